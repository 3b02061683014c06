"""Facts -> text.

describe(facts)                   # 'It is a evening scene in clear weather on a highway road. ...'
"""

import functools
from collections.abc import Mapping
from typing import Literal, get_args

from captioner.bdd100k.facts import CLASSES, SCENES, UNDEFINED, Facts, ObjectKind

Style = Literal["plain", "markdown", "natural"]
STYLES: tuple[Style, ...] = get_args(Style)
OBJECTS_LEAD = "Key visible objects are:"  # markdown style only


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
        time = "driving" if facts.time_of_day == UNDEFINED else facts.time_of_day.replace("/", " or ")
        weather = "" if facts.weather == UNDEFINED else f" in {facts.weather} weather"
        place = f" {SCENES[facts.scene]}".rstrip()
        article = "an" if time.startswith(("a", "e")) else "a"
        sentences.append(f"It is {article} {time} scene{weather}{place}.")
    if facts.traffic_light:
        sentences.append(f"The traffic light is {facts.traffic_light}.")
    for name in sorted({kind.name for kind in facts.objects}, key=lambda name: (name.startswith(OTHER), name)):
        counts = {kind: count for kind, count in facts.objects.items() if kind.name == name}
        sentences.append(_describe_class(name, counts))
    return " ".join(sentences)


# (occluded, truncated): how it is told, in this order
SHARES = {
    (True, False): "partially occluded",
    (False, True): "truncated",
    (True, True): "partially occluded and truncated",
}
OTHER = "other "  # begins the names of classes that are told last; it stands before any qualifier


def _describe_class(name: str, counts: Mapping[ObjectKind, int]) -> str:
    _, singular, plural = CLASSES[name]
    total = sum(counts.values())
    if len(counts) == 1:  # all alike: the qualifier stands before the noun
        [kind] = counts
        verb, noun = ("is", singular) if total == 1 else ("are", plural)
        return f"There {verb} {_number(total)} {qualify(noun, kind)}."
    shares = [
        f"{_number(counts[ObjectKind(name, *seen)])} {word}"
        for seen, word in SHARES.items()
        if ObjectKind(name, *seen) in counts
    ]
    shares[0] = shares[0].replace(" ", " of them ", 1)
    told = ", ".join(shares[:2]) + f", and {shares[2]}" if len(shares) == 3 else " and ".join(shares)
    return f"There are {total} {plural}, {told}."


def qualify(noun: str, kind: ObjectKind) -> str:
    """The noun with how the objects are seen: partially occluded and truncated cars, other truncated people."""
    look = f"{SHARES[kind[1:]]} " if kind[1:] in SHARES else ""
    _, other, rest = noun.rpartition(OTHER)
    return other + look + rest


def _number(count: int) -> str:
    return "one" if count == 1 else str(count)
