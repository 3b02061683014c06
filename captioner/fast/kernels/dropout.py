"""Dropout masks that are never in memory.

Whether a value is kept is drawn from a seed (1,) int64, the number of the `site` where it is dropped, and its place,
and drawn again in the backward pass. torch's twin draws from torch's generator, and keeps its mask.
"""

from typing import NamedTuple

from torch import Tensor

from captioner.fast.kernels.choice import tl, triton

LEVELS = 2**16  # dropout probabilities are multiples of 1 / LEVELS


class Drop(NamedTuple):
    """What is dropped at one place of a pass."""

    share: float
    seed: Tensor  # (1,) int64, of the pass
    site: int  # number of the place
    mask: Tensor | None = None  # that torch has drawn there

    @property
    def level(self) -> int:
        return round(self.share * LEVELS)

    @property
    def scale(self) -> float:
        """What kept values are multiplied by."""
        return LEVELS / (LEVELS - self.level)


@triton.jit
def _hash(x, key):
    """32 bits of little bias for x (uint32), which `key` changes too (Wellons 2018, Prospecting for Hash Functions)."""
    x ^= x >> 16
    x = (x * 0x21F0AAAD) ^ key
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def draw_keys(seed, site):
    """Two numbers that rows and columns are numbered with, of a seed and the number of a site."""
    number = tl.load(seed) + site
    first = _hash(number.to(tl.uint32), (number >> 32).to(tl.uint32))
    return first, _hash(~first, first)


@triton.jit
def number_rows(keys, row):
    return _hash(row.to(tl.uint32) ^ keys[0], keys[1])


@triton.jit
def number_columns(keys, column):
    """Two columns beside each other, of which the first is even, have one number."""
    return _hash((column >> 1).to(tl.uint32) ^ ~keys[1], keys[0])


@triton.jit
def is_kept(row_number, column_number, column, level):
    """Whether values are kept, of the numbers of their row and column.

    Each value's own is drawn where it is needed, in whatever order the threads hold them: the halves of the product of
    both, xor-ed (as in wyhash), of which either column takes 16 bits.
    """
    product = row_number.to(tl.uint64) * column_number.to(tl.uint64)
    number = (product ^ (product >> 32)).to(tl.uint32)
    return (number << ((~column & 1) * 16).to(tl.uint32)) >= (level.to(tl.uint32) << 16)
