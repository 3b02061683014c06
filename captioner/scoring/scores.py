"""All scores of a set of predictions: the content of scores.json. No torch.

    scores = score_predictions(predictions, signature={"split": "test", "decoding": "greedy"})

Every figure is {"value", "low", "high"} with a 95 % bootstrap interval. Beside the predictions' own stand those of
floors on the same images, and the same figures for slices of the images, worst first.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.parsing import Reading, parse_caption, read_caption
from captioner.scoring import fact_metrics, text_metrics
from captioner.scoring.predictions import Prediction
from captioner.scoring.text_metrics import Metric

SCHEMA_VERSION = 1
CLASS_GROUP = "classes: "  # what fact_metrics puts before a class
HEADLINES = {  # score: its group; what slices, the printed table and comparisons show
    "facts_f1": "facts",
    "time_of_day": "facts",
    "weather": "facts",
    "scene": "facts",
    "traffic_light": "facts",
    "objects_f1": "facts",
    "whole_caption": "facts",
    "BLEU-4": "corpus_bleu",
    "CIDEr-D": "cider_d",
}
SLICED_BY = {"time of day": "time_of_day", "weather": "weather", "scene": "scene", "traffic light": "traffic_light"}
OBJECT_BINS = (0, 1, 5, 10, 15, 20)  # smallest number of objects in each slice
FEW = 10  # images, below which a bootstrap says nothing
SMALL_SLICE = 5  # images, below which a slice is not scored
ZOO = "BDD100K model zoo, image tagging, github.com/SysCV/bdd100k-models"
PUBLISHED = [  # what others reach on the BDD100K val set; drawn scenes are another matter
    {
        "what": "weather",
        "value": 0.8194,
        "text": "ResNet-50, 640 pixels, 70,000 training images, val set",
        "source": ZOO,
    },
    {"what": "scene", "value": 0.7807, "text": "ResNet-18, 640 pixels, 70,000 training images, val set", "source": ZOO},
]
Measured = dict[str, Metric]


def score_predictions(
    predictions: Sequence[Prediction],
    signature: dict,
    facts: Sequence[Facts] | None = None,
    seed: int = text_metrics.BOOTSTRAP_SEED,
    resamples: int = text_metrics.RESAMPLES,
) -> dict:
    """All scores of `predictions`, each of which has a reference, as JSON types.

    `facts`, one for each prediction, are what the captions are held against; none: read in the first references.
    `signature` is what there is to say of how the predictions came about. Raises ValueError for no predictions.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    references = [prediction.references for prediction in predictions]
    facts = facts or [parse_caption(row[0]) for row in references]
    sets = {
        "predictions": [prediction.prediction for prediction in predictions],
        **text_metrics.make_floors(references, seed),
    }
    for name in dict.fromkeys(itertools.chain.from_iterable(prediction.floors for prediction in predictions)):
        if name in sets or not all(name in prediction.floors for prediction in predictions):
            raise ValueError(f"the floor {name!r} must have a caption for each image, and a name of its own")
        sets[name] = [prediction.floors[name] for prediction in predictions]
    readings = {name: [read_caption(text) for text in texts] for name, texts in sets.items()}
    measured = text_metrics.measure_texts(references, sets)
    for name in sets:
        measured[name] |= fact_metrics.measure_facts(readings[name], facts)
    counts = text_metrics.resample(len(predictions), resamples, seed)
    scored = {name: score_groups(groups, counts) for name, groups in measured.items()}
    scores = scored.pop("predictions")
    return {
        "schema": SCHEMA_VERSION,
        "n": len(predictions),
        "resamples": resamples,
        "bootstrap_seed": seed,
        "distinct_predictions": len(set(sets["predictions"])),
        "notes": make_notes(len(predictions), scores, measured["predictions"]),
        "scores": scores,
        "floors": scored,
        "published": PUBLISHED,
        "confusion": tabulate_confusion(readings["predictions"], facts),
        "slices": score_slices(measured["predictions"], list(map(slice_names, facts)), counts),
        "signatures": make_signatures(measured["predictions"], len(predictions), resamples, seed, signature),
    }


def score_groups(groups: Measured, counts: np.ndarray) -> dict:
    """{group: {score: figure}}, the classes in a group of their own."""
    scored, classes = {}, {}
    for group, metric in groups.items():
        target, name = (classes, group.removeprefix(CLASS_GROUP)) if group.startswith(CLASS_GROUP) else (scored, group)
        target[name] = text_metrics.score_with_intervals(metric, counts)
    return {**scored, "classes": classes}


def make_notes(n: int, scores: dict, measured: Measured) -> list[str]:
    """What a reader of the scores must know."""
    notes = []
    facts = scores["facts"]
    widths = {
        name: facts[name]["high"] - facts[name]["low"]
        for name in HEADLINES
        if facts.get(name, {}).get("value") is not None
    }
    if n < FEW:
        notes.append(f"{n} images are too few for intervals and p-values: they come out too narrow; score more images")
    elif widths:
        widest = max(widths, key=widths.get)
        low, high = facts[widest]["low"], facts[widest]["high"]
        notes.append(
            f"{n} images: {widest.replace('_', ' ')} is known to lie between {low:.2f} and {high:.2f}, the widest of "
            f"the intervals" + (", too wide to tell models apart; score more images" if widths[widest] > 0.1 else "")
        )
        notes.append(f"where all {n} are right, up to {min(3 / n, 1):.1%} of others may still be wrong (rule of three)")
    if "meteor" not in measured:
        notes.append("METEOR is left out: it needs WordNet, python -m nltk.downloader wordnet")
    return notes


def tabulate_confusion(readings: Sequence[Reading], facts: Sequence[Facts]) -> dict[str, dict]:
    """{attribute: {"labels", "counts"}}, rows by the reference and columns by the prediction."""
    tables = {}
    for name in (*fact_metrics.ATTRIBUTES, "traffic_light"):
        labels, confusion = fact_metrics.count_confusion([reading.facts for reading in readings], facts, name)
        tables[name] = {"labels": labels, "counts": confusion.sum(axis=0).astype(int).tolist()}
    return tables


def slice_names(facts: Facts) -> dict[str, str]:
    """The slices that an image is in, {what by: value}, going by its labels."""
    names = {by: getattr(facts, slot) or "none" for by, slot in SLICED_BY.items()}
    total = sum(facts.objects.values())
    place = max(i for i, smallest in enumerate(OBJECT_BINS) if smallest <= total)
    last = place + 1 == len(OBJECT_BINS)
    first, end = OBJECT_BINS[place], "" if last else OBJECT_BINS[place + 1] - 1
    return {**names, "objects": f"{first}+" if last else str(first) if first == end else f"{first}–{end}"}


def score_slices(measured: Measured, names: Sequence[dict[str, str]], counts: np.ndarray) -> list[dict]:
    """Headline scores of each slice of SMALL_SLICE images or more, that with the fewest right facts first."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, slices in enumerate(names):
        for item in slices.items():
            rows.setdefault(item, []).append(row)
    scored = []
    for (by, value), members in rows.items():
        if len(members) < SMALL_SLICE:
            continue
        figures = {}
        for group in dict.fromkeys(HEADLINES.values()):
            figures |= text_metrics.score_with_intervals(measured[group], counts, np.array(members))
        headlines = {name: figures[name] for name in HEADLINES}
        scored.append({"by": by, "value": value, "n": len(members), "scores": headlines})
    return sorted(scored, key=rank_slice)


def rank_slice(item: dict) -> tuple[bool, float]:
    """The worst first, those whose references state no fact last."""
    value = item["scores"]["facts_f1"]["value"]
    return value is None, value or 0.0


def make_signatures(measured: Measured, n: int, resamples: int, seed: int, signature: dict) -> dict[str, str]:
    """One line for each group of scores that says how it came about."""
    coco = {"tok": "coco", "case": "lower"}
    how = {
        "corpus_bleu": {"level": "corpus", **coco, "smooth": "coco", "reference_length": "closest"},
        "reference_bleu": {"level": "sentence-mean", "tok": "space", "case": "lower", "smooth": "method4"},
        "rouge_l": {"level": "sentence-mean", **coco, "beta": text_metrics.ROUGE_BETA},
        "cider_d": {"level": "sentence-mean", **coco, "sigma": text_metrics.CIDER_SIGMA, "df": "references"},
        "meteor": {"level": "sentence-mean", **coco},
        **{key: {"read_by": "captions.read_caption"} for key in ("facts", "hallucination", "form")},
    }
    end = {"n": n, **signature, "bootstrap": f"{resamples}-seed{seed}"}
    return {group: text_metrics.make_signature(**facts, **end) for group, facts in how.items() if group in measured}


# --------------------------------------------------------------------------------------------------------------
# two systems


def compare_predictions(
    one: Sequence[Prediction],
    other: Sequence[Prediction],
    seed: int = text_metrics.BOOTSTRAP_SEED,
    resamples: int = text_metrics.RESAMPLES,
) -> dict:
    """Headline scores of two systems on the images that both captioned, their differences and p-values.

    References are those of `one`. Raises ValueError when they share no image.
    """
    others = {prediction.name: prediction for prediction in other}
    pairs = [(prediction, others[prediction.name]) for prediction in one if prediction.name in others]
    if not pairs:
        raise ValueError("the two files share no image")
    references = [first.references for first, _ in pairs]
    facts = [parse_caption(row[0]) for row in references]
    sets = {"one": [first.prediction for first, _ in pairs], "other": [second.prediction for _, second in pairs]}
    measured = text_metrics.measure_texts(references, sets)
    for name, texts in sets.items():
        measured[name] |= fact_metrics.measure_facts(list(map(read_caption, texts)), facts)
    counts = text_metrics.resample(len(pairs), resamples, seed)
    compared = {}
    for group in dict.fromkeys([*HEADLINES.values(), "corpus_bleu", "rouge_l", "hallucination"]):
        compared |= text_metrics.compare_metrics(measured["one"][group], measured["other"][group], counts)
    return {
        "schema": SCHEMA_VERSION,
        "n": len(pairs),
        "notes": [f"{len(pairs)} images are too few for intervals and p-values"] if len(pairs) < FEW else [],
        "only_in_one": len(one) - len(pairs),
        "only_in_other": len(other) - len(pairs),
        "resamples": resamples,
        "bootstrap_seed": seed,
        "scores": compared,
    }
