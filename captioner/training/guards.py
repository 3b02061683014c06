"""What stops a training: processes with other weights, and a loss or a gradient that is no number."""

import hashlib
import itertools
from typing import NamedTuple

import torch
from datasets import Dataset

from captioner.runtime.errors import UserError
from captioner.runtime.processes import gather

NAMED = 8  # frames of a bad step that are named


def check_same_weights(model) -> None:
    """Raise UserError unless the trainable weights are the same in all processes, to the last bit."""
    weights = [weight.detach().flatten().cpu() for weight in model.parameters() if weight.requires_grad]
    digests = gather(lambda: hashlib.sha256(torch.cat(weights).view(torch.uint8).numpy()).hexdigest())
    different = [place for place, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise UserError(
            f"the weights of process {different[0]} are not those of process 0: the processes must have one seed, and "
            "go on from one checkpoint; see that all machines have the same versions and the same --output"
        )


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
