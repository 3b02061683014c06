"""Intervals and p-values, by rides: frames of one ride look alike, so the ride is what is drawn. No torch.

    rides = Rides(["0a1b2c3d", "0a1b2c3d", "4e5f6a7b"])
    figures = score_with_intervals(metric, rides)         # {"BLEU-4": {"value", "low", "high"}, ...}

A share gets a Clopper-Pearson interval at its effective number of trials; any other score the BCa bootstrap of rides;
the difference of two systems MOVER or BCa, and the sign-flip test. Shapes: N captions, G rides, K statistics, M scores,
R resamples.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri, stdtrit

LEVEL = 0.95  # of the intervals
RESAMPLES, BOOTSTRAP_SEED = 1000, 12345  # sacrebleu's
FLIPS = 9999  # random sign flips; with 2^13 or fewer ways to flip all of them are tried
EXACT_FLIPS = 13
CHUNK = 2**23  # elements of the largest matrix that is made at once


class Metric(NamedTuple):
    """What a group of scores is made of: statistics of each caption, whose sums give the scores."""

    names: tuple[str, ...]  # of the M scores
    statistics: np.ndarray  # (N, K), a row a caption
    score: Callable[[np.ndarray], np.ndarray]  # (..., K) sums -> (..., M); NaN where a score is undefined
    trials: Callable[[np.ndarray], np.ndarray] | None = None  # likewise how many things each is a share of; NaN: none


class Rides:
    """Which ride each of N captions is of, and R bootstrap samples of G rides each."""

    def __init__(self, rides: Sequence[str], resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED):
        places: dict[str, int] = {}
        self.index = np.fromiter((places.setdefault(ride, len(places)) for ride in rides), dtype=np.int64)  # (N,)
        self.size, self.resamples, self.seed = len(places), resamples, seed
        rng = np.random.default_rng(seed)
        self.counts = np.empty((resamples, self.size), dtype=np.uint8)  # how often each ride is drawn
        for row in self.counts:
            row[:] = np.bincount(rng.integers(self.size, size=self.size), minlength=self.size)

    def sum_up(self, statistics: np.ndarray, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(G',) the rides of the captions `rows`, and their sums (G', K)."""
        index = self.index[rows]
        present, place = np.unique(index, return_inverse=True)
        sums = np.zeros((len(present), statistics.shape[1]))
        if len(present) == len(index):
            sums[place] = statistics[rows]
        else:
            np.add.at(sums, place, statistics[rows])
        return present, sums

    def draw(self, sums: np.ndarray, present: np.ndarray) -> np.ndarray:
        """(R, K) sums of the bootstrap samples, of the rides `present` alone."""
        drawn = np.empty((self.resamples, sums.shape[1]))
        step = max(CHUNK // max(len(present), 1), 1)
        for start in range(0, self.resamples, step):
            counts = self.counts[start : start + step, present]
            drawn[start : start + step] = counts.astype(np.float32) @ sums.astype(np.float32)
        return drawn


# --------------------------------------------------------------------------------------------------------------
# one system


def score_with_intervals(
    metric: Metric, rides: Rides, rows: np.ndarray | slice = slice(None), level: float = LEVEL
) -> dict[str, dict]:
    """{score: {"value", "low", "high"}} of the captions `rows`; None where undefined or, of an interval, unknown."""
    present, sums = rides.sum_up(metric.statistics, rows)
    total = sums.sum(axis=0)
    values, left_out = metric.score(total), metric.score(total - sums)  # (M,), (G', M): without each ride
    trials, of_rides = count_trials(metric, total), count_trials(metric, sums)
    samples = metric.score(rides.draw(sums, present)) if np.isnan(trials).any() else None
    figures = {}
    for place, name in enumerate(metric.names):
        value = float(values[place])
        if math.isnan(value):
            low = high = math.nan
        elif math.isnan(trials[place]):
            low, high = bound_score(value, samples[:, place], left_out[:, place], level)
        else:
            asked = int((of_rides[:, place] > 0).sum())
            low, high = bound_share(value, trials[place], asked, left_out[:, place], level)
        figure = {"value": value, "low": low, "high": high}
        figures[name] = {key: None if math.isnan(number) else number for key, number in figure.items()}
    return figures


def count_trials(metric: Metric, sums: np.ndarray) -> np.ndarray:
    """(..., M) things that each score is a share of; NaN for scores that are no shares."""
    return np.full((*sums.shape[:-1], len(metric.names)), np.nan) if metric.trials is None else metric.trials(sums)


def measure_variance(left_out: np.ndarray) -> float:
    """The jackknife's variance of a score, from its values without each ride (G,); undefined ones are passed over."""
    known = left_out[~np.isnan(left_out)]
    return float((len(known) - 1) * known.var()) if len(known) > 1 else math.nan


def bound_share(value: float, trials: float, rides: int, left_out: np.ndarray, level: float) -> tuple[float, float]:
    """The Clopper-Pearson interval of a share at its effective number of trials (Korn and Graubard 1998).

    That number is value * (1 - value) / variance, the variance being the jackknife's over rides; it is lowered by what
    Student's t adds for so few rides, and never more than `trials`. Where no variance can be measured, as when all or
    none is right, each of the `rides` that have any counts as one trial, as if its frames were all alike.
    """
    value = min(max(value, 0.0), 1.0)
    spread, variance = value * (1 - value), measure_variance(left_out)
    if spread < 1e-12 or not variance > 0:
        effective = float(rides)
    else:
        wide, narrow = (-stdtrit(freedom, (1 - level) / 2) for freedom in (rides - 1, max(trials - 1, rides - 1)))
        effective = min(spread / variance * (narrow / wide) ** 2, trials)
    return clopper_pearson(value, effective, level)


def clopper_pearson(value: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934) for a share of so many trials, which need not be whole numbers."""
    tail, right = (1 - level) / 2, value * trials
    low = betaincinv(right, trials - right + 1, tail) if right > 1e-9 else 0.0
    high = betaincinv(right + 1, trials - right, 1 - tail) if trials - right > 1e-9 else 1.0
    return float(low), float(high)


def bound_score(value: float, samples: np.ndarray, left_out: np.ndarray, level: float) -> tuple[float, float]:
    """The BCa interval (Efron 1987) of a score from its bootstrap samples (R,) and its values without each ride (G,).

    NaN where all samples are alike: what never varied in the sample tells nothing of how it varies.
    """
    samples, left_out = samples[~np.isnan(samples)], left_out[~np.isnan(left_out)]
    if len(samples) < 2 or len(left_out) < 2 or np.ptp(samples) < 1e-5 * max(abs(value), 1e-9):
        return math.nan, math.nan
    below = (np.sum(samples < value) + np.sum(samples == value) / 2) / len(samples)
    bias = ndtri(min(max(below, 1 / len(samples)), 1 - 1 / len(samples)))
    lean = left_out.mean() - left_out
    spread = np.sum(lean**2) ** 1.5
    acceleration = np.sum(lean**3) / (6 * spread) if spread > 0 else 0.0
    ends = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(samples, ndtr(bias + ends / np.maximum(1 - acceleration * ends, 0.1)))
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------------------
# two systems


def compare_metrics(one: Metric, other: Metric, rides: Rides) -> dict[str, dict]:
    """{score: {"one", "other", "difference", "low", "high", "p"}} of two systems on the same captions.

    p is that of the sign-flip test, two-sided. The interval of the difference of two shares is MOVER's, that of other
    scores the paired BCa bootstrap's; where p says that it may be chance it is widened to hold 0, as of few rides that
    differ the test is exact and neither interval is.
    """
    present, first = rides.sum_up(one.statistics)
    _, second = rides.sum_up(other.statistics)
    value, other_value = one.score(first.sum(axis=0)), other.score(second.sum(axis=0))  # (M,)
    left, other_left = one.score(first.sum(axis=0) - first), other.score(second.sum(axis=0) - second)  # (G, M)
    shares = [score_with_intervals(metric, rides) for metric in (one, other)]
    is_share = ~np.isnan(count_trials(one, first.sum(axis=0)))
    samples = None
    if not is_share.all():
        samples = other.score(rides.draw(second, present)) - one.score(rides.draw(first, present))
    chances = test_by_flips(one.score, first, second, rides.seed)
    compared = {}
    for place, name in enumerate(one.names):
        difference = float(other_value[place] - value[place])
        if math.isnan(difference):
            continue
        if is_share[place]:
            low, high = bound_difference(*(figures[name] for figures in shares), left[:, place], other_left[:, place])
        else:
            low, high = bound_score(difference, samples[:, place], (other_left - left)[:, place], LEVEL)
        if chances[place] > 1 - LEVEL:
            low, high = min(low, 0.0), max(high, 0.0)
        figure = {"one": float(value[place]), "other": float(other_value[place]), "difference": difference}
        figure |= {"low": low, "high": high, "p": float(chances[place])}
        compared[name] = {key: None if math.isnan(number) else number for key, number in figure.items()}
    return compared


def bound_difference(one: dict, other: dict, left: np.ndarray, other_left: np.ndarray) -> tuple[float, float]:
    """MOVER's interval (Zou and Donner 2008) of other - one, two dependent shares with their own intervals.

    Their correlation is that of their values without each ride, (G,) each.
    """
    if one["low"] is None or other["low"] is None:
        return math.nan, math.nan
    both = np.stack([left, other_left])[:, ~np.isnan(left) & ~np.isnan(other_left)]  # (2, G')
    correlation = float(np.corrcoef(both)[0, 1]) if both.size and both.std(axis=1).all() else 0.0
    difference = other["value"] - one["value"]
    down = [other["value"] - other["low"], one["high"] - one["value"]]
    up = [other["high"] - other["value"], one["value"] - one["low"]]
    below, above = (math.sqrt(max(a * a + b * b - 2 * correlation * a * b, 0.0)) for a, b in (down, up))
    return difference - below, difference + above


def test_by_flips(score: Callable, one: np.ndarray, other: np.ndarray, seed: int) -> np.ndarray:
    """(M,) two-sided p-values of the paired sign-flip test (approximate randomisation, Noreen 1989) over rides.

    `one` and `other` (G, K) are the sums of each ride. If the systems were the same, each ride's captions might as well
    have been exchanged between them: p is the share of exchanges whose difference is as large as that found. All of
    them where EXACT_FLIPS rides or fewer differ, otherwise FLIPS random ones and that found.
    """
    change = (other - one)[(one != other).any(axis=1)]  # (D, K) of the rides that differ
    total, total_other = one.sum(axis=0), other.sum(axis=0)
    found = np.abs(score(total_other) - score(total))
    exact, rng = len(change) <= EXACT_FLIPS, np.random.default_rng(seed)
    ways = 2 ** len(change) if exact else FLIPS
    farther = np.zeros(len(found))
    step = max(CHUNK // max(len(change), 1), 1)
    for start in range(0, ways, step):
        size = min(step, ways - start)
        if exact:
            flipped = np.arange(start, start + size)[:, None] >> np.arange(len(change)) & 1
        else:
            packed = rng.integers(256, size=(size, -(-len(change) // 8)), dtype=np.uint8)
            flipped = np.unpackbits(packed, axis=1, count=len(change))
        moved = flipped.astype(float) @ change
        farther += (~(np.abs(score(total_other - moved) - score(total + moved)) < found - 1e-9)).sum(axis=0)
    return farther / ways if exact else (farther + 1) / (ways + 1)
