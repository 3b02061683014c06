"""The residual stream: x + dropout(h), and its layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.fast.kernels import choice
from captioner.fast.kernels.choice import VARYING, tl, triton
from captioner.fast.kernels.dropout import Drop, draw_keys, is_kept, number_columns, number_rows


def add_and_norm(x: Tensor, h: Tensor, drop: Drop, norm: nn.LayerNorm, room: int = 0) -> tuple[Tensor, Tensor]:
    """s = x + dropout(h) and norm(s), of x and h (..., W); norm is frozen.

    By Triton's kernels rows of norm(s) lie `room` values apart.
    """
    if choice.use_kernels(x):
        return AddAndNorm.apply(x, h, drop, norm, room)
    total = x + F.dropout(h, drop.share)
    return total, norm(total)


class AddAndNorm(torch.autograd.Function):
    """add_and_norm by Triton's kernels."""

    @staticmethod
    def forward(ctx, x, h, drop, norm, room):
        total, normed, moments = residual_norm(x.flatten(0, -2), h.flatten(0, -2), drop, norm, room)
        ctx.save_for_backward(total, moments, drop.seed)
        ctx.drop, ctx.weight = drop._replace(seed=None), norm.weight
        ctx.set_materialize_grads(False)
        return total.view(x.shape), normed.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        total, moments, seed = ctx.saved_tensors
        grad_total = None if grad_total is None else grad_total.contiguous().view(total.shape)
        drop = ctx.drop._replace(seed=seed)
        grads = residual_norm_backward(grad_total, grad_normed.flatten(0, -2), total, moments, drop, ctx.weight)
        return *(grad.view(grad_normed.shape) for grad in grads), None, None, None


def residual_norm(x: Tensor, h: Tensor, drop: Drop, norm: nn.LayerNorm, room: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(s, norm(s), (2, N) mean and 1 / deviation of s's rows in fp32) of x and h (N, W)."""
    rows, width = x.shape
    assert x.is_contiguous() and h.is_contiguous()
    total, normed = torch.empty_like(x), x.new_empty(rows, width + room)[:, :width]
    moments = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    _residual_norm[(rows,)](
        *(x, h, total, normed, moments, norm.weight, norm.bias, drop.seed, drop.site),
        *(rows, width, width + room, norm.eps, drop.level, drop.scale),
        DROPS=drop.share > 0,
        W=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, normed, moments


@triton.jit(do_not_specialize=VARYING)
def _residual_norm(
    x, h, total, normed, moments, weight, bias, seed, site, rows, width, normed_stride, epsilon, level, scale,
    DROPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, W)
    is_there = column < width
    place = row.to(tl.int64) * width + column
    added = tl.load(h + place, is_there, 0.0).to(tl.float32)
    if DROPS:
        keys = draw_keys(seed, site)
        kept = is_kept(number_rows(keys, row), number_columns(keys, column), column, level)
        added = tl.where(kept, added * scale, 0.0)
    s = (tl.load(x + place, is_there, 0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + place, s, is_there)
    s = s.to(tl.float32)
    mean = tl.sum(s, 0) / width
    centred = tl.where(is_there, s - mean, 0.0)
    factor = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + epsilon)
    tl.store(moments + row, mean)
    tl.store(moments + rows + row, factor)
    gain = tl.load(weight + column, is_there, 0.0).to(tl.float32)
    shift = tl.load(bias + column, is_there, 0.0).to(tl.float32)
    place = row.to(tl.int64) * normed_stride + column
    tl.store(normed + place, (centred * factor * gain + shift).to(normed.dtype.element_ty), is_there)


def residual_norm_backward(
    grad_total: Tensor | None, grad_normed: Tensor, total: Tensor, moments: Tensor, drop: Drop, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and h from those of s (None: nothing else has used it) and norm(s), whose rows may lie apart."""
    rows, width = total.shape
    assert grad_normed.stride(1) == 1 and (grad_total is None or grad_total.is_contiguous())
    grad_x = torch.empty_like(total)
    grad_h = torch.empty_like(total) if drop.share else grad_x
    _residual_norm_backward[(rows,)](
        *(grad_normed if grad_total is None else grad_total, grad_normed, total, moments, weight, grad_x, grad_h),
        *(drop.seed, drop.site, rows, width, grad_normed.stride(0), drop.level, drop.scale),
        ADDS=grad_total is not None,
        DROPS=drop.share > 0,
        W=triton.next_power_of_2(width),
        num_warps=8,
    )
    return grad_x, grad_h


@triton.jit(do_not_specialize=VARYING)
def _residual_norm_backward(
    grad_total, grad_normed, total, moments, weight, grad_x, grad_h, seed, site, rows, width, normed_stride,
    level, scale,
    ADDS: tl.constexpr, DROPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, W)
    is_there = column < width
    place = row.to(tl.int64) * width + column
    mean, factor = tl.load(moments + row), tl.load(moments + rows + row)
    normal = (tl.load(total + place, is_there, 0.0).to(tl.float32) - mean) * factor
    normal = tl.where(is_there, normal, 0.0)
    gain = tl.load(weight + column, is_there, 0.0).to(tl.float32)
    grad = tl.load(grad_normed + row.to(tl.int64) * normed_stride + column, is_there, 0.0).to(tl.float32) * gain
    along, level_part = tl.sum(grad * normal, 0) / width, tl.sum(grad, 0) / width
    grad = (grad - normal * along - level_part) * factor
    if ADDS:
        grad += tl.load(grad_total + place, is_there, 0.0).to(tl.float32)
    tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), is_there)
    if DROPS:
        keys = draw_keys(seed, site)
        kept = is_kept(number_rows(keys, row), number_columns(keys, column), column, level)
        dropped = tl.where(kept, grad * scale, 0.0)
        tl.store(grad_h + place, dropped.to(grad_h.dtype.element_ty), is_there)
