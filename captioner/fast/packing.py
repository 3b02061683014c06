"""Batches without padding: rows one behind the other."""

import torch
from torch import Tensor

from captioner.blip2.batches import IGNORED, CaptionCollator

PACKED_TO, SLOW = 8, 32  # positions of a packed batch are a multiple of the one and not of the other,
SMALL = 1024  # and up to so many a multiple of twice the one
LONGEST_TO = 64  # what positions of its longest row are rounded up to


class PackedCollator(CaptionCollator):
    """Rows of CaptionDataset -> a batch for caption_nll: rows behind each other, without padding between them.

    A label is the token to predict at its place, the next one: a caption's last token is predicted, and never read.
    Padding behind the last row leaves few sizes of batches, for which cuBLAS is fast: multiples of 32 positions take an
    H100 up to 8 % longer, and odd multiples of 8 up to 3 % where they are few (benchmarks/RESULTS.md).
    """

    def __call__(self, rows: list[dict]) -> dict[str, Tensor | int]:
        input_ids, labels, starts = [], [], [0]
        for row in rows:
            input_ids += self.prefix + row["caption_ids"][:-1]
            labels += [IGNORED] * (len(self.prefix) - 1) + row["caption_ids"]
            starts.append(len(labels))
        longest = len(self.prefix) - 1 + max(len(row["caption_ids"]) for row in rows)
        multiple = PACKED_TO * (1 + (len(labels) <= SMALL))
        padding = -len(labels) % multiple
        padding += multiple * ((len(labels) + padding) % SLOW == 0)
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),  # (B, 3, S, S)
            "input_ids": torch.tensor(input_ids + [self.pad] * padding),  # (N,)
            "labels": torch.tensor(labels + [IGNORED] * padding),  # (N,)
            "starts": torch.tensor([*starts, len(labels) + padding]),  # (B+2,) of the rows and of what is behind them
            "longest": -(-longest // LONGEST_TO) * LONGEST_TO,
        }
