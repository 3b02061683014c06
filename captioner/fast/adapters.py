"""LoRA's weights as one tensor, and their copies in the precision of the weights that they adapt.

Shapes: N values of all weights, G linear layers that read the same input, R LoRA rank.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captioner.blip2.lora import get_blip2
from captioner.fast.kernels import choice
from captioner.fast.kernels.dropout import Drop
from captioner.fast.linears import get_base, has_active_lora, list_groups, pick_compute_dtype


class Adapters(NamedTuple):
    """LoRA's matrices of a pass, and what its dropout masks are drawn from where Triton kernels draw them."""

    # by a group's first layer: A (G x R, in), scaled B (sum of out, R)
    matrices: dict[nn.Module, tuple[Tensor, Tensor]]
    sites: dict[nn.Module, int]  # number of the place where a module drops values
    seed: Tensor  # (1,) int64 on the device

    def drop(self, module: nn.Module, share: float) -> Drop:
        return Drop(share, self.seed, self.sites[module])


def list_lora(model) -> tuple[list[list[nn.Module]], list[nn.Parameter]]:
    """The groups of layers with active LoRA; and its weights, A of each of their layers and then B of each."""
    groups = [group for group in list_groups(model) if any(map(has_active_lora, group))]
    layers = [layer for group in groups for layer in group]
    assert all(map(has_active_lora, layers)), "LoRA on some of the layers that read the same input"
    parts = [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]
    return groups, [part[layers[0].active_adapters[0]].weight for part in parts]


def copy_lora(model, whole: Tensor | None = None) -> Adapters:
    """LoRA's matrices in the precision in which their layer computes, B times LoRA's scale; gradients reach them.

    Where its weights are parts of one tensor, `whole` (N,), they are taken from that, and gradients reach it alone.
    That precision differs between layers: the Q-Former of a model in fp16 stays in fp32. The scale is one for all
    layers. The seed is drawn anew.
    """
    blip, matrices = get_blip2(model), {}
    groups, weights = list_lora(model)
    if groups:
        [name] = groups[0][0].active_adapters
        [scale] = {layer.scaling[name] for group in groups for layer in group}
        whole = nn.utils.parameters_to_vector(weights) if whole is None else whole
        a_shapes = [(sum(layer.r[name] for layer in group), group[0].in_features) for group in groups]
        b_shapes = [(sum(layer.out_features for layer in group), group[0].r[name]) for group in groups]
        all_a, all_b = whole.split([sum(map(math.prod, shapes)) for shapes in (a_shapes, b_shapes)])
        dtypes = [pick_compute_dtype(get_base(group[0])) for group in groups]
        pairs = zip(copy_parts(all_a, a_shapes, dtypes), copy_parts(all_b * scale, b_shapes, dtypes), strict=True)
        matrices = {group[0]: pair for group, pair in zip(groups, pairs, strict=True)}
    sites = {module: site for site, module in enumerate(blip.modules())}
    like = blip.query_tokens
    seed = torch.randint(2**62, (1,), device=like.device) if choice.use_kernels(like) else torch.zeros(1)
    return Adapters(matrices, sites, seed)


def copy_parts(whole: Tensor, shapes: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Matrices that lie behind each other in `whole` (N,), each in its precision: by few kernels, however many."""
    sizes = list(map(math.prod, shapes))
    copies = {dtype: whole.to(dtype, copy=True).split(sizes) for dtype in set(dtypes)}
    return [copies[dtype][place].view(shape) for place, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))]
