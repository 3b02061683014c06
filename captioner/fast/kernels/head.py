"""Cross-entropy of the language model's logits, and its gradient in their place."""

import torch
from torch import Tensor

from captioner.fast.kernels import choice
from captioner.fast.kernels.choice import tl, triton


def softmax_nll(logits: Tensor, targets: Tensor, ignored: int, scale: float = 0.0) -> Tensor:
    """(C,) fp32 cross-entropies of logits (C, V) and targets (C,), 0 where the target is `ignored`.

    With a `scale` the logits are overwritten by that many times the gradient of the sum of the cross-entropies.
    """
    assert logits.is_contiguous()
    if choice.use_kernels(logits):
        nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        options = {"WRITES": scale != 0, "V": 4096, "num_warps": 8}
        _softmax_nll[(len(logits),)](logits, targets, nll, logits.shape[1], ignored, scale, **options)
        return nll
    is_wanted, target = targets != ignored, targets.clamp(min=0)[:, None]  # (C,), (C, 1)
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    nll = -log_p.gather(1, target)[:, 0] * is_wanted
    if scale:
        p = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
        logits.copy_(p.mul_(scale * is_wanted[:, None]))
    return nll


@triton.jit
def _softmax_nll(logits, targets, nll, vocabulary, ignored, scale, WRITES: tl.constexpr, V: tl.constexpr):
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
            p = tl.where(is_wanted, p * scale, 0.0)
            tl.store(start_of_row + column, p.to(logits.dtype.element_ty), column < vocabulary)
