"""The small products of LoRA: x @ A.T under dropout, what B makes of it, and their gradients."""

import torch
from torch import Tensor

from captioner.fast.kernels import choice
from captioner.fast.kernels.choice import VARYING, pick_stages, tl, triton
from captioner.fast.kernels.dropout import Drop, draw_keys, is_kept, number_columns, number_rows

LEAST_RANK = 16  # of what the kernels take, which are powers of 2 from there on
# of what a program works on, and by how many warps; measured on an H100
PROJECT = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
PLACED = 256  # rows of a matrix that is copied beside
ADD = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4}
BACKWARD = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 1}
SUM = {"PARTS": 16, "VALUES": 256, "num_warps": 4}
PROGRAMS = 1056  # that a launch has at least where the work can be divided at will: eight for each processor of an H100


def round_rank(x: Tensor, rank: int) -> int:
    """The rank, filled up with zeros, with which products for x are computed."""
    return max(LEAST_RANK, 1 << (rank - 1).bit_length()) if choice.use_kernels(x) else rank


def project_low(
    x: Tensor, a: Tensor, low: Tensor, drop: Drop, b: Tensor | None = None, room: Tensor | None = None
) -> Drop:
    """low (G, N, R) = dropout(x) @ A.T for each A of a (G x R, W), whose masks differ; what the backward pass needs.

    a is contiguous; rows of x (N, W) and of low may lie apart. If there is `room` (G x M, G x R), whose rows may lie
    apart, each group's part of b (G x M, R), contiguous, is written into columns of its own there, in the same launch.
    """
    (groups, rows, rank), width = low.shape, x.shape[1]
    if not choice.use_kernels(x):
        drawn = [torch.native_dropout(x, drop.share, True) if drop.share else (x, None) for _ in range(groups)]
        for out, (kept, _), part in zip(low, drawn, a.chunk(groups), strict=True):
            torch.mm(kept, part.T, out=out)
        return drop._replace(masks=torch.stack([mask for _, mask in drawn]) if drop.share else None)
    assert x.stride(1) == low.stride(2) == 1 and a.is_contiguous()
    blocks, height = triton.cdiv(rows, PROJECT["ROWS"]), 0 if room is None else len(b) // groups
    _project_low[groups, blocks + triton.cdiv(height, PLACED)](
        *(x, a, low, drop.seed, drop.site, *((a, a) if room is None else (b, room))),
        *(rows, width, height, blocks, x.stride(0), *low.stride()[:2], width if room is None else room.stride(0)),
        *(drop.level, drop.scale),
        DROPS=drop.share > 0,
        PLACES=room is not None,
        PLACED=PLACED,
        R=rank,
        **PROJECT,
        num_stages=pick_stages(x.device),
    )
    return drop


@triton.jit(do_not_specialize=VARYING)
def _project_low(
    x, a, low, seed, site, b, room, rows, width, height, blocks, x_stride, low_group, low_stride, room_stride,
    level, scale,
    DROPS: tl.constexpr, PLACES: tl.constexpr, PLACED: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    r = tl.arange(0, R)
    if tl.program_id(1) < blocks:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        keys = draw_keys(seed, site)
        row_number = number_rows(keys, group * rows + row)
        total = tl.zeros((ROWS, R), tl.float32)
        for block in range(tl.cdiv(width, COLUMNS)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            is_there = (row < rows)[:, None] & (column < width)[None, :]
            part = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], is_there, 0.0)
            if DROPS:
                same = block * COLUMNS | tl.arange(0, COLUMNS)  # computed anew, so that the compiler sees what is even
                column_number = number_columns(keys, same)
                kept = is_kept(row_number[:, None], column_number[None, :], same[None, :], level)
                part = tl.where(kept, part, 0.0)
            weight = tl.load(a + (group * R + r)[:, None] * width + column[None, :], (column < width)[None, :], 0.0)
            total += tl.dot(part, tl.trans(weight), input_precision="ieee")
        if DROPS:
            total = total * scale
        place = low + group * low_group + row.to(tl.int64)[:, None] * low_stride + r[None, :]
        tl.store(place, total.to(low.dtype.element_ty), (row < rows)[:, None])
    elif PLACES:
        output = (tl.program_id(1) - blocks) * PLACED + tl.arange(0, PLACED)
        is_output = (output < height)[:, None]
        output += group * height
        values = tl.load(b + output[:, None] * R + r[None, :], is_output)
        tl.store(room + output.to(tl.int64)[:, None] * room_stride + group * R + r[None, :], values, is_output)


def add_low_rank(out: Tensor, low: Tensor, b: Tensor, relu: bool = False) -> None:
    """out (N, G x M) += low @ B.T of each group in place, and then relu if asked for.

    low (G, N, R) contiguous, b (G x M, R) contiguous.
    """
    groups, rows, rank = low.shape
    if not choice.use_kernels(out):
        for target, part_low, part_b in zip(out.chunk(groups, 1), low, b.chunk(groups), strict=True):
            target.addmm_(part_low, part_b.T)
        if relu:
            out.relu_()
        return
    part = out.shape[1] // groups
    assert out.is_contiguous() and low.is_contiguous() and b.is_contiguous()
    columns = ADD["COLUMNS"]
    if groups > 1:
        columns = min(columns, part & -part)  # the largest power of 2 in it: no program adds to two groups
    grid = (triton.cdiv(rows, ADD["ROWS"]), groups * triton.cdiv(part, columns))
    _add_low_rank[grid](out, low, b, rows, out.shape[1], part, RELU=relu, R=rank, **ADD | {"COLUMNS": columns})


@triton.jit(do_not_specialize=VARYING)
def _add_low_rank(
    out, low, b, rows, width, part,
    RELU: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    group = tl.program_id(1) * COLUMNS // part
    r = tl.arange(0, R)
    left = tl.load(low + (group * rows + row).to(tl.int64)[:, None] * R + r[None, :], (row < rows)[:, None], 0.0)
    right = tl.load(b + column[:, None] * R + r[None, :], (column < width)[:, None], 0.0)
    is_there = (row < rows)[:, None] & (column < width)[None, :]
    place = out + row.to(tl.int64)[:, None] * width + column[None, :]
    total = tl.load(place, is_there, 0.0).to(tl.float32) + tl.dot(left, tl.trans(right), input_precision="ieee")
    if RELU:
        total = tl.maximum(total, 0.0)
    tl.store(place, total.to(out.dtype.element_ty), is_there)


def lora_backward(
    grad_x: Tensor | None, x: Tensor, grad_low: Tensor, a: Tensor, drop: Drop, relu: bool = False
) -> Tensor:
    """The gradient of `a` (G x R, W) from that of project_low's result, grad_low (G, N, R); `drop` as that gave it.

    Adds what goes to x to grad_x (N, W) in place, which is then set to 0 where x <= 0 if `relu`; None: not wanted. Rows
    of x, grad_x and grad_low may lie apart.
    """
    if not choice.use_kernels(x):
        return _lora_backward_by_torch(grad_x, x, grad_low, a, drop, relu)
    (groups, rows, rank), width = grad_low.shape, x.shape[1]
    target = x if grad_x is None else grad_x
    assert x.stride(1) == target.stride(1) == grad_low.stride(2) == 1
    blocks, height = triton.cdiv(width, BACKWARD["COLUMNS"]), BACKWARD["ROWS"]
    height *= triton.cdiv(triton.cdiv(rows, height), triton.cdiv(PROGRAMS, blocks))  # rows of a program
    parts = triton.cdiv(rows, height)
    sums = torch.empty(parts, *a.shape, dtype=torch.float32, device=a.device)
    options = {"DROPS": drop.share > 0, "ADDS": grad_x is not None, "RELU": relu, "G": groups, "R": rank}
    _lora_backward[blocks, parts](
        *(target, x, grad_low, a, sums, drop.seed, drop.site, rows, width, height, target.stride(0), x.stride(0)),
        *(*grad_low.stride()[:2], drop.level, drop.scale),
        **options,
        **BACKWARD,
    )
    return add_parts(sums, a.dtype)


def _lora_backward_by_torch(
    grad_x: Tensor | None, x: Tensor, grad_low: Tensor, a: Tensor, drop: Drop, relu: bool
) -> Tensor:
    scale, gradients = 1 / (1 - drop.share), []
    for group, part in enumerate(a.chunk(len(grad_low))):
        mask = None if drop.masks is None else drop.masks[group]
        kept = x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, scale)
        gradients.append(grad_low[group].T @ kept)
        if grad_x is not None:
            back = grad_low[group] @ part
            grad_x += back if mask is None else torch.ops.aten.native_dropout_backward(back, mask, scale)
    if relu and grad_x is not None:
        grad_x.masked_fill_(x <= 0, 0)
    return torch.cat(gradients)


@triton.jit
def _load_rows(grad_x, x, start, last, is_column, grad_stride, x_stride, ADDS: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, COLUMNS) of x and, if it ADDS to that, of grad_x, from a row on."""
    row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
    is_there = (row < last) & is_column
    values = tl.load(x + row * x_stride, is_there, 0.0)
    before = values
    if ADDS:
        before = tl.load(grad_x + row * grad_stride, is_there, 0.0)
    return values, before


@triton.jit
def _learn_group(
    values, low_place, weight, row, drawn_row, last, keys, column, column_number, level,
    DROPS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """(R, COLUMNS) that a block of rows adds to the gradient of a group's A, and (ROWS, COLUMNS) of x's, unscaled."""
    low = tl.load(low_place, (row < last)[:, None], 0.0)
    if DROPS:
        kept = is_kept(number_rows(keys, drawn_row)[:, None], column_number, column[None, :], level)
        values = tl.where(kept, values, 0.0)
    share = tl.dot(tl.trans(low), values, input_precision="ieee")
    back = tl.zeros(values.shape, tl.float32)
    if ADDS:
        back = tl.dot(low, weight, input_precision="ieee")
        if DROPS:
            back = tl.where(kept, back, 0.0)
    return share, back


@triton.jit(do_not_specialize=VARYING)
def _lora_backward(
    grad_x, x, grad_low, a, sums, seed, site, rows, width, height, grad_stride, x_stride, low_group, low_stride,
    level, scale,
    DROPS: tl.constexpr, ADDS: tl.constexpr, RELU: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keys = draw_keys(seed, site)
    column_number = number_columns(keys, column)[None, :]
    is_column = (column < width)[None, :]
    r = tl.arange(0, R)
    a_place = a + r[:, None] * width + column[None, :]
    weight0 = tl.load(a_place, is_column, 0.0)
    weight1, weight2 = weight0, weight0
    if G > 1:
        weight1 = tl.load(a_place + R * width, is_column, 0.0)
    if G > 2:
        weight2 = tl.load(a_place + 2 * R * width, is_column, 0.0)
    sum0 = tl.zeros((R, COLUMNS), tl.float32)
    sum1, sum2 = sum0, sum0
    first = tl.program_id(1) * height
    last = tl.minimum(first + height, rows)
    grad_x, x = grad_x + column[None, :], x + column[None, :]
    next_values, next_before = _load_rows(grad_x, x, first, last, is_column, grad_stride, x_stride, ADDS, ROWS)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        values, before = next_values, next_before  # the next are on their way while these are computed with
        next_values, next_before = _load_rows(
            grad_x, x, start + ROWS, last, is_column, grad_stride, x_stride, ADDS, ROWS
        )
        low = grad_low + row.to(tl.int64)[:, None] * low_stride + r[None, :]
        share, added = _learn_group(
            values, low, weight0, row, row, last, keys, column, column_number, level, DROPS, ADDS
        )
        sum0 += share
        if G > 1:
            share, back = _learn_group(
                values, low + low_group, weight1, row, rows + row, last, keys, column, column_number, level, DROPS, ADDS
            )
            sum1 += share
            added += back
        if G > 2:
            share, back = _learn_group(
                values, low + 2 * low_group, weight2, row, 2 * rows + row, last, keys, column, column_number, level,
                DROPS, ADDS,
            )  # fmt: skip
            sum2 += share
            added += back
        if ADDS:
            total = before.to(tl.float32) + added * scale
            if RELU:
                total = tl.where(values > 0, total, 0.0)
            place = grad_x + row.to(tl.int64)[:, None] * grad_stride
            tl.store(place, total.to(grad_x.dtype.element_ty), (row < last)[:, None] & is_column)
    place = sums + (tl.program_id(1) * G * R + r)[:, None] * width + column[None, :]
    tl.store(place, sum0 * scale, is_column)
    if G > 1:
        tl.store(place + R * width, sum1 * scale, is_column)
    if G > 2:
        tl.store(place + 2 * R * width, sum2 * scale, is_column)


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
