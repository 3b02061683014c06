"""One frame's JSON -> its facts, in all variants of BDD100K's labels. Opens no file."""

import contextlib
import functools
import re
from collections.abc import Collection
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
    SYNONYMS,
    TIMES_OF_DAY,
    TRAFFIC_LIGHT,
    UNDEFINED,
    WEATHERS,
    Facts,
    Frame,
    ObjectKind,
)
from captioner.bdd100k.file_kinds import name_format
from captioner.bdd100k.label_report import LabelReport

# Names that an image file may have: no folder, no control character, nothing that a CSV or a spreadsheet acts on.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
ClassNames = Literal["file", "2018", "det20"]
# The same class in the 2018 release, in det_20, and in other variants.
_SYNONYMS = [
    *((name, other) for other, name in SYNONYMS.items()),
    ("drivable area", "drivable area", "area/drivable", "area/alternative", "direct", "alternative"),
    ("lane", "lane", "crosswalk", "double other", "double white", "double yellow", "road curb", "single other",
     "single white", "single yellow"),
]  # fmt: skip
_LIGHT_OF = {"g": "green", "y": "yellow", "r": "red", "green": "green", "yellow": "yellow", "red": "red"}
_NO_LIGHT = ("none", "na", None)
NEAR_DUPLICATE_IOU = 0.85  # above it two boxes of one class are taken for the same object boxed twice


@dataclass(frozen=True)
class LabelOptions:
    """How labels are read. The defaults give the captions of the reference."""

    class_names: ClassNames = "file"  # person (2018) or pedestrian (det20); file: as the file has them
    lanes: bool = True  # count lanes and drivable areas like objects
    merge_duplicates: bool = False  # count near-duplicate boxes once
    min_box_size: float = 0.0  # pixels of the shorter side below which a box is not counted; lights show at any size
    without_scene: Literal["skip", "caption"] = "skip"  # frames with none of timeofday, weather and scene


DEFAULT_OPTIONS = LabelOptions()


class BadFrame(Exception):
    """A frame that can't be captioned; the message is the reason that the report counts."""


class BadFile(Exception):
    """A file that is not JSON. `position` is the byte at which that shows, if known, `remedy` what helps."""

    def __init__(self, reason: str, position: int | None = None, remedy: str | None = None):
        super().__init__(reason)
        self.position, self.remedy = position, remedy


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


class _Moment(msgspec.Struct, Generic[Category, Light], gc=False):
    objects: list[_Label[Category, Light]] | None = None


class _Frame(msgspec.Struct, Generic[Category, Light], gc=False):
    name: str | None = None
    attributes: dict[str, Any] | None = None
    labels: list[_Label[Category, Light]] | msgspec.UnsetType | None = msgspec.UNSET
    frames: list[_Moment[Category, Light]] | None = None  # one file an image: objects are in frames[0]


class _Wrapper(msgspec.Struct, Generic[Category, Light], gc=False):
    frames: list[_Frame[Category, Light]]


class _Decoders:
    """Of each layout that a file may have, for labels with these types of category and light."""

    def __init__(self, category: object, light: object):
        self.array = msgspec.json.Decoder(list[_Frame[category, light]])
        self.frame = msgspec.json.Decoder(_Frame[category, light])
        self.wrapper = msgspec.json.Decoder(_Wrapper[category, light])

    def decode(self, data: bytes | memoryview) -> tuple[list[_Frame], bool]:
        """The frames, and whether they were in a Scalabel wrapper."""
        if re.match(rb"\s*\{", data) is None:
            return self.array.decode(data), False
        frames = _decode_lines(self.frame, data)
        if len(frames) == 1 and frames[0].name is None and frames[0].frames is not None:
            return self.wrapper.decode(data).frames, True
        return frames, False


def _decode_lines(decoder: msgspec.json.Decoder, data: bytes | memoryview) -> list:
    """The one value in `data`, or the objects of JSON lines."""
    try:
        return [decoder.decode(data)]
    except msgspec.DecodeError as error:
        trailing = re.search(r"trailing characters \(byte (\d+)\)", str(error))
        first = bytes(data[: int(trailing[1]) - 1]).strip() if trailing else b""
        if not first.startswith(b"{") or b"\n" in first:
            raise
        return decoder.decode_lines(data)


_USUAL, _ANY = _Decoders(_UsualCategory, _UsualLight), _Decoders(str, Any)


def decode_frames(data: bytes | bytearray | memoryview) -> tuple[list, bool]:
    """The frames of one label file's bytes, and whether they were in a Scalabel wrapper.

    Where a type is wrong or a key missing, the frames come back as plain JSON values, to be judged one by one. Raises
    BadFile for bytes that are not JSON.
    """
    data = memoryview(data)  # of which parts are no copies
    mark = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    try:
        for decoders in (_USUAL, _ANY):
            with contextlib.suppress(msgspec.ValidationError):
                frames, wrapped = decoders.decode(data[mark:])
                return _decode_untyped(data[mark:]) if _lack_a_key(frames) else (frames, wrapped)
        return _decode_untyped(data[mark:])
    except UnicodeDecodeError:
        reason, position = _find_bad_text(data)
        raise BadFile(reason, position) from None
    except msgspec.DecodeError as error:
        byte = re.search(r"\s*\(byte (\d+)\)", str(error))
        if byte is None:
            raise BadFile("it ends too early", len(data)) from None
        late = "trailing characters" in str(error)  # of these the byte after the first is told
        raise BadFile(str(error).replace(byte[0], ""), mark + int(byte[1]) - late) from None
    except RecursionError:
        raise BadFile("nested too deep", None) from None


def _find_bad_text(data: memoryview) -> tuple[str, int | None]:
    """Why `data` is no UTF-8, and its byte."""
    try:
        str(data, "utf-8")
    except UnicodeDecodeError as error:
        return f"no UTF-8: {error.reason}", error.start
    return "no UTF-8", None


def _lack_a_key(frames: list[_Frame]) -> bool:
    """Whether frames lack a key that labels have: it may be spelt in another case, or the file holds no labels.

    A frame may lack its labels, as long as not all frames do.
    """
    if any(frame.name is None or (frame.labels and frame.labels[0].category is None) for frame in frames):
        return True
    return all(frame.labels is msgspec.UNSET and frame.frames is None for frame in frames)


_KEYS = ["name", "attributes", "labels", "frames", "objects", "timeofday", "weather", "scene"]
_KEYS += ["category", "occluded", "truncated", "trafficLightColor", "box2d"]
_KEYS = {key.lower(): key for key in _KEYS}


def _spell_keys(value):
    """A JSON value with the keys that are ours in our spelling: Name, timeOfDay, Traffic Light Color."""
    if isinstance(value, list):
        return [_spell_keys(item) for item in value]
    if isinstance(value, dict):
        return {_KEYS.get(re.sub(r"[\s_-]", "", key).lower(), key): _spell_keys(item) for key, item in value.items()}
    return value


def _decode_untyped(data: bytes | memoryview) -> tuple[list, bool]:
    values = [_spell_keys(value) for value in _decode_lines(_UNTYPED, data)]
    if len(values) > 1:
        return values, False
    [value] = values
    if isinstance(value, dict):
        wrapped = value.get("name") is None and isinstance(value.get("frames"), list)
        return (value["frames"], True) if wrapped else (values, False)
    return (value, False) if isinstance(value, list) else ([], False)


_UNTYPED = msgspec.json.Decoder()


def read_frame(
    raw: object,
    report: LabelReport,
    options: LabelOptions = DEFAULT_OPTIONS,
    wrapped: bool = False,
    used: Collection[str] = (),
) -> Frame:
    """One raw frame, a JSON value or decoded by decode_frames, as Frame. Raises BadFrame with the reason.

    A frame whose name is in `used` is one too many.
    """
    value = raw
    if not isinstance(raw, _Frame):
        try:
            raw = msgspec.convert(raw, _Frame[str, Any])
        except (msgspec.ValidationError, RecursionError) as error:
            raise BadFrame(f"wrong type: {error}") from None
    if raw.name is None:
        found = name_format(value) if isinstance(value, dict) else None
        raise BadFrame(f"{found}, not BDD100K's; {WANTED_FRAME}" if found else "no name")
    report.variants[_name_variant(raw, wrapped)] += 1
    name = _read_name(raw)
    if name in used:
        raise BadFrame("its name came before, the first frame of a name is used")
    labels = raw.labels
    if labels is msgspec.UNSET:
        labels = None
    if labels is None and raw.frames:
        labels = raw.frames[0].objects
        if len(raw.frames) > 1:
            report.remarks["a file of several moments, of which the first is used"] += 1
    scene = _read_scene(raw.attributes or {}, report)
    if scene == NO_SCENE and options.without_scene == "skip":
        raise BadFrame("no scene attributes, as in tracking and segmentation sets; see --without-scene")
    light, objects = _read_objects(labels or [], report, options)
    if scene == NO_SCENE and light is None and not objects:
        raise BadFrame("neither scene attributes nor objects, of which a caption could tell")
    return Frame(name, Facts.of_known(*scene, light, objects))


WANTED_FRAME = 'wanted are frames {"name", "attributes", "labels"}'
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
    return "frames without a light attribute"  # with boxes or without: nothing else tells the releases apart


def _read_name(raw: _Frame) -> str:
    name = raw.name
    if raw.frames is not None and "." not in name:  # one file an image
        name += ".jpg"
    if not NAME.fullmatch(name):
        raise BadFrame("its name is not a plain file name")
    return name


_TABLES = {"timeofday": TIMES_OF_DAY, "weather": WEATHERS, "scene": SCENES}
NO_SCENE = (None, None, None)


def _read_scene(attributes: dict[str, Any], report: LabelReport) -> tuple[str | None, str | None, str | None]:
    """Time of day, weather and scene: NO_SCENE if none of them can be used, else undefined where one can't."""
    if not _TABLES.keys() <= attributes.keys():
        attributes = _spell_keys(attributes)
    values = tuple([_read_attribute(key, attributes.get(key), table, report) for key, table in _TABLES.items()])
    if None not in values:
        if values == (UNDEFINED,) * 3:
            report.choices["timeofday, weather and scene all labelled undefined, captioned so"] += 1
        return values
    return NO_SCENE if values == NO_SCENE else tuple(value or UNDEFINED for value in values)


def _read_attribute(key: str, value: Any, table, report: LabelReport) -> str | None:
    """The value in our spelling; None for one that is absent or unknown."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadFrame(f"wrong type: Expected `str | null`, got {value!r:.40} - at `$.attributes.{key}`")
    if value in table:
        return value
    if (plain := value.strip().lower()) in table:
        return plain
    report.remarks[f"{key} {value[:40]!r} is unknown, taken as {UNDEFINED}"] += 1
    return None


@functools.lru_cache(maxsize=4096)
def _class_of(category: str, names: ClassNames) -> str | None:
    """The class of a category in any variant's name or case, under the name that is wanted; None for an unknown one."""
    category = re.sub(r"[\s_]+", " ", category).strip().lower()
    if category.startswith("lane/"):
        return "lane"
    if category == TRAFFIC_LIGHT:
        return category
    for row in _SYNONYMS:
        if category in row:
            if names == "file":
                return category if category in CLASSES else row[0]
            return row[names == "det20"]
    return category if category in CLASSES else None


@functools.lru_cache(maxsize=4096)
def _kind_of(
    category: str | None, occluded: bool | None, truncated: bool | None, names: ClassNames, lanes: bool
) -> ObjectKind | None:
    """What a label that says this is counted as; None when it is not."""
    name = None if category is None else _class_of(category, names)
    if name in (None, TRAFFIC_LIGHT) or (name in AREAS and not lanes):
        return None
    return ObjectKind(name, bool(occluded), bool(truncated))


_PLAIN = _LabelAttributes()


def _read_objects(
    labels: list[_Label], report: LabelReport, options: LabelOptions
) -> tuple[str | None, dict[ObjectKind, int]]:
    """The status of the traffic lights (red > yellow > green) and the count of each other kind of object."""
    duplicates = _find_near_duplicates(labels)
    report.near_duplicates += len(duplicates)
    if options.merge_duplicates and duplicates:
        labels = [label for index, label in enumerate(labels) if index not in duplicates or _is_light(label)]
    if options.min_box_size:
        labels = _leave_out_small(labels, options.min_box_size, report)
    lights, counts = set(), {}
    for (category, occluded, truncated, light), count in _tally(labels).items():
        kind = _kind_of(category, occluded, truncated, options.class_names, options.lanes)
        if kind is not None:
            counts[kind] = counts.get(kind, 0) + count
        elif category is None:
            report.remarks["object without a category, not counted"] += count
        elif (name := _class_of(category, options.class_names)) == TRAFFIC_LIGHT:
            lights.add(_read_light(light, count, report))
        elif name is None:
            report.remarks[f"object of the unknown class {category[:40]!r}, not counted"] += count
    if len(labels) > MAX_COUNT and max(counts.values(), default=0) > MAX_COUNT:
        raise BadFrame(f"more than {MAX_COUNT} objects of one kind")
    return next((light for light in LIGHTS if light in lights), None), counts


def _is_light(label: _Label) -> bool:
    return label.category is not None and _class_of(label.category, "file") == TRAFFIC_LIGHT


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
    """Labels without small boxes. Lights stay: they are not counted, and what they show holds at any size."""

    def is_small(label: _Label) -> bool:
        box = label.box2d
        if box is None or label.category is None or min(box.x2 - box.x1, box.y2 - box.y1) >= min_size:
            return False
        return not _is_light(label)

    left = [label for label in labels if not is_small(label)]
    if len(left) < len(labels):
        report.choices[f"box smaller than {min_size:g} pixels, not counted"] += len(labels) - len(left)
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
