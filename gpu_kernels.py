"""Triton kernels for what torch needs several passes over memory for. On a GPU only; each names what it stands in for.

Shapes: n rows, H heads of width D, L positions of the cache; N positions of a batch together, R LoRA rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # positions of the cache that are read at once
RANKS = (16, 32, 64, 128)  # that add_low_rank takes
ROWS, COLUMNS = 64, 128  # of what a program adds to


def attend_one(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one new token a row, (n, H, D): scaled_dot_product_attention with a query of length 1.

    qkv (n, 3, H, D), contiguous, holds query, key and value of the token at `position` (1,). Key and value are written
    into the cache, keys and values (n, H, L, D), and looked at with all positions before; those behind are not read.
    """
    n, _, heads, width = qkv.shape
    assert qkv.is_contiguous() and keys.stride() == values.stride() and keys.stride()[2:] == (width, 1)
    out = torch.empty(n, heads, width, dtype=qkv.dtype, device=qkv.device)
    _attend_one[n, heads](
        *(qkv, keys, values, position, out, *keys.stride()[:2], width**-0.5),
        H=heads,
        D=width,
        D_POWER=triton.next_power_of_2(width),
        L_BLOCK=BLOCK,
    )
    return out


@triton.jit
def _attend_one(
    qkv, keys, values, position, out, row_stride, head_stride, scale,
    H: tl.constexpr, D: tl.constexpr, D_POWER: tl.constexpr, L_BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.load(position)  # positions 0 to end - 1 are in the cache
    d = tl.arange(0, D_POWER)
    is_d = d < D
    new = qkv + row * 3 * H * D + head * D + d
    q = tl.load(new, is_d, 0.0).to(tl.float32) * scale
    k = tl.load(new + H * D, is_d, 0.0)
    v = tl.load(new + 2 * H * D, is_d, 0.0)
    cache = row * row_stride + head * head_stride
    tl.store(keys + cache + end * D + d, k, is_d)
    tl.store(values + cache + end * D + d, v, is_d)

    top = tl.sum(q * k.to(tl.float32), 0)  # largest score so far
    total = top * 0 + 1.0  # sum of exp(score - top)
    mean = v.to(tl.float32)  # sum of exp(score - top) times value
    for start in range(0, end, L_BLOCK):
        at = start + tl.arange(0, L_BLOCK)
        place = cache + at[:, None] * D + d[None, :]
        is_there = (at < end)[:, None] & is_d[None, :]
        old_k = tl.load(keys + place, is_there, 0.0).to(tl.float32)  # (L_BLOCK, D)
        old_v = tl.load(values + place, is_there, 0.0).to(tl.float32)
        score = tl.where(at < end, tl.sum(q[None, :] * old_k, 1), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        shrink, p = tl.exp(top - higher), tl.exp(score - higher)
        total = total * shrink + tl.sum(p, 0)
        mean = mean * shrink + tl.sum(p[:, None] * old_v, 0)
        top = higher
    tl.store(out + (row * H + head) * D + d, (mean / total).to(out.dtype.element_ty), is_d)


def add_low_rank(out: Tensor, low: Tensor, matrix: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> None:
    """out += mask * (low @ matrix) * scale in place: addmm_, with the gradient of dropout if there is a mask.

    out (N, M) with rows that may lie apart, low (N, R) contiguous, matrix (R, M) in any order, mask (N, M) of bool,
    contiguous; R is one of RANKS.
    """
    rows, width = out.shape
    assert out.stride(1) == 1 and low.is_contiguous() and (mask is None or mask.is_contiguous())
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    options = {"MASKED": mask is not None, "R": low.shape[1], "ROWS": ROWS, "COLUMNS": COLUMNS}
    arguments = (out, low, matrix, out if mask is None else mask, scale, rows, width)
    _add_low_rank[grid](*arguments, out.stride(0), *matrix.stride(), **options)


@triton.jit
def _add_low_rank(
    out, low, matrix, mask, scale, rows, width, out_stride, matrix_stride, matrix_step,
    MASKED: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, R)
    left = tl.load(low + row[:, None] * R + r[None, :], (row < rows)[:, None], 0.0)
    right = tl.load(matrix + r[:, None] * matrix_stride + column[None, :] * matrix_step, (column < width)[None, :], 0.0)
    added = tl.dot(left, right) * scale
    is_there = (row < rows)[:, None] & (column < width)[None, :]
    if MASKED:
        kept = tl.load(mask + row[:, None] * width + column[None, :], is_there, 0)
        added = tl.where(kept != 0, added, 0.0)
    place = out + row[:, None] * out_stride + column[None, :]
    before = tl.load(place, is_there, 0.0)
    tl.store(place, (before.to(tl.float32) + added).to(before.dtype), is_there)
