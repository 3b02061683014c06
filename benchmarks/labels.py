"""Labels to captions at full size: our pipeline beside the reference's algorithm, one process after the other.

    python -m benchmarks.labels                          # 69,863 frames, 1.4 GB of drawn labels in a temporary folder
    python -m benchmarks.labels --frames-from FILE.json  # the same from the frames of 2018 label files

Prints the median wall seconds of runs that take turns, the peak memory of each process tree (in a run of its own, since
looking at it costs time), and their ratios; checks that both wrote the same captions. --record puts what it prints into
benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.results import record
from demo.draw import list_labels, name_image, sample_scene

ROOT = Path(__file__).parent.parent
FRAMES = 69_863  # of the 2018 train labels


def caption_as_reference(frame: dict) -> str:
    """A caption as the reference's loop builds it, but for what its README promises and it does not: the status of
    the light is red > yellow > green, no bold, regular plurals."""
    attributes = frame["attributes"]
    sentences = [
        f"It is a {attributes['timeofday']} scene in {attributes['weather']} weather on a {attributes['scene']} road."
    ]
    counts, lights = Counter(), set()
    for label in frame["labels"]:
        seen = label.get("attributes", {})
        if label["category"] == "traffic light":
            lights.add(seen.get("trafficLightColor"))
        else:
            occluded = "partially occluded " if seen.get("occluded") else ""
            counts[occluded + ("truncated " if seen.get("truncated") else "") + label["category"]] += 1
    sentences += [f"The traffic light is {light}." for light in ("red", "yellow", "green") if light in lights][:1]
    for phrase, count in sorted(counts.items()):
        plural = phrase + ("es" if phrase.endswith("bus") else "s")
        sentences.append(f"There is one {phrase}." if count == 1 else f"There are {count} {plural}.")
    return " ".join(sentences)


def run_reference(labels: Path, output: Path) -> None:
    """All of the file into memory, then a loop; a zip of single files one by one."""
    if labels.suffix == ".zip":
        with zipfile.ZipFile(labels) as archive:
            frames = [json.loads(archive.read(name)) for name in archive.namelist()]
    else:
        with open(labels, encoding="utf-8") as file:
            frames = json.load(file)
    with open(output, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "raw_caption"])
        writer.writerows((frame["name"], caption_as_reference(frame)) for frame in frames)


def draw_frames() -> list[dict]:
    """300 frames with the labels of three drawn scenes each, about as many as a real frame has."""
    frames = []
    for seed in range(0, 900, 3):
        scenes = [sample_scene(seed + i) for i in range(3)]
        labels = list(itertools.chain.from_iterable(map(list_labels, scenes)))
        attributes = {"weather": scenes[0].weather, "scene": scenes[0].place, "timeofday": scenes[0].time}
        frames.append({"attributes": attributes, "timestamp": 10000, "labels": labels})
    return frames


def repeat_frames(frames: list[dict], count: int) -> Iterator[dict]:
    for seed, frame in zip(range(count), itertools.cycle(frames), strict=False):
        yield {"name": name_image(seed), **frame}


def write_array(path: Path, frames: list[dict], count: int) -> None:
    """One indented array, as the 2018 release is."""
    bodies = [json.dumps([{"name": "NAME", **frame}], indent=4)[2:-2] for frame in frames]
    with open(path, "w", encoding="utf-8") as file:
        file.write("[\n")
        for seed, body in zip(range(count), itertools.cycle(bodies), strict=False):
            file.write((",\n" if seed else "") + body.replace('"NAME"', f'"{name_image(seed)}"', 1))
        file.write("\n]\n")


def write_archive(path: Path, frames: list[dict], count: int) -> None:
    """One indented file an image in a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for frame in repeat_frames(frames, count):
            archive.writestr(f"100k/train/{Path(frame['name']).stem}.json", json.dumps(frame, indent=4))


def measure_seconds(command: list) -> float:
    """Wall seconds of a command."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure_memory(command: list) -> float:
    """Peak memory of a command's process tree in MB, shared pages counted once, looked at twice a second."""
    peak = 0.0
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [root, *root.children(recursive=True)]
            peak = max(peak, sum(member.memory_full_info().pss for member in tree) / 1e6)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    assert process.returncode == 0, f"{command} failed with {process.returncode}"
    return peak


def compare(labels: Path, folder: Path, repeats: int) -> str:
    """Measure both in turn, `repeats` times. Returns rows of a Markdown table."""
    theirs, ours = folder / "reference.csv", folder / "ours.csv"
    os.sync()  # what was just written is on the disk, and in memory too
    commands = {
        "json.load and a loop": [sys.executable, "-m", "benchmarks.labels", "--reference", labels, theirs],
        "bdd100k_data_pipeline.py": [sys.executable, "bdd100k_data_pipeline.py", "--labels", labels, "--output", ours],
    }
    peaks = {name: measure_memory(command) for name, command in commands.items()}
    runs: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(measure_seconds(command))
    with open(theirs, newline="") as one, open(ours, newline="") as other:
        rows = sum(1 for a, b in zip(csv.reader(one), csv.reader(other), strict=True) if a == b or sys.exit("differ"))
    lines, medians = [], []
    for name, seconds in runs.items():
        seconds.sort()
        medians.append((statistics.median(seconds), peaks[name]))
        spread = f"{seconds[0]:.1f} to {seconds[-1]:.1f}"
        lines.append(f"| {labels.name} | {name} | {medians[-1][0]:.1f} | {spread} | {peaks[name]:,.0f} |")
    (slow, large), (fast, small) = medians
    what = f"{labels.stat().st_size / 1e9:.2f} GB, {rows - 1:,} captions, equal"
    lines.append(f"| {what} | **ratio** | **{slow / fast:.1f}** | | {large / small:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=FRAMES, help="frames")
    whose = "2018 label files whose frames are repeated; none: drawn ones"
    parser.add_argument("--frames-from", type=Path, nargs="*", default=[], help=whose)
    parser.add_argument("--folder", type=Path, help="where to put the files; none: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each")
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--reference", type=Path, nargs=2, help="only run the reference's algorithm: LABELS OUTPUT")
    args = parser.parse_args()
    if args.reference:
        run_reference(*args.reference)
        return
    real = [frame for path in args.frames_from for frame in json.loads(path.read_text())]
    frames = [{key: value for key, value in frame.items() if key != "name"} for frame in real] or draw_frames()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder, tables = Path(temporary), []
        for name, write in (("array.json", write_array), ("single_files.zip", write_archive)):
            write(folder / name, frames, args.count)
            tables.append(compare(folder / name, folder, args.repeats))
            print(tables[-1], flush=True)
            (folder / name).unlink()
    header = "| labels | what read them | seconds | from, to | peak MB |\n| --- | --- | ---: | --- | ---: |\n"
    if args.record:
        title = f"Labels to captions, {'real' if real else 'drawn'} frames"
        record(title, header + "\n".join(tables), packages=["msgspec"])


if __name__ == "__main__":
    main()
