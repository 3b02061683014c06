"""Triton kernels for what torch needs several passes over memory for. On a GPU only; each names what it stands in for.

Shapes: N positions of a batch together, G linear layers that read the same input, R LoRA rank, W width of an input, M
width of a layer's output, V vocabulary; n rows, H heads of width D, L positions of the cache.

Dropout masks are never in memory: whether a value is kept is drawn from a seed (1,) int64, the number of the `site`
where it is dropped, and its place, and drawn again in the backward pass.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

RANKS = (16, 32, 64)  # of LoRA, that the kernels here take
# of what a program works on, and by how many warps; measured on an H100
PROJECT = {"ROWS": 16, "COLUMNS": 256, "num_warps": 4}
PLACED = 256  # rows of a matrix that is copied beside
ADD = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4}
BACKWARD = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4, "num_stages": 1}
SUM = {"PARTS": 16, "VALUES": 256, "num_warps": 4}
ATTEND = {"MOST": 64, "num_warps": 4}  # most queries and keys
CAUSAL_KEYS = 32  # most keys of a causal forward pass
ATTEND_ONE = {"POSITIONS": 16, "num_warps": 1}  # of the cache
LARGE_SHARED_MEMORY = 160 * 2**10  # bytes of a program; A100 and H100 have more, other GPUs 99 KiB
PROGRAMS = 1056  # that a launch has at least where the work can be divided at will: eight for each processor of an H100
LEVELS = 2**16  # dropout probabilities are multiples of 1 / LEVELS
# arguments that no kernel is compiled anew for
VARYING = ("site", "level", "rows", "height", "blocks", "length", "key_length", "positions")


@triton.jit
def _hash(x, key):
    """32 bits of little bias for x (uint32), which `key` changes too (Wellons 2018, Prospecting for Hash Functions)."""
    x ^= x >> 16
    x = (x * 0x21F0AAAD) ^ key
    x ^= x >> 15
    x *= 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _draw_keys(seed, site):
    """Two numbers that rows and columns are numbered with, of a seed and the number of a site."""
    number = tl.load(seed) + site
    first = _hash(number.to(tl.uint32), (number >> 32).to(tl.uint32))
    return first, _hash(~first, first)


@triton.jit
def _number_rows(keys, row):
    return _hash(row.to(tl.uint32) ^ keys[0], keys[1])


@triton.jit
def _number_columns(keys, column):
    """Two columns beside each other, of which the first is even, have one number."""
    return _hash((column >> 1).to(tl.uint32) ^ ~keys[1], keys[0])


@triton.jit
def _is_kept(row_number, column_number, column, level):
    """Whether values are kept, of the numbers of their row and column.

    Each value's own is drawn where it is needed, in whatever order the threads hold them: the halves of the product of
    both, xor-ed (as in wyhash), of which either column takes 16 bits.
    """
    product = row_number.to(tl.uint64) * column_number.to(tl.uint64)
    number = (product ^ (product >> 32)).to(tl.uint32)
    return (number << ((~column & 1) * 16).to(tl.uint32)) >= (level.to(tl.uint32) << 16)


def pick_stages(device: torch.device) -> int:
    """How many blocks a loop has on their way at once: fewer on GPUs with little shared memory (RTX 30 and 40, L4)."""
    return _pick_stages(device.index) if device.type == "cuda" else 1


@functools.cache
def _pick_stages(index: int) -> int:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return 3 if properties["max_shared_mem"] >= LARGE_SHARED_MEMORY else 2


def _to_level(dropout: float) -> int:
    return round(dropout * LEVELS)


def _to_scale(dropout: float) -> float:
    """What kept values are multiplied by."""
    return LEVELS / (LEVELS - _to_level(dropout))


# --------------------------------------------------------------------------------------------------------------
# LoRA


def project_low(
    x: Tensor,
    a: Tensor,
    dropout: float,
    seed: Tensor,
    site: int,
    low: Tensor,
    b: Tensor | None = None,
    room: Tensor | None = None,
) -> None:
    """low (G, N, R) = dropout(x) @ A.T for each A of a (G x R, W), whose masks differ.

    a is contiguous; rows of x (N, W) and of low may lie apart. If there is `room` (G x M, G x R), whose rows may lie
    apart, each group's part of b (G x M, R), contiguous, is written into columns of its own there, in the same launch.
    """
    (groups, rows, rank), width = low.shape, x.shape[1]
    assert x.stride(1) == low.stride(2) == 1 and a.is_contiguous()
    blocks, height = triton.cdiv(rows, PROJECT["ROWS"]), 0 if room is None else len(b) // groups
    _project_low[groups, blocks + triton.cdiv(height, PLACED)](
        *(x, a, low, seed, site, *((a, a) if room is None else (b, room))),
        *(rows, width, height, blocks, x.stride(0), *low.stride()[:2], width if room is None else room.stride(0)),
        *(_to_level(dropout), _to_scale(dropout)),
        DROPS=dropout > 0,
        PLACES=room is not None,
        PLACED=PLACED,
        R=rank,
        **PROJECT,
        num_stages=pick_stages(x.device),
    )


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
        keys = _draw_keys(seed, site)
        row_number = _number_rows(keys, group * rows + row)
        total = tl.zeros((ROWS, R), tl.float32)
        for block in range(tl.cdiv(width, COLUMNS)):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            is_there = (row < rows)[:, None] & (column < width)[None, :]
            part = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], is_there, 0.0)
            if DROPS:
                same = block * COLUMNS | tl.arange(0, COLUMNS)  # computed anew, so that the compiler sees what is even
                column_number = _number_columns(keys, same)
                is_kept = _is_kept(row_number[:, None], column_number[None, :], same[None, :], level)
                part = tl.where(is_kept, part, 0.0)
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
    """out (N, G x M) += low @ B.T of each group in place, and then relu if asked for: addmm_ for each, and relu_.

    low (G, N, R) contiguous, b (G x M, R) contiguous.
    """
    groups, rows, rank = low.shape
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
    grad_x: Tensor | None,
    x: Tensor,
    grad_low: Tensor,
    a: Tensor,
    dropout: float,
    seed: Tensor,
    site: int,
    relu: bool = False,
) -> Tensor:
    """The gradient of `a` (G x R, W) from that of project_low's result, grad_low (G, N, R).

    Adds what goes to x to grad_x (N, W) in place, which is then set to 0 where x <= 0 if `relu`; None: not wanted. Rows
    of x, grad_x and grad_low may lie apart.
    """
    (groups, rows, rank), width = grad_low.shape, x.shape[1]
    target = x if grad_x is None else grad_x
    assert x.stride(1) == target.stride(1) == grad_low.stride(2) == 1
    blocks, height = triton.cdiv(width, BACKWARD["COLUMNS"]), BACKWARD["ROWS"]
    height *= triton.cdiv(triton.cdiv(rows, height), triton.cdiv(PROGRAMS, blocks))  # rows of a program
    parts = triton.cdiv(rows, height)
    sums = torch.empty(parts, *a.shape, dtype=torch.float32, device=a.device)
    options = {"DROPS": dropout > 0, "ADDS": grad_x is not None, "RELU": relu, "G": groups, "R": rank}
    _lora_backward[blocks, parts](
        *(target, x, grad_low, a, sums, seed, site, rows, width, height, target.stride(0), x.stride(0)),
        *(*grad_low.stride()[:2], _to_level(dropout), _to_scale(dropout)),
        **options,
        **BACKWARD,
    )
    return add_parts(sums, a.dtype)


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


@triton.jit(do_not_specialize=VARYING)
def _lora_backward(
    grad_x, x, grad_low, a, sums, seed, site, rows, width, height, grad_stride, x_stride, low_group, low_stride,
    level, scale,
    DROPS: tl.constexpr, ADDS: tl.constexpr, RELU: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    keys = _draw_keys(seed, site)
    column_number = _number_columns(keys, column)[None, :]
    is_column = (column < width)[None, :]
    r = tl.arange(0, R)
    sum0 = tl.zeros((R, COLUMNS), tl.float32)
    sum1 = tl.zeros((R, COLUMNS), tl.float32)
    sum2 = tl.zeros((R, COLUMNS), tl.float32)
    weight0 = tl.load(a + r[:, None] * width + column[None, :], is_column, 0.0)
    weight1 = weight0
    weight2 = weight0
    if G > 1:
        weight1 = tl.load(a + (R + r)[:, None] * width + column[None, :], is_column, 0.0)
    if G > 2:
        weight2 = tl.load(a + (2 * R + r)[:, None] * width + column[None, :], is_column, 0.0)
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
        added = tl.zeros((ROWS, COLUMNS), tl.float32)
        for group in tl.static_range(G):
            low_place = group * low_group + row.to(tl.int64)[:, None] * low_stride + r[None, :]
            low = tl.load(grad_low + low_place, (row < last)[:, None], 0.0)
            kept = values
            if DROPS:
                row_number = _number_rows(keys, group * rows + row)[:, None]
                is_kept = _is_kept(row_number, column_number, column[None, :], level)
                kept = tl.where(is_kept, values, 0.0)
            share = tl.dot(tl.trans(low), kept, input_precision="ieee")  # (R, COLUMNS)
            if group == 0:
                sum0 += share
            elif group == 1:
                sum1 += share
            else:
                sum2 += share
            if ADDS:
                if group == 0:
                    back = tl.dot(low, weight0, input_precision="ieee")
                elif group == 1:
                    back = tl.dot(low, weight1, input_precision="ieee")
                else:
                    back = tl.dot(low, weight2, input_precision="ieee")
                if DROPS:
                    back = tl.where(is_kept, back, 0.0)
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


# --------------------------------------------------------------------------------------------------------------
# residual stream


def residual_norm(
    x: Tensor, h: Tensor, dropout: float, seed: Tensor, site: int, norm: torch.nn.LayerNorm, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(s = x + dropout(h), norm(s), (2, N) mean and 1 / deviation of s's rows in fp32); x and h (N, W).

    Rows of norm(s) lie `room` values apart.
    """
    rows, width = x.shape
    assert x.is_contiguous() and h.is_contiguous()
    total, normed = torch.empty_like(x), x.new_empty(rows, width + room)[:, :width]
    moments = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    _residual_norm[(rows,)](
        *(x, h, total, normed, moments, norm.weight, norm.bias, seed, site, rows, width, width + room, norm.eps),
        *(_to_level(dropout), _to_scale(dropout)),
        DROPS=dropout > 0,
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
        keys = _draw_keys(seed, site)
        is_kept = _is_kept(_number_rows(keys, row), _number_columns(keys, column), column, level)
        added = tl.where(is_kept, added * scale, 0.0)
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
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    moments: Tensor,
    dropout: float,
    seed: Tensor,
    site: int,
    weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of residual_norm's x and h from those of its sum (None: nothing else has used it) and normed sum.

    Rows of the latter may lie apart.
    """
    rows, width = total.shape
    assert grad_normed.stride(1) == 1 and (grad_total is None or grad_total.is_contiguous())
    grad_x = torch.empty_like(total)
    grad_h = torch.empty_like(total) if dropout else grad_x
    _residual_norm_backward[(rows,)](
        *(grad_normed if grad_total is None else grad_total, grad_normed, total, moments, weight, grad_x, grad_h),
        *(seed, site, rows, width, grad_normed.stride(0), _to_level(dropout), _to_scale(dropout)),
        ADDS=grad_total is not None,
        DROPS=dropout > 0,
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
        keys = _draw_keys(seed, site)
        is_kept = _is_kept(_number_rows(keys, row), _number_columns(keys, column), column, level)
        dropped = tl.where(is_kept, grad * scale, 0.0)
        tl.store(grad_h + place, dropped.to(grad_h.dtype.element_ty), is_there)


# --------------------------------------------------------------------------------------------------------------
# attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    is_causal: bool,
    dropout: float,
    seed: Tensor,
    site: int,
    rows: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """F.scaled_dot_product_attention of q (B, L, W) over k and v (B, S, W), heads being side by side.

    With `rows` q, k and v are (N, W), rows of different lengths behind each other: a tensor (B+1,) int64 of where each
    begins and the last ends, and a length that none exceeds. Each may be a part of the result of linear layers side by
    side; k and v have the same strides. Returns what has q's shape, and (heads, positions) fp32 logarithms to base 2 of
    the sums that probabilities were divided by.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.empty(heads, out[..., 0].numel(), dtype=torch.float32, device=q.device)
    batch, length, key_length, starts = _size_rows(q, k, rows)
    width = q.shape[-1] // heads
    sizes = _size_blocks(length, key_length, width) | {"num_stages": pick_stages(q.device)}
    if is_causal:
        sizes["KEYS"] = min(sizes["KEYS"], CAUSAL_KEYS)
    _attend[triton.cdiv(length, sizes["QUERIES"]), batch * heads](
        *(q, k, v, out, sums, starts, seed, site, length, key_length, sums.shape[1], heads, width),
        *(q.stride(-2), k.stride(-2), out.shape[-1], width**-0.5, _to_level(dropout), _to_scale(dropout)),
        CAUSAL=is_causal,
        DROPS=dropout > 0,
        PACKED=rows is not None,
        **sizes,
    )
    return out, sums


def attend_backward(
    grad_out: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    sums: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    is_causal: bool,
    dropout: float,
    seed: Tensor,
    site: int,
    rows: tuple[Tensor, int] | None = None,
) -> None:
    """Write the `gradients` of attend's q, k and v, which have their strides. They are the same each time.

    Positions of grad_out may lie apart.
    """
    (q, k, v), (heads, positions) = inputs, sums.shape
    assert grad_out.stride(-1) == 1 and out.is_contiguous()
    batch, length, key_length, starts = _size_rows(q, k, rows)
    width = q.shape[-1] // heads
    sizes = _size_blocks(length, key_length, width)
    along = torch.empty_like(sums)
    arguments = (
        *(q, k, v, out, grad_out, sums, along, *gradients, starts, seed, site),
        *(length, key_length, positions, heads, width, q.stride(-2), k.stride(-2), out.shape[-1], grad_out.stride(-2)),
        *(width**-0.5, _to_level(dropout), _to_scale(dropout)),
    )
    options = {"CAUSAL": is_causal, "DROPS": dropout > 0, "PACKED": rows is not None, **sizes}
    stages = 1 if is_causal else pick_stages(q.device)  # the fastest on an H100
    # the first writes `along`, which the second reads
    _attend_backward_queries[triton.cdiv(length, sizes["QUERIES"]), batch * heads](
        *arguments, **options, num_stages=stages
    )
    _attend_backward_keys[triton.cdiv(key_length, sizes["KEYS"]), batch * heads](*arguments, **options, num_stages=1)


def _size_rows(q: Tensor, k: Tensor, rows: tuple[Tensor, int] | None) -> tuple[int, int, int, Tensor]:
    """Number of rows, queries and keys of one at most, and where they begin (any tensor if they are of one length)."""
    if rows is None:
        return len(q), q.shape[1], k.shape[1], q
    return len(rows[0]) - 1, rows[1], rows[1], rows[0]


def _size_blocks(length: int, keys: int, width: int) -> dict[str, int]:
    """Queries and keys that are worked on at once."""
    most = ATTEND["MOST"]
    queries, keys = (min(most, max(16, triton.next_power_of_2(size))) for size in (length, keys))
    return {"QUERIES": queries, "KEYS": keys, **_size_head(width), "num_warps": ATTEND["num_warps"]}


def _size_head(width: int) -> dict[str, int]:
    """The powers of 2 that a head's width is made up of.

    Those are one, or two where that leaves less to fill up: 64 and 16 for the 80 of OPT-2.7B.
    """
    whole = max(16, triton.next_power_of_2(width))
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return {"D": whole, "E": 0} if whole == 16 or rest == whole // 2 else {"D": whole // 2, "E": rest}


@triton.jit
def _find_row(starts, length, key_length, positions, heads, width, PACKED: tl.constexpr):
    """Where a program's row and head are: the head's first column, where its sums begin, and of the row the first query
    and number of queries, and the first key and number of keys."""
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    begin, key_begin = row.to(tl.int64) * length, row.to(tl.int64) * key_length
    if PACKED:
        begin = tl.load(starts + row)
        key_begin = begin
        length = (tl.load(starts + row + 1) - begin).to(tl.int32)
        key_length = length
    return head * width, head.to(tl.int64) * positions + begin, begin, length, key_begin, key_length


@triton.jit
def _load_head(start, row, is_row, stride, width, D: tl.constexpr, E: tl.constexpr):
    """Rows (rows, width) of a head as blocks (rows, D) and (rows, E); where E is 0, the first stands for the second."""
    d = tl.arange(0, D)
    place = start + row[:, None] * stride
    block = tl.load(place + d[None, :], is_row[:, None] & (d < width)[None, :], 0.0)
    rest = block
    if E > 0:
        e = D + tl.arange(0, E)
        rest = tl.load(place + e[None, :], is_row[:, None] & (e < width)[None, :], 0.0)
    return block, rest


@triton.jit
def _store_head(start, row, is_row, stride, width, block, rest, D: tl.constexpr, E: tl.constexpr):
    d = tl.arange(0, D)
    place = start + row[:, None] * stride
    tl.store(place + d[None, :], block.to(start.dtype.element_ty), is_row[:, None] & (d < width)[None, :])
    if E > 0:
        e = D + tl.arange(0, E)
        tl.store(place + e[None, :], rest.to(start.dtype.element_ty), is_row[:, None] & (e < width)[None, :])


@triton.jit
def _products(a, b, E: tl.constexpr):
    """Products (rows of a, rows of b) along a head, of what _load_head gave."""
    total = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if E > 0:
        total += tl.dot(a[1], tl.trans(b[1]), input_precision="ieee")
    return total


@triton.jit
def _add_products(total, weights, b, E: tl.constexpr):
    """total += weights (rows, rows of b) @ b, both blocks of each."""
    first = total[0] + tl.dot(weights, b[0], input_precision="ieee")
    rest = first
    if E > 0:
        rest = total[1] + tl.dot(weights, b[1], input_precision="ieee")
    return first, rest


@triton.jit
def _zero_head(ROWS: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    block = tl.zeros((ROWS, D), tl.float32)
    rest = block
    if E > 0:
        rest = tl.zeros((ROWS, E), tl.float32)
    return block, rest


@triton.jit
def _scores(
    q, k, queries, keys, length, key_length, scale, CAUSAL: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Scores to base 2 (QUERIES, KEYS) of blocks q and k, -inf where nothing is to be seen."""
    is_seen = (keys < key_length)[None, :] & (queries < length)[:, None]
    if CAUSAL:
        is_seen = is_seen & (queries[:, None] >= keys[None, :])
    return tl.where(is_seen, _products(q, k, E) * scale * 1.4426950408889634, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def _attend(
    q, k, v, out, sums, starts, seed, site, length, key_length, positions, heads, width, q_stride, k_stride, out_stride,
    scale, level, kept_scale,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    drawn, drawn_row = _draw_keys(seed, site), tl.program_id(1) * length
    first, at, begin, length, key_begin, key_length = _find_row(
        starts, length, key_length, positions, heads, width, PACKED
    )
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    q_block = _load_head(q + first, begin + queries, queries < length, q_stride, width, D, E)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mean, mean_rest = _zero_head(QUERIES, D, E)
    end = tl.where(tl.program_id(0) * QUERIES < length, key_length, 0)
    if CAUSAL:
        end = tl.minimum(end, (tl.program_id(0) + 1) * QUERIES)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        k_block = _load_head(k + first, key_begin + keys, keys < key_length, k_stride, width, D, E)
        scores = _scores(q_block, k_block, queries, keys, length, key_length, scale, CAUSAL, E)
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # of queries behind the last
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        if DROPS:
            is_kept = _is_pair_kept(drawn, drawn_row + queries, keys, level)
            p = tl.where(is_kept, p * kept_scale, 0.0)
        v_block = _load_head(v + first, key_begin + keys, keys < key_length, k_stride, width, D, E)
        shrunk = (mean * shrink[:, None], mean_rest * shrink[:, None])
        mean, mean_rest = _add_products(shrunk, p.to(v.dtype.element_ty), v_block, E)
        top = higher
    mean, mean_rest = mean / total[:, None], mean_rest / total[:, None]
    _store_head(out + first, begin + queries, queries < length, out_stride, width, mean, mean_rest, D, E)
    tl.store(sums + at + queries, top + tl.log2(total), queries < length)


@triton.jit
def _is_pair_kept(drawn, query, key, level):
    """(QUERIES, KEYS) whether probabilities are kept."""
    row_number, column_number = _number_rows(drawn, query), _number_columns(drawn, key)
    return _is_kept(row_number[:, None], column_number[None, :], key[None, :], level)


@triton.jit
def _score_gradients(
    q, k, v, grad, log_total, along, drawn, drawn_row, queries, keys, length, key_length,
    scale, level, kept_scale, CAUSAL: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Of blocks: the probabilities as they weigh v, and the gradients of the scores (QUERIES, KEYS), both fp32."""
    p = tl.exp2(_scores(q, k, queries, keys, length, key_length, scale, CAUSAL, E) - log_total[:, None])
    grad_p = _products(grad, v, E)
    weighed = p
    if DROPS:
        is_kept = _is_pair_kept(drawn, drawn_row + queries, keys, level)
        weighed = tl.where(is_kept, p * kept_scale, 0.0)
        grad_p = tl.where(is_kept, grad_p * kept_scale, 0.0)
    return weighed, p * (grad_p - along[:, None])


@triton.jit(do_not_specialize=VARYING)
def _attend_backward_keys(
    q, k, v, out, grad_out, sums, along, grad_q, grad_k, grad_v, starts, seed, site, length, key_length, positions,
    heads, width, q_stride, k_stride, out_stride, grad_stride, scale, level, kept_scale,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    drawn, drawn_row = _draw_keys(seed, site), tl.program_id(1) * length
    first, at, begin, length, key_begin, key_length = _find_row(
        starts, length, key_length, positions, heads, width, PACKED
    )
    sums, along = sums + at, along + at
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    is_key, key_row = keys < key_length, key_begin + keys
    k_block = _load_head(k + first, key_row, is_key, k_stride, width, D, E)
    v_block = _load_head(v + first, key_row, is_key, k_stride, width, D, E)
    sum_k, sum_k_rest = _zero_head(KEYS, D, E)
    sum_v, sum_v_rest = _zero_head(KEYS, D, E)
    from_query = 0
    if CAUSAL:
        from_query = (tl.program_id(0) * KEYS) // QUERIES * QUERIES
    for start in range(from_query, length, QUERIES):
        queries = start + tl.arange(0, QUERIES)
        is_query, query_row = queries < length, begin + queries
        q_block = _load_head(q + first, query_row, is_query, q_stride, width, D, E)
        grad = _load_head(grad_out + first, query_row, is_query, grad_stride, width, D, E)
        log_total = tl.load(sums + queries, is_query, 0.0)
        along_block = tl.load(along + queries, is_query, 0.0)
        weighed, grad_scores = _score_gradients(
            q_block, k_block, v_block, grad, log_total, along_block, drawn, drawn_row, queries,
            keys, length, key_length, scale, level, kept_scale, CAUSAL, DROPS, E,
        )  # fmt: skip
        weighed, grad_scores = weighed.to(v.dtype.element_ty), grad_scores.to(q.dtype.element_ty)
        sum_v, sum_v_rest = _add_products((sum_v, sum_v_rest), tl.trans(weighed), grad, E)
        sum_k, sum_k_rest = _add_products((sum_k, sum_k_rest), tl.trans(grad_scores), q_block, E)
    _store_head(grad_k + first, key_row, is_key, k_stride, width, sum_k * scale, sum_k_rest * scale, D, E)
    _store_head(grad_v + first, key_row, is_key, k_stride, width, sum_v, sum_v_rest, D, E)


@triton.jit(do_not_specialize=VARYING)
def _attend_backward_queries(
    q, k, v, out, grad_out, sums, along, grad_q, grad_k, grad_v, starts, seed, site, length, key_length, positions,
    heads, width, q_stride, k_stride, out_stride, grad_stride, scale, level, kept_scale,
    CAUSAL: tl.constexpr, DROPS: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    drawn, drawn_row = _draw_keys(seed, site), tl.program_id(1) * length
    first, at, begin, length, key_begin, key_length = _find_row(
        starts, length, key_length, positions, heads, width, PACKED
    )
    sums, along = sums + at, along + at
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_query, query_row = queries < length, begin + queries
    q_block = _load_head(q + first, query_row, is_query, q_stride, width, D, E)
    out_block = _load_head(out + first, query_row, is_query, out_stride, width, D, E)
    grad = _load_head(grad_out + first, query_row, is_query, grad_stride, width, D, E)
    log_total = tl.load(sums + queries, is_query, 0.0)
    along_block = tl.sum(grad[0].to(tl.float32) * out_block[0].to(tl.float32), 1)
    if E > 0:
        along_block += tl.sum(grad[1].to(tl.float32) * out_block[1].to(tl.float32), 1)
    tl.store(along + queries, along_block, is_query)
    total, total_rest = _zero_head(QUERIES, D, E)
    end = tl.where(tl.program_id(0) * QUERIES < length, key_length, 0)
    if CAUSAL:
        end = tl.minimum(end, (tl.program_id(0) + 1) * QUERIES)
    for start in range(0, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        is_key, key_row = keys < key_length, key_begin + keys
        k_block = _load_head(k + first, key_row, is_key, k_stride, width, D, E)
        v_block = _load_head(v + first, key_row, is_key, k_stride, width, D, E)
        _, grad_scores = _score_gradients(
            q_block, k_block, v_block, grad, log_total, along_block, drawn, drawn_row, queries,
            keys, length, key_length, scale, level, kept_scale, CAUSAL, DROPS, E,
        )  # fmt: skip
        total, total_rest = _add_products((total, total_rest), grad_scores.to(k.dtype.element_ty), k_block, E)
    _store_head(grad_q + first, query_row, is_query, q_stride, width, total * scale, total_rest * scale, D, E)


# --------------------------------------------------------------------------------------------------------------
# the language model's head


def softmax_nll(logits: Tensor, targets: Tensor, ignored: int, with_gradient: bool) -> Tensor:
    """(C,) fp32 cross-entropies of logits (C, V) and targets (C,), 0 where the target is `ignored`.

    With a gradient, the logits are overwritten by that of the sum of the cross-entropies.
    """
    rows, vocabulary = logits.shape
    assert logits.is_contiguous()
    nll = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _softmax_nll[(rows,)](logits, targets, nll, vocabulary, ignored, WRITES=with_gradient, V=4096, num_warps=8)
    return nll


@triton.jit
def _softmax_nll(logits, targets, nll, vocabulary, ignored, WRITES: tl.constexpr, V: tl.constexpr):
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * vocabulary
    target = tl.load(targets + row)
    is_wanted = target != ignored
    at_target = tl.load(start_of_row + tl.where(is_wanted, target, 0)).to(tl.float32)
    top = tl.full((V,), float("-inf"), tl.float32)  # of each lane so far
    total = tl.zeros((V,), tl.float32)  # sum of exp(logit - top)
    for start in range(0, vocabulary, V):
        column = start + tl.arange(0, V)
        part = tl.load(start_of_row + column, column < vocabulary, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, part)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(part - safe)
        top = higher
    highest = tl.max(top, 0)
    log_total = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(nll + row, tl.where(is_wanted, log_total - at_target, 0.0))
    if WRITES:
        for start in range(0, vocabulary, V):
            column = start + tl.arange(0, V)
            part = tl.load(start_of_row + column, column < vocabulary, float("-inf")).to(tl.float32)
            p = tl.exp(part - log_total) - tl.where(column == target, 1.0, 0.0)
            p = tl.where(is_wanted, p, 0.0)
            tl.store(start_of_row + column, p.to(logits.dtype.element_ty), column < vocabulary)


# --------------------------------------------------------------------------------------------------------------
# generation


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
        HEADS=heads,
        WIDTH=width,
        **_size_head(width),
        **ATTEND_ONE,
    )
    return out


@triton.jit
def _load_vector(start, WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    """A vector (WIDTH,) as (D,) and (E,)."""
    d = tl.arange(0, D)
    part = tl.load(start + d, d < WIDTH, 0.0)
    rest = part
    if E > 0:
        e = D + tl.arange(0, E)
        rest = tl.load(start + e, e < WIDTH, 0.0)
    return part, rest


@triton.jit
def _store_vector(start, part, rest, WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(start + d, part.to(start.dtype.element_ty), d < WIDTH)
    if E > 0:
        e = D + tl.arange(0, E)
        tl.store(start + e, rest.to(start.dtype.element_ty), e < WIDTH)


@triton.jit
def _attend_one(
    qkv, keys, values, position, out, row_stride, head_stride, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, E: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.load(position)  # positions 0 to end - 1 are in the cache
    new = qkv + row * 3 * HEADS * WIDTH + head * WIDTH
    q, q_rest = _load_vector(new, WIDTH, D, E)
    k, k_rest = _load_vector(new + HEADS * WIDTH, WIDTH, D, E)
    v, v_rest = _load_vector(new + 2 * HEADS * WIDTH, WIDTH, D, E)
    cache = row * row_stride + head * head_stride
    _store_vector(keys + cache + end * WIDTH, k, k_rest, WIDTH, D, E)
    _store_vector(values + cache + end * WIDTH, v, v_rest, WIDTH, D, E)

    q, q_rest = q.to(tl.float32) * scale, q_rest.to(tl.float32) * scale
    top = tl.sum(q * k.to(tl.float32), 0)  # largest score so far
    if E > 0:
        top += tl.sum(q_rest * k_rest.to(tl.float32), 0)
    total = top * 0 + 1.0  # sum of exp(score - top)
    mean, mean_rest = v.to(tl.float32), v_rest.to(tl.float32)  # sum of exp(score - top) times value
    for start in range(0, end, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        old_k, old_k_rest = _load_head(keys + cache, at, at < end, WIDTH, WIDTH, D, E)
        old_v, old_v_rest = _load_head(values + cache, at, at < end, WIDTH, WIDTH, D, E)
        score = tl.sum(q[None, :] * old_k.to(tl.float32), 1)
        if E > 0:
            score += tl.sum(q_rest[None, :] * old_k_rest.to(tl.float32), 1)
        score = tl.where(at < end, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        shrink, p = tl.exp(top - higher), tl.exp(score - higher)
        total = total * shrink + tl.sum(p, 0)
        mean = mean * shrink + tl.sum(p[:, None] * old_v.to(tl.float32), 0)
        if E > 0:
            mean_rest = mean_rest * shrink + tl.sum(p[:, None] * old_v_rest.to(tl.float32), 0)
        top = higher
    _store_vector(out + (row * HEADS + head) * WIDTH, mean / total, mean_rest / total, WIDTH, D, E)
