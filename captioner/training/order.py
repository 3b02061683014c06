"""The order in which frames are trained on."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class LengthSampler(torch.utils.data.Sampler):
    """Random order for steps of `batch_size` frames whose captions are of about one length, against padding.

    All frames are shuffled. The frames of each `window` steps are then sorted by length and cut into steps, and these
    steps are shuffled. The order depends on seed and epoch alone, so that a run can go on within an epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, window: int, seed: int):
        self.lengths, self.batch_size, self.window, self.seed = lengths, batch_size, window, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = shuffle(range(len(self.lengths)), generator)
        size = self.window * self.batch_size
        for start in range(0, len(order), size):
            part = order[start : start + size]
            whole = len(part) - len(part) % self.batch_size
            short = part[whole:]  # stays last
            batches = self.deal(sorted(part[:whole], key=lambda row: self.lengths[row]), generator)
            for batch in shuffle(batches, generator):
                yield from batch
            yield from short

    def deal(self, rows: list[int], generator: torch.Generator) -> list[list[int]]:
        """Batches of rows that are sorted by length, and make up whole batches."""
        return [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]


def shuffle(items: Sequence[T], generator: torch.Generator) -> list[T]:
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]
