"""The residual stream: x + dropout(h), and its layer norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captioner.fast.kernels import choice
from captioner.fast.kernels.choice import VARYING, tl, triton
from captioner.fast.kernels.dropout import Drop, draw_keys, is_kept, number_columns, number_rows
from captioner.fast.kernels.lora import LARGEST_SUM


def add_and_norm(x: Tensor, h: Tensor, drop: Drop, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """s = x + dropout(h) and norm(s), of x and h (..., W); norm is frozen.

    By Triton's kernels rows of norm(s) lie apart in memory: for LoRA's projections, beside what they are of.
    """
    if choice.use_kernels(x):
        sums = AddAndNorm.apply(x.flatten(0, -2), h.flatten(0, -2), drop, norm)
        return sums[0].view(x.shape), sums[1].unflatten(0, x.shape[:-1])
    total = x + F.dropout(h, drop.share)
    return total, norm(total)


class AddAndNorm(torch.autograd.Function):
    """add_and_norm of x and h (N, W) by Triton's kernels."""

    @staticmethod
    def forward(ctx, x, h, drop, norm):
        rows, width = x.shape
        assert x.stride(1) == 1 and h.is_contiguous()
        total, normed = torch.empty_like(h), x.new_empty(rows, width + LARGEST_SUM)[:, :width]
        _add_and_norm[(rows,)](
            *(x, h, total, normed, norm.weight, norm.bias, drop.seed, drop.site),
            *(width, x.stride(0), normed.stride(0), norm.eps, drop.level, drop.scale),
            W=triton.next_power_of_2(width),
            num_warps=8,
        )
        ctx.save_for_backward(total, drop.seed)
        ctx.drop, ctx.norm = drop._replace(seed=None), norm
        return total, normed

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        (total, seed), drop = ctx.saved_tensors, ctx.drop
        assert grad_normed.stride(1) == 1
        grad_x, grad_h = torch.empty_like(total), torch.empty_like(total)
        _add_and_norm_backward[(len(total),)](
            *(grad_total.contiguous(), grad_normed, total, ctx.norm.weight, grad_x, grad_h, seed, drop.site),
            *(total.shape[1], grad_normed.stride(0), ctx.norm.eps, drop.level, drop.scale),
            W=triton.next_power_of_2(total.shape[1]),
            num_warps=8,
        )
        return grad_x, grad_h, None, None


@triton.jit(do_not_specialize=VARYING)
def _add_and_norm(
    x, h, total, normed, weight, bias, seed, site, width, x_stride, normed_stride, epsilon, level, scale,
    W: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, W)
    is_there = column < width
    row = row.to(tl.int64)
    place = row * width + column
    added = _drop(tl.load(h + place, is_there, 0.0).to(tl.float32), seed, site, row, column, level, scale)
    s = (tl.load(x + row * x_stride + column, is_there, 0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + place, s, is_there)
    normal, _ = _normalise(s.to(tl.float32), is_there, width, epsilon)
    gain = tl.load(weight + column, is_there, 0.0).to(tl.float32)
    shift = tl.load(bias + column, is_there, 0.0).to(tl.float32)
    place = row * normed_stride + column
    tl.store(normed + place, (normal * gain + shift).to(normed.dtype.element_ty), is_there)


@triton.jit(do_not_specialize=VARYING)
def _add_and_norm_backward(
    grad_total, grad_normed, total, weight, grad_x, grad_h, seed, site, width, normed_stride, epsilon, level, scale,
    W: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, W)
    is_there = column < width
    place = row.to(tl.int64) * width + column
    normal, factor = _normalise(tl.load(total + place, is_there, 0.0).to(tl.float32), is_there, width, epsilon)
    gain = tl.load(weight + column, is_there, 0.0).to(tl.float32)
    grad = tl.load(grad_normed + row.to(tl.int64) * normed_stride + column, is_there, 0.0).to(tl.float32) * gain
    along, mean = tl.sum(grad * normal, 0) / width, tl.sum(grad, 0) / width
    grad = (grad - normal * along - mean) * factor
    grad += tl.load(grad_total + place, is_there, 0.0).to(tl.float32)
    tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), is_there)
    dropped = _drop(grad, seed, site, row, column, level, scale)
    tl.store(grad_h + place, dropped.to(grad_h.dtype.element_ty), is_there)


@triton.jit
def _normalise(s, is_there, width, epsilon):
    """A row's values with mean 0 and deviation 1, and 1 / its deviation before."""
    centred = tl.where(is_there, s - tl.sum(s, 0) / width, 0.0)
    factor = 1 / tl.sqrt(tl.sum(centred * centred, 0) / width + epsilon)
    return centred * factor, factor


@triton.jit
def _drop(values, seed, site, row, column, level, scale):
    keys = draw_keys(seed, site)
    kept = is_kept(number_rows(keys, row), number_columns(keys, column), column, level)
    return tl.where(kept, values * scale, 0.0)
