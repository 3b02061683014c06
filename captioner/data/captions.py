"""Labels, captions CSV, pictures and splits: which frames there are, where they lie, and which split each is in."""

import csv
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: there folders are not locked
    fcntl = None

from captioner.bdd100k.facts import describe
from captioner.bdd100k.label_files import NAME, LabelOptions, LabelReport, read_labels
from captioner.blip2.trust import is_inside
from config import DEMO_DATA, DEMO_SCENES, DataConfig, UserError

CSV_HEADER = ["name", "raw_caption"]
SPLIT_COLUMNS = ["name", "split", "image", "raw_caption"]  # of split.csv, which main.py writes and eval.py reads
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

DEMO_IMAGES = DEMO_DATA / "images"


class Example(NamedTuple):
    """A picture and its caption."""

    name: str
    image: Path
    caption: str


# --------------------------------------------------------------------------------------------------------------
# files


@contextmanager
def atomic_write(path: Path) -> Iterator:
    """Open `path` for writing text under a temporary name; it gets its own name only when all is written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from None
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def explain_writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a UserError that names it, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); {remedy}") from None


@contextmanager
def lock_folder(folder: Path, flag: str) -> Iterator[None]:
    """Hold `folder`, that `flag` names, for this run alone; of several processes of a run the main one holds it.

    The kernel frees it when the process ends, however it ends. A folder that the run made and left empty is removed.
    """
    if fcntl is None or os.environ.get("RANK", "0") != "0":
        yield
        return
    path = folder / ".lock"
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        file = _open_locked(path)
    except BlockingIOError:
        raise UserError(f"{flag} {folder}: another run is writing there; wait for its end, or name another") from None
    except OSError as error:
        raise UserError(f"{flag} {folder}: can't be written ({error.strerror}); name another folder") from None
    with file:
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)
            with suppress(OSError):  # it may be gone, or the disk have become read-only
                path.unlink()
                for empty in made:
                    empty.rmdir()


def _open_locked(path: Path):
    """The file at `path`, made and locked. Raises BlockingIOError when another process has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()  # the run that had it has just removed it: what was locked is nobody's


_locks = set()


def _leave_locks() -> None:
    """A forked worker must not hold on to a folder when the run that it worked for was killed."""
    for file in _locks:
        file.close()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave_locks)


def write_captions(path: Path, rows: Iterable[tuple[str, str]]) -> int:
    """Write (name, caption) rows as CSV, the caption always in quotes. Returns how many."""
    count = 0
    with atomic_write(path) as file:
        file.write(",".join(CSV_HEADER) + "\n")
        for name, caption in rows:
            file.write(f'{name},"{caption}"\n')  # neither can hold a quote: NAME and the caption grammar see to it
            count += 1
    return count


def read_captions(path: Path) -> dict[str, str]:
    """Read a captions CSV as {name: caption}."""
    if not path.is_file():
        raise UserError(f"{path}: no such captions file; write it with python bdd100k_data_pipeline.py --output {path}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if (header := next(reader, None)) != CSV_HEADER:
                raise UserError(f"{path}: its first line must be {','.join(CSV_HEADER)}, not {header}")
            captions = {}
            for row in reader:
                if len(row) != 2 or not NAME.fullmatch(row[0]) or row[0] in captions:
                    raise UserError(f"{path}, line {reader.line_num}: must be a new image name and a caption")
                captions[row[0]] = row[1]
            return captions
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV ({error})") from None


# --------------------------------------------------------------------------------------------------------------
# labels


def find_labels(config: DataConfig) -> Sequence[Path]:
    """The label files to read: those given, the drawn ones, or those of the Kaggle data set."""
    if config.labels:
        return config.labels
    if config.demo:
        # a process of its own: those that it starts in turn then import the renderer alone
        draw = [sys.executable, "-m", "demo.draw", "--count", str(DEMO_SCENES), "--out", DEMO_DATA.resolve()]
        if subprocess.run(draw, cwd=Path(__file__).parents[2], check=False, stdout=subprocess.DEVNULL).returncode:
            raise UserError(f"{DEMO_DATA}: the scenes can't be drawn there, see above; start from a folder of your own")
        return [DEMO_DATA / "labels.json"]
    from captioner.bdd100k.download import fetch_labels  # here: kagglehub takes a while to import

    return fetch_labels(config.kaggle_dataset, config.subset)


def caption_labels(config: DataConfig, labels: Sequence[Path], output: Path, run_dir: Path) -> LabelReport:
    """Write the captions of all frames in `labels` to the CSV `output`, and print what was read.

    What the labels hold goes to `run_dir`/census.json.
    """
    options = LabelOptions(
        config.class_names, config.lanes, config.merge_duplicates, config.min_box_size, config.without_scene
    )
    report = LabelReport()
    write_captions(output, _caption_rows(config, labels, options, report))
    with atomic_write(run_dir / "census.json") as file:
        json.dump(report.to_json(), file, indent=1)
    print(report)
    print(f"captions written to {output}, what the labels hold to {run_dir / 'census.json'}")
    return report


def _caption_rows(config: DataConfig, labels, options: LabelOptions, report: LabelReport) -> Iterator[tuple[str, str]]:
    for name, caption in read_labels(labels, report, options, convert=functools.partial(describe, style=config.style)):
        report.caption_words[caption.count(" ") + 1] += 1  # words are one space apart
        yield name, caption
    if config.strict and report.skipped:
        raise UserError(f"--strict: {report.skipped.total():,} frames can't be used, nothing is written\n{report}")


# --------------------------------------------------------------------------------------------------------------
# pictures


def index_images(folder: Path) -> dict[str, Path]:
    """{file name: path} of the pictures below `folder`. The first of equal names in alphabetical order counts.

    A link to a file outside of the folder is passed over.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder with the pictures with --images, or try --demo")
    index: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            # os.walk enters no linked folder: only a file that is a link itself can lead out
            if name.lower().endswith(IMAGE_SUFFIXES) and (not path.is_symlink() or is_inside(path, folder)):
                index.setdefault(name, path)
    if not index:
        raise UserError(f"{folder}: no picture in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return index


def match_images(captions: dict[str, str], images: dict[str, Path]) -> list[Example]:
    """The captions that have a picture. Prints how many have none; raises UserError when that is all of them."""
    examples = [Example(name, images[name], caption) for name, caption in captions.items() if name in images]
    missing = len(captions) - len(examples)
    if not examples:
        name = next(iter(captions), "none")
        raise UserError(
            f"none of the {len(captions)} captioned frames has a picture: {name}, for one, is not among the "
            f"{len(images)} pictures; give the folder that belongs to the labels with --images"
        )
    if missing:
        print(f"{missing:,} of {len(captions):,} captioned frames have no picture and are left out")
    return examples


# --------------------------------------------------------------------------------------------------------------
# splits


def ride_of(name: str) -> str:
    """The ride that a frame belongs to: the first half of `<8 hex>-<8 hex>.jpg`. Frames of a ride look alike."""
    return Path(name).stem.split("-")[0]


def split_by_ride(names: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Split names into the keys of `shares`, by its values in order, so that no ride is in two splits.

    Rides are ordered by a hash of seed and ride, so the order of `names` does not matter, and are dealt out until
    each split has its share of the frames, to within a ride. Each split gets one ride at least.
    """
    rides: dict[str, list[str]] = {}
    for name in sorted(names):
        rides.setdefault(ride_of(name), []).append(name)
    if len(rides) < len(shares):
        raise UserError(
            f"{len(names)} frames of {len(rides)} rides can't be split: {', '.join(shares)} need a ride each"
        )
    order = sorted(rides, key=lambda ride: hashlib.sha256(f"{seed}:{ride}".encode()).digest())
    ends = list(itertools.accumulate(shares.values()))
    dealt: list[list[str]] = [[] for _ in shares]
    done, current, last = 0, 0, len(shares) - 1
    for position, ride in enumerate(order):
        left = len(order) - position  # rides, this one included
        middle = (done + len(rides[ride]) / 2) / len(names)
        while current < last and dealt[current] and (middle > ends[current] or left <= last - current):
            current += 1
        dealt[current] += rides[ride]
        done += len(rides[ride])
    return dict(zip(shares, dealt, strict=True))
