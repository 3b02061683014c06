"""LoRA's weights as one tensor, and their copies in the precision of the weights that they adapt.

Shapes: N values of all weights, G linear layers that read the same input, R LoRA rank.
"""

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
    groups, all_a, all_b = [], [], []
    for group in list_groups(model):
        layers = [layer for layer in group if has_active_lora(layer)]
        assert len(layers) in (0, len(group)), "LoRA on some of the layers that read the same input"
        groups += [layers] if layers else []
        for layer in layers:
            [name] = layer.active_adapters
            all_a.append(layer.lora_A[name].weight)
            all_b.append(layer.lora_B[name].weight)
    return groups, all_a + all_b


def join_lora(model) -> tuple[Tensor, list[nn.Parameter]]:
    """Put LoRA's weights behind each other in one tensor (N,), to be copied and trained as one.

    Returns the tensor and the weights, which the layers keep, as parts of it. Gradients of copy_lora's result reach
    the tensor, not its parts.
    """
    weights = list_lora(model)[1]
    whole = torch.cat([weight.detach().flatten() for weight in weights])
    bind_parts(whole, weights)
    get_blip2(model).joined_lora = whole.requires_grad_(), weights
    return whole, weights


def bind_parts(whole: Tensor, weights: Sequence[nn.Parameter]) -> None:
    """Make the weights parts of the whole, where they are not; their values go into it.

    What loads weights or moves a model to a device may put other memory in the place of theirs.
    """
    place = whole.data_ptr()
    for weight in weights:
        if weight.data_ptr() != place:
            start = (place - whole.data_ptr()) // whole.element_size()
            with torch.inference_mode(False), torch.no_grad():
                part = whole[start : start + weight.numel()].view_as(weight).copy_(weight)
            weight.data = part
        place += weight.nbytes


def copy_lora(model) -> Adapters:
    """LoRA's matrices in the precision in which their layer computes, B times LoRA's scale; gradients reach them.

    That precision differs between layers: the Q-Former of a model in fp16 stays in fp32. The scale is one for all
    layers. The seed is drawn anew.
    """
    blip, copies = get_blip2(model), ()
    groups, weights = list_lora(model)
    if groups:
        [name] = groups[0][0].active_adapters
        [scale] = {layer.scaling[name] for group in groups for layer in group}
        whole, parts = getattr(blip, "joined_lora", (None, []))
        if [*map(id, parts)] == [*map(id, weights)]:
            bind_parts(whole, weights)
        else:  # not joined, or another adapter was
            whole = torch.cat([weight.flatten() for weight in weights])
        shapes = [(sum(layer.r[name] for layer in group), group[0].in_features) for group in groups]
        shapes += [(sum(layer.out_features for layer in group), group[0].r[name]) for group in groups]
        dtypes = 2 * [pick_compute_dtype(get_base(group[0])) for group in groups]
        copies = ScaledCopies.apply(shapes, dtypes, scale, whole)
    sites = {module: site for site, module in enumerate(blip.modules())}
    like = blip.query_tokens
    seed = torch.randint(2**62, (1,), device=like.device) if choice.use_kernels(like) else torch.zeros(1)
    pairs = zip(copies[: len(groups)], copies[len(groups) :], strict=True)
    return Adapters({group[0]: pair for group, pair in zip(groups, pairs, strict=True)}, sites, seed)


class ScaledCopies(torch.autograd.Function):
    """Hundreds of small matrices in another precision, B's times a factor, by a few kernels.

    `whole` (N,) are the weights of list_lora. Those of the layers of a group become one matrix, of `shapes` and
    `dtypes`: first the A's of each group, then the B's.
    """

    @staticmethod
    def forward(ctx, shapes, dtypes, scale, whole):
        sizes = [rows * columns for rows, columns in shapes]
        ctx.first_b, ctx.scale, ctx.dtype = sum(sizes[: len(sizes) // 2]), scale, whole.dtype
        copies = {}
        for dtype in set(dtypes):
            copy = whole.to(dtype, copy=True)
            copy[ctx.first_b :] *= scale
            copies[dtype] = copy.split(sizes)
        return tuple(copies[dtypes[i]][i].view(shape) for i, shape in enumerate(shapes))

    @staticmethod
    def backward(ctx, *gradients):
        whole = torch.cat([gradient.flatten() for gradient in gradients]).to(ctx.dtype)
        whole[ctx.first_b :] *= ctx.scale
        return None, None, None, whole
