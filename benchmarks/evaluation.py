"""Scoring at full size: 10,000 captions, all metrics, 1,000 bootstrap samples, floors that need no model, all slices.

    python -m benchmarks.evaluation              # drawn scenes' facts; the predictions get some of them wrong
    python -m benchmarks.evaluation --record     # and put the table into benchmarks/RESULTS.md

Prints the seconds of `scores.score_predictions`, which eval.py calls, and where they go. METEOR is not in it where
WordNet is not installed.
"""

import argparse
import dataclasses
import functools
import random
import statistics
import time

from benchmarks.results import record
from captioner.bdd100k import parsing
from captioner.bdd100k.facts import WEATHERS, Facts
from captioner.bdd100k.frames import read_frame
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.wording import describe
from captioner.scoring import fact_metrics, scores, text_metrics
from captioner.scoring.predictions import Prediction
from demo.draw import list_labels, name_image, sample_scene

STAGES = {  # what is timed: its module and name
    "tokens, n-grams, BLEU, ROUGE-L, CIDEr-D": (text_metrics, "measure_texts"),
    "facts": (fact_metrics, "measure_facts"),
    "reading captions": (scores, "read_caption"),
    "floors": (scores, "make_floors"),
    "drawing bootstrap samples": (scores, "Rides"),
    "scores with intervals": (scores, "score_groups"),
    "slices": (scores, "score_slices"),
}


def sample_facts(seed: int) -> Facts:
    """Facts of a scene, without drawing it."""
    scene = sample_scene(seed)
    attributes = {"weather": scene.weather, "scene": scene.place, "timeofday": scene.time}
    raw = {"name": name_image(seed), "attributes": attributes, "labels": list_labels(scene)}
    return read_frame(raw, LabelReport()).facts


def disturb(facts: Facts, rng: random.Random) -> Facts:
    """Facts as a model may see them: a sixth of the weathers and counts wrong, a tenth of the objects missing."""
    objects = {kind: count + (rng.random() < 0.2) for kind, count in facts.objects.items() if rng.random() < 0.9}
    weather = facts.weather if rng.random() < 0.8 else rng.choice(WEATHERS[:6])
    return dataclasses.replace(facts, weather=weather, objects=objects)


def make_predictions(count: int) -> list[Prediction]:
    rng = random.Random(0)
    facts = map(sample_facts, range(count))
    return [Prediction(f"{i}.jpg", describe(disturb(one, rng)), [describe(one)]) for i, one in enumerate(facts)]


def time_stages(seconds: dict[str, float]) -> None:
    """Let each function of STAGES add the seconds it takes to `seconds`."""

    def wrap(stage, function):
        @functools.wraps(function)
        def timed(*args, **options):
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

        return timed

    for stage, (module, name) in STAGES.items():
        setattr(module, name, wrap(stage, getattr(module, name)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="captions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args()
    predictions, stages = make_predictions(args.count), {}
    time_stages(stages)
    runs = []
    for _ in range(args.repeats):
        for cache in (text_metrics._tokenize_sentence, parsing._read_sentence):
            cache.cache_clear()  # as in a fresh process
        start = time.perf_counter()
        scored = scores.score_predictions(predictions, {})
        runs.append(time.perf_counter() - start)
    lines = [f"| **all, median of {args.repeats}** | **{statistics.median(runs):.1f}** |"]
    lines += [f"| {stage} | {seconds / args.repeats:.1f} |" for stage, seconds in stages.items()]
    figures = scored["scores"]["facts"]
    table = "\n".join(["| stage | seconds |", "| --- | ---: |", *lines])
    text = (
        f"{args.count:,} captions, {scored['distinct_predictions']:,} of them distinct, {scored['resamples']:,} "
        f"bootstrap samples, {len(scored['floors'])} floors, {len(scored['slices'])} slices; facts F1 "
        f"{figures['facts_f1']['value']:.3f}. From {min(runs):.1f} to {max(runs):.1f} s."
    )
    print(f"{table}\n\n{text}")
    if args.record:
        record(f"Scoring {args.count:,} captions", f"{table}\n\n{text}", packages=["numpy", "nltk"])


if __name__ == "__main__":
    main()
