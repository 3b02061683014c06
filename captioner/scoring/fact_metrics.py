"""What captions get right: facts read in them against the facts of the labels.

    metrics = measure_facts([read_caption("There is one car.")], [Facts(objects={ObjectKind("car"): 1})])

Statistics of each caption, so that bootstrap and slices work as for text (see bootstrap.Metric). A sentence that can't
be read or that contradicts an earlier one counts as said and wrong. Shapes: N captions, K statistics, L labels.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from captioner.bdd100k.facts import AREAS, CLASSES, LIGHTS, SCENES, TIMES_OF_DAY, WEATHERS, Facts, merge_synonyms
from captioner.bdd100k.parsing import Reading
from captioner.scoring.bootstrap import Metric
from captioner.scoring.text_metrics import divide, measure_mean

ATTRIBUTES = {"time_of_day": TIMES_OF_DAY, "weather": WEATHERS, "scene": tuple(SCENES)}
NOT_SAID = "not said"  # the label of a prediction that gives no value
NO_LIGHT = "none"  # no lit light is labelled, or said to be there
LOOKS = ("", "occluded_", "truncated_")  # of the objects of a class all are counted, the occluded, the truncated


def measure_facts(predictions: Sequence[Reading], references: Sequence[Facts]) -> dict[str, Metric]:
    """{group: Metric} of all that is scored on facts. "classes: car" and so on are groups too.

    Two names of one class, such as pedestrian and person, are one class.
    """
    predictions = [dataclasses.replace(reading, facts=merge_synonyms(reading.facts)) for reading in predictions]
    references = [merge_synonyms(facts) for facts in references]
    said = [reading.facts for reading in predictions]
    groups = {"facts": measure_shares(predictions, references)}
    for name in (*ATTRIBUTES, "traffic_light"):
        labels, pairs = pair_labels(said, references, name)
        groups[name] = measure_confusion(labels, pairs, each=name == "traffic_light")
    groups["hallucination"] = measure_hallucination(predictions, references)
    groups["form"] = measure_form(predictions)
    stated = np.array([facts != Facts() for facts in references])  # a reference without any fact is not scored
    got, there = count_classes(said) * stated[:, None, None], count_classes(references)
    seen = [place for place in range(len(CLASSES)) if got[:, place].any() or there[:, place].any()]
    names = list(CLASSES)
    return groups | {f"classes: {names[place]}": measure_class(got[:, place], there[:, place]) for place in seen}


# --------------------------------------------------------------------------------------------------------------
# a score and what it is a share of

Figure = tuple[np.ndarray, np.ndarray | float]  # a score, and how many things it is a share of; NaN: it is no share


def make_metric(
    names: tuple[str, ...], statistics: np.ndarray, list_figures: Callable[[np.ndarray], list[Figure]]
) -> Metric:
    """The metric with the figures that list_figures(sums of statistics) gives, one for each name."""

    def stack(part: int, sums: np.ndarray) -> np.ndarray:
        return np.stack([np.broadcast_to(figure[part], sums.shape[:-1]) for figure in list_figures(sums)], axis=-1)

    return Metric(names, statistics, partial(stack, 0), partial(stack, 1))


def make_share(right: np.ndarray, trials: np.ndarray) -> Figure:
    return divide(right, trials), trials


def compare_sets(right: np.ndarray, said: np.ndarray, there: np.ndarray) -> list[Figure]:
    """Precision, recall, F1; NaN where there is nothing to find, and precision 0 where nothing is said of it.

    They are shares of the things said, of those there, and of the mean of the two.
    """
    undefined = np.where(there == 0, np.nan, 0.0)
    precision = np.where(said == 0, 0.0, divide(right, said)) + undefined
    f1 = divide(2 * right, said + there) + undefined
    return [(precision, said), make_share(right, there), (f1, (said + there) / 2)]


# --------------------------------------------------------------------------------------------------------------
# shares of facts


def list_statements(facts: Facts) -> set[tuple]:
    """All that facts say, one item a statement: the attributes, the status of the light, each kind with its count."""
    stated = {(name, getattr(facts, name)) for name in (*ATTRIBUTES, "traffic_light")}
    return {(name, value) for name, value in stated if value is not None} | set(facts.objects.items())


SHARES = (
    *("facts_precision", "facts_recall", "facts_f1", "facts_precision_read"),
    *("time_of_day", "weather", "scene", "traffic_light", "whole_caption"),
    *("objects_precision", "objects_recall", "objects_f1", "boxed_precision", "boxed_recall", "boxed_f1"),
)


def count_right(reading: Reading, reference: Facts) -> tuple[int, int, int]:
    """What a caption says right, all that it says, and all that there is to say, in statements."""
    mine, theirs = (list_statements(merge_synonyms(facts)) for facts in (reading.facts, reference))
    return len(mine & theirs), len(mine) + reading.unfounded, len(theirs)


def measure_shares(predictions: Sequence[Reading], references: Sequence[Facts]) -> Metric:
    """Shares, 0 to 1, of facts that are right.

    Precision, recall and F1, pooled over all captions: of all statements (facts_), of the object sentences (objects_,
    right when kind and count both are) and of those without lanes and drivable areas (boxed_). What can't be read or
    contradicts counts as said, but not in facts_precision_read. Accuracy of the attributes and of the traffic light's
    status ("none" included), and of whole captions, which say every fact right and nothing else. An attribute counts
    where the reference states it, the light where the reference states anything: a reference without any fact is not
    scored.
    """
    rows = [_count_statements(reading, facts) for reading, facts in zip(predictions, references, strict=True)]

    def list_figures(sums: np.ndarray) -> list[Figure]:
        right, said, there, unfounded, *others = np.moveaxis(sums, -1, 0)
        read, *_ = compare_sets(right, said - unfounded, there)
        objects, boxed = compare_sets(*others[:3]), compare_sets(*others[3:6])
        accuracies = [make_share(*others[at : at + 2]) for at in range(6, len(others), 2)]
        return [*compare_sets(right, said, there), read, *accuracies, *objects, *boxed]

    return make_metric(SHARES, np.array(rows, dtype=float), list_figures)


def _count_statements(reading: Reading, reference: Facts) -> list[int]:
    """The statistics of a caption for measure_shares(), all 0 for a reference without any fact.

    How many of all statements are right, said, there, and said but unfounded; how many object sentences are right, said
    and there, and how many of those without lanes and drivable areas; then whether each attribute, the traffic light
    and the whole caption is right, and whether it counts.
    """
    if reference == Facts():
        return [0] * 20
    said, extra = reading.facts, reading.unfounded_objects
    right = dict(said.objects.items() & reference.objects.items())
    boxed = [sum(kind.name not in AREAS for kind in kinds) for kinds in (right, said.objects, reference.objects)]
    row = [*count_right(reading, reference), reading.unfounded]
    row += [len(right), len(said.objects) + extra, len(reference.objects), boxed[0], boxed[1] + extra, boxed[2]]
    for name in ATTRIBUTES:
        value = getattr(reference, name)
        row += [value is not None and getattr(said, name) == value, value is not None]
    row += [said.traffic_light == reference.traffic_light and said != Facts(), 1]
    return [*row, said == reference and not reading.unfounded, 1]


# --------------------------------------------------------------------------------------------------------------
# attributes and traffic light


def pair_labels(said: Sequence[Facts], references: Sequence[Facts], name: str) -> tuple[list[str], np.ndarray]:
    """Labels that occur, and (N, 2) the places among them of the reference's label and the prediction's.

    -1 twice for a caption whose reference does not state the attribute.
    """
    table = (*LIGHTS, NO_LIGHT) if name == "traffic_light" else ATTRIBUTES[name]
    pairs = []
    for p, r in zip(said, references, strict=True):
        expected, got = getattr(r, name), getattr(p, name)
        if name == "traffic_light":
            expected = (expected or NO_LIGHT) if r != Facts() else None
            got = (got or NO_LIGHT) if p != Facts() else None
        pairs.append((expected, got or NOT_SAID))
    seen = {label for pair in pairs if pair[0] is not None for label in pair}
    labels = [label for label in (*table, NOT_SAID) if label in seen]
    places = {label: place for place, label in enumerate(labels)}
    nowhere = (-1, -1)
    rows = [(places[there], places[got]) if there is not None else nowhere for there, got in pairs]
    return labels, np.array(rows).reshape(-1, 2)


def count_confusion(labels: list[str], pairs: np.ndarray) -> np.ndarray:
    """(L, L) captions, by the reference's label (row) and the prediction's (column)."""
    there, got = pairs[pairs[:, 0] >= 0].T
    return np.bincount(there * len(labels) + got, minlength=len(labels) ** 2).reshape(len(labels), len(labels))


def measure_confusion(labels: list[str], pairs: np.ndarray, each: bool) -> Metric:
    """Accuracy and macro-F1, the mean F1 of the labels that references have; precision, recall and F1 of `each` too.

    The mean is over the same labels in every resample: one that a resample lacks has F1 0 there.
    """
    values = [label for label in labels if label != NOT_SAID]
    kinds = ("precision", "recall", "f1")
    names = [f"{label}_{kind}" for label in values for kind in kinds] if each else []
    is_label = pairs[:, :, None] == np.arange(len(labels))  # (N, 2, L)
    there, got = is_label[:, 0], is_label[:, 1]
    in_references = there.any(axis=0)

    def list_figures(sums: np.ndarray) -> list[Figure]:
        right, got, there = np.split(sums, 3, axis=-1)
        f1 = np.where(right > 0, divide(2 * right, there + got), 0)[..., in_references]
        figures = [make_share(right.sum(axis=-1), there.sum(axis=-1))]
        figures.append((divide(f1.sum(axis=-1), in_references.sum()), math.nan))
        for place in range(len(values) if each else 0):
            figures += compare_sets(right[..., place], got[..., place], there[..., place])
        return figures

    return make_metric(("accuracy", "macro_f1", *names), np.hstack([there & got, got, there]), list_figures)


# --------------------------------------------------------------------------------------------------------------
# objects


def count_classes(captions: Sequence[Facts]) -> np.ndarray:
    """(N, classes, 3): objects of each class, all of them, the occluded ones and the truncated ones."""
    places = {name: place for place, name in enumerate(CLASSES)}
    counts = np.zeros((len(captions), len(places), len(LOOKS)), dtype=np.int64)
    for row, facts in enumerate(captions):
        for (name, occluded, truncated), count in facts.objects.items():
            counts[row, places[name]] += (count, count * occluded, count * truncated)
    return counts


def measure_class(said: np.ndarray, labelled: np.ndarray) -> Metric:
    """Presence and counts of one class, from its objects (N, 3) in predictions and references.

    Precision, recall and F1 of naming it at all. Of the captions in which prediction or reference count some: the share
    with the exact count, and within one; the mean absolute error and the bias (said less labelled) in objects; the same
    of the occluded and of the truncated ones.
    """
    got, there = said[:, 0] > 0, labelled[:, 0] > 0
    columns, names = [got & there, got, there], ["presence_precision", "presence_recall", "presence_f1"]
    for place, look in enumerate(LOOKS):
        error, counted = said[:, place] - labelled[:, place], (said[:, place] > 0) | (labelled[:, place] > 0)
        columns += [counted, counted & (error == 0), counted & (np.abs(error) <= 1), np.abs(error), error]
        names += [look + figure for figure in ("exact", "within_one", "mean_absolute_error", "bias")]

    def list_figures(sums: np.ndarray) -> list[Figure]:
        present, *looks = np.split(sums, range(3, len(columns), 5), axis=-1)
        figures = compare_sets(*np.moveaxis(present, -1, 0))
        for look in looks:
            counted, exact, within_one, error, bias = np.moveaxis(look, -1, 0)
            figures += [make_share(exact, counted), make_share(within_one, counted)]
            figures += [(divide(error, counted), math.nan), (divide(bias, counted), math.nan)]
        return figures

    return make_metric(tuple(names), np.stack(columns, axis=-1).astype(np.float32), list_figures)


CHAIR = ("CHAIRs", "CHAIRi")


def measure_hallucination(predictions: Sequence[Reading], references: Sequence[Facts]) -> Metric:
    """CHAIR (Rohrbach et al. 2018): object sentences that are invented.

    An object sentence is invented if its class is not in the labels, if it can't be read, or if it counts anew what was
    counted before. CHAIRs: captions with such a sentence, of all captions. CHAIRi: such sentences, of all object
    sentences. _boxed: without lanes and drivable areas, which are in nearly each image. _read: only sentences that
    could be read and contradict nothing. The traffic light is scored by its status instead.
    """
    statistics = np.zeros((len(predictions), 10))
    for row, (reading, r) in enumerate(zip(predictions, references, strict=True)):
        if r == Facts():
            continue
        there = {kind.name for kind in r.objects}
        named = [kind.name for kind in reading.facts.objects]
        boxed, extra = [name for name in named if name not in AREAS], reading.unfounded_objects
        invented, invented_boxed = (sum(name not in there for name in names) for names in (named, boxed))
        sets = (invented + extra, len(named) + extra), (invented_boxed + extra, len(boxed) + extra)
        counts = [(wrong > 0, wrong, said) for wrong, said in (*sets, (invented, len(named)))]
        statistics[row] = [1, *itertools.chain(*counts)]

    def list_figures(sums: np.ndarray) -> list[Figure]:
        captions, *sets = np.split(sums, (1, 4, 7), axis=-1)
        figures = []
        for with_invented, invented, said in (np.moveaxis(counts, -1, 0) for counts in sets):
            figures += [make_share(with_invented, captions[..., 0]), make_share(invented, said)]
        return figures

    names = tuple(name + end for end in ("", "_boxed", "_read") for name in CHAIR)
    return make_metric(names, statistics, list_figures)


def measure_form(readings: Sequence[Reading]) -> Metric:
    """Shares of captions with a sentence that can't be read, is repeated, or contradicts an earlier one; of captions
    that are cut off in a sentence; and of empty ones."""
    rows = [
        (bool(r.unread), bool(r.repeated), bool(r.contradicting), r.cut_off, r == Reading(Facts(), [], [], [], False))
        for r in readings
    ]
    return measure_mean(
        ("unread", "repeated", "contradicting", "cut_off", "empty"), np.array(rows, dtype=float), are_shares=True
    )
