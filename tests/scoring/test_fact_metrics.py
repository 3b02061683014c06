"""Facts: hand-made cases, the ends of the scale, and that each figure measures what its name says."""

import math

import pytest

from captioner.bdd100k.facts import Facts, ObjectKind
from captioner.bdd100k.parsing import parse_caption, read_caption
from captioner.bdd100k.wording import describe
from captioner.scoring import bootstrap, text_metrics
from captioner.scoring.fact_metrics import count_confusion, measure_facts, pair_labels

CAR, BUS, HIDDEN_CAR = ObjectKind("car"), ObjectKind("bus"), ObjectKind("car", occluded=True)
FACTS = Facts("night", "rainy", "highway", "red", {CAR: 2, BUS: 1})


def score(said, references):
    """{group: {score: value}} of facts said."""
    measured = measure_facts([read_caption(describe(facts)) for facts in said], references)
    return {group: text_metrics.score(metric) for group, metric in measured.items()}


def test_shares_of_right_facts_are_counted():
    wrong = Facts("daytime", "rainy", "highway", None, {CAR: 3, BUS: 1})
    scores = score([FACTS, wrong], [FACTS, FACTS])["facts"]
    assert (scores["time_of_day"], scores["weather"], scores["traffic_light"]) == (0.5, 1.0, 0.5)
    assert scores["objects_precision"] == scores["objects_recall"] == scores["objects_f1"] == 0.75
    assert scores["whole_caption"] == 0.5
    # said: 6 + 5 statements, 6 + 3 of them right, of 12
    assert scores["facts_precision"] == pytest.approx(9 / 11)
    assert scores["facts_recall"] == pytest.approx(9 / 12)
    assert scores["facts_f1"] == pytest.approx(18 / 23)
    assert set(score([FACTS], [FACTS])["facts"].values()) == {1.0}


def test_a_fact_that_no_reference_states_is_not_scored():
    assert all(map(math.isnan, score([Facts(), FACTS], [Facts(), Facts()])["facts"].values()))
    only_light = score([Facts(traffic_light="red")], [Facts(traffic_light="red")])["facts"]
    assert math.isnan(only_light["time_of_day"]) and only_light["traffic_light"] == 1.0
    assert set(score([Facts()], [FACTS])["facts"].values()) == {0.0}


def test_confusions_and_macro_f1_are_right():
    said = [Facts("night", "clear", "highway"), Facts("daytime", "clear", "highway"), Facts(traffic_light="red")]
    references = [
        Facts("night", "clear", "highway"),
        Facts("night", "rainy", "highway"),
        Facts("night", "rainy", "tunnel"),
    ]
    labels, pairs = pair_labels(said, references, "weather")
    assert labels == ["clear", "rainy", "not said"]
    assert count_confusion(labels, pairs).tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0]]
    weather = score(said, references)["weather"]
    assert weather == {"accuracy": pytest.approx(1 / 3), "macro_f1": pytest.approx((2 / 3 + 0) / 2)}


def test_the_traffic_light_is_scored_by_status():
    lights = [("red", "red"), ("red", "green"), (None, "green"), (None, None), ("green", None)]  # said, labelled
    said, references = ([Facts("night", "clear", "highway", pair[side]) for pair in lights] for side in (0, 1))
    scores = score(said, references)["traffic_light"]
    assert scores["accuracy"] == pytest.approx(2 / 5)
    assert (scores["red_precision"], scores["red_recall"]) == (0.5, 1.0)
    assert (scores["green_precision"], scores["green_recall"], scores["green_f1"]) == (0, 0, 0)
    assert (scores["none_precision"], scores["none_recall"]) == (0.5, 0.5)


def test_each_class_is_scored_by_presence_and_count():
    said = [Facts("night", "clear", "highway", None, objects) for objects in ({CAR: 3}, {CAR: 2, HIDDEN_CAR: 1}, {})]
    labelled = [{CAR: 2}, {CAR: 2, HIDDEN_CAR: 3}, {BUS: 1}]
    scores = score(said, [Facts("night", "clear", "highway", None, objects) for objects in labelled])
    car, bus = scores["classes: car"], scores["classes: bus"]
    assert car["presence_f1"] == 1.0 and bus["presence_recall"] == 0.0
    assert (car["exact"], car["within_one"]) == (0.0, 0.5)  # 3 for 2, 3 for 5
    assert (car["mean_absolute_error"], car["bias"]) == (1.5, -0.5)
    assert (car["occluded_exact"], car["occluded_bias"]) == (0.0, -2.0)
    assert math.isnan(car["truncated_exact"])


def test_invented_objects_are_counted():
    said = [Facts("night", "clear", "highway", None, objects) for objects in ({CAR: 3, BUS: 1}, {HIDDEN_CAR: 1})]
    references = [Facts("night", "clear", "highway", None, {CAR: 1})] * 2
    scores = score(said, references)["hallucination"]
    assert {scores["CHAIRs"], scores["CHAIRs_read"]} == {0.5}
    assert scores["CHAIRi"] == scores["CHAIRi_read"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("There is one car.", set()),
        ("There is one car. A dog barks.", {"unread"}),
        ("There is one car. There is one car.", {"repeated"}),
        ("There is one car. There are 2 cars.", {"contradicting"}),
        ("There is one car. There is o", {"unread", "cut_off"}),
        ("", {"empty"}),
    ],
)
def test_faults_of_form_are_found(text, faults):
    form = text_metrics.score(measure_facts([read_caption(text)], [FACTS])["form"])
    assert {name for name, share in form.items() if share} == faults


def test_intervals_work_on_every_group():
    rides = bootstrap.Rides(["a", "b"], 20)
    for group, metric in measure_facts([read_caption(describe(FACTS)), read_caption("x")], [FACTS, FACTS]).items():
        figures = bootstrap.score_with_intervals(metric, rides)
        assert set(figures) == set(metric.names), group
        for name, figure in figures.items():
            if figure["low"] is None:  # undefined, or no share and the same in both captions
                assert figure["value"] is None or name == "macro_f1" or name.endswith(("error", "bias")), (group, name)
                continue
            assert figure["low"] <= figure["value"] + 1e-6 <= figure["high"] + 2e-6
    assert parse_caption("x") == Facts()
