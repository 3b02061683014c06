"""Memory does not grow with the images: tests/load.py in short."""

import load
import pytest


@pytest.mark.slow
def test_captioning_does_not_grow(tmp_path):
    [captioned] = load.main(["--folder", str(tmp_path), "--images", "400", "--rows", "0", "--interval", "0.1"])
    assert sum(sample.done > 0 for sample in captioned.samples) > 10, "sampled while it captioned"
    assert captioned.growth() < load.LIMIT_MB
    assert (tmp_path / "load.png").stat().st_size > 5000


def test_growth_is_that_of_the_second_half():
    samples = [load.Sample(0, 100, 0), load.Sample(1, 200, 40), load.Sample(2, 250, 60), load.Sample(3, 290, 90)]
    assert load.Load("work", [*samples, load.Sample(4, 900, 100)]).growth() == 40
    assert load.Load("work", samples[:1]).growth() is None
