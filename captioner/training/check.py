"""main.py --check: every stage of a run once, on the real inputs, and what the whole run will take.

The trial is the run itself, with few frames and steps and in a temporary folder: the labels are read and captioned, a
hundred images decoded, the model loaded; steps, a validation, a checkpoint, captions and their scores follow.
"""

import dataclasses
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from captioner.data.captions import read_captions
from captioner.data.images import find_image_folder, index_images
from captioner.runtime.errors import UserError
from captioner.runtime.files import measure_free
from captioner.runtime.machine import pick_store_gib
from captioner.training.plain import PlainWay
from config import TrainConfig

FRAMES = 100  # of the trial
STEPS = 3  # of it; the first records and warms up, the last is timed
CHECKPOINTS = 3  # that lie on the disk at once: the newest, the one before and the best


class Stopwatch:
    """A way to train (see PlainWay) that notes how long each of its methods takes."""

    def __init__(self, way: PlainWay, checkpoints: Path):
        self.way, self.checkpoints = way, checkpoints
        self.seconds: Counter[str] = Counter()
        self.features: torch.Tensor | None = None
        self.checkpoint_bytes = self.resident_bytes = 0

    def __getattr__(self, name: str):
        method = getattr(self.way, name)

        def timed(*args):
            start = time.perf_counter()
            result = method(*args)
            self.seconds[name] += time.perf_counter() - start
            return result

        return timed

    def encode_images(self, *args):
        start = time.perf_counter()
        splits, self.features = self.way.encode_images(*args)
        self.seconds["encode_images"] += time.perf_counter() - start
        return splits, self.features

    def finish(self) -> None:
        """Called when the last checkpoint is written."""
        sizes = Counter()
        for file in self.checkpoints.glob("checkpoint-*/*"):
            sizes[file.parent] += file.stat().st_size
        self.checkpoint_bytes = max(sizes.values(), default=0)
        self.resident_bytes = psutil.Process().memory_info().rss
        self.way.finish()


class Estimate(NamedTuple):
    """What a whole run takes."""

    frames: dict[str, int]  # of each split
    steps: int
    stages: dict[str, float]  # seconds
    memory_bytes: int  # of the GPU at the most or, without one, of the process after training
    stored_bytes: int  # of the ViT's outputs of all images trained on, in memory; 0: they are not kept
    disk_bytes: int  # of checkpoints and adapter


def check_run(config: TrainConfig, train: Callable, choose_way: Callable[..., PlainWay]) -> None:
    """Have train(config, choose_way) go through a trial of the run, and print what the whole run will take.

    Nothing is written into the output folder. Raises what the run would raise, and UserError under a launcher.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--check: is for one process; start it with python main.py, without a launcher")
    with tempfile.TemporaryDirectory(prefix="check-") as name:
        folder, watches = Path(name), []

        def choose(trial: TrainConfig, model_config, device: torch.device) -> Stopwatch:
            share = min(1.0, FRAMES / max(1, count_frames(config, trial)))
            limit = pick_store_gib(config.fast.vision_store_gib, device.type == "cuda") * share  # as for all images
            trial = dataclasses.replace(trial, fast=dataclasses.replace(trial.fast, vision_store_gib=limit))
            watches.append(Stopwatch(choose_way(trial, model_config, device), trial.run.output / "checkpoints"))
            return watches[0]

        trial = make_trial(config, folder)
        print(f"check: a trial of {STEPS} steps with {FRAMES} frames, in a temporary folder")
        train(trial, choose)
        estimate = estimate_run(config, trial, watches[0])
    report_estimate(config, estimate)


def make_trial(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings of the trial: those of the run, but for its length and for where it writes."""
    few = min(FRAMES, config.data.limit or FRAMES)
    return dataclasses.replace(
        config,
        # not all of the val labels as a test split, whose images would all be decoded
        data=dataclasses.replace(config.data, captions=folder / "captions.csv", limit=few, held_out="rides"),
        training=dataclasses.replace(config.training, max_steps=STEPS),
        run=dataclasses.replace(
            config.run,
            output=folder / "adapter",
            run_name=str(folder / "logs"),
            resume=False,
            overwrite=False,
            merge=False,
            push_to_hub=None,
            logging_steps=1,
            val_captions=1,
            wandb="disabled",
        ),
        fast=dataclasses.replace(config.fast, vision_store="off"),
    )


def count_frames(config: TrainConfig, trial: TrainConfig) -> int:
    """How many captioned frames have an image, up to --limit."""
    images = index_images(find_image_folder(config))
    count = sum(name in images for name in read_captions(trial.data.captions))
    return min(count, config.data.limit or count)


def estimate_run(config: TrainConfig, trial: TrainConfig, watch: Stopwatch) -> Estimate:
    """What the whole run takes, by what the trial took."""
    frames, data, training = count_frames(config, trial), config.data, config.training
    shares = {"train": data.train_share, "val": data.val_share}
    if data.held_out == "rides":
        shares["test"] = 1 - sum(shares.values())
    else:
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    counts = {split: round(share * frames) for split, share in shares.items()}
    steps_an_epoch = math.ceil(counts["train"] / training.train_batch_size)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_an_epoch)
    epochs = math.ceil(steps / steps_an_epoch)

    log = [json.loads(line) for line in (trial.run.output.parent / "logs/metrics.jsonl").read_text().splitlines()]
    speeds = [record["samples_per_second"] for record in log if "samples_per_second" in record]
    validated = [record["eval_samples_per_second"] for record in log if "eval_samples_per_second" in record]
    scale = max(1.0, frames / trial.data.limit)
    stages = {
        "images decoded": watch.seconds["check_images"] * scale,
        "images encoded": watch.seconds["encode_images"] * scale if watch.features is not None else 0.0,
        "training": steps * training.train_batch_size / speeds[-1],
        "validation": epochs * counts["val"] / validated[-1],
    }
    run = json.loads((trial.run.output / "run.json").read_text())
    memory = run["results"].get("peak_memory_gib", watch.resident_bytes / 2**30) * 2**30
    stored = 0
    if watch.features is not None:
        stored = round(watch.features[0].nbytes * (counts["train"] + counts["val"]))
    adapter = sum(file.stat().st_size for file in trial.run.output.iterdir() if file.is_file())
    return Estimate(counts, steps, stages, round(memory), stored, CHECKPOINTS * watch.checkpoint_bytes + adapter)


def report_estimate(config: TrainConfig, estimate: Estimate) -> None:
    """Print the estimate, and what of it this machine lacks."""
    hours = sum(estimate.stages.values()) / 3600
    parts = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in estimate.stages.items() if seconds)
    print("\ncheck: every stage works; the whole run will take, by this trial:")
    print(f"  frames   {', '.join(f'{count:,} {split}' for split, count in estimate.frames.items())}")
    print(f"  time     {hours:.2f} hours for {estimate.steps:,} steps (minutes: {parts}), the model's loading beside")
    print(f"  memory   {estimate.memory_bytes / 2**30:.1f} GiB, on {name_memory()}")
    if estimate.stored_bytes:
        print(f"  stored   the ViT's outputs of each image, {estimate.stored_bytes / 2**30:.1f} GiB of memory")
    else:
        print("  stored   no outputs of the ViT: each image is decoded and encoded in each epoch")
    print(f"  disk     {estimate.disk_bytes / 1e6:,.0f} MB of checkpoints and adapter in {config.run.output}")
    output = config.run.output.absolute()
    free = measure_free(next(parent for parent in (output, *output.parents) if parent.exists()))
    if free is not None and free < estimate.disk_bytes:
        print(f"  but only {free / 1e6:,.0f} MB are free there: make room, or name another --output")


def name_memory() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
