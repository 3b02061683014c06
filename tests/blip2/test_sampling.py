"""Tokens that are drawn by the image's seed."""

import pytest
import torch

from captioner.blip2 import sampling
from captioner.blip2.sampling import draw_noise, pick_tokens, seed_image

LOGITS = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2]])).expand(1000, -1)
SEEDS = torch.tensor([seed_image(0, f"{number}.jpg") for number in range(1000)])


@pytest.mark.parametrize(
    ("temperature", "top_p", "nucleus", "tokens"),
    [
        (1.0, 1.0, 4, [0, 1, 2, 3]),
        (1.0, 0.75, 4, [0, 2, 3]),
        (1.0, 0.65, 4, [0, 2]),
        (1.0, 0.95, 2, [0, 2]),  # cut at two tokens
        (1.0, 0.0, 4, [0]),
        (0.01, 0.75, 4, [0]),
    ],
)
def test_nucleus_is_drawn_from_the_most_likely_tokens(monkeypatch, temperature, top_p, nucleus, tokens):
    monkeypatch.setattr(sampling, "NUCLEUS", nucleus)
    assert pick_tokens(LOGITS, temperature, top_p, SEEDS, 0).unique().tolist() == tokens


@pytest.mark.parametrize("top_p", [0.95, 1.0])
def test_the_order_of_the_vocabulary_and_of_the_rows_do_not_matter(top_p):
    """A token's noise is its own: those that are near in probability may change places."""
    whole = pick_tokens(LOGITS, 1.0, top_p, SEEDS, 3)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pick_tokens(LOGITS, 1.0, top_p, SEEDS[order], 3), whole[order])
    nearly = LOGITS + 1e-4 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert (pick_tokens(nearly, 1.0, top_p, SEEDS, 3) == whole).float().mean() > 0.99


def test_noise_is_exponential_and_independent():
    """By row, by place and by token: mean and standard deviation 1, no correlation, tails as they should be."""
    tokens = torch.arange(500).expand(1000, -1)
    noise = torch.stack([draw_noise(SEEDS, place, tokens) for place in range(4)])  # (4, 1000, 500)
    assert noise.min() > 0 and noise.isfinite().all()
    assert abs(noise.mean() - 1) < 4e-3 and abs(noise.std() - 1) < 4e-3
    for quantile in (0.1, 1.0, 5.0):
        share = (noise > quantile).float().mean().item()
        expected = torch.tensor(-quantile).exp().item()
        assert abs(share - expected) < 5 * (expected / noise.numel()) ** 0.5
    for axis in range(3):
        shifted = noise.roll(1, axis)
        assert abs(((noise - 1) * (shifted - 1)).mean()) < 4e-3
    assert draw_noise(SEEDS[:1], 0, tokens[:1, :4]).tolist() == draw_noise(SEEDS[:2], 0, tokens[:2])[:1, :4].tolist()


def test_any_name_has_a_seed():
    names = ["a.jpg", "b.jpg", "", "\udcff.jpg", "ä/ö.jpg"]
    seeds = [seed_image(seed, name) for seed in (0, 1) for name in names]
    assert len(set(seeds)) == 10 and all(-(2**63) <= seed < 2**63 for seed in seeds)
