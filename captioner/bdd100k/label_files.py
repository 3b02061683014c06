"""BDD100K label files -> frames of facts. Knows the layouts of the files, and nothing of the wording of captions.

    report = LabelReport()
    for frame in read_labels([Path("bdd100k_labels_images_val.json")], report):
        print(frame.name, frame.facts)
    print(report)

Read are .json, .json.gz and .zip files and folders of them, in these layouts, which are told apart by what is in them:
2018 arrays, one file an image, det_20 arrays, Scalabel dumps bare or wrapped, tracking and segmentation sets. A frame
that can't be used is left out, counted with its reason and listed; a file that is damaged is an error.

A large array is cut where a frame ends, and decoded piece by piece by all cores: memory stays small whatever the size.
A wrong cut can't go unnoticed, since neither side of it would then be JSON.
"""

import contextlib
import functools
import gc
import gzip
import mmap
import multiprocessing.connection
import os
import re
import signal
import struct
import threading
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import msgspec
from tqdm import tqdm

from captioner.bdd100k.facts import (
    CLASSES,
    LIGHTS,
    MAX_COUNT,
    SCENES,
    TIMES_OF_DAY,
    TRAFFIC_LIGHT,
    UNDEFINED,
    WEATHERS,
    Facts,
    ObjectKind,
)
from captioner.blip2.trust import is_inside
from config import UserError

# Names that an image file may have: no folder, no control character, nothing that a CSV or a spreadsheet acts on.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
LABEL_SUFFIXES = (".json", ".json.gz", ".zip")

ClassNames = Literal["file", "2018", "det20"]
# The same class in the 2018 release, in det_20, and in other variants.
_SYNONYMS = [
    ("person", "pedestrian"),
    ("bike", "bicycle"),
    ("motor", "motorcycle"),
    ("drivable area", "drivable area", "area/drivable", "area/alternative"),
]
_AREAS = ("lane", "drivable area")
_LIGHT_OF = {"g": "green", "y": "yellow", "r": "red", "green": "green", "yellow": "yellow", "red": "red"}
_NO_LIGHT = ("none", "na", None)

NEAR_DUPLICATE_IOU = 0.85  # above it two boxes of one class are taken for the same object boxed twice
PIECE = 4 * 2**20  # bytes of a large array that are decoded at once
LOOKAHEAD = 64 * 2**20  # bytes in which the next frame must begin for a file to be cut
WHOLE = 256 * 2**20  # bytes up to which a file that can't be cut is decoded as a whole
GZIP_LIMIT = 2 * 2**30  # bytes of a .json.gz when unpacked; BDD100K's largest label file has 1.4 GB
LISTED = 20  # frames left out that are listed by name for each reason

T = TypeVar("T")


class Frame(NamedTuple):
    """One labelled picture. `name` is the file name of its image."""

    name: str
    facts: Facts


@dataclass(frozen=True)
class LabelOptions:
    """How labels are read. The defaults give the captions of the reference."""

    class_names: ClassNames = "file"  # person (2018) or pedestrian (det20); file: as the file has them
    lanes: bool = True  # count lanes and drivable areas like objects
    merge_duplicates: bool = False  # count near-duplicate boxes once
    min_box_size: float = 0.0  # pixels of the shorter side below which a box is not counted
    without_scene: Literal["skip", "caption"] = "skip"  # frames with no scene attributes


DEFAULT_OPTIONS = LabelOptions()


@dataclass
class LabelReport:
    """What was read, and what was left out and why. Counts are of frames unless the name says otherwise."""

    frames: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason: frames
    listed: dict[str, list[str]] = field(default_factory=dict)  # reason: names of the first frames
    remarks: Counter[str] = field(default_factory=Counter)  # what was mended or not counted: times
    variants: Counter[str] = field(default_factory=Counter)
    attributes: dict[str, Counter[str]] = field(
        default_factory=lambda: defaultdict(Counter)
    )  # attribute: value: frames
    objects: Counter[ObjectKind] = field(default_factory=Counter)  # kind: objects
    boxes_a_frame: Counter[int] = field(default_factory=Counter)
    near_duplicates: int = 0  # boxes
    caption_words: Counter[int] = field(default_factory=Counter)  # words of a caption: captions

    def skip(self, reason: str, name: object) -> None:
        self.skipped[reason] += 1
        listed = self.listed.setdefault(reason, [])
        if len(listed) < LISTED:
            listed.append(str(name)[:80])

    def add(self, frames: Sequence[Frame]) -> None:
        """Count frames that are used."""
        if not frames:
            return
        self.frames += len(frames)
        for name in ("time_of_day", "weather", "scene", "traffic_light"):
            self.attributes[name].update([getattr(frame.facts, name) or "none" for frame in frames])
        objects, boxes_a_frame = self.objects, []
        for frame in frames:
            boxes = 0
            for kind, count in frame.facts.objects.items():
                objects[kind] += count
                if kind[0] not in _AREAS:
                    boxes += count
            boxes_a_frame.append(boxes)
        self.boxes_a_frame.update(boxes_a_frame)

    def merge(self, other: "LabelReport") -> None:
        """Add what another process counted."""
        self.frames += other.frames
        self.near_duplicates += other.near_duplicates
        for name in ("skipped", "remarks", "variants", "objects", "boxes_a_frame"):
            getattr(self, name).update(getattr(other, name))
        for name, counts in other.attributes.items():
            self.attributes[name].update(counts)
        for reason, names in other.listed.items():
            self.listed[reason] = (self.listed.get(reason, []) + names)[:LISTED]

    def to_json(self) -> dict:
        """All counts as JSON types."""
        return {
            "frames": self.frames,
            "variants": dict(self.variants),
            "left_out": {reason: {"frames": n, "first": self.listed[reason]} for reason, n in self.skipped.items()},
            "remarks": dict(self.remarks),
            **{name: dict(counts.most_common()) for name, counts in self.attributes.items()},
            "objects": {kind.phrase: n for kind, n in self.objects.most_common()},
            "objects_a_frame": {str(n): frames for n, frames in sorted(self.boxes_a_frame.items())},
            "near_duplicate_boxes": self.near_duplicates,
            "caption_words": {str(n): captions for n, captions in sorted(self.caption_words.items())},
        }

    def __str__(self) -> str:
        variants = ", ".join(f"{count:,} of {variant}" for variant, count in self.variants.most_common())
        lines = [f"{self.frames:,} frames used, {self.skipped.total():,} left out; read: {variants or 'nothing'}"]
        for reason, count in self.skipped.most_common():
            names = self.listed.get(reason, [])
            more = ", ..." if count > 3 else ""
            lines.append(f"  {count:>9,} left out: {reason} ({', '.join(names[:3])}{more})")
        lines += [f"  {count:>9,} x {remark}" for remark, count in self.remarks.most_common()]
        return "\n".join(lines)


class _BadFrame(Exception):
    """A frame that can't be captioned; the message is the reason that the report counts."""


class _BadFile(Exception):
    """A file that is not JSON. `position` is the byte at which that shows, if known."""

    def __init__(self, reason: str, position: int | None = None):
        super().__init__(reason)
        self.position = position


# --------------------------------------------------------------------------------------------------------------
# what is decoded; all else in the files is skipped unread


class _Box(msgspec.Struct, gc=False):
    x1: float
    y1: float
    x2: float
    y2: float


# Both are strings and few: where a file holds no others, all labels share those that are made here.
Category, Light = TypeVar("Category"), TypeVar("Light")
_UsualCategory = Literal[(*CLASSES, TRAFFIC_LIGHT, "area/drivable", "area/alternative")]
_UsualLight = Literal["none", "red", "yellow", "green", "NA", "R", "Y", "G"]


class _LabelAttributes(msgspec.Struct, Generic[Light], gc=False):
    occluded: bool | None = None
    truncated: bool | None = None
    light: Light | None = msgspec.field(default=None, name="trafficLightColor")
    # early tracking files and exports
    occluded_too: bool | None = msgspec.field(default=None, name="Occluded")
    truncated_too: bool | None = msgspec.field(default=None, name="Truncated")
    light_too: Any = msgspec.field(default=None, name="Traffic Light Color")


class _Label(msgspec.Struct, Generic[Category, Light], gc=False):
    category: Category | None = None
    attributes: _LabelAttributes[Light] | None = None
    box2d: _Box | None = None


class _SceneAttributes(msgspec.Struct, gc=False):
    timeofday: str | None = None
    weather: str | None = None
    scene: str | None = None


class _Moment(msgspec.Struct, Generic[Category, Light], gc=False):
    objects: list[_Label[Category, Light]] | None = None


class _Frame(msgspec.Struct, Generic[Category, Light], gc=False):
    name: str | None = None
    attributes: _SceneAttributes | None = None
    labels: list[_Label[Category, Light]] | None = None
    frames: list[_Moment[Category, Light]] | None = None  # one file an image: objects are in frames[0]


class _Wrapper(msgspec.Struct, Generic[Category, Light], gc=False):
    frames: list[_Frame[Category, Light]]


class _Decoders:
    def __init__(self, category: object, light: object):
        self.array = msgspec.json.Decoder(list[_Frame[category, light]])
        self.frame = msgspec.json.Decoder(_Frame[category, light])
        self.wrapper = msgspec.json.Decoder(_Wrapper[category, light])

    def decode(self, data: bytes | memoryview) -> tuple[list[_Frame], bool]:
        if re.match(rb"\s*\{", data) is None:
            return self.array.decode(data), False
        frame = self.frame.decode(data)
        if frame.name is None and frame.frames is not None:
            return self.wrapper.decode(data).frames, True
        return [frame], False


_USUAL, _ANY = _Decoders(_UsualCategory, _UsualLight), _Decoders(str, Any)


def decode_frames(data: bytes | memoryview) -> tuple[list, bool]:
    """The frames of one label file's bytes, and whether they were in a Scalabel wrapper.

    Where a type is wrong anywhere, the frames come back as plain JSON values, to be judged one by one. Raises
    _BadFile for bytes that are not JSON.
    """
    if bytes(data[:3]) == b"\xef\xbb\xbf":
        data = data[3:]
    try:
        for decoders in (_USUAL, _ANY):
            with contextlib.suppress(msgspec.ValidationError):
                return decoders.decode(data)
        return _decode_untyped(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        byte = re.search(r"\(byte (\d+)\)", str(error))
        raise _BadFile(str(error), int(byte[1]) if byte else len(data)) from None
    except RecursionError:
        raise _BadFile("nested too deep", None) from None


def _decode_untyped(data: bytes | memoryview) -> tuple[list, bool]:
    value = msgspec.json.decode(data)
    if isinstance(value, dict):
        wrapped = "name" not in value and isinstance(value.get("frames"), list)
        return (value["frames"], True) if wrapped else ([value], False)
    return (value, False) if isinstance(value, list) else ([], False)


# --------------------------------------------------------------------------------------------------------------
# one frame


def read_frame(
    raw: object, report: LabelReport, options: LabelOptions = DEFAULT_OPTIONS, wrapped: bool = False
) -> Frame:
    """One raw frame, a JSON value or decoded by decode_frames, as Frame. Raises _BadFrame with the reason."""
    if not isinstance(raw, _Frame):
        try:
            raw = msgspec.convert(raw, _Frame[str, Any])
        except (msgspec.ValidationError, RecursionError) as error:
            raise _BadFrame(f"wrong type: {error}") from None
    report.variants[_name_variant(raw, wrapped)] += 1
    name = _read_name(raw)
    labels = raw.labels
    if labels is None and raw.frames:
        labels = raw.frames[0].objects
    attributes = (None, None, None)
    if raw.attributes is not None:
        attributes = (
            _read_attribute("timeofday", raw.attributes.timeofday, TIMES_OF_DAY, report),
            _read_attribute("weather", raw.attributes.weather, WEATHERS, report),
            _read_attribute("scene", raw.attributes.scene, SCENES, report),
        )
    elif options.without_scene == "skip":
        raise _BadFrame("no scene attributes, as in tracking and segmentation sets")
    return Frame(name, Facts.of_known(*attributes, *_read_objects(labels or [], report, options)))


_LIGHTS_OF_2018 = ("none", *LIGHTS)


def _name_variant(raw: _Frame, wrapped: bool) -> str:
    if raw.frames is not None:
        return "one file an image"
    if wrapped:
        return "Scalabel wrapper"
    if raw.attributes is None:
        return "tracking or segmentation set"
    for label in raw.labels or ():
        if label.attributes is not None:
            if label.attributes.light is not None:
                return "2018 release" if label.attributes.light in _LIGHTS_OF_2018 else "det_20"
            if label.attributes.light_too is not None:
                return "Scalabel export"
    return "frames without boxes"


def _read_name(raw: _Frame) -> str:
    name = raw.name
    if name is None:
        raise _BadFrame("no name")
    if raw.frames is not None and "." not in name:  # one file an image
        name += ".jpg"
    if not NAME.fullmatch(name):
        raise _BadFrame("its name is not a plain file name")
    return name


def _read_attribute(key: str, value: str | None, table, report: LabelReport) -> str:
    if value is None:
        return UNDEFINED
    if value not in table:
        report.remarks[f"{key} {value[:40]!r} is unknown, taken as {UNDEFINED}"] += 1
        return UNDEFINED
    return value


@functools.lru_cache(maxsize=4096)
def _class_of(category: str, names: ClassNames) -> str | None:
    """The class of a category in any variant's name, under the name that is wanted; None for an unknown one."""
    if category.startswith("lane/"):
        return "lane"
    for row in _SYNONYMS:
        if category in row:
            if names == "file":
                return category if category in CLASSES else row[0]
            return row[names == "det20"]
    return category if category in CLASSES else None


class _Kinds(dict):
    """{(category, occluded, truncated): what such a label is counted as}, None when it is not; filled when asked."""

    def __init__(self, names: ClassNames, lanes: bool):
        self.names, self.lanes = names, lanes

    def __missing__(self, look: tuple) -> ObjectKind | None:
        category, occluded, truncated = look
        if category == TRAFFIC_LIGHT:  # in most frames
            self[look] = None
            return None
        name = None if category is None else _class_of(category, self.names)
        if name is None or (name in _AREAS and not self.lanes):
            return None
        self[look] = kind = ObjectKind(name, bool(occluded), bool(truncated))
        return kind


_kinds_of = functools.cache(_Kinds)


_PLAIN = _LabelAttributes()


def _read_objects(
    labels: list[_Label], report: LabelReport, options: LabelOptions
) -> tuple[str | None, dict[ObjectKind, int]]:
    """The status of the traffic lights (red > yellow > green) and the count of each other kind of object."""
    duplicates = _find_near_duplicates(labels)
    report.near_duplicates += len(duplicates)
    if options.merge_duplicates and duplicates:
        labels = [
            label for index, label in enumerate(labels) if index not in duplicates or label.category == TRAFFIC_LIGHT
        ]
    if options.min_box_size:
        labels = _leave_out_small(labels, options.min_box_size, report)
    kinds, lights, counts = _kinds_of(options.class_names, options.lanes), set(), {}
    for (category, occluded, truncated, light), count in _tally(labels).items():
        kind = kinds[category, occluded, truncated]
        if kind is not None:
            counts[kind] = counts.get(kind, 0) + count
        elif category == TRAFFIC_LIGHT:
            lights.add(_read_light(light, count, report))
        elif category is None:
            report.remarks["object without a category, not counted"] += count
        elif _class_of(category, options.class_names) is None:
            report.remarks[f"object of the unknown class {category[:40]!r}, not counted"] += count
    if len(labels) > MAX_COUNT and max(counts.values(), default=0) > MAX_COUNT:
        raise _BadFrame(f"more than {MAX_COUNT} objects of one kind")
    status = next((light for light in LIGHTS if light in lights), None) if lights else None
    return status, counts


def _tally(labels: list[_Label]) -> dict[tuple, int]:
    """{(category, occluded, truncated, light): labels}; few of a frame's labels differ in these."""
    tally = {}
    for label in labels:
        seen = label.attributes or _PLAIN
        light = seen.light if seen.light is not None else seen.light_too
        look = label.category, seen.occluded or seen.occluded_too, seen.truncated or seen.truncated_too, light
        try:
            tally[look] = tally.get(look, 0) + 1
        except TypeError:
            look = *look[:3], _unwrap_light(light)
            tally[look] = tally.get(look, 0) + 1
    return tally


def _unwrap_light(color: list | dict) -> object:
    """The colour in what older det_20 files and exports have, [1, "G"]; of anything else its text."""
    if isinstance(color, list):
        color = color[-1] if color else None
    return str(color) if isinstance(color, list | dict) else color


def _leave_out_small(labels: list[_Label], min_size: float, report: LabelReport) -> list[_Label]:
    def is_small(label: _Label) -> bool:
        box = label.box2d
        return box is not None and label.category is not None and min(box.x2 - box.x1, box.y2 - box.y1) < min_size

    left = [label for label in labels if not is_small(label)]
    if len(left) < len(labels):
        report.remarks[f"box smaller than {min_size:g} pixels, not counted"] += len(labels) - len(left)
    return left


def _read_light(color: object, count: int, report: LabelReport) -> str | None:
    """What one traffic light shows, or `count` that are labelled alike."""
    known = color.lower() if isinstance(color, str) else color
    if known in _NO_LIGHT:
        return None
    if known not in _LIGHT_OF:
        report.remarks[f"traffic light of the unknown colour {str(color)[:40]!r}, taken as none"] += count
    return _LIGHT_OF.get(known)


def _find_near_duplicates(labels: list[_Label]) -> set[int]:
    """Positions of boxes that overlap an earlier one of their class by more than NEAR_DUPLICATE_IOU."""
    boxes = [
        (box.x1, box.y1, box.x2, box.y2, label.category, index)
        for index, label in enumerate(labels)
        if (box := label.box2d) is not None
    ]
    boxes.sort(key=itemgetter(0))
    found, count = set(), len(boxes)
    for position, (x1, y1, x2, y2, category, index) in enumerate(boxes, start=1):
        reach = x1 + (1 - NEAR_DUPLICATE_IOU) * (x2 - x1)  # a box that starts farther right overlaps too little
        while position < count and (following := boxes[position])[0] <= reach:
            u1, v1, u2, v2, its_category, its_index = following
            if its_category == category:
                wide, high = min(x2, u2) - u1, min(y2, v2) - max(y1, v1)
                if wide > 0 and high > 0:
                    common = wide * high
                    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common
                    if common > NEAR_DUPLICATE_IOU * union:
                        found.add(max(index, its_index))
            position += 1
    return found


# --------------------------------------------------------------------------------------------------------------
# files


class _Member(NamedTuple):
    """What is needed of a zipfile.ZipInfo, which is ten times as slow to hand to another process."""

    name: str
    offset: int  # of its header
    packed: int  # bytes
    size: int  # bytes
    method: int
    flags: int
    crc: int


class _Job(NamedTuple):
    """What one process reads at once: a stretch of a file, or some whole files or members of an archive."""

    path: Path
    size: int  # bytes, for the progress bar
    start: int = 0
    stop: int | None = None  # of a stretch; None: not a stretch
    members: tuple[_Member, ...] = ()  # of a .zip


class _Result(NamedTuple):
    frames: list  # or (name, what `convert` made of its facts)
    count: int  # of frames in, used or not
    report: LabelReport
    error: tuple[str, int | None] | None = None  # reason and byte


def read_labels(
    paths: Sequence[Path],
    report: LabelReport,
    options: LabelOptions = DEFAULT_OPTIONS,
    convert: Callable[[Facts], T] | None = None,
) -> Iterator[Frame | tuple[str, T]]:
    """Frames of the label files in `paths` and in the folders of it; `report` is filled on the way.

    With `convert`, pairs of name and convert(facts), made by the process that read the frame. A name that comes twice
    is used once, the first time. Raises UserError for a path that is missing, a file that is damaged (with the byte
    where that shows), and when there is no usable frame at all.
    """
    jobs = plan_jobs(find_label_files(paths))
    seen: set[str] = set()
    consumed: Counter[Path] = Counter()  # frames of each file so far
    given_up = set()  # files that can't be cut and were read as a whole
    run = functools.partial(_run_job, options=options, convert=convert)
    with tqdm(total=sum(job.size for job in jobs), desc="reading labels", unit="B", unit_scale=True) as progress:
        for job, result in zip(jobs, _run_jobs(run, jobs), strict=True):
            progress.update(job.size)
            if job.path in given_up:
                continue
            if result.error is not None:
                result = _run_whole(job, result, consumed[job.path], options, convert)
                given_up.add(job.path)
            consumed[job.path] += result.count
            report.merge(result.report)
            names = {frame[0] for frame in result.frames}
            if len(names) == len(result.frames) and seen.isdisjoint(names):  # mostly: no need to look at each
                seen |= names
                yield from result.frames
                continue
            for frame in result.frames:
                name = frame[0]
                if name in seen:
                    report.frames -= 1
                    report.skip("its name came before", name)
                else:
                    seen.add(name)
                    yield frame
    if not seen:
        raise UserError(f"no usable frame in {', '.join(map(str, paths))}: {report}")


def find_label_files(paths: Sequence[Path]) -> list[Path]:
    """The files in `paths`, folders replaced by the label files below them in alphabetical order."""
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(LABEL_SUFFIXES) and file.is_file())
            found = [file for file in found if is_inside(file, path)]  # no link leads out of the folder
            if not found:
                raise UserError(f"{path}: no .json file in this folder; --labels takes BDD100K label files or folders")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give BDD100K labels with --labels, or try --demo")
    return files


def plan_jobs(files: Sequence[Path]) -> list[_Job]:
    """Cut the files into jobs of about PIECE bytes."""
    jobs = []
    for path in files:
        if path.suffix == ".zip":
            jobs += _plan_archive(path)
            continue
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); see to the file") from None
        if path.suffix == ".gz" or size <= 2 * PIECE:
            jobs.append(_Job(path, size))
        else:
            jobs += [_Job(path, min(PIECE, size - at), at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
    return jobs


def _plan_archive(path: Path) -> Iterator[_Job]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".json") and not info.is_dir()]
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise UserError(f"{path}: not readable as a zip archive ({error}); is the download complete?") from None
    if not members:
        raise UserError(f"{path}: no .json file in this archive")
    batch, size = [], 0
    for info in members:
        batch.append(
            _Member(
                info.filename,
                info.header_offset,
                info.compress_size,
                info.file_size,
                info.compress_type,
                info.flag_bits,
                info.CRC,
            )
        )
        size += info.compress_size
        if size >= PIECE // 4 or info is members[-1]:
            yield _Job(path, size, members=tuple(batch))
            batch, size = [], 0


def _run_jobs(run: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
    """Results in the order of the jobs, from all cores if there is enough to do.

    Processes take jobs themselves and answer through a pipe each, so that this one has little to do beside them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, total = min(cores, len(jobs)), sum(job.size for job in jobs)
    if len(jobs) < 2 or total < PIECE:
        yield from map(run, jobs)
        return
    step = max(1, min(32, PIECE * len(jobs) // (total + 1)))  # many small files at once
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    taken, processes = context.Value("q", 0), {}
    try:
        for _ in range(workers):
            answer, send = context.Pipe(duplex=False)
            inherited = [*processes, answer] if context.get_start_method() == "fork" else []
            process = context.Process(target=_work, args=(run, jobs, step, taken, send, inherited), daemon=True)
            process.start()
            send.close()
            processes[answer] = process
        yield from _gather(dict(processes), len(jobs))
    finally:  # also when nobody asks for the rest
        for process in processes.values():
            process.kill()
            process.join()


def _work(run: Callable[[_Job], _Result], jobs: Sequence[_Job], step: int, taken, send, inherited: list) -> None:
    """What a process does: take the next `step` jobs and send (number of the first, results) until none are left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for answer in inherited:  # else nobody would notice when the main process is killed
        answer.close()
    gc.disable()  # nothing here is a cycle, so looking for garbage again and again would find none
    while True:
        with taken.get_lock():
            first = taken.value
            taken.value = first + step
        if first >= len(jobs):
            return
        try:
            send.send((first, [run(job) for job in jobs[first : first + step]]))
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """End this process when the one that started it does, also when that is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _gather(processes: dict, count: int) -> Iterator[_Result]:
    """What {pipe: process} answer, in the order of the jobs. Raises UserError when one of them was killed."""
    early: dict[int, _Result] = {}
    for number in range(count):
        while number not in early:
            for pipe in multiprocessing.connection.wait(processes):
                try:
                    first, results = pipe.recv()
                    early.update(enumerate(results, start=first))
                except EOFError:
                    process = processes.pop(pipe)
                    process.join()
                    if process.exitcode:
                        raise UserError(
                            f"a process that reads labels was killed (exit code {process.exitcode}): mostly for want "
                            "of memory, or because a label file was cut while it was read; start again"
                        ) from None
        yield early.pop(number)


def _run_job(job: _Job, options: LabelOptions, convert: Callable[[Facts], T] | None) -> _Result:
    report, frames, count = LabelReport(), [], 0
    try:
        for data in _load_job(job):
            raw_frames, wrapped = decode_frames(data)
            if not raw_frames and job.stop is None:
                raise _BadFile("no frames in it; a BDD100K label file is a JSON array of frames")
            frames += _read_frames(raw_frames, wrapped, options, report)
            count += len(raw_frames)
    except _BadFile as error:
        return _Result([], 0, report, (str(error), error.position))
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return _Result([], 0, report, (f"can't be read: {error}", None))
    return _finish(frames, count, report, convert)


def _finish(frames: list[Frame], count: int, report: LabelReport, convert) -> _Result:
    report.add(frames)
    return _Result([(name, convert(facts)) for name, facts in frames] if convert else frames, count, report)


def _read_frames(raw_frames: list, wrapped: bool, options: LabelOptions, report: LabelReport) -> list[Frame]:
    frames = []
    for raw in raw_frames:
        try:
            frames.append(read_frame(raw, report, options, wrapped))
        except _BadFrame as error:
            name = raw.name if isinstance(raw, _Frame) else raw.get("name") if isinstance(raw, dict) else "?"
            report.skip(str(error), name)
    return frames


def _run_whole(job: _Job, result: _Result, consumed: int, options, convert) -> _Result:
    """Read a file again as a whole, from the frame `consumed` on, to know if only the cut was wrong."""
    reason, position = result.error
    try:
        size = job.path.stat().st_size
    except OSError as error:
        raise UserError(f"{job.path}: can't be read any more ({error.strerror}); see to the file") from None
    if job.stop is not None and size <= WHOLE:
        try:
            frames, wrapped = decode_frames(job.path.read_bytes())
            report = LabelReport()
            read = _read_frames(frames[consumed:], wrapped, options, report)
            return _finish(read, len(frames) - consumed, report, convert)
        except _BadFile as error:
            reason, position = str(error), error.position
    elif position is not None:
        position += job.start
    at = f" at byte {position:,} of {size:,}" if position is not None else ""
    raise UserError(f"{job.path}: not readable as JSON{at} ({reason}); is the download complete?")


def _load_job(job: _Job) -> Iterator[bytes | memoryview]:
    """The bytes of each label file of a job; of a stretch, the whole frames that start in it, as an array."""
    if job.members:
        with open(job.path, "rb") as archive:
            for member in job.members:
                yield _load_member(archive, member)
    elif job.path.suffix == ".gz":
        with gzip.open(job.path) as file:
            data = file.read(GZIP_LIMIT + 1)
        if len(data) > GZIP_LIMIT:
            raise _BadFile(f"unpacked it has more than {GZIP_LIMIT:,} bytes; unpack it first")
        yield data
    elif job.stop is None:
        yield job.path.read_bytes()
    else:
        yield _load_stretch(job)


def _load_member(archive, member: _Member) -> bytes:
    """One member of a zip archive, without opening the archive anew, which would read its whole directory again."""
    if member.size > WHOLE or member.flags & 1 or member.method not in _DECOMPRESS:
        raise _BadFile(f"its member {member.name} is larger than {WHOLE:,} bytes, encrypted or packed unusually")
    archive.seek(member.offset)
    header = archive.read(zipfile.sizeFileHeader)
    if len(header) < zipfile.sizeFileHeader or header[:4] != zipfile.stringFileHeader:
        raise _BadFile(f"its member {member.name} is damaged")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    archive.seek(name_length + extra_length, os.SEEK_CUR)
    data = _DECOMPRESS[member.method](archive.read(member.packed), member.size)
    if zlib.crc32(data) != member.crc:
        raise _BadFile(f"its member {member.name} is damaged")
    return data


_DECOMPRESS = {
    zipfile.ZIP_STORED: lambda packed, size: packed,
    zipfile.ZIP_DEFLATED: lambda packed, size: zlib.decompressobj(-15).decompress(packed, size + 1),
}


# Where a frame of an array ends and the next begins, if frames begin with their name, as all we know of do.
_BOUNDARY = re.compile(rb'\}\s*,\s*(?=\{\s*"name"\s*:)')


def _load_stretch(job: _Job) -> memoryview:
    """The frames whose boundary lies in [start, stop) of the file, as a JSON array of their own.

    The file is mapped, not copied. The brackets are written over the commas that stood there, in a copy of those pages.
    """
    base = job.start - job.start % mmap.ALLOCATIONGRANULARITY  # all in bytes; a map begins at a multiple of this
    with open(job.path, "rb") as file:
        length = min(job.stop + LOOKAHEAD, os.fstat(file.fileno()).st_size) - base
        if length <= 0:
            return memoryview(b"[]")  # the file has shrunk
        data = mmap.mmap(file.fileno(), length, offset=base, access=mmap.ACCESS_COPY)
    start, stop = 0, length
    if job.start:
        first = _find_boundary(data, job.start - base, job)
        if first is None or first.start() >= job.stop - base:
            return memoryview(b"[]")  # one long frame spans it all; a stretch before has it
        start = first.end() - 1
        data[start : start + 1] = b"["
    if end := _find_boundary(data, job.stop - base, job):
        stop = end.start() + 2
        data[stop - 1 : stop] = b"]"
    return memoryview(data)[start:stop]


def _find_boundary(data: mmap.mmap, at: int, job: _Job) -> re.Match | None:
    """The first boundary from `at` on; None at the end of the file."""
    found = _BOUNDARY.search(data, at)
    if found is None and job.stop + LOOKAHEAD < job.path.stat().st_size:
        raise _BadFile(f"no frame begins in {LOOKAHEAD:,} bytes")
    return found
