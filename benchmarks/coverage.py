"""How often a 95 % interval holds the truth, and p-values of no difference: by simulation.

    python -m benchmarks.coverage                 # some minutes on a core
    python -m benchmarks.coverage --record        # and put the tables into benchmarks/COVERAGE.md

Beside the intervals of scoring/bootstrap.py stand those that a bootstrap of frames gives: percentiles of 1,000 samples
of the captions as if each were of a ride of its own.
"""

import argparse

import numpy as np

from benchmarks.drawn_captions import draw_predictions
from benchmarks.results import RESULTS, record
from captioner.bdd100k.facts import Facts
from captioner.bdd100k.parsing import parse_caption, read_caption
from captioner.scoring import bootstrap, fact_metrics, text_metrics
from captioner.scoring.bootstrap import RESAMPLES, Metric, Rides
from captioner.scoring.predictions import find_ride

IMAGES, SHARES, FRAMES = (20, 200, 1200), (0.5, 0.7, 0.95, 0.994), (1, 2, 4)
ALIKE = 0.5  # correlation of two frames of a ride
POPULATION = 4000  # rides of four frames, from which tests are drawn
SCORES = {"facts_f1": "facts", "whole_caption": "facts", "macro_f1": "weather", "BLEU-4": "corpus_bleu",
          "ROUGE-L": "rouge_l", "CIDEr-D": "cider_d"}  # fmt: skip


def draw_right(rng, rides: int, frames: int, share: float) -> np.ndarray:
    """(rides, frames) whether each caption is right; two frames of a ride correlate by ALIKE."""
    own, common = rng.random((rides, frames)) < share, rng.random((rides, 1)) < share
    return np.where(rng.random((rides, frames)) < ALIKE**0.5, common, own).astype(float)


def measure_share(right: np.ndarray) -> Metric:
    return text_metrics.measure_mean(("share",), right.reshape(-1, 1), are_shares=True)


def bound_by_frames(metric: Metric, counts: np.ndarray) -> dict[str, tuple[float, float]]:
    """Percentiles of bootstrap samples `counts` (R, N) of captions."""
    samples = metric.score(counts @ metric.statistics.astype(np.float32))
    return dict(zip(metric.names, np.nanpercentile(samples, [2.5, 97.5], axis=0).T, strict=True))


def count_draws(rng, size: int) -> np.ndarray:
    """(R, N) how often each of N captions is in a sample."""
    return rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.float32)


def cover_shares(rng, repeats: int) -> list[str]:
    """Rows of shares: both coverages for each share, number of images and frames a ride."""
    rows = []
    for frames in FRAMES:
        for images in IMAGES:
            rides, names, cells = images // frames, [str(image // frames) for image in range(images)], []
            drawn = Rides(names, 1)
            for share in SHARES:
                held = held_by_frames = 0
                for _ in range(repeats):
                    right = draw_right(rng, rides, frames, share)
                    figure = bootstrap.score_with_intervals(measure_share(right), drawn)["share"]
                    held += figure["low"] <= share <= figure["high"]
                    # the mean of a sample of zeros and ones is a binomial number
                    samples = rng.binomial(images, right.mean(), RESAMPLES) / images
                    low, high = np.percentile(samples, [2.5, 97.5])
                    held_by_frames += low <= share <= high
                cells.append(f"{100 * held_by_frames / repeats:.0f} → **{100 * held / repeats:.0f}**")
            rows.append(f"| {frames} | {images:,} | {' | '.join(cells)} |")
    return rows


def cover_scores(rng, repeats: int) -> list[str]:
    """Rows of scores of drawn captions, by images and frames a ride: the truth is the score of all POPULATION rides."""
    rows = draw_predictions(POPULATION, max(FRAMES), without=("foggy",))  # too rare for any sample's macro-F1
    facts = [parse_caption(row.references[0]) for row in rows]
    readings = [read_caption(row.prediction) for row in rows]
    groups = text_metrics.measure_texts([row.references for row in rows], {"": [row.prediction for row in rows]})[""]
    groups |= fact_metrics.measure_facts(readings, facts)
    names, said = [find_ride(row) for row in rows], [reading.facts for reading in readings]
    metrics = {name: groups[group] for name, group in SCORES.items()}
    truth = {name: text_metrics.score(metric)[name] for name, metric in metrics.items()}
    of_labels = measure_labels(said, facts)
    lines = []
    for frames in (1, 4):
        for images in (80, 400):
            held, held_by_frames = dict.fromkeys(SCORES, 0), dict.fromkeys(SCORES, 0)
            for _ in range(repeats):
                rides = rng.choice(POPULATION, images // frames, replace=False)
                chosen = (rides[:, None] * max(FRAMES) + np.arange(frames)).ravel()
                drawn, counts = Rides([names[place] for place in chosen]), count_draws(rng, images)
                parts = {
                    name: metric._replace(statistics=metric.statistics[chosen]) for name, metric in metrics.items()
                }
                there = [facts[place] for place in chosen]  # the mean is over the labels of these
                labels, pairs = fact_metrics.pair_labels([said[place] for place in chosen], there, "weather")
                parts["macro_f1"] = fact_metrics.measure_confusion(labels, pairs, each=False)
                truth["macro_f1"] = np.mean([of_labels[label] for label in {one.weather for one in there}])
                for name, part in parts.items():
                    figure = bootstrap.score_with_intervals(part, drawn)[name]
                    low, high = bound_by_frames(part, counts)[name]
                    held[name] += figure["low"] is not None and figure["low"] <= truth[name] <= figure["high"]
                    held_by_frames[name] += low <= truth[name] <= high
            cells = [
                f"{100 * held_by_frames[name] / repeats:.0f} → **{100 * held[name] / repeats:.0f}**" for name in SCORES
            ]
            lines.append(f"| {frames} | {images} | {' | '.join(cells)} |")
    return lines


def measure_labels(said: list[Facts], facts: list[Facts]) -> dict[str, float]:
    """{weather: its F1}."""
    labels, pairs = fact_metrics.pair_labels(said, facts, "weather")
    table = fact_metrics.count_confusion(labels, pairs)
    f1 = 2 * np.diagonal(table) / np.maximum(table.sum(axis=0) + table.sum(axis=1), 1)
    return dict(zip(labels, f1.tolist(), strict=True))


def tabulate_differences(rng, repeats: int) -> list[str]:
    """Rows of p-values: a few captions of 500 that differ, all one way, and how often no difference has p < 0.05."""
    rows = []
    for differing in (3, 5):
        one, other = np.zeros(500), np.arange(500) < differing
        exact = bootstrap.compare_metrics(measure_share(one), measure_share(other), Rides(list(map(str, range(500)))))
        before = sorted(shift_test(np.random.default_rng(seed), one - other) for seed in range(20))
        rows.append(
            f"| p: {differing} of 500 captions differ, all one way | {before[0]:.3f} to {before[-1]:.3f} | "
            f"{exact['share']['p']:.4f} |"
        )
    for frames in (1, 4):
        names, small, small_before, held = [str(image // frames) for image in range(200)], 0, 0, 0
        drawn = Rides(names, 1)
        for _ in range(repeats):
            one, other = (draw_right(rng, 200 // frames, frames, 0.7) for _ in range(2))
            row = bootstrap.compare_metrics(measure_share(one), measure_share(other), drawn)["share"]
            small += row["p"] < 0.05
            held += row["low"] <= 0 <= row["high"]
            small_before += shift_test(rng, (one - other).ravel()) < 0.05
        rows.append(
            f"| no difference, 200 images, {frames} a ride: p < 0.05 | {100 * small_before / repeats:.1f} % | "
            f"{100 * small / repeats:.1f} %, interval without 0 {100 - 100 * held / repeats:.1f} % |"
        )
    return rows


def shift_test(rng, differences: np.ndarray) -> float:
    """p of a paired bootstrap of frames, shifted to no difference (Riezler and Maxwell 2005)."""
    samples = count_draws(rng, len(differences)) @ differences / len(differences)
    return (np.sum(np.abs(samples - samples.mean()) >= abs(differences.mean())) + 1) / (RESAMPLES + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    repeats = "simulated test sets; a third of it for scores of text"
    parser.add_argument("--repeats", type=int, default=1000, help=repeats)
    parser.add_argument("--record", action="store_true", help="put the tables into benchmarks/COVERAGE.md")
    args = parser.parse_args()
    rng, rule = np.random.default_rng(0), "| ---: " * 2 + "| --- "
    heads = " | ".join(f"p = {share}" for share in SHARES)
    shares = [f"| frames a ride | images | {heads} |", rule + "| --- " * 3 + "|"]
    scores = [f"| frames a ride | images | {' | '.join(SCORES)} |", rule + "| --- " * (len(SCORES) - 1) + "|"]
    tests = ["| | bootstrap of frames | exchanged rides |", "| --- | --- | --- |"]
    shares += cover_shares(rng, args.repeats)
    scores += cover_scores(rng, args.repeats // 3)
    tests += tabulate_differences(rng, args.repeats // 3)
    sets = f"{args.repeats // 3:,} sets"
    text = "\n".join(
        [
            f"Percent of {args.repeats:,} test sets whose 95 % interval holds the truth, by a bootstrap of frames",
            f"→ **as scored**. Shares, two frames of a ride correlating by {ALIKE}:\n",
            *shares,
            f"\nScores of drawn captions (benchmarks/drawn_captions.py; {sets}):\n",
            *scores,
            f"\nTwo systems ({sets}):\n",
            *tests,
        ]
    )
    print(text)
    if args.record:
        record("Coverage of intervals", text, packages=["numpy", "scipy"], path=RESULTS.with_name("COVERAGE.md"))


if __name__ == "__main__":
    main()
