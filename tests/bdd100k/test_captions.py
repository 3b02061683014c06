"""The caption grammar: the reference's texts to the letter, and describe/parse_caption as exact inverses."""

import re

import pytest
from caption_facts import all_facts
from conftest import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st

from captioner.bdd100k.facts import (
    CLASSES,
    MAX_COUNT,
    SCENES,
    SYNONYMS,
    TIMES_OF_DAY,
    WEATHERS,
    Facts,
    ObjectKind,
)
from captioner.bdd100k.parsing import Reading, mark_caption, parse_caption, read_caption
from captioner.bdd100k.wording import STYLES, describe


@given(all_facts, st.sampled_from(STYLES))
def test_parse_inverts_describe(facts, style):
    reading = read_caption(describe(facts, style))
    assert reading.facts == facts
    assert reading.unread == reading.repeated == reading.contradicting == []


def read_grammar() -> dict[str, str]:
    """The rules of the grammar in docs/captions.md, without comments."""
    text = (
        (ROOT / "docs/captions.md").read_text(encoding="utf-8").split("<!-- grammar -->\n```abnf\n")[1].split("```")[0]
    )
    rules = re.sub(r" *;.*", "", text).replace("\n  ", " ").splitlines()
    return {name.strip(): rule for name, rule in (line.split(" = ", 1) for line in rules)}


def convert_rule(name: str, rules: dict[str, str]) -> str:
    """The regular expression of an ABNF rule."""
    pattern, ends = "", []
    for token in re.findall(r'"[^"]*"|1\*4DIGIT|\w+|\*\(|\S', rules[name]):
        if token in ("(", "*(", "["):
            pattern += "(?:"
            ends.append({"(": ")", "*(": ")*", "[": ")?"}[token])
        elif token in (")", "]"):
            pattern += ends.pop()
        elif token[0] == '"':
            pattern += re.escape(token[1:-1])
        else:
            words = {"/": "|", "SP": " ", "1*4DIGIT": "[0-9]{1,4}"}
            pattern += words[token] if token in words else f"(?:{convert_rule(token, rules)})"
    return pattern


CAPTION = re.compile(convert_rule("caption", read_grammar()))


@given(all_facts)
def test_captions_are_of_the_grammar_that_is_documented(facts):
    assert CAPTION.fullmatch(describe(facts))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("time", TIMES_OF_DAY),
        ("weather", WEATHERS),
        ("place", SCENES),
        ("class", CLASSES),
        ("classes", [plural for plural, *_ in CLASSES.values()]),
    ],
)
def test_the_grammar_that_is_documented_has_the_words_that_are_read(rule, words):
    assert re.findall('"(.*?)"', read_grammar()[rule]) == list(words)


@given(all_facts, all_facts, st.sampled_from(STYLES))
def test_different_facts_give_different_captions(one, other, style):
    assert (describe(one, style) == describe(other, style)) == (one == other)


@given(st.text() | st.text(alphabet="There isao2 9cars.,*\n"))
def test_any_text_is_read(text):
    reading = read_caption(text)
    assert parse_caption(text) == reading.facts


FACTS = Facts("evening", "clear", "highway", "red", {ObjectKind("car"): 1, ObjectKind("pedestrian", truncated=True): 1})
STREET = Facts(
    "daytime",
    "clear",
    "city street",
    "green",
    {
        ObjectKind("car"): 3,
        ObjectKind("bus"): 2,
        ObjectKind("car", occluded=True): 4,
        ObjectKind("car", truncated=True): 1,
        ObjectKind("car", True, True): 1,
        ObjectKind("drivable area"): 1,
        ObjectKind("lane"): 3,
        ObjectKind("person"): 2,
        ObjectKind("traffic sign", occluded=True): 1,
    },
)
GOLDEN = [
    (
        FACTS,
        "plain",
        "It is a evening scene in clear weather on a highway road. The traffic light is red. "
        "There is one car. There is one truncated pedestrian.",
    ),
    (
        STREET,
        "plain",
        "It is a daytime scene in clear weather on a city street road. The traffic light is green. "
        "There are 2 buses. There are 3 cars. There is one drivable area. There are 3 lanes. "
        "There are 4 partially occluded cars. There is one partially occluded traffic sign. "
        "There is one partially occluded truncated car. There are 2 persons. There is one truncated car.",
    ),
    (
        STREET,
        "markdown",
        "It is a **daytime** scene in **clear** weather on a **city street** road. Key visible objects are: "
        "The traffic light is **green**. There are **2 buses**. There are **3 cars**. "
        "There is one **drivable area**. There are **3 lanes**. There are **4 partially occluded cars**. "
        "There is one **partially occluded traffic sign**. There is one **partially occluded truncated car**. "
        "There are **2 persons**. There is one **truncated car**.",
    ),
    (
        STREET,
        "natural",
        "It is a daytime scene in clear weather on a city street. The traffic light is green. There are 2 buses. "
        "There are 9 cars, 4 of them partially occluded, one truncated, and one partially occluded and truncated. "
        "There is one drivable area. There are 3 lane markings. There are 2 people. "
        "There is one partially occluded traffic sign.",
    ),
    (FACTS, "natural", "It is an evening scene in clear weather on a highway. The traffic light is red. "
        "There is one car. There is one truncated pedestrian."),
    (Facts("dawn/dusk", "undefined", "residential"), "natural", "It is a dawn or dusk scene in a residential area."),
    (Facts("undefined", "undefined", "undefined"), "natural", "It is a driving scene."),
    (Facts("undefined", "clear", "tunnel"), "natural", "It is a driving scene in clear weather in a tunnel."),
    (Facts(objects={ObjectKind("car"): 1, ObjectKind("car", True, True): 1}), "natural",
        "There are 2 cars, one of them partially occluded and truncated."),
    (Facts(objects={ObjectKind("bus", True, True): 1, ObjectKind("person", True, True): 2}), "natural",
        "There is one partially occluded and truncated bus. There are 2 partially occluded and truncated people."),
    (Facts(objects={ObjectKind("bus", True, True): 1}), "plain", "There is one partially occluded truncated bus."),
    (Facts(objects={ObjectKind("other person", truncated=True): 2, ObjectKind("person"): 1,
                    ObjectKind("other vehicle", True, True): 1, ObjectKind("truck"): 1}), "natural",
        "There is one person. There is one truck. There are 2 other truncated people. "
        "There is one other partially occluded and truncated vehicle."),
    (Facts("undefined", "foggy", "undefined"), "plain",
        "It is a undefined scene in foggy weather on a undefined road."),
    (Facts("night", "rainy", "tunnel"), "markdown",
        "It is a **night** scene in **rainy** weather on a **tunnel** road."),
    (Facts(), "plain", ""),
]  # fmt: skip


@pytest.mark.parametrize(("facts", "style", "caption"), GOLDEN)
def test_facts_have_this_wording(facts, style, caption):
    assert describe(facts, style) == caption
    assert parse_caption(caption) == facts


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("It is a scene in a tunnel.", Facts("undefined", "undefined", "tunnel")),
        ("It is a scene.", Facts("undefined", "undefined", "undefined")),
        (
            "There are 5 cars, 2 of them truncated and one both.",
            Facts(objects={ObjectKind("car"): 2, ObjectKind("car", False, True): 2, ObjectKind("car", True, True): 1}),
        ),
        (
            "There are 2 partially occluded truncated other people.",
            Facts(objects={ObjectKind("other person", True, True): 2}),
        ),
    ],
)
def test_what_older_captions_say_is_read(caption, facts):
    assert read_caption(caption) == Reading(facts, [], [], [])


def test_generated_caption_of_the_reference_is_read():
    """Its first demo caption says one sentence twice and gives two numbers for one kind."""
    reading = read_caption(
        "It is a **daytime** scene in **clear** weather on a **city street** road. Key visible objects are: There "
        "are **3 cars**. There is one **drivable area**. There are **3 lanes**. There are **4 partially occluded "
        "cars**. There is one **partially occluded traffic sign**. There is one **partially occluded car**. There is "
        "one **partially occluded traffic sign**. "
    )
    assert reading.facts.objects[ObjectKind("car", occluded=True)] == 4
    assert reading.repeated == ["There is one **partially occluded traffic sign**."]
    assert reading.contradicting == ["There is one **partially occluded car**."]
    assert reading.unread == []


@pytest.mark.parametrize(
    "sentence",
    [
        "There are 0 cars.",
        "There are 2 cars",  # cut off
        "There are 99999 cars.",
        "There are two unicorns.",
        "There are 2 cars, 3 of them truncated.",
        "There are 2 cars, one of them truncated and one truncated.",
        "The traffic light is blue.",
        "It is a daytime scene in clear weather on a city street road",
        "<script>alert(1)</script>",
    ],
)
def test_unreadable_sentences_are_told(sentence):
    assert read_caption(sentence) == Reading(Facts(), [sentence], [], [], cut_off=not sentence.endswith("."))


@pytest.mark.parametrize(
    "arguments",
    [
        {"time_of_day": "noonish", "weather": "clear", "scene": "highway"},
        {"time_of_day": "night"},
        {"traffic_light": "blue"},
        {"objects": {ObjectKind("unicorn"): 1}},
        {"objects": {ObjectKind("car"): 0}},
        {"objects": {ObjectKind("car"): MAX_COUNT + 1}},
    ],
)
def test_facts_outside_the_tables_are_refused(arguments):
    with pytest.raises(ValueError):
        Facts(**arguments)


@given(all_facts, all_facts, st.sampled_from(STYLES))
def test_marks_add_up_to_the_caption(one, other, style):
    names = {kind.name for kind in one.objects}
    assume(len({SYNONYMS.get(name, name) for name in names}) == len(names))  # labels call a class by one name
    text = describe(one, style)
    assert "".join(piece for piece, _ in mark_caption(text, other, "invented")) == text
    verdicts = {verdict for _, verdict in mark_caption(text, one, "invented")}
    assert verdicts <= {"", "right"}  # held against its own facts, all is right


@given(st.text(max_size=100))
def test_any_text_is_marked(text):
    assert "".join(piece for piece, _ in mark_caption(text, Facts(), "invented")) == text


def test_each_piece_has_its_verdict():
    facts = Facts("night", "rainy", "highway", None, {ObjectKind("car"): 2})
    text = "It is a night scene in clear weather on a highway road. The traffic light is red. There are 3 cars. A dog."
    marked = {piece.strip(): verdict for piece, verdict in mark_caption(text, facts, "invented")}
    expected = {"night": "right", "clear": "wrong", "red": "invented", "3 cars": "wrong", "A dog.": "unread"}
    assert {piece: marked[piece] for piece in expected} == expected
    assert ("one bus", "missing") in mark_caption("There is one bus.", facts, "missing")
