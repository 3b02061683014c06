"""What is checked before training goes on: equal weights in all processes, no pickles that run code."""

import hashlib
import pickle
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from captioner.runtime.errors import UserError
from captioner.runtime.processes import gather


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


def check_pickles(checkpoint: Path) -> None:
    """Raise UserError unless what is pickled in a checkpoint holds tensors and numbers alone; nothing of it is run."""
    remedy = "is not opened; if the checkpoint is your own, start anew with --overwrite"
    for name in ("adapter_model.bin", "pytorch_model.bin"):
        if (checkpoint / name).exists():
            raise UserError(f"{checkpoint / name}: a pickle, which this program never writes, {remedy}")
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")]):
        if path.name == "training_args.bin":  # nothing reads it
            continue
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: holds other things than tensors ({reason}) and {remedy}") from None
