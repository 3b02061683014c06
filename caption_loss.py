"""BLIP-2's training loss, written out so that a GPU runs fewer and larger kernels; gradients equal, to rounding.

Against transformers' forward and peft's LoRA: linear layers that read the same input are one; LoRA computes in the
precision of the weights that it adapts, and adds to their result in place; the language model's head sees text alone,
and its logits are never all in memory.

Shapes: B rows, Q image tokens, T text tokens with bos and newline, H width of the language model, V vocabulary,
N positions of a batch together, R LoRA rank.
"""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from generation import get_blip2, group_linears
from model import IGNORED

CHUNK = 512  # text positions whose logits are in memory at once
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # whose gradients are the same each time, unlike the others'

Matrices = dict[nn.Module, tuple[Tensor, Tensor]]  # of a linear layer's LoRA: A (R, in), scaled B (out, R)


def supports(model) -> bool:
    """Whether Q-Former and language model are of the form that is written out here, as in BLIP-2 with OPT-2.7B."""
    text = model.config.text_config
    return (
        text.model_type == "opt"
        and text.do_layer_norm_before
        and text.word_embed_proj_dim == text.hidden_size
        and not text.layerdrop
        and not getattr(text, "_remove_final_layer_norm", False)
        and not model.config.qformer_config.use_qformer_text_input
    )


@sdpa_kernel(ATTENTION)
def caption_nll(model, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, **_) -> Tensor:
    """(B,) sums of -log p over each row's caption tokens, of a batch as CaptionCollator makes it.

    The sum over rows divided by the tokens is Blip2ForConditionalGeneration's loss. The frozen ViT runs without
    gradients, and rows need no attention mask since padding stands on the right of a causal model.
    """
    blip = get_blip2(model)
    qformer, decoder, lora = blip.qformer, blip.language_model.model.decoder, copy_lora(blip)
    with torch.no_grad():
        vision = blip.vision_model(pixel_values=pixel_values).last_hidden_state  # (B, P, D)

    queries = blip.query_tokens.expand(len(pixel_values), -1, -1)
    x = qformer.dropout(qformer.layernorm(queries.to(qformer.layernorm.weight.dtype)))  # (B, Q, width of the Q-Former)
    for layer in qformer.encoder.layer:
        x = run_layer(qformer_layer, layer, x, vision.to(x.dtype), lora)

    text = decoder.embed_tokens(input_ids[:, x.shape[1] :])  # (B, T, H): bos, caption, newline, padding
    image = blip.language_projection(x.to(text.dtype)).to(text.dtype)  # (B, Q, H)
    x, first = torch.cat([image, text], dim=1), decoder.embed_positions.offset
    x = x + decoder.embed_positions.weight[first : first + x.shape[1]]
    for layer in decoder.layers:
        x = run_layer(opt_layer, layer, x, lora)

    hidden = decoder.final_layer_norm(x)[:, queries.shape[1] : -1]  # (B, T-1, H)
    targets = labels[:, queries.shape[1] + 1 :]  # (B, T-1)
    nll = FrozenHeadNLL.apply(hidden.flatten(0, 1), blip.language_model.lm_head.weight, targets.flatten())
    return nll.view(targets.shape).sum(1)


# --------------------------------------------------------------------------------------------------------------
# layers


def run_layer(function, layer, *args) -> Tensor:
    """function(layer, *args), its activations computed again in the backward pass where the layer is set to that."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return checkpoint(function, layer, *args, use_reentrant=False)
    return function(layer, *args)


def opt_layer(layer, x: Tensor, lora: Matrices) -> Tensor:
    """An OPTDecoderLayer on x (B, Q+T, H), each position seeing itself and those before."""
    attention, (qkv, out, fc1, fc2) = layer.self_attn, group_linears(layer)
    q, k, v = apply_linears(qkv, layer.self_attn_layer_norm(x), lora)
    seen = attend(q, k, v, attention.num_heads, attention.dropout * layer.training, is_causal=True)
    [h] = apply_linears(out, seen, lora)
    x = x + F.dropout(h, layer.dropout, layer.training)
    [h] = apply_linears(fc1, layer.final_layer_norm(x), lora)
    [h] = apply_linears(fc2, layer.activation_fn(h), lora)
    return x + F.dropout(h, layer.dropout, layer.training)


def qformer_layer(layer, x: Tensor, vision: Tensor, lora: Matrices) -> Tensor:
    """A Blip2QFormerLayer on queries x (B, Q, width), which look at vision (B, P, D) in every other layer."""
    x = qformer_attention(layer.attention, x, x, lora)
    if layer.has_cross_attention:
        x = qformer_attention(layer.crossattention, x, vision, lora)
    [h] = apply_linears([layer.intermediate_query.dense], x, lora)
    [h] = apply_linears([layer.output_query.dense], layer.intermediate_query.intermediate_act_fn(h), lora)
    return layer.output_query.LayerNorm(layer.output_query.dropout(h) + x)


def qformer_attention(block, x: Tensor, source: Tensor, lora: Matrices) -> Tensor:
    attention = block.attention
    if source is x:
        q, k, v = apply_linears([attention.query, attention.key, attention.value], x, lora)
    else:
        [q] = apply_linears([attention.query], x, lora)
        k, v = apply_linears([attention.key, attention.value], source, lora)
    dropout = attention.attention_dropout * attention.training
    [h] = apply_linears(
        [block.output.dense], attend(q, k, v, attention.num_attention_heads, dropout, is_causal=False), lora
    )
    return block.output.LayerNorm(block.output.dropout(h) + x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, dropout: float, is_causal: bool) -> Tensor:
    """Attention of q (B, L, width) over k and v (B, S, width) -> (B, L, width)."""
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal).transpose(1, 2).flatten(2)


# --------------------------------------------------------------------------------------------------------------
# linear layers with LoRA


def apply_linears(layers: Sequence[nn.Module], x: Tensor, lora: Matrices) -> tuple[Tensor, ...]:
    """What each of `layers`, which read the same x (..., in), gives: (..., out) each."""
    matrices = [matrix for layer in layers if layer in lora for matrix in lora[layer]]
    dropouts = [m for m in layers[0].lora_dropout.values() if isinstance(m, nn.Dropout)] if matrices else []
    dropout = dropouts[0].p if dropouts and dropouts[0].training else 0.0
    y = LoraLinears.apply(x.reshape(-1, x.shape[-1]), layers, dropout, *matrices)
    return y.view(*x.shape[:-1], -1).split([layer.out_features for layer in layers], dim=-1)


class LoraLinears(torch.autograd.Function):
    """Frozen linear layers side by side, with or without LoRA: x (N, in), A1, B1, A2, B2, ... -> (N, sum of out).

    The matrices are those of `copy_lora`. Each layer's LoRA has a dropout mask of its own, as in peft.
    """

    @staticmethod
    def forward(ctx, x, layers, dropout, *matrices):
        weight, bias = join_linears(layers)
        y = F.linear(x, weight, bias)
        ctx.layers, ctx.dropout = layers, dropout
        ctx.sizes = [layer.out_features for layer in layers]
        saved = []
        for a, b, part in zip(matrices[::2], matrices[1::2], y.split(ctx.sizes, dim=1), strict=False):
            kept, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
            low = kept @ a.T  # (N, R)
            part.addmm_(low, b.T)
            saved += [kept, mask, low]
        ctx.save_for_backward(*matrices, *saved)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        saved = ctx.saved_tensors
        count = len(saved) * 2 // 5
        matrices, saved = saved[:count], saved[count:]
        grad_x = grad_y @ join_linears(ctx.layers)[0] if ctx.needs_input_grad[0] else None
        gradients = []
        for i, part in zip(range(count // 2), grad_y.split(ctx.sizes, dim=1), strict=False):
            a, b = matrices[2 * i : 2 * i + 2]
            kept, mask, low = saved[3 * i : 3 * i + 3]
            grad_low = part @ b  # (N, R)
            gradients += [grad_low.T @ kept, part.T @ low]
            if grad_x is None:
                continue
            if mask is None:
                grad_x.addmm_(grad_low, a)
            else:
                grad_x.add_(torch.ops.aten.native_dropout_backward(grad_low @ a, mask, 1 / (1 - ctx.dropout)))
        return grad_x, None, None, *gradients


def get_base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def join_linears(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weight (sum of out, in) and bias (sum of out,) of layers as one; NF4 is unpacked."""
    bases = [get_base(layer) for layer in layers]
    if hasattr(bases[0], "joined"):  # see speed.join_weights
        return bases[0].joined
    weights = [
        bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(base.compute_dtype)
        if isinstance(base, bnb.nn.Linear4bit)
        else base.weight
        for base in bases
    ]
    if len(bases) == 1:
        return weights[0], bases[0].bias
    return torch.cat(weights), None if bases[0].bias is None else torch.cat([base.bias for base in bases])


def copy_lora(model) -> Matrices:
    """LoRA's matrices in the precision of the model's other weights, B times LoRA's scale; gradients reach them."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged
    ]
    weights, scales = [], []
    for layer in layers:
        [name] = layer.active_adapters
        weights += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        scales += [1.0, layer.scaling[name]]
    if not layers:
        return {}
    copies = ScaledCopies.apply(model.language_model.model.decoder.embed_tokens.weight.dtype, scales, *weights)
    return dict(zip(layers, zip(copies[::2], copies[1::2], strict=True), strict=True))


class ScaledCopies(torch.autograd.Function):
    """Hundreds of small weights in another precision and times a factor each, by a few kernels."""

    @staticmethod
    def forward(ctx, dtype, scales, *weights):
        ctx.scales, ctx.dtype = scales, weights[0].dtype
        return tuple(copy_all(weights, dtype, scales))

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *copy_all(gradients, ctx.dtype, ctx.scales)


def copy_all(tensors: Sequence[Tensor], dtype: torch.dtype, scales: list[float]) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    torch._foreach_mul_(copies, scales)
    return copies


# --------------------------------------------------------------------------------------------------------------
# the head


class FrozenHeadNLL(torch.autograd.Function):
    """-log p of each target under softmax(hidden @ weight.T), with the gradient computed in the forward pass.

    hidden (N, H), weight (V, H) without gradient, targets (N,) with IGNORED where nothing is to be learnt -> (N,) fp32.
    Logits of CHUNK positions exist at a time, and none are kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            kept = targets[part] != IGNORED
            target = targets[part].clamp(min=0)[:, None]  # (C, 1)
            log_p = (hidden[part] @ weight.T).log_softmax(-1, dtype=torch.float32)  # (C, V)
            nll[part] = -log_p.gather(1, target)[:, 0] * kept
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
                gradient[part] = (p.to(weight.dtype) @ weight) * kept[:, None]
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None].to(gradient.dtype), None, None
