"""FSDP, which spreads the weights over the GPUs of a run: what it can't do, and its settings for this model.

fsdp.yaml beside this file is what `accelerate launch --config_file` takes.
"""

import dataclasses

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from captioner.runtime.errors import UserError
from config import TrainConfig


def check_sharding(config: TrainConfig) -> None:
    """Raise UserError for what does not go with weights that are spread over the GPUs."""
    if config.base.load_in_4bit:
        raise UserError("--load-in-4bit: FSDP can't spread NF4 weights; give --no-load-in-4bit, or leave FSDP out")
    if config.run.val_captions:
        raise UserError(
            f"--val-captions {config.run.val_captions}: with FSDP no process has the whole model to caption with; give "
            "--val-captions 0, and caption with eval.py after training"
        )


def fit_fsdp(plugin, model) -> None:
    """Make accelerate's settings for FSDP fit this model: called before anything is spread.

    It wraps only layers that are there, the ViT's being gone once its outputs are stored; and losses and the sums of
    gradients, which are LoRA's alone, stay in fp32, while accelerate rounds them to the precision of the weights.
    """
    there = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in plugin.transformer_cls_names_to_wrap if name in there]
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def gather_trainable(model) -> dict[str, torch.Tensor]:
    """LoRA's whole weights, on the CPU of the first process, of a model that FSDP spreads; called in all processes."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
