"""OPT's linear layers as FastGenerator uses them: copied once with LoRA added, or read packed at each use."""

import functools
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from captioner.fast.adapters import copy_lora
from captioner.fast.layers import apply_linears, is_written_out
from captioner.fast.linears import get_base, group_linears, list_groups, read_weight


def is_plain(linear: torch.nn.Module) -> bool:
    """Whether the layer is an nn.Linear or Linear4bit, bare or with LoRA that is no variant like DoRA."""
    if isinstance(linear, LoraLayer):
        if linear.lora_variant or any(matrix.bias is not None for matrix in linear.lora_B.values()):
            return False
        linear = linear.base_layer
    return type(linear) in (torch.nn.Linear, bnb.nn.Linear4bit)


def supports(model) -> bool:
    """Whether FastGenerator can caption with this model; where not, transformers' generate() can."""
    return is_written_out(model) and all(is_plain(linear) for group in list_groups(model) for linear in group)


def copy_linear(linear: torch.nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write a layer's `weight` (out, in) and `bias` (out,) as they act now: dequantised, active LoRA added."""
    base = get_base(linear)
    weight.copy_(read_weight(base))
    bias.copy_(base.bias)
    if isinstance(linear, LoraLayer) and not linear.disable_adapters and not linear.merged:
        for name in linear.active_adapters:
            if name in linear.lora_A:
                a, b = linear.lora_A[name].weight, linear.lora_B[name].weight  # (rank, in), (out, rank)
                weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=linear.scaling[name])


def describe_lora(module: torch.nn.Module) -> list[tuple]:
    """What changes whenever LoRA below the module gives something else: what is on, and the versions of its weights.

    torch's fused optimisers don't raise them; CaptionTrainer does.
    """
    return [
        (
            layer.disable_adapters,
            layer.merged,
            *layer.active_adapters,
            *((w.data_ptr(), w._version) for w in layer.parameters()),
        )
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
    ]


class DecoderWeights:
    """The linear layers of a BLIP-2's OPT, and the LoRA of all its layers, as they were at the last update().

    With `copied`, each group of layers that read the same input is one, unquantised and with LoRA added: 5 GB for
    OPT-2.7B in bf16. Without, a layer is unpacked at each use, and LoRA is computed beside it.
    """

    def __init__(self, blip2, copied: bool):
        self.blip2, self.copied = blip2, copied
        self.copies: list[tuple[list[torch.nn.Module], Tensor, Tensor]] = []  # a group's layers, weight and bias
        self.lora, self.taken = None, None
        make = self._make_copy if copied else self._make_reader
        decoder = blip2.language_model.model.decoder
        with torch.inference_mode():
            self.layers = [[make(group) for group in group_linears(layer)] for layer in decoder.layers]

    def _make_copy(self, group: list[torch.nn.Module]) -> Callable[[Tensor], Tensor]:
        """A group as one linear layer, with room for its weight (out, in) and bias (out,)."""
        out, like = sum(linear.out_features for linear in group), self.blip2.get_input_embeddings().weight
        options = {"device": like.device, "dtype": like.dtype}
        weight, bias = torch.empty(out, group[0].in_features, **options), torch.empty(out, **options)
        self.copies.append((group, weight, bias))
        return functools.partial(F.linear, weight=weight, bias=bias)

    def _make_reader(self, group: list[torch.nn.Module]) -> Callable[[Tensor], Tensor]:
        """A group as one linear layer, whose weights are read at each use."""
        return lambda x: apply_linears(group, x, self.lora)

    def update(self) -> bool:
        """Take the weights anew if a training step or disable_adapter() has changed them.

        Returns whether they now lie elsewhere in memory, where no recorded step reads them.
        """
        if describe_lora(self.blip2) == self.taken:
            return False
        self.lora = copy_lora(self.blip2)
        self.taken = describe_lora(self.blip2)  # copying may have moved weights
        for group, weight, bias in self.copies:
            parts = zip(group, weight.chunk(len(group)), bias.chunk(len(group)), strict=True)
            for linear, weight_part, bias_part in parts:
                copy_linear(linear, weight_part, bias_part)
        return not self.copied
