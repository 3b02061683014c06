"""All scores of a set of predictions: the content of scores.json. No torch.

    scores = score_predictions(predictions, signature={"split": "test", "decoding": "greedy"})

Every figure is {"value", "low", "high"} with a 95 % interval (see bootstrap). Beside the predictions' own stand those
of floors on the same images, and the same figures for slices of the images, worst first. Where there are no facts to
hold the captions against, only their text is scored, and there are no slices.
"""

import itertools
from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.parsing import Reading, read_caption
from captioner.data.splits import is_frame_name
from captioner.scoring import bootstrap, fact_metrics, text_metrics
from captioner.scoring.bootstrap import BOOTSTRAP_SEED, LEVEL, RESAMPLES, Metric, Rides
from captioner.scoring.floors import make_floors
from captioner.scoring.grammar import find_facts
from captioner.scoring.headlines import HEADLINES, RANKED_BY, Headline, choose_headlines
from captioner.scoring.predictions import Prediction, find_ride

SCHEMA_VERSION = 2
CLASS_GROUP = "classes: "  # what fact_metrics puts before a class
SLICED_BY = {"time of day": "time_of_day", "weather": "weather", "scene": "scene", "traffic light": "traffic_light"}
OBJECT_BINS = (0, 1, 5, 10, 15, 20)  # smallest number of objects in each slice
FEW = 20  # rides: with fewer, intervals were not tried (see docs/scores.md), and a slice is not scored
WIDE = 0.1  # an interval wider than this share of the score's scale says little
ZOO = "BDD100K model zoo, image tagging, github.com/SysCV/bdd100k-models"
SET_UP = "640 pixels, 70,000 training images, val set"
PUBLISHED = [  # what others reach on the BDD100K val set
    {"what": "weather", "value": 0.8194, "text": f"ResNet-50, {SET_UP}", "source": ZOO},
    {"what": "scene", "value": 0.7807, "text": f"ResNet-18, {SET_UP}", "source": ZOO},
]
Measured = dict[str, Metric]


def score_predictions(
    predictions: Sequence[Prediction],
    signature: dict,
    facts: Sequence[Facts] | None = None,
    training: Sequence[str] | None = None,
    of_bdd100k: bool = False,
    resamples: int = RESAMPLES,
) -> dict:
    """All scores of `predictions`, each of which has a reference, as JSON types.

    `facts`, one for each prediction, are what the captions are held against; none: those of the first references, if
    find_facts finds any there. `signature` is what there is to say of how the predictions came about, `training` the
    captions of the training split, among which constant floors are chosen. Published figures are for captions
    `of_bdd100k` alone. Raises ValueError for no predictions.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    references = [prediction.references for prediction in predictions]
    facts = facts or find_facts([row[0] for row in references])
    ride_names = [find_ride(prediction) for prediction in predictions]
    sets = collect_sets(predictions, make_floors(references, training, ride_names, BOOTSTRAP_SEED))
    rides = Rides(ride_names, resamples)
    measured, scored, by_facts = text_metrics.measure_texts(references, sets), {}, {}
    for name, texts in sets.items():
        groups = measured.pop(name)
        if facts:
            readings = [read_caption(text) for text in texts]
            groups |= fact_metrics.measure_facts(readings, facts)
        scored[name] = score_groups(groups, rides)
        if name == "predictions":  # here: of 70,000 captions the statistics of one set are enough in memory
            signature = {"n": len(predictions), "rides": rides.size, **signature}
            signatures = make_signatures(groups, signature, resamples)
            if facts:
                by_facts["confusion"] = tabulate_confusion(readings, facts)
                by_facts["slices"] = score_slices(groups, list(map(slice_names, facts)), rides)
    scores, slices = scored.pop("predictions"), len(by_facts.get("slices", ()))
    return {
        "schema": SCHEMA_VERSION,
        "n": len(predictions),
        "rides": rides.size,
        "resamples": resamples,
        "bootstrap_seed": BOOTSTRAP_SEED,
        "distinct_predictions": len(set(sets["predictions"])),
        "notes": make_notes(predictions, rides.size, scores, training is not None, slices),
        "scores": scores,
        "floors": scored,
        "floors_from": "training captions" if training else "scored references",
        "published": PUBLISHED if of_bdd100k and facts else [],
        **by_facts,
        "signatures": signatures,
    }


def collect_sets(predictions: Sequence[Prediction], floors: dict[str, list[str]]) -> dict[str, list[str]]:
    """{name: captions} of the predictions, of `floors`, and of the floors that come with the predictions."""
    sets = {"predictions": [prediction.prediction for prediction in predictions], **floors}
    for name in dict.fromkeys(itertools.chain.from_iterable(prediction.floors for prediction in predictions)):
        if name in sets or not all(name in prediction.floors for prediction in predictions):
            raise ValueError(f"the floor {name!r} must have a caption for each image, and a name of its own")
        sets[name] = [prediction.floors[name] for prediction in predictions]
    return sets


def score_groups(groups: Measured, rides: Rides) -> dict:
    """{group: {score: figure}}, the classes, if facts are scored, in a group of their own."""
    scored, classes = {}, {}
    for group, metric in groups.items():
        target, name = (classes, group.removeprefix(CLASS_GROUP)) if group.startswith(CLASS_GROUP) else (scored, group)
        target[name] = bootstrap.score_with_intervals(metric, rides)
    return {**scored, "classes": classes} if "facts" in groups else scored


def make_notes(
    predictions: Sequence[Prediction], rides: int, scores: dict, floors_from_training: bool, slices: int
) -> list[str]:
    """What a reader of the scores must know."""
    notes, count = [], describe_size(len(predictions), rides)
    if rides < FEW:
        notes.append(f"{count}: too few for intervals and p-values to be relied on; score more images")
    elif widest := find_widest(scores):
        width, headline, figure = widest
        notes.append(
            f"{count}: the widest 95 % interval, of {headline.words}, is {figure['low']:.2f} to {figure['high']:.2f}"
            + ", too wide to tell models apart; score more images" * (width > WIDE)
        )
    if slices > 1:
        notes.append(
            f"the worst of {slices} slices may be low by chance alone. To allow for that, a slice's interval is one of "
            f"{100 * choose_level(slices):.1f} % in place of 95 % (Bonferroni): of each score, those of all slices "
            "together hold the truth with 95 % confidence"
        )
    if not floors_from_training:
        notes.append(
            "the constant floors were chosen on the very references that they are scored on, for want of training "
            "captions: they come out too high"
        )
    if others := [row.name for row in predictions if not row.ride and not is_frame_name(row.name)]:
        notes.append(
            f"names don't tell the ride of {count_things(len(others), 'image')}, {others[0][:80]} for one: each is "
            "taken for a ride of its own, and intervals are too narrow if some images look alike"
        )
    if "meteor" not in scores:
        notes.append("METEOR is left out: it needs WordNet, python -m nltk.downloader wordnet")
    return notes


def count_things(count: int, what: str) -> str:
    """1 image, 2,000 images."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def describe_size(images: int, rides: int) -> str:
    """How many images were scored and, where some are of one ride, of how many rides."""
    return count_things(images, "image") + (f" of {count_things(rides, 'ride')}" if rides != images else "")


def choose_level(slices: int) -> float:
    """The level of each slice's interval, by which those of one score hold for all slices at once (Bonferroni)."""
    return 1 - (1 - LEVEL) / max(slices, 1)


def find_widest(scores: dict) -> tuple[float, Headline, dict] | None:
    """The widest interval of the headlines: its width in shares of the score's scale, the headline and the figure.

    None where no interval is known. Where facts are scored, text is left out.
    """
    found = [(headline, headline.find(scores, name)) for name, headline in choose_headlines(scores).items()]
    widths = [
        ((figure["high"] - figure["low"]) / headline.scale, headline, figure)
        for headline, figure in found
        if (headline.group == "facts" or "facts" not in scores) and figure["low"] is not None
    ]
    return max(widths, key=itemgetter(0), default=None)


def tabulate_confusion(readings: Sequence[Reading], facts: Sequence[Facts]) -> dict[str, dict]:
    """{attribute: {"labels", "counts"}}, rows by the reference and columns by the prediction."""
    tables = {}
    for name in (*fact_metrics.ATTRIBUTES, "traffic_light"):
        labels, pairs = fact_metrics.pair_labels([reading.facts for reading in readings], facts, name)
        tables[name] = {"labels": labels, "counts": fact_metrics.count_confusion(labels, pairs).tolist()}
    return tables


def slice_names(facts: Facts) -> dict[str, str]:
    """The slices that an image is in, {what by: value}, going by its labels."""
    names = {by: getattr(facts, slot) or "none" for by, slot in SLICED_BY.items()}
    total = sum(facts.objects.values())
    place = max(i for i, smallest in enumerate(OBJECT_BINS) if smallest <= total)
    last = place + 1 == len(OBJECT_BINS)
    first, end = OBJECT_BINS[place], "" if last else OBJECT_BINS[place + 1] - 1
    return {**names, "objects": f"{first}+" if last else str(first) if first == end else f"{first}–{end}"}


def score_slices(measured: Measured, names: Sequence[dict[str, str]], rides: Rides) -> list[dict]:
    """Headline scores of each slice of FEW rides or more, that with the fewest right facts first.

    Their intervals are those of choose_level, wider than others.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for row, slices in enumerate(names):
        for item in slices.items():
            rows.setdefault(item, []).append(row)
    sizes = {item: len(np.unique(rides.index[members])) for item, members in rows.items()}
    large = {item: np.array(members) for item, members in rows.items() if sizes[item] >= FEW}
    level, scored = choose_level(len(large)), []
    for (by, value), members in large.items():
        figures = {}
        for group in dict.fromkeys(headline.group for headline in HEADLINES.values()):
            figures |= bootstrap.score_with_intervals(measured[group], rides, members, level)
        item = {"by": by, "value": value, "n": len(members), "rides": sizes[by, value]}
        scored.append(item | {"scores": {name: figures[name] for name in HEADLINES}, "level": level})
    return sorted(scored, key=rank_slice)


def rank_slice(item: dict) -> tuple[bool, float]:
    """The worst first, those whose references state no fact last."""
    value = item["scores"][RANKED_BY]["value"]
    return value is None, value or 0.0


def make_signatures(measured: Measured, signature: dict, resamples: int) -> dict[str, str]:
    """One line for each group of scores that says how it came about."""
    coco = {"tok": "coco", "case": "lower"}
    read = {"read_by": "parsing.read_caption", "classes": "synonyms-merged"}
    how = {
        "corpus_bleu": {"level": "corpus", **coco, "smooth": "coco", "reference_length": "closest"},
        "reference_bleu": {"level": "sentence-mean", "tok": "space", "case": "lower", "smooth": "method4"},
        "rouge_l": {"level": "sentence-mean", **coco, "beta": text_metrics.ROUGE_BETA},
        "cider_d": {"level": "sentence-mean", **coco, "sigma": text_metrics.CIDER_SIGMA, "df": "references"},
        "meteor": {"level": "sentence-mean", **coco, "of": "nltk-not-coco-1.5", **text_metrics.METEOR_WEIGHTS},
        **dict.fromkeys(("facts", "hallucination", "form"), read),
    }
    signatures = {}
    for group, facts in how.items():
        if group in measured:
            bca = f"bca-rides-{resamples}-seed{BOOTSTRAP_SEED}"
            interval = bca if measured[group].trials is None else "clopper-pearson-effective-rides"
            signatures[group] = text_metrics.make_signature(**facts, **signature, interval=interval)
    return signatures
