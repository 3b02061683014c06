"""The small products of LoRA: dropout(x) @ A.T, and the gradients of x and A.

Layers that read the same input count as one, with a dropout mask in common: K = G x R is the sum of their ranks.
"""

import torch
from torch import Tensor

from captioner.fast.kernels import choice
from captioner.fast.kernels.choice import VARYING, tl, triton
from captioner.fast.kernels.dropout import Drop, draw_keys, is_kept, number_columns, number_rows

LARGEST_SUM = 128  # of ranks: beyond it the products are torch's
# of what a program works on, and by how many warps; measured on an H100
PROJECT = {"ROWS": 16, "COLUMNS": 256, "PLACED": 256, "num_warps": 4}
BACKWARD = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 1}
SUM = {"PARTS": 16, "VALUES": 256, "num_warps": 4}
PROGRAMS = 528  # of the backward pass at least: four for each processor of an H100


def use_kernels(x: Tensor, ranks: int) -> bool:
    """Whether the kernels take x, with ranks that sum up to so many."""
    return choice.use_kernels(x) and ranks <= LARGEST_SUM


def fill_up(ranks: int) -> int:
    """What the kernels' products take: a power of 2, from 16 on."""
    return max(16, triton.next_power_of_2(ranks))


def pick_stages(rank: int) -> int:
    """How many blocks the projection has on their way at once: 99 KiB are all that most GPUs have for a program."""
    return 3 if rank <= 64 else 2


def project_low(x: Tensor, a: Tensor, low: Tensor, drop: Drop, b: Tensor, beside: Tensor) -> Drop:
    """Write dropout(x) @ A.T into low (N, K), of x (N, W) and a (K, W); and place b where the next product finds it.

    b (G x M, R) goes, block by block, onto the diagonal of `beside` (G x M, K), which is zero elsewhere. a and b are
    contiguous, rows of x, low and `beside` may lie apart. Returns what the backward pass needs of the dropout.
    """
    (rows, width), (outputs, rank) = x.shape, b.shape
    groups = len(a) // rank
    if not use_kernels(x, len(a)):
        kept, mask = torch.native_dropout(x, drop.share, True) if drop.share else (x, None)
        torch.mm(kept, a.T, out=low)
        blocks = beside.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2)  # (M, R, G)
        blocks.copy_(b.unflatten(0, (groups, -1)).permute(1, 2, 0))
        return drop._replace(mask=mask)
    assert x.stride(1) == low.stride(1) == beside.stride(1) == 1 and a.is_contiguous() and b.is_contiguous()
    blocks, height = triton.cdiv(rows, PROJECT["ROWS"]), outputs // groups
    _project_low[groups, blocks + triton.cdiv(height, PROJECT["PLACED"])](
        *(x, a, low, b, beside, drop.seed, drop.site, rows, width, height, blocks),
        *(x.stride(0), low.stride(0), beside.stride(0), drop.level, drop.scale),
        R=rank,
        FULL=fill_up(rank),
        **PROJECT,
        num_stages=pick_stages(rank),
    )
    return drop


@triton.jit(do_not_specialize=VARYING)
def _project_low(
    x, a, low, b, beside, seed, site, rows, width, height, blocks, x_stride, low_stride, beside_stride, level, scale,
    R: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    r = tl.arange(0, FULL)
    is_rank = r < R
    if tl.program_id(1) < blocks:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        keys = draw_keys(seed, site)
        row_number = number_rows(keys, row)[:, None]
        total = tl.zeros((ROWS, FULL), tl.float32)
        for block in range(tl.cdiv(width, COLUMNS)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            is_column = (column < width)[None, :]
            place = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
            values = tl.load(place, (row < rows)[:, None] & is_column, 0.0)
            same = block * COLUMNS | tl.arange(0, COLUMNS)  # computed anew, so that the compiler sees what is even
            kept = is_kept(row_number, number_columns(keys, same)[None, :], same[None, :], level)
            values = tl.where(kept, values, 0.0)
            weight = tl.load(a + (group * R + r)[:, None] * width + column[None, :], is_rank[:, None] & is_column, 0.0)
            total += tl.dot(values, tl.trans(weight), input_precision="ieee")
        place = low + row.to(tl.int64)[:, None] * low_stride + (group * R + r)[None, :]
        tl.store(place, (total * scale).to(low.dtype.element_ty), (row < rows)[:, None] & is_rank[None, :])
    else:
        output = (tl.program_id(1) - blocks) * PLACED + tl.arange(0, PLACED)
        is_there = (output < height)[:, None] & is_rank[None, :]
        output = (group * height + output).to(tl.int64)[:, None]
        values = tl.load(b + output * R + r[None, :], is_there)
        tl.store(beside + output * beside_stride + (group * R + r)[None, :], values, is_there)


def lora_backward(
    grad_x: Tensor | None, x: Tensor, grad_low: Tensor, a: Tensor, drop: Drop, relu: bool = False
) -> Tensor:
    """The gradient of `a` (K, W) from that of project_low's result, grad_low (N, K); `drop` as that gave it.

    Adds what goes to x to grad_x (N, W) in place, which is then set to 0 where x <= 0 if `relu`; None: not wanted. Rows
    of x, grad_x and grad_low may lie apart.
    """
    (rows, width), ranks = x.shape, len(a)
    if not use_kernels(x, ranks):

        def keep(values: Tensor) -> Tensor:
            return (
                values if drop.mask is None else torch.ops.aten.native_dropout_backward(values, drop.mask, drop.scale)
            )

        if grad_x is not None:
            grad_x += keep(grad_low @ a)
            if relu:
                grad_x.masked_fill_(x <= 0, 0)
        return grad_low.T @ keep(x)
    target = x if grad_x is None else grad_x
    assert x.stride(1) == target.stride(1) == grad_low.stride(1) == 1
    blocks, height = triton.cdiv(width, BACKWARD["COLUMNS"]), BACKWARD["ROWS"]
    height *= triton.cdiv(triton.cdiv(rows, height), triton.cdiv(PROGRAMS, blocks))  # rows of a program
    sums = torch.empty(triton.cdiv(rows, height), *a.shape, dtype=torch.float32, device=a.device)
    _lora_backward[blocks, len(sums)](
        *(target, x, grad_low, a, sums, drop.seed, drop.site, rows, width, height),
        *(target.stride(0), x.stride(0), grad_low.stride(0), drop.level, drop.scale),
        ADDS=grad_x is not None,
        RELU=relu,
        K=ranks,
        ALL=fill_up(ranks),
        **BACKWARD,
    )
    return add_parts(sums, a.dtype)


@triton.jit(do_not_specialize=VARYING)
def _lora_backward(
    grad_x, x, grad_low, a, sums, seed, site, rows, width, height, grad_stride, x_stride, low_stride, level, scale,
    ADDS: tl.constexpr, RELU: tl.constexpr, K: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < width)[None, :]
    k = tl.arange(0, ALL)
    is_rank = k < K
    keys = draw_keys(seed, site)
    column_number = number_columns(keys, column)[None, :]
    weight = tl.load(a + k[:, None] * width + column[None, :], is_rank[:, None] & is_column, 0.0)
    total = tl.zeros((ALL, COLUMNS), tl.float32)
    first = tl.program_id(1) * height
    last = tl.minimum(first + height, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        is_there = (row < last)[:, None] & is_column
        long = row.to(tl.int64)[:, None]
        values = tl.load(x + long * x_stride + column[None, :], is_there, 0.0)
        low = tl.load(grad_low + long * low_stride + k[None, :], (row < last)[:, None] & is_rank[None, :], 0.0)
        kept = is_kept(number_rows(keys, row)[:, None], column_number, column[None, :], level)
        total += tl.dot(tl.trans(low), tl.where(kept, values, 0.0), input_precision="ieee")
        if ADDS:
            place = grad_x + long * grad_stride + column[None, :]
            back = tl.where(kept, tl.dot(low, weight, input_precision="ieee") * scale, 0.0)
            back += tl.load(place, is_there, 0.0).to(tl.float32)
            if RELU:
                back = tl.where(values > 0, back, 0.0)
            tl.store(place, back.to(grad_x.dtype.element_ty), is_there)
    place = sums + (tl.program_id(1) * K + k)[:, None] * width + column[None, :]
    tl.store(place, total * scale, is_rank[:, None] & is_column)


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts.sum(0).to(dtype) of a contiguous tensor in fp32."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    _add_parts[triton.cdiv(out.numel(), SUM["VALUES"]),](parts, out, len(parts), out.numel(), **SUM)
    return out


@triton.jit(do_not_specialize=VARYING)
def _add_parts(parts, out, rows, size, PARTS: tl.constexpr, VALUES: tl.constexpr):
    place = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    total = tl.zeros((VALUES,), tl.float32)
    for start in range(0, rows, PARTS):
        part = start + tl.arange(0, PARTS)
        is_there = (part < rows)[:, None] & (place < size)[None, :]
        total += tl.sum(tl.load(parts + part.to(tl.int64)[:, None] * size + place[None, :], is_there, 0.0), 0)
    tl.store(out + place, total.to(out.dtype.element_ty), place < size)
