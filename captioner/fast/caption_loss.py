"""BLIP-2's training loss from the layers of layers.py: equal to transformers', and its gradients too, to rounding.

The language model's head sees text alone, and its logits are never all in memory.

Shapes: B rows, Q image tokens, H width of the language model, V vocabulary, N positions of a batch together, C of them
that predict a token or stand behind the last row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from captioner.blip2.batches import IGNORED
from captioner.blip2.lora import get_blip2
from captioner.fast.layers import (
    ATTENTION,
    Adapters,
    Rows,
    copy_lora,
    embed_images,
    gpu_kernels,
    is_written_out,
    run_decoder,
    use_kernels,
)

CHUNK = 512  # text positions whose logits are in memory at once


def supports(model) -> bool:
    """Whether caption_nll is the loss of this model: that of layers.py, with no layers left out at random."""
    return is_written_out(model) and not model.config.text_config.layerdrop


def caption_nll(model, pixel_values: Tensor, **texts) -> Tensor:
    """(B,) sums of -log p over each row's caption tokens, of a batch as PackedCollator makes it.

    The sum over rows divided by the tokens is Blip2ForConditionalGeneration's loss.
    """
    lora = copy_lora(model)
    return text_nll(model, embed_pixels(model, pixel_values, lora), lora, **texts)


def sum_nll(model, batch: dict[str, Tensor]) -> Tensor:
    """The sum of caption_nll over the rows of a batch."""
    return caption_nll(model, **batch).sum()


@sdpa_kernel(ATTENTION)
def embed_pixels(model, pixel_values: Tensor, lora: Adapters) -> Tensor:
    """The image tokens (B, Q, H) of images; the frozen ViT runs without gradients."""
    blip = get_blip2(model)
    with torch.no_grad():
        vision = blip.vision_model(pixel_values=pixel_values).last_hidden_state  # (B, P, D)
    return embed_images(blip, vision, lora)


@sdpa_kernel(ATTENTION)
def text_nll(
    model, image: Tensor, lora: Adapters, input_ids: Tensor, labels: Tensor, starts: Tensor, longest: int, **_
) -> Tensor:
    """caption_nll of a batch whose images' tokens are image (B, Q, H).

    What stands behind the last row counts as a row of its own, whose tokens are not predicted.
    """
    blip = get_blip2(model)
    decoder = blip.language_model.model.decoder
    rows, queries = image.shape[:2]
    places = torch.arange(len(input_ids), device=input_ids.device)  # (N,)
    row = torch.bucketize(places, starts[1:], right=True)  # (N,) that a place is in
    image_places = starts[:rows, None] + places[:queries]  # (B, Q)
    x = decoder.embed_tokens(input_ids)  # (N, H)
    x = x.index_copy(0, image_places.flatten(), image.flatten(0, 1).to(x.dtype))
    x = x + F.embedding(places - starts[row] + decoder.embed_positions.offset, decoder.embed_positions.weight)

    # all places with a label, filled up with the first, which is an image token's
    size = len(labels) - rows * queries
    predicting = torch.nonzero_static(labels != IGNORED, size=size, fill_value=0)[:, 0]  # (C,)
    hidden = run_decoder(decoder, x, Rows(starts, longest), lora, predicting)  # (C, H)
    nll = FrozenHeadNLL.apply(hidden, blip.language_model.lm_head.weight, labels[predicting])  # (C,)
    return torch.where(row[predicting] == places[:rows, None], nll, 0).sum(1)


# --------------------------------------------------------------------------------------------------------------
# the head


class FrozenHeadNLL(torch.autograd.Function):
    """-log p of each target under softmax(hidden @ weight.T), with the gradient computed in the forward pass.

    hidden (C, H), weight (V, H) without gradient, targets (C,) with IGNORED where nothing is to be learnt -> (C,) fp32.
    Logits of CHUNK positions exist at a time, and none are kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = hidden[part] @ weight.T  # (C, V)
            nll[part], grad_logits = softmax_nll(logits, targets[part], gradient is not None)
            if gradient is not None:
                torch.mm(grad_logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None].to(gradient.dtype), None, None


def softmax_nll(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """(C,) fp32 cross-entropies of logits (C, V), which are overwritten, and the gradient (C, V) of their sum."""
    if use_kernels(logits):
        return gpu_kernels.softmax_nll(logits, targets, IGNORED, with_gradient), logits if with_gradient else None
    kept, target = targets != IGNORED, targets.clamp(min=0)[:, None]  # (C,), (C, 1)
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    nll = -log_p.gather(1, target)[:, 0] * kept
    if not with_gradient:
        return nll, None
    p = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
    return nll, (p * kept[:, None]).to(logits.dtype)
