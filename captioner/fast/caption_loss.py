"""BLIP-2's training loss from the layers of layers.py: equal to transformers', and its gradients too, to rounding.

The language model's head sees text alone, and its logits are never all in memory.

Shapes: B rows, Q image tokens, H width of the language model, V vocabulary, N positions of a batch together, C of them
that predict a token or stand behind the last row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.blip2.batches import IGNORED
from captioner.blip2.lora import get_blip2
from captioner.fast.adapters import copy_lora
from captioner.fast.kernels.attention import Rows, attend
from captioner.fast.kernels.head import softmax_nll
from captioner.fast.layers import embed_images, run_decoder

CHUNK = 512  # text positions whose logits are in memory at once
FP16_SCALE = 256.0  # of the head's gradients in fp16, in which the small ones of most tokens would be 0


def caption_nll(
    model, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, starts: Tensor, longest: int, whole=None
) -> Tensor:
    """(B,) sums of -log p over each row's caption tokens, of a batch as PackedCollator makes it.

    The sum over rows divided by the tokens is Blip2ForConditionalGeneration's loss. What stands behind the last row
    counts as a row of its own, whose tokens are not predicted. Gradients reach LoRA's weights, or the tensor `whole`
    that they are parts of.
    """
    blip, lora = get_blip2(model), copy_lora(model, whole)
    with torch.no_grad():  # the ViT is frozen
        vision = blip.vision_model(pixel_values=pixel_values).last_hidden_state  # (B, P, D)
    image = embed_images(blip, vision, lora)  # (B, Q, H)
    decoder = blip.language_model.model.decoder
    rows, queries = image.shape[:2]
    places = torch.arange(len(input_ids), device=input_ids.device)  # (N,)
    packed = Rows.of(starts, longest, len(input_ids))
    row = packed.places // longest  # (N,) that a place is in
    image_places = starts[:rows, None] + places[:queries]  # (B, Q)
    x = decoder.embed_tokens(input_ids)  # (N, H)
    x = x.index_copy(0, image_places.flatten(), image.flatten(0, 1).to(x.dtype))
    x = x + F.embedding(places - starts[row] + decoder.embed_positions.offset, decoder.embed_positions.weight)

    # all places with a label, filled up with the first, which is an image token's
    size = len(labels) - rows * queries
    predicting = torch.nonzero_static(labels != IGNORED, size=size, fill_value=0)[:, 0]  # (C,)

    def look(qkv: Tensor) -> Tensor:
        attention = decoder.layers[0].self_attn  # all layers have its settings
        return attend([qkv], attention.num_heads, attention.dropout * attention.training, packed)

    hidden = run_decoder(decoder, x, [look] * len(decoder.layers), lora, predicting)  # (C, H)
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
        ctx.scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logits = hidden[part] @ weight.T  # (C, V)
            nll[part] = softmax_nll(logits, targets[part], IGNORED, 0.0 if gradient is None else ctx.scale)
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_nll[:, None] / ctx.scale).to(gradient.dtype), None, None
