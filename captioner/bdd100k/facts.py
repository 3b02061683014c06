"""Facts and text: what a caption says about a driving scene, and how it says it.

    facts = Facts("evening", "clear", "highway", "red", {ObjectKind("car"): 1})
    describe(facts)                   # 'It is a evening scene in clear weather on a highway road. ...'
    parse_caption(describe(facts))    # == facts, for every style

The vocabulary is closed and lies in the tables below; a class or an attribute value that is new belongs there
and nowhere else.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Style = Literal["plain", "markdown", "natural"]
STYLES: tuple[Style, ...] = get_args(Style)

UNDEFINED = "undefined"  # BDD100K's own word for an attribute that its annotators left open

# Attribute values: BDD100K's, then those that only the reference's README uses.
TIMES_OF_DAY = ("daytime", "night", "dawn/dusk", UNDEFINED, "morning", "afternoon", "evening", "dawn", "dusk")
WEATHERS = ("clear", "overcast", "partly cloudy", "rainy", "snowy", "foggy", UNDEFINED)
# value: where that is, in correct English
SCENES = {
    "city street": "on a city street",
    "highway": "on a highway",
    "residential": "in a residential area",
    "parking lot": "in a parking lot",
    "tunnel": "in a tunnel",
    "gas stations": "at a gas station",
    UNDEFINED: "",
}
LIGHTS = ("red", "yellow", "green")  # the first that is seen is the status: red > yellow > green
TRAFFIC_LIGHT = "traffic light"  # told by its status, never counted among the objects

# class: (regular plural, natural singular, natural plural)
CLASSES = {
    "bicycle": ("bicycles", "bicycle", "bicycles"),
    "bike": ("bikes", "bike", "bikes"),
    "bus": ("buses", "bus", "buses"),
    "car": ("cars", "car", "cars"),
    "caravan": ("caravans", "caravan", "caravans"),
    "drivable area": ("drivable areas", "drivable area", "drivable areas"),
    "lane": ("lanes", "lane marking", "lane markings"),
    "motor": ("motors", "motorbike", "motorbikes"),
    "motorcycle": ("motorcycles", "motorcycle", "motorcycles"),
    "other person": ("other persons", "other person", "other people"),
    "other vehicle": ("other vehicles", "other vehicle", "other vehicles"),
    "pedestrian": ("pedestrians", "pedestrian", "pedestrians"),
    "person": ("persons", "person", "people"),
    "rider": ("riders", "rider", "riders"),
    "traffic sign": ("traffic signs", "traffic sign", "traffic signs"),
    "trailer": ("trailers", "trailer", "trailers"),
    "train": ("trains", "train", "trains"),
    "truck": ("trucks", "truck", "trucks"),
}
MAX_COUNT = 9999  # of one kind in one caption

# what Facts may hold together
_ATTRIBUTES = frozenset([(None, None, None), *itertools.product(TIMES_OF_DAY, WEATHERS, SCENES)])

OBJECTS_LEAD = "Key visible objects are:"  # markdown style only


class ObjectKind(NamedTuple):
    """One kind of object that a caption counts: its class and how it is seen."""

    name: str
    occluded: bool = False
    truncated: bool = False

    @property
    def qualifier(self) -> str:
        return "partially occluded " * self.occluded + "truncated " * self.truncated

    @property
    def phrase(self) -> str:
        return self.qualifier + self.name


@dataclass(frozen=True)
class Facts:
    """What a caption says of one frame.

    `time_of_day`, `weather` and `scene` are all None when the frame has no such labels at all: its caption then has
    no first sentence. `traffic_light` is None when no lit light is labelled. `objects` maps ObjectKind to its
    count, 1 to MAX_COUNT. Raises ValueError for a value that is not in this module's tables.
    """

    time_of_day: str | None = None
    weather: str | None = None
    scene: str | None = None
    traffic_light: str | None = None
    objects: Mapping[ObjectKind, int] = field(default_factory=dict)

    @classmethod
    def of_known(cls, time_of_day, weather, scene, traffic_light, objects) -> "Facts":
        """The same for values that come out of this module's tables: they are not looked up there again."""
        facts = object.__new__(cls)
        facts.__dict__.update(
            time_of_day=time_of_day, weather=weather, scene=scene, traffic_light=traffic_light, objects=objects
        )
        return facts

    def __post_init__(self):
        attributes = (self.time_of_day, self.weather, self.scene)
        if attributes not in _ATTRIBUTES:
            for value, table in zip(attributes, (TIMES_OF_DAY, WEATHERS, SCENES), strict=True):
                if value not in table:
                    raise ValueError(f"{value!r} is not one of {', '.join(table)}")
        if self.traffic_light not in (None, *LIGHTS):
            raise ValueError(f"traffic light {self.traffic_light!r} is not one of {', '.join(LIGHTS)}")
        for kind, count in self.objects.items():
            if kind[0] not in CLASSES:
                raise ValueError(f"class {kind[0]!r} is not one of {', '.join(CLASSES)}")
            if not 1 <= count <= MAX_COUNT:
                raise ValueError(f"{count} x {kind.phrase!r}: a count is 1 to {MAX_COUNT}")


# --------------------------------------------------------------------------------------------------------------
# facts -> text


def describe(facts: Facts, style: Style = "plain") -> str:
    """Write `facts` as a caption. `parse_caption` is its inverse for every style."""
    if style == "natural":
        return _describe_natural(facts)
    bold = "**" if style == "markdown" else ""
    sentences = []
    if facts.time_of_day is not None:
        sentences.append(
            f"It is a {bold}{facts.time_of_day}{bold} scene in {bold}{facts.weather}{bold} weather "
            f"on a {bold}{facts.scene}{bold} road."
        )
    if bold and (facts.traffic_light or facts.objects):
        sentences.append(OBJECTS_LEAD)
    if facts.traffic_light:
        sentences.append(f"The traffic light is {bold}{facts.traffic_light}{bold}.")
    counted = sorted([_count_sentence(kind, count, bold) for kind, count in facts.objects.items()])
    return " ".join(sentences + [sentence for _, sentence in counted])


@functools.lru_cache(maxsize=4096)  # ten sentences a caption, and few that differ: most have been written before
def _count_sentence(kind: ObjectKind, count: int, bold: str) -> tuple[str, str]:
    """The phrase of a kind, by which sentences are sorted, and its sentence."""
    if count == 1:
        return kind.phrase, f"There is one {bold}{kind.phrase}{bold}."
    return kind.phrase, f"There are {bold}{count} {kind.qualifier}{CLASSES[kind.name][0]}{bold}."


def _describe_natural(facts: Facts) -> str:
    """Correct English: one sentence a class, and what is undefined is left unsaid."""
    sentences = []
    if facts.time_of_day is not None:
        time = "" if facts.time_of_day == UNDEFINED else facts.time_of_day.replace("/", " or ") + " "
        weather = "" if facts.weather == UNDEFINED else f" in {facts.weather} weather"
        place = f" {SCENES[facts.scene]}".rstrip()
        article = "an" if time.startswith(("a", "e")) else "a"
        sentences.append(f"It is {article} {time}scene{weather}{place}.")
    if facts.traffic_light:
        sentences.append(f"The traffic light is {facts.traffic_light}.")
    for name in sorted({kind.name for kind in facts.objects}):
        counts = {kind: count for kind, count in facts.objects.items() if kind.name == name}
        sentences.append(_describe_class(name, counts))
    return " ".join(sentences)


# how a share of one class is told, in this order
_SHARES = {(True, False): "partially occluded", (False, True): "truncated", (True, True): "both"}


def _describe_class(name: str, counts: Mapping[ObjectKind, int]) -> str:
    _, singular, plural = CLASSES[name]
    total = sum(counts.values())
    if len(counts) == 1:  # all alike: the qualifier stands before the noun
        [kind] = counts
        return f"There {'is' if total == 1 else 'are'} {_number(total)} {kind.qualifier}" + (
            f"{singular}." if total == 1 else f"{plural}."
        )
    shares = [
        f"{_number(counts[ObjectKind(name, *seen)])} {word}"
        for seen, word in _SHARES.items()
        if ObjectKind(name, *seen) in counts
    ]
    first, space, word = shares[0].partition(" ")
    shares[0] = f"{first} of them{space}{word}"
    told = shares[0] if len(shares) == 1 else ", ".join(shares[:-1]) + " and " + shares[-1]
    return f"There are {total} {plural}, {told}."


def _number(count: int) -> str:
    return "one" if count == 1 else str(count)


# --------------------------------------------------------------------------------------------------------------
# text -> facts


@dataclass(frozen=True)
class Reading:
    """What was read in a text. Every sentence of it is in `facts` or in one of the three lists.

    `unread`: not a sentence of any style. `repeated`: says again what an earlier sentence said.
    `contradicting`: gives another value for what an earlier sentence said; the earlier one stands.
    `cut_off`: the last sentence has no end.
    """

    facts: Facts
    unread: list[str]
    repeated: list[str]
    contradicting: list[str]
    cut_off: bool = False


def parse_caption(text: str) -> Facts:
    """The facts in `text`, whatever the style. Never raises; `read_caption` also tells what it could not read."""
    return read_caption(text).facts


def read_caption(text: str) -> Reading:
    """Read any text sentence by sentence. Never raises."""
    claims: dict[str | ObjectKind, str | int] = {}
    unread, repeated, contradicting = [], [], []
    for sentence in map(str.strip, _SENTENCE.findall(text)):
        claimed = _read_sentence(sentence)
        if claimed is None:
            unread.append(sentence)
        elif any(claims.get(slot, value) != value for slot, value in claimed.items()):
            contradicting.append(sentence)
        elif claimed.keys() <= claims.keys():
            if claimed:  # a lead such as "Key visible objects are:" claims nothing
                repeated.append(sentence)
        else:
            claims.update(claimed)
    attributes = {slot: claims.pop(slot) for slot in list(claims) if isinstance(slot, str)}
    cut_off = bool(text.strip()) and not text.rstrip().endswith(".")
    return Reading(Facts(**attributes, objects=claims), unread, repeated, contradicting, cut_off)


def _any_of(words) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_SENTENCE = re.compile(r"[^.\s][^.]*\.?")
_TIMES = {time.replace("/", " or "): time for time in TIMES_OF_DAY} | {time: time for time in TIMES_OF_DAY}
_PLACES = {place: scene for scene, place in SCENES.items() if place}
_NOUNS = {noun: name for name, forms in CLASSES.items() for noun in (name, *forms)}
_SHARE_OF = {word: seen for seen, word in _SHARES.items()}
_COUNT = r"(?:one|[0-9]{1,5})"  # five digits: a class has four kinds of up to MAX_COUNT
_SHARE = rf"{_COUNT} (?:{_any_of(_SHARE_OF)})"

_PLAIN_SCENE = re.compile(
    rf"it is an? (?P<time>{_any_of(_TIMES)}) scene in (?P<weather>{_any_of(WEATHERS)}) weather "
    rf"on an? (?P<scene>{_any_of(SCENES)}) road\."
)
_NATURAL_SCENE = re.compile(
    rf"it is an? (?:(?P<time>{_any_of(_TIMES)}) )?scene(?: in (?P<weather>{_any_of(WEATHERS)}) weather)?"
    rf"(?: (?P<place>{_any_of(_PLACES)}))?\."
)
_LIGHT = re.compile(rf"the traffic light is (?P<light>{_any_of(LIGHTS)})\.")
_OBJECTS = re.compile(
    rf"there (?:is|are) (?P<count>{_COUNT}) (?P<occluded>partially occluded )?(?P<truncated>truncated )?"
    rf"(?P<noun>{_any_of(_NOUNS)})"
    rf"(?:, (?P<shares>{_COUNT} of them (?:{_any_of(_SHARE_OF)})(?:, {_SHARE})*(?: and {_SHARE})?))?\."
)


@functools.lru_cache(maxsize=2**14)  # captions are made of the same sentences again and again
def _read_sentence(sentence: str) -> dict[str | ObjectKind, str | int] | None:
    """{slot: value} of one sentence, a slot being a field of Facts or an ObjectKind; None when unreadable."""
    text = " ".join(sentence.replace("**", "").lower().split())
    text = text.removeprefix(OBJECTS_LEAD.lower()).strip()
    if not text:
        return {}
    if match := _PLAIN_SCENE.fullmatch(text):
        return {"time_of_day": _TIMES[match["time"]], "weather": match["weather"], "scene": match["scene"]}
    if match := _NATURAL_SCENE.fullmatch(text):
        return {
            "time_of_day": _TIMES[match["time"] or UNDEFINED],
            "weather": match["weather"] or UNDEFINED,
            "scene": _PLACES.get(match["place"], UNDEFINED),
        }
    if match := _LIGHT.fullmatch(text):
        return {"traffic_light": match["light"]}
    if match := _OBJECTS.fullmatch(text):
        return _read_objects(match)
    return None


def _read_objects(match: re.Match) -> dict[ObjectKind, int] | None:
    name, total = _NOUNS[match["noun"]], _to_int(match["count"])
    kind = ObjectKind(name, match["occluded"] is not None, match["truncated"] is not None)
    counts = {}
    if match["shares"]:
        if kind != ObjectKind(name):
            return None
        told = re.findall(rf"({_COUNT}) ({_any_of(_SHARE_OF)})", match["shares"].replace(" of them", ""))
        counts = {ObjectKind(name, *_SHARE_OF[word]): _to_int(count) for count, word in told}
        if len(counts) < len(told) or min(counts.values()) < 1:
            return None
    rest = total - sum(counts.values())
    if total < 1 or rest < 0 or max(rest, *counts.values(), 0) > MAX_COUNT:
        return None
    return {kind: rest, **counts} if rest else counts


def _to_int(number: str) -> int:
    return 1 if number == "one" else int(number)


# --------------------------------------------------------------------------------------------------------------
# text against facts

Verdict = Literal["", "right", "wrong", "invented", "missing", "unread"]


def mark_caption(text: str, other: Facts, absent: Literal["invented", "missing"]) -> list[tuple[str, Verdict]]:
    """Cut `text` into pieces that add up to it, each with a verdict on what it states, held against `other` facts.

    `absent` is the verdict on what `other` says nothing about: invented for a prediction held against its reference's
    facts, missing for a reference held against the prediction's.
    """
    pieces, end = [], 0
    for match in _SENTENCE.finditer(text):
        pieces += [(text[end : match.start()], ""), *_mark_sentence(match[0], other, absent)]
        end = match.end()
    return [piece for piece in [*pieces, (text[end:], "")] if piece[0]]


def _mark_sentence(sentence: str, other: Facts, absent: Verdict) -> list[tuple[str, Verdict]]:
    claimed = _read_sentence(sentence.strip())
    if claimed is None:
        return [(sentence, "unread")]
    if not claimed.keys() & _SURFACES.keys():
        verdict = _judge([(value, _find_fact(other, slot)) for slot, value in claimed.items()], absent)
        lead, told, end = _LEAD.fullmatch(sentence).groups()
        return [(lead, ""), (told, verdict), (end, "")]
    pieces, end = [], 0
    for slot, surfaces in _SURFACES.items():  # the scene's sentence: the words of each attribute by themselves
        words = [surface for surface, value in surfaces.items() if value == claimed[slot]]  # its own name comes first
        found = next(filter(None, (re.compile(re.escape(word)).search(sentence.lower(), end) for word in words)), None)
        if found and len(sentence.lower()) == len(sentence):
            verdict = _judge([(claimed[slot], _find_fact(other, slot))], absent)
            pieces += [(sentence[end : found.start()], ""), (sentence[found.start() : found.end()], verdict)]
            end = found.end()
    return [*pieces, (sentence[end:], "")]


_LEAD = re.compile(r"(\s*(?:(?:there (?:is|are)|the traffic light is)\s+)?)(.*?)(\.?)", re.IGNORECASE | re.DOTALL)

_SURFACES = {  # what an attribute's value looks like in a caption
    "time_of_day": {time: time for time in TIMES_OF_DAY} | _TIMES,
    "weather": {weather: weather for weather in WEATHERS},
    "scene": {scene: scene for scene in SCENES} | _PLACES,
}


def _find_fact(facts: Facts, slot: str | ObjectKind) -> str | int | None:
    return getattr(facts, slot) if isinstance(slot, str) else facts.objects.get(slot)


def _judge(pairs: list[tuple[str | int, str | int | None]], absent: Verdict) -> Verdict:
    """Verdict on what one piece states: (stated, what the other facts have) pairs."""
    if all(stated == there for stated, there in pairs):
        return "right" if pairs else ""
    return absent if all(there is None for _, there in pairs) else "wrong"
