"""Whether the loss and the gradient of each optimiser step are numbers."""

import itertools
from typing import NamedTuple

import torch
from datasets import Dataset

from captioner.runtime.errors import UserError
from captioner.runtime.processes import gather

NAMED = 8  # frames of a bad step that are named


class Step(NamedTuple):
    """An optimiser step, before it has changed any weight."""

    number: int
    is_finite: torch.Tensor  # whether loss and gradient are numbers
    loss: torch.Tensor  # of all its frames, in all processes
    norm: torch.Tensor  # of the gradient
    losses: torch.Tensor  # (P,) of its passes in this process
    rows: list[torch.Tensor]  # of each pass, the places of its frames in the dataset


def check_steps(steps: list[Step], dataset: Dataset, output: str) -> None:
    """Raise UserError, in all processes, for the first step whose loss or gradient is no number.

    `dataset` names its frames; `output` is the folder of the checkpoints. Waits for the GPU.
    """
    finite = torch.stack([step.is_finite for step in steps]).tolist() if steps else []
    if all(finite):
        return
    step = steps[finite.index(False)]
    passes = list(zip(step.losses.isfinite().tolist(), (rows.tolist() for rows in step.rows), strict=True))
    passes = list(itertools.chain.from_iterable(gather(lambda: passes)))
    bad = [row for is_good, rows in passes for row in rows if not is_good]
    bad = bad or [row for _, rows in passes for row in rows]  # the gradient alone: of any of them
    names = dataset.with_format(None)[bad]["name"]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    raise UserError(
        f"step {step.number}: the loss is {step.loss:g} and the gradient norm {step.norm:g}, in the batch "
        f"{', '.join(names[:NAMED])}{more}. Training has stopped; the last checkpoint is "
        f"kept in {output}. Lower --learning-rate, look at those images, or use a GPU with bf16 (fp16 overflows in the "
        "Q-Former)"
    )
