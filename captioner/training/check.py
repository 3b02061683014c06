"""main.py --check: every stage of a run once, on the real inputs, and what the whole run will take.

The trial is the run itself, with few frames and steps and in a temporary folder: the labels are read and captioned, a
hundred images decoded, the model loaded; steps, a validation, a checkpoint, captions and their scores follow.
"""

import dataclasses
import functools
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from captioner.blip2.batches import Features
from captioner.data.examples import Example
from captioner.runtime.errors import UserError
from captioner.runtime.files import find_existing, measure_free
from captioner.training.plain import PlainWay, Splits
from config import FastTrainingSettings, TrainConfig

FRAMES = 100  # of the trial
STEPS = 3  # of it; the first records and warms up, the last is timed
CHECKPOINTS = 3  # that lie on the disk at once: the newest, the one before and the best


class Stopwatch:
    """A way to train (see PlainWay) with a few frames of each split, that notes how long each of its methods takes.

    `choose(share)` makes the way, which has that share of the disk for the ViT's outputs: it keeps them or not as it
    would with all frames.
    """

    def __init__(self, choose: Callable[[float], PlainWay], checkpoints: Path):
        self.choose, self.checkpoints = choose, checkpoints
        self.way: PlainWay | None = None
        self.frames: dict[str, int] = {}  # of each split of the whole run
        self.share = 1.0  # of them that are in the trial
        self.seconds: Counter[str] = Counter()
        self.features: Features | None = None
        self.checkpoint_bytes = self.resident_bytes = 0

    def __getattr__(self, name: str):
        return functools.partial(self._time, name)

    def _time(self, name: str, *args):
        start = time.perf_counter()
        try:
            return getattr(self.way, name)(*args)
        finally:
            self.seconds[name] += time.perf_counter() - start

    def check_images(self, splits: Splits, processor) -> Splits:
        """Called first, with all frames."""
        self.frames = {split: len(examples) for split, examples in splits.items()}
        total = sum(self.frames.values())
        self.share = min(1.0, FRAMES / total)
        few = {split: spread(examples, math.ceil(self.share * len(examples))) for split, examples in splits.items()}
        self.way = self.choose(self.share)
        return self._time("check_images", few, processor)

    def encode_images(self, *args):
        splits, self.features = self._time("encode_images", *args)
        return splits, self.features

    def finish(self) -> None:
        """Called when the last checkpoint is written."""
        sizes = Counter()
        for file in self.checkpoints.glob("checkpoint-*/*"):
            sizes[file.parent] += file.stat().st_size
        self.checkpoint_bytes = max(sizes.values(), default=0)
        self.resident_bytes = psutil.Process().memory_info().rss
        self.way.finish()


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of them, evenly spread."""
    return [examples[place * len(examples) // count] for place in range(count)]


class Estimate(NamedTuple):
    """What a whole run takes."""

    frames: dict[str, int]  # of each split
    steps: int
    stages: dict[str, float]  # seconds
    memory_bytes: int  # of the GPU at the most or, without one, of the process after training
    stored_bytes: int  # of the ViT's outputs of all images, on the disk; 0: they are not kept
    disk_bytes: int  # of checkpoints and adapter


def check_run(config: TrainConfig, train: Callable, choose_way: Callable[..., PlainWay]) -> None:
    """Have train(config, choose_way) go through a trial of the run, and print what the whole run will take.

    Nothing is written into the output folder. Raises what the run would raise, and UserError under a launcher.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--check: is for one process; start it with python main.py, without a launcher")
    with tempfile.TemporaryDirectory(prefix="check-") as name:
        trial, watches = make_trial(config, Path(name)), []

        def choose(trial: TrainConfig, model_config, device: torch.device) -> Stopwatch:
            def choose_for(share: float) -> PlainWay:
                fast = limit_features(config, Path(name), share, device)
                return choose_way(dataclasses.replace(trial, fast=fast), model_config, device)

            watches.append(Stopwatch(choose_for, trial.run.output / "checkpoints"))
            return watches[0]

        print(f"check: a trial of {STEPS} steps with {FRAMES} frames, in a temporary folder")
        try:
            train(trial, choose)
        except UserError as error:
            if name not in str(error):
                raise
            raise UserError(f"{error} (of the trial alone: TMPDIR=FOLDER lets it write on another disk)") from None
        estimate = estimate_run(config, trial, watches[0])
    report_estimate(config, estimate)


def make_trial(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings of the trial: those of the run, but for its length and for where it writes."""
    run = dataclasses.replace(
        config.run,
        output=folder / "adapter",
        run_name=str(folder / "logs"),
        resume=False,
        overwrite=False,
        merge=False,
        push_to_hub=None,
        push_captions=None,
        logging_steps=1,
        val_captions=1,
        wandb="disabled",
    )
    training = dataclasses.replace(config.training, max_steps=STEPS)
    return dataclasses.replace(config, run=run, training=training)


def limit_features(config: TrainConfig, folder: Path, share: float, device: torch.device) -> FastTrainingSettings:
    """The settings with which the trial keeps the ViT's outputs, in `folder`, if the run has room for them.

    `share`: of the run's images that the trial has.
    """
    fast, output = config.fast, config.run.output.absolute()
    if fast.features == "off" or (fast.features == "auto" and device.type != "cuda"):
        return fast
    places = [output, folder] if fast.features == "auto" else [fast.features.absolute()]
    disks = [find_existing(place) for place in places]
    limit = fast.features_disk_gib
    if limit is None:
        limit = max(measure_free(disk) or 0 for disk in disks) / 2 / 2**30
    return dataclasses.replace(fast, features=folder / "features", features_disk_gib=limit * share)


def estimate_run(config: TrainConfig, trial: TrainConfig, watch: Stopwatch) -> Estimate:
    """What the whole run takes, by what the trial took."""
    training, frames = config.training, watch.frames
    steps_an_epoch = math.ceil(frames["train"] / training.train_batch_size)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_an_epoch)
    epochs = math.ceil(steps / steps_an_epoch)

    log = [json.loads(line) for line in Path(trial.run.run_name, "metrics.jsonl").read_text().splitlines()]
    speeds = [record["samples_per_second"] for record in log if "samples_per_second" in record]
    validated = [record["eval_samples_per_second"] for record in log if "eval_samples_per_second" in record]
    stages = {
        "images decoded": watch.seconds["check_images"] / watch.share,
        "images encoded": watch.seconds["encode_images"] / watch.share if watch.features is not None else 0.0,
        "training": steps * training.train_batch_size / speeds[-1],
        "validation": epochs * frames["val"] / validated[-1],
    }
    results = json.loads((trial.run.output / "run.json").read_text())["results"]
    memory = results.get("peak_memory_gib", watch.resident_bytes / 2**30) * 2**30
    stored = 0
    if watch.features is not None:
        stored = next(iter(watch.features.values())).nbytes * sum(frames.values())
    adapter = sum(file.stat().st_size for file in trial.run.output.iterdir() if file.is_file())
    return Estimate(frames, steps, stages, round(memory), stored, CHECKPOINTS * watch.checkpoint_bytes + adapter)


def report_estimate(config: TrainConfig, estimate: Estimate) -> None:
    """Print the estimate, and what of it this machine lacks."""
    minutes = sum(estimate.stages.values()) / 60
    time_told = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
    parts = ", ".join(f"{stage} {seconds / 60:.1f}" for stage, seconds in estimate.stages.items() if seconds)
    print("\ncheck: every stage works; the whole run will take, by this trial:")
    print(f"  frames   {', '.join(f'{count:,} {split}' for split, count in estimate.frames.items())}")
    print(f"  time     {time_told} for {estimate.steps:,} steps (minutes: {parts}), the model's loading beside")
    print(f"  memory   {estimate.memory_bytes / 2**30:.1f} GiB, on {name_memory()}")
    if estimate.stored_bytes:
        print(f"  stored   the ViT's outputs of each image, {estimate.stored_bytes / 2**30:.1f} GiB of disk")
    else:
        print("  stored   no outputs of the ViT: each image is decoded and encoded in each epoch")
    print(f"  disk     {estimate.disk_bytes / 1e6:,.0f} MB of checkpoints and adapter in {config.run.output}")
    free = measure_free(find_existing(config.run.output))
    if free is not None and free < estimate.disk_bytes:
        print(f"  but only {free / 1e6:,.0f} MB are free there: make room, or name another --output")


def name_memory() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
