"""Whether memory grows with the work: eval.py on many images, the pipeline and eval.py on many rows.

    python -m tests.load --folder /tmp/load                       # 10,000 images, 70,000 rows; minutes
    python -m tests.load --folder /tmp/load --images 600 --rows 2000

The model is the tests' tiny one, the images are hard links to a few drawn ones. The resident memory of each script
and its processes is sampled each second; load.png in the folder draws it, and a line is printed for each script.
Growth is told of the captioning: the last sample before the report is made less the first after half of the captions.
The rows of a CSV are all kept until they are scored. Exit code 1 if captioning grows by more than LIMIT_MB.
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parent.parent
LIMIT_MB = 32  # that captioning may grow in its second half; an image's pixels alone would be more, were they kept
DRAWN = 12  # different images
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}


class Sample(NamedTuple):
    seconds: float
    mb: float  # resident, of the script and its processes
    done: int  # bytes that the script has written to the file it is watched by


class Load(NamedTuple):
    """What one script took."""

    what: str
    samples: list[Sample]

    def growth(self) -> float | None:
        """MB from half of the work to its end, the work being what fills the watched file; None without one."""
        end = self.samples[-1].done
        work = [sample for sample in self.samples if end / 2 <= sample.done < end]
        return work[-1].mb - work[0].mb if work else None

    def __str__(self) -> str:
        peak, growth = max(sample.mb for sample in self.samples), self.growth()
        told = "" if growth is None else f", growth in the second half of the captions {growth:+.1f} MB"
        return f"{self.what}: {self.samples[-1].seconds:.0f} s, peak {peak:.0f} MB{told}"


def measure_memory(pid: int) -> float:
    """MB that a process and its children have; what they share counts for each of them."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    return total / 1e6


def watch(what: str, command: list, cwd: Path, watched: Path | None, interval: float = 1.0) -> Load:
    """Run a script and sample its memory, and the size of `watched`, until it ends. Exits if it fails."""
    log, start, samples = cwd / "log.txt", time.monotonic(), []
    with open(log, "w") as file:
        script = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | ENVIRONMENT, stdout=file, stderr=file
        )
        while script.poll() is None:
            done = watched.stat().st_size if watched and watched.exists() else 0
            samples.append(Sample(time.monotonic() - start, measure_memory(script.pid), done))
            time.sleep(interval)
    if script.returncode:
        sys.exit(f"{what} ended with {script.returncode}:\n{log.read_text()[-3000:]}")
    return Load(what, samples)


# --------------------------------------------------------------------------------------------------------------
# the work


def train_adapter(folder: Path) -> list[dict]:
    """A tiny model's adapter in folder/blip2-finetuned. Returns the drawn labels."""
    from conftest import build_tiny_checkpoint

    from demo.draw import draw_dataset

    build_tiny_checkpoint(folder / "model")
    labels = draw_dataset(folder / "drawn", range(DRAWN), workers=1)
    flags = ["--labels", labels, "--images", folder / "drawn/images", "--model", folder / "model", "--max-steps", 1]
    flags += ["--dataloader-workers", 0, "--val-captions", 0, "--wandb", "disabled", "--run-name", "training"]
    watch("training", [ROOT / "main.py", *flags], folder, None)
    return json.loads(labels.read_text())


def caption_many(folder: Path, count: int, interval: float) -> Load:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    drawn = sorted((folder / "drawn/images").iterdir())
    for number in range(count):
        if not (path := images / f"{number:08x}-00000000.jpg").exists():
            os.link(drawn[number % len(drawn)], path)
    flags = ["--images", images, "--max-new-tokens", 8, "--batch-size", 16, "--run-name", "captions"]
    watched = folder / "logs/captions/captions.jsonl"
    watched.unlink(missing_ok=True)
    return watch(f"captioning {count:,} images", [ROOT / "eval.py", *flags], folder, watched, interval)


def convert_many(folder: Path, frames: list[dict], count: int, interval: float) -> Load:
    """Labels of `count` frames to a captions CSV."""
    labels = folder / "labels.json"
    with open(labels, "w") as file:
        for number in range(count):
            frame = frames[number % len(frames)] | {"name": f"{number:08x}-00000000.jpg"}
            file.write(("[" if number == 0 else ",\n") + json.dumps(frame))
        file.write("]\n")
    flags = ["--labels", labels, "--output", folder / "captions.csv", "--run-name", "labels"]
    what = f"labels of {count:,} frames to a CSV"
    return watch(what, [ROOT / "bdd100k_data_pipeline.py", *flags], folder, None, interval)


def score_many(folder: Path, interval: float) -> Load:
    """Each caption of the CSV as the prediction for the next frame."""
    with open(folder / "captions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(folder / "predictions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "prediction", "reference"])
        writer.writerows([row["name"], rows[n - 1]["raw_caption"], row["raw_caption"]] for n, row in enumerate(rows))
    flags = ["--predictions", folder / "predictions.csv", "--run-name", "scores"]
    what = f"scoring a CSV of {len(rows):,} rows"
    return watch(what, [ROOT / "eval.py", *flags], folder, None, interval)


def draw(path: Path, loads: list[Load]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(loads), figsize=(4 * len(loads), 2.8), layout="constrained", squeeze=False)
    for axis, load in zip(axes.flat, loads, strict=True):
        axis.plot([sample.seconds for sample in load.samples], [sample.mb for sample in load.samples], lw=1)
        axis.set(title=load.what, xlabel="seconds", ylabel="resident memory (MB)", ylim=(0, None))
        axis.title.set_fontsize("medium")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(arguments: list[str] | None = None, tell: Callable = print) -> list[Load]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=70_000, help="0: images alone")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two samples")
    args = parser.parse_args(arguments)
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    frames = train_adapter(folder)
    loads = [caption_many(folder, args.images, args.interval)]
    tell(loads[-1], flush=True)
    if args.rows:
        loads.append(convert_many(folder, frames, args.rows, args.interval))
        tell(loads[-1], flush=True)
        loads.append(score_many(folder, args.interval))
        tell(loads[-1], flush=True)
    draw(folder / "load.png", loads)
    return loads


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main()[0].growth() > LIMIT_MB)
