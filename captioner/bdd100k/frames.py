"""One frame's JSON -> its facts, in all variants of BDD100K's labels. Opens no file."""

import contextlib
import functools
import re
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, Literal, TypeVar

import msgspec

from captioner.bdd100k.facts import (
    AREAS,
    CLASSES,
    LIGHTS,
    MAX_COUNT,
    SCENES,
    TIMES_OF_DAY,
    TRAFFIC_LIGHT,
    UNDEFINED,
    WEATHERS,
    Facts,
    Frame,
    ObjectKind,
)
from captioner.bdd100k.label_report import LabelReport

# Names that an image file may have: no folder, no control character, nothing that a CSV or a spreadsheet acts on.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
ClassNames = Literal["file", "2018", "det20"]
# The same class in the 2018 release, in det_20, and in other variants.
_SYNONYMS = [
    ("person", "pedestrian"),
    ("bike", "bicycle"),
    ("motor", "motorcycle"),
    ("drivable area", "drivable area", "area/drivable", "area/alternative"),
]
_LIGHT_OF = {"g": "green", "y": "yellow", "r": "red", "green": "green", "yellow": "yellow", "red": "red"}
_NO_LIGHT = ("none", "na", None)
NEAR_DUPLICATE_IOU = 0.85  # above it two boxes of one class are taken for the same object boxed twice


@dataclass(frozen=True)
class LabelOptions:
    """How labels are read. The defaults give the captions of the reference."""

    class_names: ClassNames = "file"  # person (2018) or pedestrian (det20); file: as the file has them
    lanes: bool = True  # count lanes and drivable areas like objects
    merge_duplicates: bool = False  # count near-duplicate boxes once
    min_box_size: float = 0.0  # pixels of the shorter side below which a box is not counted
    without_scene: Literal["skip", "caption"] = "skip"  # frames with no scene attributes


DEFAULT_OPTIONS = LabelOptions()


class BadFrame(Exception):
    """A frame that can't be captioned; the message is the reason that the report counts."""


class BadFile(Exception):
    """A file that is not JSON. `position` is the byte at which that shows, if known."""

    def __init__(self, reason: str, position: int | None = None):
        super().__init__(reason)
        self.position = position


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
        raise BadFile(str(error), int(byte[1]) if byte else len(data)) from None
    except RecursionError:
        raise BadFile("nested too deep", None) from None


def _decode_untyped(data: bytes | memoryview) -> tuple[list, bool]:
    value = msgspec.json.decode(data)
    if isinstance(value, dict):
        wrapped = "name" not in value and isinstance(value.get("frames"), list)
        return (value["frames"], True) if wrapped else ([value], False)
    return (value, False) if isinstance(value, list) else ([], False)


def read_frame(
    raw: object, report: LabelReport, options: LabelOptions = DEFAULT_OPTIONS, wrapped: bool = False
) -> Frame:
    """One raw frame, a JSON value or decoded by decode_frames, as Frame. Raises BadFrame with the reason."""
    if not isinstance(raw, _Frame):
        try:
            raw = msgspec.convert(raw, _Frame[str, Any])
        except (msgspec.ValidationError, RecursionError) as error:
            raise BadFrame(f"wrong type: {error}") from None
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
        raise BadFrame("no scene attributes, as in tracking and segmentation sets")
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
        raise BadFrame("no name")
    if raw.frames is not None and "." not in name:  # one file an image
        name += ".jpg"
    if not NAME.fullmatch(name):
        raise BadFrame("its name is not a plain file name")
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
        if name is None or (name in AREAS and not self.lanes):
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
        raise BadFrame(f"more than {MAX_COUNT} objects of one kind")
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
