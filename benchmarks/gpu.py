"""The whole job on a GPU at full size, beside the reference's configuration, one process after the other.

    python -m benchmarks.gpu --folder FOLDER             # some 25 GB of disk, ten minutes on an H100
    python -m benchmarks.gpu --folder FOLDER --record    # and put the tables into benchmarks/RESULTS.md
    python -m benchmarks.gpu --folder FOLDER --parts job # one part

FOLDER gets a BLIP-2 OPT-2.7B with random weights (benchmarks.full_size) and 10,000 JPEGs of 1280 x 720 whose captions
are as long as BDD100K's. What is timed are main.py and eval.py themselves, started as a user starts them.

Parts: `floor` times the matrix products that training can't do without; `step` one pass of loss and gradients; `job`
trains on 6,000 frames for 5 epochs with validation on 2,800 after each, and captions and scores the 1,200 of the test
split; `reference` trains and captions as the reference does; `small` trains and captions with all but 4 GiB of the GPU
taken; `batch` trains at a larger batch. If they are asked for, `t4` trains as a T4 would (benchmarks.t4), in the plain
and in the fast way, and captions what it trained on, `t4-job` does what the notebook does there, with few frames, and
`sizes` times passes of other numbers of positions.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from benchmarks.notebook import read_flags
from benchmarks.peaks import Peak, measure_folder, measure_processes
from benchmarks.results import record
from captioner.bdd100k.frames import read_frame
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.wording import describe
from demo.draw import draw_scene, list_labels, name_image, sample_scene

ROOT = Path(__file__).parent.parent
IMAGES, SIZE, QUALITY = 200, (1280, 720), 90  # that are drawn; frames beyond show them again
SCENES_A_FRAME = 4  # at most, whose labels a frame has
REFERENCE_LENGTH = 114  # positions to which the reference pads
REFERENCE_STEPS, REFERENCE_WARMUP = 12, 3  # that are trained as the reference does, and those of them left out
REFERENCE_CAPTIONS = 4
NEW_TOKENS = 75  # of a caption: a model with random weights writes on to the last
SIZES = {8: range(904, 968, 8), 16: range(1840, 1912, 8), 32: range(3704, 3776, 8), 64: range(7440, 7520, 8)}  # by rows
FILLED = 16  # positions behind the rows
PARTS = ("floor", "step", "job", "greedy", "reference", "small", "batch")
TITLE = "Training and captioning on a GPU"
TRAINING, REFERENCE_TRAINING = "training, 16 a step", "reference: training, 4 x 4, Q-Former only, truncated"
CAPTIONING, REFERENCE_CAPTIONING = "captioning, sampled", "reference: captioning one by one, sampled"
LARGE_BATCH = 128
T4_STEPS = 40
T4_JOB_FRAMES, T4_CORES = 1200, 2  # of the part `t4-job`; cores as Colab has them
STEP_POSITIONS = 128  # of a row in the part `step`
LARGE_TRAINING = f"training, {LARGE_BATCH} a step"
FLOOR = "floor of training, {} a step"
RATIOS = (
    (TRAINING, REFERENCE_TRAINING),
    (CAPTIONING, REFERENCE_CAPTIONING),
    (TRAINING, FLOOR.format(16)),
    (LARGE_TRAINING, FLOOR.format(LARGE_BATCH)),
)


# --------------------------------------------------------------------------------------------------------------
# data


def make_data(folder: Path, frames: int) -> None:
    """labels.json and images/ in 2018 layout."""
    if (folder / "labels.json").is_file():
        return
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for seed in range(min(IMAGES, frames)):
        drawn.append(folder / f"drawn{seed}.jpg")
        draw_scene(seed)[0].resize(SIZE).save(drawn[-1], quality=QUALITY)
    bodies = [make_labels(index) for index in range(min(IMAGES, frames))]
    labels = []
    for index in range(frames):
        labels.append({"name": name_image(index), **bodies[index % len(bodies)]})
        image = drawn[index % len(drawn)].read_bytes()  # what follows its end makes a file of its own of it
        (images / name_image(index)).write_bytes(image + index.to_bytes(8))
    (folder / "labels.json").write_text(json.dumps(labels))


def make_labels(index: int) -> dict:
    """A frame without its name: the labels of one to four drawn scenes, for captions of 84 tokens on average.

    The plain captions of BDD100K's val labels have 83 (measured with OPT's tokenizer).
    """
    rng = random.Random(index)
    scenes = [sample_scene(SCENES_A_FRAME * index + i) for i in range(1 + index % SCENES_A_FRAME)]
    things = list(itertools.chain.from_iterable(map(list_labels, scenes)))
    for thing in things:
        thing.setdefault("attributes", {}).update(occluded=rng.random() < 0.3, truncated=rng.random() < 0.1)
    attributes = {"weather": scenes[0].weather, "scene": scenes[0].place, "timeofday": scenes[0].time}
    return {"attributes": attributes, "timestamp": 10000, "labels": things}


# --------------------------------------------------------------------------------------------------------------
# ours


@dataclasses.dataclass
class Training:
    """What a run of main.py says of itself."""

    seconds: float
    samples_per_second: float  # median of what was logged after the first half of the steps
    peak_gib: float
    losses: list[float]
    output: str


def run(
    script: str,
    *flags,
    free_gib: float | None = None,
    as_t4: bool = False,
    launcher: tuple[str, ...] = (sys.executable,),
) -> tuple[float, str]:
    """(wall seconds, what it printed, each line with its second) of a script, started by the words of `launcher`.

    `free_gib` is the GPU memory that the script finds free. With `as_t4` it takes the GPU for a T4.
    """
    command = [*launcher, script, *map(str, flags)]
    if free_gib is not None:
        then = "--then-as-t4" if as_t4 else "--then"
        command = [sys.executable, "-m", "benchmarks.gpu", "--leave", str(free_gib), then, *command[1:]]
    start = time.perf_counter()
    lines = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, text=True, errors="replace", env=set_environment(), **pipes) as process:
        for line in process.stdout:
            lines.append(f"{time.perf_counter() - start:7.1f}  {line}")
    seconds, text = time.perf_counter() - start, "".join(lines)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{text[-3000:]}")
    return seconds, text


def set_environment() -> dict[str, str]:
    """The environment of a script that is measured: Python keeps its bytecode, else imports take twice as long."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONUNBUFFERED": "1"}


def prepare(args) -> None:
    """Data, model and captions in args.folder, as far as they are not there; and packages compiled, as pip does it."""
    subprocess.run([sys.executable, "-c", "import main, eval"], cwd=ROOT, check=True, env=set_environment())
    make_data(args.folder, args.frames)
    if not (args.model / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "benchmarks.full_size", str(args.model)], cwd=ROOT, check=True)
    if not (args.folder / "captions.csv").is_file():
        flags = ("--labels", args.folder / "labels.json", "--output", args.folder / "captions.csv")
        run("bdd100k_data_pipeline.py", *flags)


def train(args, name: str, *flags, **options) -> Training:
    logs, output = ROOT / "logs" / f"benchmark-{name}", args.folder / name
    for old in (logs, output):
        shutil.rmtree(old, ignore_errors=True)
    data = ("--labels", args.folder / "labels.json", "--images", args.folder / "images", "--model", args.model)
    places = ("--output", output, "--run-name", logs.name)
    seconds, text = run("main.py", *data, *places, "--wandb", "disabled", *flags, **options)
    (args.folder / f"{name}.log").write_text(text)
    records = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    pace = [record["samples_per_second"] for record in records if "samples_per_second" in record]
    peaks = [record["peak_memory_gib"] for record in records if "peak_memory_gib" in record]
    losses = [record["loss"] for record in records if "loss" in record]
    shutil.rmtree(logs)
    return Training(seconds, statistics.median(pace[len(pace) // 2 :]), max(peaks, default=math.nan), losses, text)


@dataclasses.dataclass
class Captioning:
    """What a run of eval.py says of itself."""

    seconds: float
    captions_per_second: float  # while it captions
    later: float  # the same after the first batch of each process, nan if there is no second
    peak_gib: float


def caption(args, name: str, *flags, **options) -> Captioning:
    logs = ROOT / "logs" / "benchmark-eval"
    shutil.rmtree(logs, ignore_errors=True)
    flags = ("--adapter", args.folder / name, "--max-new-tokens", NEW_TOKENS, "--run-name", logs.name, *flags)
    seconds, text = run("eval.py", *flags, **options)
    (args.folder / f"{name}-eval.log").write_text(text)
    shutil.rmtree(logs)
    pace = re.search(r"captions in .* s, ([\d.]+) a second(?: \(([\d.]+) after .*?\))?(?:, ([\d.]+) GiB)?", text)
    return Captioning(seconds, *(float(figure or "nan") for figure in pace.groups()))


def measure_job(args) -> Iterator[tuple]:
    shutil.rmtree(find_features(args), ignore_errors=True)  # nothing that an earlier run has left
    job = train(args, "job", "--num-train-epochs", args.epochs, "--features", find_features(args))
    yield TRAINING, job.samples_per_second, "samples/s", job.peak_gib
    yield f"main.py: {args.frames:,} frames, {args.epochs} epochs", job.seconds, "s", math.nan
    drawn = caption(args, "job", "--num-samples", "all", "--features", find_features(args))
    yield "eval.py: captions of the test split and all scores", drawn.seconds, "s", math.nan
    yield "whole job", job.seconds + drawn.seconds, "s", math.nan
    yield from list_paces(CAPTIONING, drawn)


def measure_greedy(args) -> Iterator[tuple]:
    """Greedy captions by the adapter that the part job has trained."""
    done = caption(args, "job", "--num-samples", "all", "--greedy", "--features", find_features(args))
    yield from list_paces("captioning, greedy", done)


def find_features(args) -> Path:
    return args.folder / "job-features"


def list_paces(what: str, done: Captioning) -> Iterator[tuple]:
    yield what, done.captions_per_second, "captions/s", done.peak_gib
    if not math.isnan(done.later):
        yield f"{what}, after the first batch", done.later, "captions/s", math.nan


def measure_batch(args) -> Iterator[tuple]:
    """Two epochs, in the first of which the GPU's launches are recorded."""
    flags = ("--train-batch-size", LARGE_BATCH, "--num-train-epochs", 2, "--logging-steps", 8, "--val-captions", 0)
    run = train(args, "batch", *flags)
    yield LARGE_TRAINING, run.samples_per_second, "samples/s", run.peak_gib


def measure_small(args) -> Iterator[tuple]:
    flags = ("--per-device-train-batch-size", 4, "--per-device-eval-batch-size", 4, "--gradient-checkpointing")
    flags = (*flags, "--max-steps", 24, "--logging-steps", 2, "--limit", 300, "--val-captions", 0)
    run = train(args, "small", *flags, free_gib=args.small_gib)
    yield f"training, 4 x 4, {args.small_gib:g} GiB free", run.samples_per_second, "samples/s", run.peak_gib
    done = caption(args, "small", "--num-samples", 24, "--batch-size", 4, free_gib=args.small_gib)
    yield from list_paces(f"captioning 4 at a time, {args.small_gib:g} GiB free", done)


def measure_t4(args) -> Iterator[tuple]:
    """Losses of the same frames in the same order, the pace with frames dealt out by length, and captions of these."""
    flags = ("--max-steps", T4_STEPS, "--logging-steps", 1, "--limit", 1200, "--val-captions", 0)
    from benchmarks import t4

    options = {"free_gib": t4.FREE_GIB, "as_t4": True}
    plain = train(args, "t4-plain", *flags, "--length-window", 0, "--fast", "off", **options)
    yield "as a T4: training, plain", plain.samples_per_second, "samples/s", plain.peak_gib
    fast = train(args, "t4-same", *flags, "--length-window", 0, **options)
    far = max(abs(ours / theirs - 1) for ours, theirs in zip(fast.losses, plain.losses, strict=True))
    yield f"as a T4: farthest of {len(fast.losses)} losses from the plain way's", 100 * far, "%", math.nan
    fast = train(args, "t4", *flags, **options)
    yield "as a T4: training", fast.samples_per_second, "samples/s", fast.peak_gib
    captioned = caption(args, "t4", "--split", "train", "--num-samples", "all", "--greedy", **options)
    yield from list_paces("as a T4: captioning, greedy", captioned)


def measure_t4_job(args) -> Iterator[tuple]:
    """The notebook's main.py and eval.py, with few frames and cores, from empty folders."""
    from benchmarks import t4

    output, kept = args.folder / "t4-job", args.folder / "t4-job-features"
    shutil.rmtree(kept, ignore_errors=True)
    options, features = {"free_gib": t4.FREE_GIB, "as_t4": True}, ("--features", kept)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:T4_CORES])  # the scripts inherit it
    with Peak(measure_processes) as memory, Peak(lambda: measure_folder(output)) as disk:
        limit = ("--limit", T4_JOB_FRAMES)
        trained = train(args, output.name, *limit, *features, *read_flags("main.py"), **options)
    with Peak(measure_processes) as later_memory:
        captioned = caption(args, output.name, *features, *read_flags("eval.py"), **options)
    os.sched_setaffinity(0, cores)
    what = f"as a T4 with {T4_CORES} cores, {T4_JOB_FRAMES:,} frames: "
    yield f"{what}main.py", trained.seconds, "s", math.nan
    yield f"{what}training", trained.samples_per_second, "samples/s", trained.peak_gib
    yield f"{what}eval.py", captioned.seconds, "s", math.nan
    yield from list_paces(f"{what}captioning", captioned)
    yield f"{what}memory of main.py", memory.most / 2**30, "GiB", math.nan
    yield f"{what}memory of eval.py", later_memory.most / 2**30, "GiB", math.nan
    yield f"{what}disk of the output folder, at the most", disk.most / 1e9, "GB", math.nan
    yield f"{what}disk of the output folder, in the end", measure_folder(output) / 1e9, "GB", math.nan
    yield f"{what}disk of the ViT's kept outputs", measure_folder(kept) / 1e9, "GB", math.nan


def leave(free_gib: float, script: list[str], as_t4: bool) -> None:
    """Take the GPU's memory but for `free_gib`, then run the script in this process."""
    import torch

    if as_t4:
        from benchmarks import t4

        t4.pretend()

    torch.cuda.init()
    ballast = torch.empty(int(torch.cuda.mem_get_info()[0] - free_gib * 2**30), dtype=torch.uint8, device="cuda")
    taken = torch.cuda.memory_allocated()
    peak = torch.cuda.max_memory_allocated
    torch.cuda.max_memory_allocated = lambda *args: peak(*args) - taken
    sys.path.insert(0, str(ROOT))
    sys.argv = script
    runpy.run_path(script[0], run_name="__main__")
    del ballast


# --------------------------------------------------------------------------------------------------------------
# the reference's configuration


def measure_reference(args) -> Iterator[tuple]:
    """NF4 and fp16, LoRA on the Q-Former, 4 x 4 frames a step, each decoded and padded anew; captions one by one."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--as-reference", "--folder", str(args.folder)]
    done = subprocess.run([*command, "--model", str(args.model)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the reference's configuration: {done.stderr[-3000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    yield REFERENCE_TRAINING, figures["samples"], "samples/s", figures["peak"]
    yield REFERENCE_CAPTIONING, figures["captions"], "captions/s", math.nan


def run_as_reference(args) -> None:
    """Train and caption as the reference does, in this process, and print the figures as a line of JSON."""
    import torch

    from captioner.blip2.loading import load_processor

    processor, model = load_processor(args.model), load_as_reference(args.model)
    frames = json.loads((args.folder / "labels.json").read_text())[: 16 * REFERENCE_STEPS]
    samples = train_as_reference(model, processor, frames, args.folder)
    peak = torch.cuda.max_memory_allocated() / 2**30
    images = [args.folder / "images" / frame["name"] for frame in frames[:REFERENCE_CAPTIONS]]
    captions = caption_as_reference(model, processor, images)
    print(json.dumps({"samples": samples, "peak": peak, "captions": captions}))


def load_as_reference(source: Path):
    """The model in NF4 and fp16, with LoRA on the Q-Former."""
    import torch
    from transformers import BitsAndBytesConfig, Blip2ForConditionalGeneration

    from captioner.blip2.lora import add_lora

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )
    place = {"": 0 if torch.cuda.is_available() else "cpu"}
    model = Blip2ForConditionalGeneration.from_pretrained(
        source, quantization_config=quantization, dtype=torch.float16, device_map=place
    )
    return add_lora(model.requires_grad_(False), "qformer", 16, 32, 0.05)


class ReferenceFrames:
    """A data set of frames, each decoded, described and padded anew whenever it is asked for."""

    def __init__(self, frames: list[dict], images: Path, processor):
        self.frames, self.images, self.processor = frames, images, processor

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict:
        image = Image.open(self.images / self.frames[index]["name"]).convert("RGB")
        text = describe(read_frame(self.frames[index], LabelReport()).facts)
        options = {"padding": "max_length", "truncation": True, "max_length": REFERENCE_LENGTH}
        row = self.processor(images=image, text=text, return_tensors="pt", **options)
        row = {name: value[0] for name, value in row.items()}
        return row | {"labels": row["input_ids"].clone()}


def train_as_reference(model, processor, frames: list[dict], folder: Path) -> float:
    """Samples a second of REFERENCE_STEPS steps of 4 x 4 frames, the first REFERENCE_WARMUP of them left out."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "reference"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=REFERENCE_STEPS,
        learning_rate=5e-5,
        fp16=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    data = ReferenceFrames(frames, folder / "images", processor)
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return 16 * (REFERENCE_STEPS - REFERENCE_WARMUP) / (marks[-1] - marks[REFERENCE_WARMUP - 1])


def caption_as_reference(model, processor, images: list[Path]) -> float:
    """Captions a second, one by one, sampled."""
    import torch

    model.eval()
    start = time.perf_counter()
    for image in images:
        inputs = processor(images=Image.open(image), return_tensors="pt").to(model.device, torch.float16)
        with torch.autocast(model.device.type, torch.float16):
            model.generate(
                **inputs, do_sample=True, temperature=0.7, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
            )
    return len(images) / (time.perf_counter() - start)


# --------------------------------------------------------------------------------------------------------------
# a pass and the floor


def measure_step(args) -> Iterator[tuple]:
    """A pass of speed.FastStep, recorded, in bf16 over rows of STEP_POSITIONS positions, ViT left out."""
    model = make_trainable()
    for rows in (16, 64, LARGE_BATCH):
        [(seconds, peak)] = time_passes(model, rows, [rows * STEP_POSITIONS + FILLED])
        yield f"a pass, {rows} x {STEP_POSITIONS}", rows / seconds, "samples/s", peak


def measure_sizes(args) -> Iterator[tuple]:
    """The same of about as many positions as passes of main.py have here, to see for which cuBLAS is fast."""
    model = make_trainable()
    for rows, sizes in SIZES.items():
        for positions, (seconds, peak) in zip(sizes, time_passes(model, rows, sizes), strict=True):
            yield f"a pass, {rows} rows, {positions:,} positions", 1e3 * seconds, "ms", peak


def make_trainable():
    import torch
    from transformers import Blip2ForConditionalGeneration

    from benchmarks.full_size import build_full_size_config
    from captioner.blip2.lora import add_lora
    from captioner.blip2.vit import take_vision_out
    from captioner.fast.speed import join_weights

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Blip2ForConditionalGeneration(build_full_size_config()).to(torch.bfloat16).requires_grad_(False)
    take_vision_out(model)
    model = add_lora(model, "both", 16, 32, 0.05).train()
    join_weights(model)
    return model


def time_passes(model, rows: int, sizes: Iterable[int]) -> Iterator[tuple[float, float]]:
    """(seconds, peak GiB) of a recorded pass over `rows` rows, for each of some sizes in positions together."""
    import torch
    import torch.nn.functional as F
    from accelerate.utils import send_to_device

    from captioner.blip2.batches import IGNORED
    from captioner.fast.packing import PackedCollator
    from captioner.fast.speed import FastStep

    config = model.get_base_model().config
    collate, step = PackedCollator(config), FastStep(model, cuda_graphs=True)
    for size in sizes:
        vision = torch.randn(rows, 257, config.vision_config.hidden_size, dtype=torch.bfloat16, device="cuda")
        lengths = [(size - FILLED + row) // rows for row in range(rows)]
        ids = [torch.randint(10, 50_000, (length - config.num_query_tokens,)).tolist() for length in lengths]
        batch = collate([{"pixel_values": v, "caption_ids": i} for v, i in zip(vision, ids, strict=True)])
        for name, filler in (("input_ids", config.text_config.pad_token_id), ("labels", IGNORED)):
            batch[name] = F.pad(batch[name], (0, size - len(batch[name])), value=filler)  # or cut off
        batch["starts"][-1] = size
        batch = send_to_device(batch, "cuda")
        torch.cuda.reset_peak_memory_stats()

        def learn(batch=batch) -> None:
            step.zero_grad()
            step(batch, batch["labels"].numel())

        yield time_on_gpu(learn, repeats=10), torch.cuda.max_memory_allocated() / 2**30


def time_on_gpu(work, repeats: int) -> float:
    """Seconds of work(), the mean of `repeats` after three others."""
    import torch

    for _ in range(3):
        work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def measure_floor(args) -> Iterator[tuple]:
    """Samples a second if a training step were its large matrix products alone: those of the frozen weights of OPT, its
    head and the Q-Former, forward and for the gradient of their inputs, in bf16, with the ViT's output stored."""
    import torch

    from captioner.blip2.batches import tokenize_captions
    from captioner.blip2.loading import load_processor
    from captioner.data.caption_files import read_captions
    from captioner.fast.speed import record_graph

    texts = read_captions(args.folder / "captions.csv")["caption"][:1000]
    processor = load_processor(args.model)
    lengths = list(map(len, tokenize_captions(list(texts), processor, 256, 0)))
    tokens = statistics.mean(lengths)
    print(f"captions have {tokens:.1f} tokens on average, {max(lengths)} at most")

    def seconds(rows: int, inner: int, outer: int, backward: bool = True) -> float:
        weights = [torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        gradient = torch.randn(rows, outer, device="cuda", dtype=torch.bfloat16)

        def work():
            for weight in weights:
                torch.nn.functional.linear(x, weight)
                if backward:
                    gradient @ weight

        work()
        graph, _ = record_graph(work)  # else small ones would wait for their launch
        return time_on_gpu(graph.replay, repeats=20) / len(weights)

    shapes = (2560, 7680), (2560, 2560), (2560, 10240), (10240, 2560)
    for batch in (16, 64, LARGE_BATCH):
        rows, queries, seen = round(batch * (32 + tokens)), batch * 32, batch * 257
        layer = sum(seconds(rows, *shape) for shape in shapes)
        # behind its attention the last layer is needed only where a token is predicted
        last = seconds(rows, *shapes[0]) + sum(seconds(round(batch * tokens), *shape) for shape in shapes[1:])
        head = seconds(round(batch * tokens), 2560, 50304)
        qformer = 12 * sum(seconds(queries, *shape) for shape in ((768, 2304), (768, 768), (768, 3072), (3072, 768)))
        qformer += 6 * (2 * seconds(queries, 768, 768) + seconds(seen, 1408, 1536, backward=False))
        opt = 4 * rows * 78.6e6 / layer / 1e12
        print(f"batch {batch}: a layer of OPT at {opt:.0f} TFLOP/s")
        yield (
            FLOOR.format(batch),
            batch / (31 * layer + last + head + qformer),
            "samples/s",
            math.nan,
        )


# --------------------------------------------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["--leave"]:
        leave(float(sys.argv[2]), sys.argv[4:], as_t4=sys.argv[3] == "--then-as-t4")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for model, images and results")
    parser.add_argument("--model", type=Path, help="another BLIP-2; none: one of full size is made in FOLDER")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--small-gib", type=float, default=4.0, help="GPU memory left in the small setting")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "t4", "t4-job", "sizes"), default=PARTS)
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--as-reference", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    args.model = args.model or args.folder / "model"
    if args.as_reference:
        run_as_reference(args)
        return
    prepare(args)

    rows = []
    for part in args.parts:
        for row in globals()[f"measure_{part.replace('-', '_')}"](args):
            rows.append(row)
            print("{}: {:.2f} {}, peak {:.2f} GiB".format(*row), flush=True)
        if args.record:  # after each part: a later one may fail
            import torch

            device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
            record(TITLE, make_table(rows), packages=["torch", "transformers", "peft", "bitsandbytes"], device=device)
    print(make_table(rows))


def make_table(rows: list[tuple]) -> str:
    lines = ["| what | measured | | peak GiB |", "| --- | ---: | --- | ---: |"]
    for what, value, unit, peak in rows:
        lines.append(f"| {what} | {value:,.1f} | {unit} | {'' if math.isnan(peak) else f'{peak:.2f}'} |")
    figures = {what: value for what, value, *_ in rows}
    lines += [
        f"| **{ours} : {theirs}** | **{figures[ours] / figures[theirs]:,.2f}** | | |"
        for ours, theirs in RATIOS
        if ours in figures and theirs in figures
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
