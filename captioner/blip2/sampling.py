"""Drawing tokens so that an image's caption is the same whatever it is captioned with.

Which token is drawn depends on the model's probabilities, the image's seed and the token's place in the caption, and
on nothing else: not on the batch, the process, or what was drawn before. A token is drawn as the largest of
probability / noise, with noise from the exponential distribution, independent for each token (the exponential race,
or Gumbel-max trick). The noise is a hash of seed, place and token, so no generator has a state to keep.

Shapes: n rows, V tokens of the vocabulary, K of them that noise is wanted for.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

NUCLEUS = 1024  # most likely tokens among which top-p draws
PLACES = 2**20  # tokens that one place of a caption may have; more than any vocabulary of OPT


def seed_image(seed: int, name: str) -> int:
    """The seed, 64 bits with sign, of the image of that name in a run with that seed."""
    digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def draw_noise(seeds: Tensor, place: Tensor | int, tokens: Tensor) -> Tensor:
    """Exponential noise (n, K) for `tokens` (n, K) at a place of captions whose images have `seeds` (n,).

    A hash by SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), of which 23 bits
    are taken: uniform values strictly between 0 and 1, exact in fp32.
    """
    counter = place * PLACES + tokens
    mixed = seeds[:, None] + counter * _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shift(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift(mixed, 27)) * _signed(0x94D049BB133111EB)
    mixed = mixed ^ _shift(mixed, 31)
    return -((_shift(mixed, 41) + 0.5) / 2**23).log()


def _signed(number: int) -> int:
    """64 bits as torch's int64 has them; it multiplies and adds modulo 2^64."""
    return number - 2**64


def _shift(numbers: Tensor, places: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (numbers >> places) & (2 ** (64 - places) - 1)


def pick_tokens(logits: Tensor, temperature: float, top_p: float, seeds: Tensor, place: Tensor | int) -> Tensor:
    """Draw one token (n,) a row from logits (n, V), with the distribution of transformers' temperature and top_p.

    Below top_p = 1 the nucleus is drawn from the NUCLEUS most likely tokens: where those hold less than top_p of the
    probability, the tail behind them is lost.
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p >= 1:
        tokens = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return (probabilities / draw_noise(seeds, place, tokens)).argmax(-1)
    top, tokens = probabilities.topk(min(NUCLEUS, logits.shape[1]))  # from the most likely on
    before = top.cumsum(-1) - top  # a token stays while those before it hold less than top_p
    noise = draw_noise(seeds, place, tokens)
    drawn = (top.masked_fill(before >= top_p, 0) / noise).argmax(-1, keepdim=True)
    return tokens.gather(-1, drawn).squeeze(-1)


class DrawTokens(LogitsProcessor):
    """Makes the token that pick_tokens draws the only one that transformers' generate() can take. For one call of it,
    greedy and without other settings of sampling."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int], device: torch.device):
        self.temperature, self.top_p = temperature, top_p
        self.seeds = torch.tensor(seeds, device=device)  # (n,)
        self.place = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = pick_tokens(scores, self.temperature, self.top_p, self.seeds, self.place)
        self.place += 1
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
