"""Batches without padding: rows one behind the other, in batches of about one size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.blip2.batches import IGNORED, CaptionCollator
from captioner.training.order import LengthSampler, shuffle

PACKED_TO = 32  # positions of a packed batch are an odd multiple of half of it
LONGEST_TO = 64  # what positions of its longest row are rounded up to


class PackedCollator(CaptionCollator):
    """Rows of RowReader -> a batch for caption_nll: rows behind each other, without padding between them.

    A label is the token to predict at its place, the next one: a caption's last token is predicted, and never read.
    Padding behind the last row leaves few sizes of batches. For most multiples of 32 positions cuBLAS picks kernels
    that take an H100 up to 8 % longer (benchmarks/RESULTS.md): they are odd multiples of 16.
    """

    def __call__(self, rows: list[dict]) -> dict[str, Tensor | int]:
        input_ids, labels, starts = [], [], [0]
        for row in rows:
            input_ids += self.prefix + row["caption_ids"][:-1]
            labels += [IGNORED] * (len(self.prefix) - 1) + row["caption_ids"]
            starts.append(len(labels))
        longest = len(self.prefix) - 1 + max(len(row["caption_ids"]) for row in rows)
        padding = (PACKED_TO // 2 - len(labels)) % PACKED_TO
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),  # (B, 3, S, S)
            "input_ids": torch.tensor(input_ids + [self.pad] * padding),  # (N,)
            "labels": torch.tensor(labels + [IGNORED] * padding),  # (N,)
            "starts": torch.tensor([*starts, len(labels) + padding]),  # (B+2,) of the rows and of what is behind them
            "longest": -(-longest // LONGEST_TO) * LONGEST_TO,
        }


class PackedSampler(LengthSampler):
    """LengthSampler for packed rows: a step has one frame of each range of lengths.

    So all steps, and their halves and quarters too, have about the same number of positions.
    """

    def deal(self, rows: list[int], generator: torch.Generator) -> list[list[int]]:
        count = len(rows) // self.batch_size
        ranges = [shuffle(rows[first : first + count], generator) for first in range(0, len(rows), count or 1)]
        return [spread(step) for step in zip(*ranges, strict=True)]


def spread(items: Sequence[int]) -> list[int]:
    """Sorted items in an order in which each half, quarter and so on has about the same sum.

    They are dealt out to the halves by the Thue-Morse sequence, in which neither is always served first, and so to the
    halves of each.
    """

    def list_sides(place: int) -> list[int]:
        return [(place >> depth).bit_count() % 2 for depth in range(len(items).bit_length())]

    return [items[place] for place in sorted(range(len(items)), key=list_sides)]
