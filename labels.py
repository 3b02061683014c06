"""BDD100K label files -> frames of facts. Knows the layouts of the files, and nothing of the wording of captions.

    report = LabelReport()
    for frame in read_labels([Path("bdd100k_labels_images_val.json")], report):
        print(frame.name, frame.facts)
    print(report)

Read so far: the 2018 arrays, det_20 arrays, Scalabel dumps bare or wrapped, one file an image, and folders of these.
A frame that cannot be used is left out, and counted in the report with its reason.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from captions import (
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
from config import UserError

# Names that an image file may have: no folder, no control character, nothing that a CSV or a spreadsheet acts on.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")

# The classes of the one-file-an-image layout that are named otherwise; "lane/..." are lanes.
_CLASS_OF = {"area/drivable": "drivable area", "area/alternative": "drivable area"}
_LIGHT_OF = {"g": "green", "y": "yellow", "r": "red", "green": "green", "yellow": "yellow", "red": "red"}
_NO_LIGHT = ("none", "na", None)


class Frame(NamedTuple):
    """One labelled picture. `name` is the file name of its image."""

    name: str
    facts: Facts


@dataclass
class LabelReport:
    """What was read, and what was left out and why. Counts are of frames, or of objects where the reason says so."""

    frames: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.frames:,} frames read, {self.skipped.total():,} left out"]
        lines += [f"  {count:>9,} left out: {reason}" for reason, count in self.skipped.most_common()]
        lines += [f"  {count:>9,} x {remark}" for remark, count in self.remarks.most_common()]
        return "\n".join(lines)


class _BadFrame(Exception):
    """A frame that cannot be captioned; the message is the reason that the report counts."""


def read_labels(paths: Sequence[Path], report: LabelReport) -> Iterator[Frame]:
    """Frames of the label files, and of the .json files of the folders, in `paths`; `report` is filled on the way.

    A name that comes twice is used once, the first time. Raises UserError for a path that is missing, for a file
    that is no label file, and when no frame at all is found.
    """
    seen: set[str] = set()
    files = find_label_files(paths)
    for file in tqdm(files, desc="reading labels", unit="file", disable=len(files) < 2):
        for raw in load_frames(file):
            try:
                frame = read_frame(raw, report)
                if frame.name in seen:
                    raise _BadFrame("its name came before")
            except _BadFrame as error:
                report.skipped[str(error)] += 1
                continue
            seen.add(frame.name)
            report.frames += 1
            yield frame
    if not seen:
        raise UserError(f"no usable frame in {', '.join(map(str, paths))}: {report}")


def find_label_files(paths: Sequence[Path]) -> list[Path]:
    """The files in `paths`, folders replaced by the .json files below them in alphabetical order."""
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.rglob("*.json"))
            if not found:
                raise UserError(f"{path}: no .json file in this folder; --labels takes BDD100K label files or folders")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give BDD100K labels with --labels, or try --demo")
    return files


def load_frames(file: Path) -> list:
    """The raw frames of one label file, whatever its layout: an array, a Scalabel wrapper, or one frame."""
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8
        raise UserError(f"{file}: not readable as JSON ({error}); is the download complete?") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    if isinstance(data, dict) and "name" not in data and isinstance(data.get("frames"), list):
        data = data["frames"]
    elif isinstance(data, dict):
        data = [data]
    if not isinstance(data, list) or not data:
        raise UserError(f"{file}: no frames in it; a BDD100K label file is a JSON array of frames")
    return data


def read_frame(raw: object, report: LabelReport) -> Frame:
    """One raw frame to its name and facts. Raises _BadFrame with the reason."""
    if not isinstance(raw, dict):
        raise _BadFrame("not a JSON object")
    attributes = raw.get("attributes")
    if not isinstance(attributes, dict):
        raise _BadFrame("no scene attributes (as in tracking and segmentation sets)")
    name = _read_name(raw)
    labels = _read_labels_list(raw)
    return Frame(
        name,
        Facts(
            _read_attribute(attributes, "timeofday", TIMES_OF_DAY, report),
            _read_attribute(attributes, "weather", WEATHERS, report),
            _read_attribute(attributes, "scene", SCENES, report),
            *_read_objects(labels, report),
        ),
    )


def _read_name(raw: dict) -> str:
    name = raw.get("name")
    if not isinstance(name, str):
        raise _BadFrame("no name")
    if not Path(name).suffix:  # the one-file-an-image layout
        name += ".jpg"
    if not NAME.fullmatch(name):
        raise _BadFrame("its name is not a plain file name")
    return name


def _read_labels_list(raw: dict) -> list:
    labels = raw.get("labels")
    frames = raw.get("frames")
    if labels is None and isinstance(frames, list) and frames and isinstance(frames[0], dict):
        labels = frames[0].get("objects")
    if labels is None:
        return []
    if not isinstance(labels, list) or not all(isinstance(label, dict) for label in labels):
        raise _BadFrame("its labels are not a list of JSON objects")
    return labels


def _read_attribute(attributes: dict, key: str, table, report: LabelReport) -> str:
    value = attributes.get(key)
    if value is None:
        return UNDEFINED
    if not isinstance(value, str) or value not in table:
        report.remarks[f"{key} {str(value)[:40]!r} is unknown, taken as {UNDEFINED}"] += 1
        return UNDEFINED
    return value


def _read_objects(labels: list[dict], report: LabelReport) -> tuple[str | None, dict[ObjectKind, int]]:
    """The status of the traffic lights (red > yellow > green) and the count of each other kind of object."""
    lights, counts = set(), Counter()
    for label in labels:
        category = label.get("category")
        if not isinstance(category, str):
            report.remarks["object without a category, not counted"] += 1
            continue
        attributes = label.get("attributes")
        attributes = attributes if isinstance(attributes, dict) else {}
        # early tracking files and exports capitalise: "Occluded", "Traffic Light Color"
        attributes = {key.lower().replace(" ", ""): value for key, value in attributes.items()}
        if category == TRAFFIC_LIGHT:
            lights.add(_read_light(attributes.get("trafficlightcolor"), report))
            continue
        category = "lane" if category.startswith("lane/") else _CLASS_OF.get(category, category)
        if category not in CLASSES:
            report.remarks[f"object of the unknown class {category[:40]!r}, not counted"] += 1
            continue
        kind = ObjectKind(category, attributes.get("occluded") is True, attributes.get("truncated") is True)
        counts[kind] += 1
    if max(counts.values(), default=0) > MAX_COUNT:
        raise _BadFrame(f"more than {MAX_COUNT} objects of one kind")
    return next((light for light in LIGHTS if light in lights), None), dict(counts)


def _read_light(color: object, report: LabelReport) -> str | None:
    if isinstance(color, list):  # older det_20 files and exports: [1, "G"]
        color = color[-1] if color else None
    if isinstance(color, str):
        color = color.lower()
        if color in _LIGHT_OF:
            return _LIGHT_OF[color]
    if color not in _NO_LIGHT:
        report.remarks[f"traffic light of the unknown colour {str(color)[:40]!r}, taken as none"] += 1
    return None
