"""Training and captioning by several GPUs of a machine, each beside one GPU of the same machine in the same run.

    python -m benchmarks.several_gpus --folder FOLDER                  # two GPUs; some 25 GB of disk, ten minutes
    python -m benchmarks.several_gpus --folder FOLDER --record         # and put the table into benchmarks/RESULTS.md
    python -m benchmarks.several_gpus --folder FOLDER --parts nf4 --processes 2 4   # one part, by two GPUs and by four

FOLDER gets the full-size model with random weights and the images of benchmarks.gpu. What is timed are main.py and
eval.py themselves, started by accelerate launch.

Parts: `nf4` and `bf16` train with 64 frames a step, each process with a whole model, beside each GPU alone; `fsdp`
trains in bf16 with the weights spread by fsdp.yaml; `captions` captions 3,072 images; `losses` compares the losses of
the first 20 steps, all dropouts being 0, since processes draw other random numbers than one.
"""

import argparse
import collections
import csv
import itertools
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import caption, prepare, train
from benchmarks.results import record

PARTS = ("nf4", "captions", "losses", "bf16", "fsdp")  # in the order of what matters most
TITLE = "Several GPUs"
SECONDS = 200  # of one start of main.py or eval.py, after which it counts as hung
LOSSES = 20  # steps whose losses are compared
CAPTIONING, LATER = "captioning, sampled", "captioning, after the first batches"
NF4, BF16, FSDP = "training, NF4", "training, bf16", "training, bf16, FSDP"
ADAPTER = "several-nf4-1"  # of the part nf4; it is captioned with
NO_DROPOUT = {
    "vision_config": {"attention_dropout": 0.0},
    "qformer_config": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "text_config": {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
}


class Row(NamedTuple):
    what: str
    processes: int
    value: float
    unit: str
    peak_gib: float = math.nan  # of the first GPU
    beside: str | None = None  # it is compared with the rows of one process that have the same here


# --------------------------------------------------------------------------------------------------------------
# what is run


def launch(processes: int, config: str | None = None, gpu: int = 0) -> tuple[str, ...]:
    """The words before the script: several processes by accelerate launch, ended when they take too long.

    One process has the GPU of number `gpu` among those that can be seen.
    """
    words = ("timeout", "--kill-after", "45", str(SECONDS), sys.executable)
    if processes == 1:
        numbers = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpu + 1)))).split(",")
        return ("env", f"CUDA_VISIBLE_DEVICES={numbers[gpu] if gpu < len(numbers) else ''}", *words)
    how = ("--config_file", config) if config else ("--multi_gpu",)
    words += ("-m", "accelerate.commands.launch", *how, "--num_processes", str(processes))
    return (*words, "--num_machines", "1", "--main_process_port", "0")


def list_flags(args, *more) -> list:
    """Of main.py: epochs of `steps` steps and a little more, with little validation."""
    frames = min(args.frames, int(1.25 * args.steps * args.batch_size))
    flags = ["--train-batch-size", args.batch_size, "--limit", frames, "--train-share", 0.9, "--val-share", 0.05]
    return [*flags, "--val-captions", 0, *more]


def list_timed_flags(args, *more) -> list:
    """In the first epoch of three the GPU's launches are recorded; the median leaves it out."""
    return list_flags(args, "--num-train-epochs", 3, "--logging-steps", 9, *more)


def measure_training(args, what: str, name: str, *flags) -> Iterator[Row]:
    """Of each GPU alone, as they differ, and then of several."""
    flags = list_timed_flags(args, *flags)
    for gpu in reversed(range(max(args.processes))):  # what the first leaves is captioned with
        done = train(args, f"several-{name}-1", *flags, launcher=launch(1, gpu=gpu))
        yield Row(f"{what}, GPU {gpu} alone", 1, done.samples_per_second, "samples/s", done.peak_gib, what)
    for processes in args.processes:
        done = train(args, f"several-{name}-{processes}", *flags, launcher=launch(processes))
        yield Row(what, processes, done.samples_per_second, "samples/s", done.peak_gib, what)


def measure_nf4(args) -> Iterator[Row]:
    yield from measure_training(args, NF4, "nf4")


def measure_bf16(args) -> Iterator[Row]:
    yield from measure_training(args, BF16, "bf16", "--no-load-in-4bit")


def measure_fsdp(args) -> Iterator[Row]:
    """Beside one process that needs no FSDP."""
    for processes in args.processes:
        launcher = launch(processes, "captioner/training/fsdp.yaml")
        done = train(args, "several-fsdp", *list_timed_flags(args, "--no-load-in-4bit"), launcher=launcher)
        yield Row(FSDP, processes, done.samples_per_second, "samples/s", done.peak_gib, BF16)


def measure_captions(args) -> Iterator[Row]:
    """The pace of all, and of those after each process's first batch, in which the GPU's launches are recorded.

    Of one process before and after the others: what comes first on a machine is slower.
    """
    if not (args.folder / ADAPTER / "run.json").is_file():
        train(args, ADAPTER, *list_flags(args, "--max-steps", 1), launcher=launch(1))
    write_test_split(args)
    for processes in (1, *args.processes, 1):
        flags = ("--num-samples", "all", "--features", "off")  # all processes have all of it to do
        done = caption(args, ADAPTER, *flags, launcher=launch(processes))
        yield Row(CAPTIONING, processes, done.captions_per_second, "captions/s", done.peak_gib, CAPTIONING)
        if not math.isnan(done.later):
            yield Row(LATER, processes, done.later, "captions/s", math.nan, LATER)


def write_test_split(args) -> None:
    """Make all images the test split of the adapter."""
    with open(args.folder / "captions.csv", encoding="utf-8", newline="") as file:
        texts = {row["name"]: row["raw_caption"] for row in itertools.islice(csv.DictReader(file), args.frames)}
    with open(args.folder / ADAPTER / "split.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "split", "image", "raw_caption"))
        writer.writerows((name, "test", args.folder / "images" / name, text) for name, text in texts.items())


def measure_losses(args) -> Iterator[Row]:
    still = argparse.Namespace(**vars(args) | {"model": copy_without_dropout(args.model, args.folder / "still")})
    losses = {}
    for processes in (1, *args.processes):
        steps = min(args.steps, LOSSES)  # within the first epoch, at whose end one process has fewer frames in a step
        flags = list_flags(args, "--max-steps", steps, "--logging-steps", 1, "--lora-dropout", 0)
        done = train(still, f"several-losses-{processes}", *flags, launcher=launch(processes))
        losses[processes] = done.losses
        yield Row(f"loss of step {len(done.losses)}, no dropout", processes, done.losses[-1], "nats a token")
    (args.folder / "losses.json").write_text(json.dumps(losses))
    one = losses[1]
    for processes in args.processes:
        differences = [abs(a - b) for a, b in zip(one, losses[processes], strict=True)]
        what = f"largest difference from one process in {len(one)} losses"
        yield Row(what, processes, max(differences), "nats a token")


def copy_without_dropout(model: Path, folder: Path) -> Path:
    """A model folder with the same files but for its config.json; weights are hard links where that is possible."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = os.link if model.stat().st_dev == folder.stat().st_dev else shutil.copy
    for file in model.iterdir():
        if file.name != "config.json":
            place(file, folder / file.name)
    config = json.loads((model / "config.json").read_text())
    for part, dropouts in NO_DROPOUT.items():
        config[part] |= dropouts
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for model, images and results")
    parser.add_argument("--model", type=Path, help="another BLIP-2; none: one of full size is made in FOLDER")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="numbers of GPUs, each with a process")
    parser.add_argument("--frames", type=int, default=3072, help="images that are captioned")
    parser.add_argument("--batch-size", type=int, default=64, help="frames an optimiser step, over all GPUs")
    parser.add_argument("--steps", type=int, default=24, help="of each epoch of training, at least")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    if min(args.processes) < 2:
        parser.error("--processes: 2 or more; one GPU is measured beside them anyway")
    args.folder = args.folder.resolve()
    args.model = (args.model or args.folder / "model").resolve()
    prepare(args)

    rows, failed = [], []
    for part in args.parts:
        try:
            for row in globals()[f"measure_{part}"](args):
                rows.append(row)
                print(f"{row.what}, {row.processes} processes: {row.value:.6g} {row.unit}", flush=True)
        except SystemExit as error:  # the machine's time is dear: the other parts go on
            print(error, flush=True)
            failed.append(part)
        if args.record and rows:
            device = name_gpus()
            record(TITLE, make_table(rows), packages=["torch", "transformers", "peft", "accelerate"], device=device)
    print(make_table(rows))
    if failed:
        sys.exit(f"these parts failed: {', '.join(failed)}")


def name_gpus() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def make_table(rows: list[Row]) -> str:
    """Efficiency is the pace of N processes : (N x that of one, of the mean of these GPUs alone; of all if N is 1)."""
    lines = [
        "| what | processes | measured | | peak GiB of the first GPU | efficiency |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    ones = collections.defaultdict(list)
    for row in rows:
        if row.processes == 1 and row.beside:
            ones[row.beside].append(row.value)
    for row in rows:
        value = f"{row.value:,.1f}" if row.beside else f"{row.value:.6f}"
        peak = "" if math.isnan(row.peak_gib) else f"{row.peak_gib:.2f}"
        alone = ones[row.beside][-row.processes if row.processes > 1 else 0 :]  # the first GPU comes last
        share = f"{row.value / (row.processes * statistics.mean(alone)):.3f}" if alone else ""
        lines.append(f"| {row.what} | {row.processes} | {value} | {row.unit} | {peak} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
