"""The linear layers of the Q-Former and OPT, those that read the same input together, and their weights as one.

Shapes: G linear layers that read the same input.
"""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from captioner.blip2.lora import get_blip2


def group_linears(layer) -> list[list[nn.Module]]:
    """The linear layers of an OPT layer in the order of their use; those in a group read the same input."""
    attention = layer.self_attn
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [layer.fc1], [layer.fc2]]


def group_qformer_linears(layer) -> list[list[nn.Module]]:
    """The same of a Q-Former layer's part for queries."""
    own = layer.attention.attention
    groups = [[own.query, own.key, own.value], [layer.attention.output.dense]]
    if layer.has_cross_attention:
        cross = layer.crossattention.attention
        groups += [[cross.query], [cross.key, cross.value], [layer.crossattention.output.dense]]
    return [*groups, [layer.intermediate_query.dense], [layer.output_query.dense]]


def list_groups(model) -> list[list[nn.Module]]:
    """The linear layers of the language model and the Q-Former, those that read the same input together."""
    blip = get_blip2(model)
    groups = [group for layer in blip.language_model.model.decoder.layers for group in group_linears(layer)]
    return groups + [group for layer in blip.qformer.encoder.layer for group in group_qformer_linears(layer)]


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer is an nn.Linear or Linear4bit, bare or with LoRA that is no variant like DoRA."""
    if isinstance(layer, LoraLayer) and (layer.lora_variant or any(b.bias is not None for b in layer.lora_B.values())):
        return False
    return type(get_base(layer)) in (nn.Linear, bnb.nn.Linear4bit)


def get_base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def read_weight(base: nn.Linear) -> Tensor:
    """(out, in) weight of a layer without LoRA, in the precision in which it computes; NF4 is unpacked."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight
    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(base.compute_dtype)


def join_linears(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weight (sum of out, in) and bias (sum of out,) of layers as one; NF4 is unpacked."""
    bases = [get_base(layer) for layer in layers]
    if hasattr(bases[0], "joined"):  # by speed.join_weights
        return bases[0].joined
    if len(bases) == 1:
        return read_weight(bases[0]), bases[0].bias
    return torch.cat([read_weight(base) for base in bases]), torch.cat([base.bias for base in bases])


def has_active_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged


def pick_compute_dtype(base: nn.Linear) -> torch.dtype:
    """The precision in which a layer without LoRA computes."""
    return base.compute_dtype if isinstance(base, bnb.nn.Linear4bit) else base.weight.dtype
