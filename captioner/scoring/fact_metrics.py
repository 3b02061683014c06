"""What captions get right: facts read in them against the facts of the labels.

    metrics = measure_facts([read_caption("There is one car.")], [Facts(objects={ObjectKind("car"): 1})])

Statistics of each caption, so that bootstrap and slices work as for text (see text_metrics.Metric). Shapes: N captions,
K statistics, L labels.
"""

from collections.abc import Sequence

import numpy as np

from captioner.bdd100k.facts import CLASSES, LIGHTS, SCENES, TIMES_OF_DAY, WEATHERS, Facts
from captioner.bdd100k.parsing import Reading
from captioner.scoring.text_metrics import Metric, divide, measure_mean

ATTRIBUTES = {"time_of_day": TIMES_OF_DAY, "weather": WEATHERS, "scene": tuple(SCENES)}
NOT_SAID = "not said"  # the label of a prediction that gives no value
NO_LIGHT = "none"  # no lit light is labelled, or said to be there
LOOKS = ("", "occluded_", "truncated_")  # which objects of a class are counted: all, these, those


def measure_facts(predictions: Sequence[Reading], references: Sequence[Facts]) -> dict[str, Metric]:
    """{group: Metric} of all that is scored on facts. "classes: car" and so on are groups too."""
    said = [reading.facts for reading in predictions]
    groups = {"facts": measure_shares(said, references)}
    for name in (*ATTRIBUTES, "traffic_light"):
        labels, confusion = count_confusion(said, references, name)
        groups[name] = measure_confusion(labels, confusion, each=name == "traffic_light")
    groups["hallucination"] = measure_hallucination(said, references)
    groups["form"] = measure_form(predictions)
    stated = np.array([facts != Facts() for facts in references])  # a reference without any fact is not scored
    got, there = count_classes(said) * stated[:, None, None], count_classes(references)
    seen = [place for place in range(len(CLASSES)) if got[:, place].any() or there[:, place].any()]
    names = list(CLASSES)
    return groups | {f"classes: {names[place]}": measure_class(got[:, place], there[:, place]) for place in seen}


# --------------------------------------------------------------------------------------------------------------
# shares of facts


def list_statements(facts: Facts) -> set[tuple]:
    """All that facts say, one item a statement: the attributes, the status of the light, each kind with its count."""
    stated = {(name, getattr(facts, name)) for name in (*ATTRIBUTES, "traffic_light")}
    return {(name, value) for name, value in stated if value is not None} | set(facts.objects.items())


SHARES = (
    *("facts_precision", "facts_recall", "facts_f1", "time_of_day", "weather", "scene", "traffic_light"),
    *("objects_precision", "objects_recall", "objects_f1", "whole_caption"),
)


def measure_shares(said: Sequence[Facts], references: Sequence[Facts]) -> Metric:
    """Shares, 0 to 1, of facts that are right.

    Precision, recall and F1 of all statements, and of the object sentences (right when kind and count both are), pooled
    over all captions; accuracy of the attributes and of the traffic light's status ("none" included), and of whole
    captions. An attribute counts where the reference states it, the light where the reference states anything: a
    reference without any fact is not scored.
    """
    statistics = np.zeros((len(said), 16))
    for row, (p, r) in enumerate(zip(said, references, strict=True)):
        if r == Facts():
            continue
        mine, theirs = list_statements(p), list_statements(r)
        statistics[row, :3] = len(mine & theirs), len(mine), len(theirs)
        for place, name in enumerate(ATTRIBUTES):
            value = getattr(r, name)
            statistics[row, 3 + 2 * place : 5 + 2 * place] = getattr(p, name) == value, value is not None
        statistics[row, 9:11] = p.traffic_light == r.traffic_light and p != Facts(), 1
        statistics[row, 11:14] = len(p.objects.items() & r.objects.items()), len(p.objects), len(r.objects)
        statistics[row, 14:16] = p == r, 1
    statistics[:, 3:9:2] *= statistics[:, 4:9:2]  # unstated in both is no hit
    return Metric(SHARES, statistics, _score_shares)


def _score_shares(sums: np.ndarray) -> np.ndarray:
    facts = _score_sets(sums[..., 0], sums[..., 1], sums[..., 2])
    objects = _score_sets(sums[..., 11], sums[..., 12], sums[..., 13])
    accuracies = [divide(sums[..., at], sums[..., at + 1]) for at in (3, 5, 7, 9)]
    return np.stack([*facts, *accuracies, *objects, divide(sums[..., 14], sums[..., 15])], axis=-1)


def _score_sets(right, said, there) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall, F1; NaN where there is nothing to find, and precision 0 where nothing is said of it."""
    undefined = np.where(there == 0, np.nan, 0.0)
    precision = np.where(said == 0, 0.0, divide(right, said)) + undefined
    return precision, divide(right, there), divide(2 * right, said + there) + undefined


# --------------------------------------------------------------------------------------------------------------
# attributes and traffic light


def count_confusion(said: Sequence[Facts], references: Sequence[Facts], name: str) -> tuple[list[str], np.ndarray]:
    """Labels that occur, and (N, L, L) with a 1 at the reference's label (row) and the prediction's (column).

    All zeros for a caption whose reference does not state the attribute.
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
    confusion = np.zeros((len(pairs), len(labels), len(labels)))
    for row, (expected, got) in enumerate(pairs):
        if expected is not None:
            confusion[row, labels.index(expected), labels.index(got)] = 1
    return labels, confusion


def measure_confusion(labels: list[str], confusion: np.ndarray, each: bool) -> Metric:
    """Accuracy and macro-F1, the mean F1 of the labels that references have; precision, recall and F1 of `each` too."""
    values = [label for label in labels if label != NOT_SAID]
    kinds = ("precision", "recall", "f1")
    names = [f"{label}_{kind}" for label in values for kind in kinds] if each else []

    def score(sums: np.ndarray) -> np.ndarray:
        table = sums.reshape(*sums.shape[:-1], len(labels), len(labels))
        right = np.diagonal(table, axis1=-2, axis2=-1)
        there, got = table.sum(axis=-1), table.sum(axis=-2)
        accuracy = divide(right.sum(axis=-1), there.sum(axis=-1))
        f1 = np.where(there > 0, divide(2 * right, there + got), 0)
        macro = divide(f1.sum(axis=-1), (there > 0).sum(axis=-1))
        scores = [accuracy, macro]
        if each:
            for place in range(len(values)):
                scores += _score_sets(right[..., place], got[..., place], there[..., place])
        return np.stack(scores, axis=-1)

    return Metric(("accuracy", "macro_f1", *names), confusion.reshape(len(confusion), -1), score)


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

    def score(sums: np.ndarray) -> np.ndarray:
        scores = list(_score_sets(*np.moveaxis(sums[..., :3], -1, 0)))
        for at in range(3, 3 + 5 * len(LOOKS), 5):
            scores += [divide(sums[..., at + figure], sums[..., at]) for figure in range(1, 5)]
        return np.stack(scores, axis=-1)

    return Metric(tuple(names), np.stack(columns, axis=-1).astype(float), score)


def measure_hallucination(said: Sequence[Facts], references: Sequence[Facts]) -> Metric:
    """CHAIR (Rohrbach et al. 2018) over object classes: what is named though the labels have none of its class.

    CHAIRs: captions with such an object sentence, of all captions. CHAIRi: such sentences, of all object sentences.
    The traffic light is scored by its status instead.
    """
    statistics = np.zeros((len(said), 4))
    for row, (p, r) in enumerate(zip(said, references, strict=True)):
        if r == Facts():
            continue
        there = {kind.name for kind in r.objects}
        invented = sum(kind.name not in there for kind in p.objects)
        statistics[row] = invented > 0, 1, invented, len(p.objects)
    return Metric(
        ("CHAIRs", "CHAIRi"),
        statistics,
        lambda sums: np.stack([divide(sums[..., 0], sums[..., 1]), divide(sums[..., 2], sums[..., 3])], axis=-1),
    )


def measure_form(readings: Sequence[Reading]) -> Metric:
    """Shares of captions with a sentence that can't be read, is repeated, or contradicts an earlier one; of captions
    that are cut off in a sentence; and of empty ones."""
    rows = [
        (bool(r.unread), bool(r.repeated), bool(r.contradicting), r.cut_off, r == Reading(Facts(), [], [], [], False))
        for r in readings
    ]
    return measure_mean(("unread", "repeated", "contradicting", "cut_off", "empty"), np.array(rows, dtype=float))
