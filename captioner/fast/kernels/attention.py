"""Attention of packed rows and of one new token."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captioner.fast.kernels import choice
from captioner.fast.kernels.choice import tl, triton

# Flash attention's gradients are the same each time for rows of up to 256 positions: it adds up one part for each 128
# keys, in any order. Where a GPU has none, as a T4, the memory-efficient one's may differ in their last digits.
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
ATTEND_ONE = {"POSITIONS": 16, "num_warps": 1}  # of the cache, at once; measured on an H100


class Rows(NamedTuple):
    """Where rows of different lengths lie, one behind the other without padding between them."""

    starts: Tensor  # (rows + 1,) int32, the end of the last one too
    longest: int  # a length that none exceeds
    padded: Tensor  # (rows x longest,) the position at each place of padded rows, any position behind a row's end
    places: Tensor  # (N,) the place among these of each position

    @classmethod
    def of(cls, starts: Tensor, longest: int, positions: int) -> "Rows":
        """Of rows that begin at `starts` (rows + 1,) int64 among so many positions."""
        position = torch.arange(positions, device=starts.device)
        row = torch.bucketize(position, starts[1:-1], right=True)
        padded = (starts[:-1, None] + torch.arange(longest, device=starts.device)).clamp(max=positions - 1)
        return cls(starts.int(), longest, padded.flatten(), row * longest + position - starts[row])


def attend(joined: Sequence[Tensor], heads: int, dropout: float, rows: Rows | None = None) -> Tensor:
    """Attention (B, L, W) of queries (B, L, W) over keys and values (B, S, W).

    These are what `joined` holds, side by side: [queries, keys, values as one], or [queries, keys and values as one].
    With `rows` they and the result are (N, W), and each position sees itself and those before in its row.
    """
    width = sum(part.shape[-1] for part in joined) // 3
    q, k, v = (x.unflatten(-1, (heads, -1)) for part in joined for x in part.split(width, -1))  # (..., heads, D)
    if rows is None:
        return attend_rows(q, k, v, dropout)
    if choice.can_flash(q):
        bounds = rows.starts, rows.starts, rows.longest, rows.longest
        return torch.ops.aten._flash_attention_forward(q, k, v, *bounds, dropout, True, False)[0].flatten(1)
    # behind a row's end others' positions stand, which none of its own sees
    q, k, v = (x.index_select(0, rows.padded).unflatten(0, (-1, rows.longest)) for x in (q, k, v))
    return attend_rows(q, k, v, dropout, is_causal=True).flatten(0, 1).index_select(0, rows.places)


@sdpa_kernel(BACKENDS)
def attend_rows(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, is_causal: bool = False) -> Tensor:
    """(B, L, W) of q (B, L, heads, D), and k and v (B, S, heads, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal).transpose(1, 2).flatten(2)


# --------------------------------------------------------------------------------------------------------------
# one token


def attend_one(qkv: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
    """Attention of one new token a row, (n, H, D): scaled_dot_product_attention with a query of length 1.

    qkv (n, 3, H, D), contiguous, holds query, key and value of the token at `position` (1,). Key and value are written
    into the cache, keys and values (n, H, L, D), and looked at with all positions before; those behind are not read.
    """
    n, _, heads, width = qkv.shape
    if not choice.use_kernels(qkv):
        q, new_key, new_value = qkv.unsqueeze(3).unbind(1)  # (n, H, 1, D)
        keys.index_copy_(2, position, new_key)
        values.index_copy_(2, position, new_value)
        is_behind = torch.arange(keys.shape[2], device=keys.device) > position
        scores = (q @ keys.mT * width**-0.5).masked_fill(is_behind, -torch.inf)  # (n, H, 1, L)
        return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ values)[:, :, 0]
    assert qkv.is_contiguous() and keys.stride() == values.stride() and keys.stride()[2:] == (width, 1)
    out = torch.empty(n, heads, width, dtype=qkv.dtype, device=qkv.device)
    options = {"HEADS": heads, "WIDTH": width, "D": triton.next_power_of_2(width)}
    strides = keys.stride()[:2]
    _attend_one[n, heads](qkv, keys, values, position, out, *strides, width**-0.5, **options, **ATTEND_ONE)
    return out


@triton.jit
def _attend_one(
    qkv, keys, values, position, out, row_stride, head_stride, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = tl.load(position)  # positions 0 to end - 1 are in the cache
    d = tl.arange(0, D)
    is_there = d < WIDTH
    new = qkv + (row * 3 * HEADS + head) * WIDTH + d
    q = tl.load(new, is_there, 0.0).to(tl.float32) * scale
    k = tl.load(new + HEADS * WIDTH, is_there, 0.0)
    v = tl.load(new + 2 * HEADS * WIDTH, is_there, 0.0)
    cache = row * row_stride + head * head_stride + d
    keys, values = keys + cache, values + cache
    tl.store(keys + end * WIDTH, k, is_there)
    tl.store(values + end * WIDTH, v, is_there)

    top = tl.sum(q * k.to(tl.float32), 0)  # largest score so far
    total = top * 0 + 1.0  # sum of exp(score - top)
    mean = v.to(tl.float32)  # sum of exp(score - top) times value
    for start in range(0, end, POSITIONS):
        at = start + tl.arange(0, POSITIONS)
        is_old = (at < end)[:, None] & is_there[None, :]
        old_k = tl.load(keys[None, :] + at[:, None] * WIDTH, is_old, 0.0).to(tl.float32)
        old_v = tl.load(values[None, :] + at[:, None] * WIDTH, is_old, 0.0).to(tl.float32)
        score = tl.where(at < end, tl.sum(q[None, :] * old_k, 1), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        shrink, p = tl.exp(top - higher), tl.exp(score - higher)
        total = total * shrink + tl.sum(p, 0)
        mean = mean * shrink + tl.sum(p[:, None] * old_v, 0)
        top = higher
    tl.store(out + (row * HEADS + head) * WIDTH + d, (mean / total).to(out.dtype.element_ty), is_there)
