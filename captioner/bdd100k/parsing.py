"""Text -> facts, and text held against facts.

parse_caption(describe(facts))    # == facts, for every style
"""

import functools
import itertools
import re
from dataclasses import dataclass
from typing import Literal

from captioner.bdd100k.facts import (
    CLASSES,
    LIGHTS,
    MAX_COUNT,
    SCENES,
    SYNONYMS,
    TIMES_OF_DAY,
    UNDEFINED,
    WEATHERS,
    Facts,
    ObjectKind,
    merge_synonyms,
)
from captioner.bdd100k.wording import OBJECTS_LEAD, SHARES, qualify


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

    @property
    def unfounded(self) -> int:
        """Sentences that are said and, whatever the labels hold, are not right: unread or contradicting."""
        return len(self.unread) + len(self.contradicting)

    @property
    def unfounded_objects(self) -> int:
        """Those that are taken for objects: all that can't be read, and a second count of objects counted before."""
        about_objects = [any(isinstance(slot, ObjectKind) for slot in _read_sentence(s)) for s in self.contradicting]
        return len(self.unread) + sum(about_objects)


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


def is_readable(text: str) -> bool:
    """Whether each of its sentences can be read, whatever they say together."""
    return all(_read_sentence(sentence.strip()) is not None for sentence in _SENTENCE.findall(text))


def _any_of(words) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_SENTENCE = re.compile(r"[^.\s][^.]*\.?")
_TIMES = {time.replace("/", " or "): time for time in TIMES_OF_DAY} | {time: time for time in TIMES_OF_DAY}
_PLACES = {place: scene for scene, place in SCENES.items() if place}
_KINDS = {  # what is counted, in the words of every style
    phrase: kind
    for kind in itertools.starmap(ObjectKind, itertools.product(CLASSES, (False, True), (False, True)))
    for noun in (kind.name, *CLASSES[kind.name])
    for phrase in (kind.qualifier + noun, qualify(noun, kind))
}
_SHARE_OF = {word: seen for seen, word in SHARES.items()} | {"both": (True, True)}  # both: in older captions
_COUNT = r"(?:one|[0-9]{1,5})"  # five digits: a class has four kinds of up to MAX_COUNT
_SHARE = rf"{_COUNT} (?:{_any_of(_SHARE_OF)})"
_PLAIN_SCENE = re.compile(
    rf"it is an? (?P<time>{_any_of(_TIMES)}) scene in (?P<weather>{_any_of(WEATHERS)}) weather "
    rf"on an? (?P<scene>{_any_of(SCENES)}) road\."
)
_NATURAL_SCENE = re.compile(
    rf"it is an? (?:(?P<time>{_any_of(_TIMES)}) |driving )?scene(?: in (?P<weather>{_any_of(WEATHERS)}) weather)?"
    rf"(?: (?P<place>{_any_of(_PLACES)}))?\."
)
_LIGHT = re.compile(rf"the traffic light is (?P<light>{_any_of(LIGHTS)})\.")
_OBJECTS = re.compile(
    rf"there (?:is|are) (?P<count>{_COUNT}) (?P<objects>{_any_of(_KINDS)})"
    rf"(?:, (?P<shares>{_COUNT} of them (?:{_any_of(_SHARE_OF)})(?:, {_SHARE})*(?:,? and {_SHARE})?))?\."
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
    kind, total, counts = _KINDS[match["objects"]], _to_int(match["count"]), {}
    if match["shares"]:
        if kind != ObjectKind(kind.name):
            return None
        told = re.findall(rf"({_COUNT}) ({_any_of(_SHARE_OF)})", match["shares"].replace(" of them", ""))
        counts = {ObjectKind(kind.name, *_SHARE_OF[word]): _to_int(count) for count, word in told}
        if len(counts) < len(told) or min(counts.values()) < 1:
            return None
    rest = total - sum(counts.values())
    if total < 1 or rest < 0 or max(rest, *counts.values(), 0) > MAX_COUNT:
        return None
    return {kind: rest, **counts} if rest else counts


def _to_int(number: str) -> int:
    return 1 if number == "one" else int(number)


Verdict = Literal["", "right", "wrong", "invented", "missing", "unread"]


def mark_caption(text: str, other: Facts, absent: Literal["invented", "missing"]) -> list[tuple[str, Verdict]]:
    """Cut `text` into pieces that add up to it, each with a verdict on what it states, held against `other` facts.

    `absent` is the verdict on what `other` says nothing about: invented for a prediction held against its reference's
    facts, missing for a reference held against the prediction's. Two names of one class are one.
    """
    other, pieces, end = merge_synonyms(other), [], 0
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
    """What facts, their synonyms merged, have for a slot."""
    if isinstance(slot, str):
        return getattr(facts, slot)
    return facts.objects.get(slot._replace(name=SYNONYMS.get(slot.name, slot.name)))


def _judge(pairs: list[tuple[str | int, str | int | None]], absent: Verdict) -> Verdict:
    """Verdict on what one piece states: (stated, what the other facts have) pairs."""
    if all(stated == there for stated, there in pairs):
        return "right" if pairs else ""
    return absent if all(there is None for _, there in pairs) else "wrong"
