"""Intervals by rides, and p-values: how often they hold, and the cases that can be counted by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from captioner.scoring import bootstrap, text_metrics
from captioner.scoring.bootstrap import Rides, clopper_pearson, compare_metrics, score_with_intervals
from captioner.scoring.text_metrics import References, measure_bleu, measure_mean, tokenize_coco


def measure_share(right) -> bootstrap.Metric:
    return measure_mean(("share",), np.array(right, dtype=float).reshape(-1, 1), are_shares=True)


def name_rides(images: int, frames: int = 1) -> list[str]:
    return [str(image // frames) for image in range(images)]


def draw_right(rng, images: int, frames: int, share: float, alike: float = 0.6) -> np.ndarray:
    """Whether each caption is right: frames of a ride go together with a correlation of `alike`."""
    rides = images // frames
    own, common = rng.random((rides, frames)) < share, rng.random((rides, 1)) < share
    return np.where(rng.random((rides, frames)) < alike**0.5, common, own).ravel()


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize(("images", "share"), [(20, 0.95), (20, 0.5), (200, 0.994), (200, 0.7)])
def test_intervals_of_shares_cover_the_truth(frames, images, share):
    """Also near 1, where a bootstrap has nothing to vary, and of frames that look alike (benchmarks/coverage.py)."""
    rng, rides, covered = np.random.default_rng(0), Rides(name_rides(images, frames), 2), 0
    for _ in range(200):
        figure = score_with_intervals(measure_share(draw_right(rng, images, frames, share)), rides)["share"]
        covered += figure["low"] <= share <= figure["high"]
    assert covered >= 184  # of 200; 93 % but for the chance of so few


def test_intervals_of_other_scores_cover_the_truth_about_as_often_as_they_say():
    rng, rides, covered = np.random.default_rng(0), Rides(name_rides(40), 400), 0
    for _ in range(200):
        figure = score_with_intervals(measure_mean(("mean",), rng.exponential(3, (40, 1))), rides)["mean"]
        covered += figure["low"] <= 3 <= figure["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_of_a_share_with_a_frame_a_ride_is_that_of_clopper_and_pearson():
    """Of 20 all right by hand, 0.025 ** (1 / 20); of others as scipy has it."""
    figure = score_with_intervals(measure_share([True] * 20), Rides(name_rides(20), 2))["share"]
    assert (figure["low"], figure["high"]) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    figure = score_with_intervals(measure_share([True] * 190 + [False] * 10), Rides(name_rides(200), 2))["share"]
    assert (figure["low"], figure["high"]) == pytest.approx(clopper_pearson(0.95, 200), abs=2e-3)
    expected = binomtest(190, 200).proportion_ci(0.95, "exact")
    assert clopper_pearson(0.95, 200) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_frames_of_one_ride_count_as_little_as_they_tell():
    """Each of 20 frames four times over, in one ride each, is no more than the 20."""
    right = np.arange(20) < 15
    once = score_with_intervals(measure_share(right), Rides(name_rides(20), 2))["share"]
    four = score_with_intervals(measure_share(np.repeat(right, 4)), Rides(name_rides(80, 4), 2))["share"]
    taken_apart = score_with_intervals(measure_share(np.repeat(right, 4)), Rides(name_rides(80), 2))["share"]
    width = {name: figure["high"] - figure["low"] for name, figure in (("once", once), ("four", four))}
    assert width["four"] == pytest.approx(width["once"], rel=0.1)
    assert taken_apart["high"] - taken_apart["low"] < 0.6 * width["four"]


def test_bootstrap_samples_are_of_rides():
    rides = Rides(["a", "b", "a", "c"], 50)
    assert (rides.counts.sum(axis=1) == 3).all() and rides.index.tolist() == [0, 1, 0, 2]
    present, sums = rides.sum_up(np.arange(4.0)[:, None], np.array([0, 2, 3]))
    assert (present.tolist(), sums.tolist()) == ([0, 2], [[2.0], [3.0]])
    assert (rides.draw(sums, present)[:, 0] == rides.counts[:, [0, 2]] @ [2.0, 3.0]).all()
    assert (rides.counts == Rides(["a", "b", "a", "c"], 50).counts).all()
    assert not (rides.counts == Rides(["a", "b", "a", "c"], 50, seed=1).counts).all()


def test_a_score_that_never_varies_has_no_interval():
    figure = score_with_intervals(measure_mean(("mean",), np.full((30, 1), 0.7)), Rides(name_rides(30), 50))["mean"]
    assert figure == {"value": pytest.approx(0.7), "low": None, "high": None}


# --------------------------------------------------------------------------------------------------------------
# two systems


@pytest.mark.parametrize(("differing", "p"), [(3, 0.25), (5, 0.0625), (8, 2 / 256), (0, 1)])
def test_p_of_a_few_captions_that_differ_is_exact(differing, p):
    """All of them one way: as likely as that many coins that fall alike, either way up."""
    one = np.arange(500) < 350
    other = one | (np.arange(500) >= 500 - differing)
    row = compare_metrics(measure_share(one), measure_share(other), Rides(name_rides(500)))["share"]
    assert row["p"] == pytest.approx(p)
    assert (row["low"] > 0) == (p < 0.05)


def test_p_exchanges_whole_rides():
    """Four frames that differ in one ride are one coin."""
    one, other = np.zeros(40, dtype=bool), np.arange(40) < 4
    assert compare_metrics(measure_share(one), measure_share(other), Rides(name_rides(40, 4)))["share"]["p"] == 1.0
    assert compare_metrics(measure_share(one), measure_share(other), Rides(name_rides(40)))["share"]["p"] == 0.125


def test_p_of_many_captions_is_about_that_of_the_sign_test():
    one, other = np.arange(200) < 20, (np.arange(200) >= 20) & (np.arange(200) < 60)
    row = compare_metrics(measure_share(one), measure_share(other), Rides(name_rides(200)))["share"]
    assert row["p"] == pytest.approx(binomtest(40, 60).pvalue, abs=0.005)


def test_no_difference_is_rarely_taken_for_one():
    rng, rides, small = np.random.default_rng(1), Rides(name_rides(60, 2), 2), 0
    for _ in range(100):
        one, other = (draw_right(rng, 60, 2, 0.8) for _ in range(2))
        small += compare_metrics(measure_share(one), measure_share(other), rides)["share"]["p"] < 0.05
    assert small <= 10


def test_intervals_of_differences_cover_the_truth():
    """Two systems that are right on the same images mostly, 0.9 and 0.95 of the time, frames of a ride alike."""
    rng, rides, covered = np.random.default_rng(0), Rides(name_rides(200, 2), 2), 0
    for _ in range(100):
        one = draw_right(rng, 200, 2, 0.9)
        row = compare_metrics(measure_share(one), measure_share(one | draw_right(rng, 200, 2, 0.5)), rides)["share"]
        covered += row["low"] <= 0.05 <= row["high"]
    assert covered >= 90


def test_a_paired_comparison_tells_a_difference_from_chance():
    """A clear difference has a small p, none has a large one, and the sign is that of the second less the first."""
    references = [[f"there are {n} cars and {n + 1} lanes on the road"] for n in range(60)]
    good = [row[0] for row in references]
    bad = [text if n % 3 else "there is one bus" for n, text in enumerate(good)]
    known = References(references, [*good, *bad], tokenize_coco)
    rides = Rides(name_rides(60))
    one, other = measure_bleu(known, bad), measure_bleu(known, good)
    row = compare_metrics(one, other, rides)["BLEU-4"]
    assert row["difference"] > 0.1 and row["low"] > 0 and row["p"] < 0.01
    same = compare_metrics(one, one, rides)["BLEU-4"]
    assert (same["difference"], same["p"]) == (0, 1)
    assert text_metrics.score(one)["BLEU-4"] == pytest.approx(row["one"])
