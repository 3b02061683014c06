"""BLIP-2's Q-Former and OPT layers written out, so that a GPU runs fewer and larger kernels than with transformers
and peft: linear layers that read the same input are one, and LoRA computes in the precision of the weights that it
adapts and adds to their result in place. What caption_loss.py, generation.py and speed.py share.

Shapes: B rows, Q image tokens, H width of the language model, P positions of the ViT and D its width, N positions of a
batch together, L queries and S keys of a row, G linear layers that read the same input, R LoRA rank.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Blip2ForConditionalGeneration, OPTForCausalLM

from captioner.blip2.lora import get_blip2
from captioner.fast.adapters import Adapters
from captioner.fast.kernels import choice, norm
from captioner.fast.kernels.attention import attend
from captioner.fast.kernels.lora import lora_backward, project_low
from captioner.fast.linears import group_linears, is_plain, join_linears, list_groups

# attention of one layer: queries, keys and values of N positions, side by side (N, 3H) -> (N, H)
Look = Callable[[Tensor], Tensor]


def supports(model) -> bool:
    """Whether a model is a BLIP-2 of the form that the functions here compute, as the one with OPT-2.7B is.

    With layers of it left out at random it is not, nor with a variant of LoRA.
    """
    blip = get_blip2(model)
    if not isinstance(blip, Blip2ForConditionalGeneration) or not isinstance(blip.language_model, OPTForCausalLM):
        return False
    config, decoder = blip.config.text_config, blip.language_model.model.decoder
    return (
        config.do_layer_norm_before
        and config.enable_bias
        and decoder.final_layer_norm is not None
        and config.word_embed_proj_dim == config.hidden_size
        and not config.layerdrop
        and not blip.config.qformer_config.use_qformer_text_input
        and all(is_plain(layer) for group in list_groups(model) for layer in group)
    )


def embed_images(blip: Blip2ForConditionalGeneration, vision: Tensor, lora: Adapters) -> Tensor:
    """The language model's image tokens (B, Q, H) for the ViT's outputs (B, P, D)."""
    qformer = blip.qformer
    queries = blip.query_tokens.expand(len(vision), -1, -1).to(qformer.layernorm.weight.dtype)
    x = qformer.dropout(qformer.layernorm(queries))  # (B, Q, width of the Q-Former)
    vision = vision.to(x.dtype)
    for layer in qformer.encoder.layer:
        x = qformer_layer(layer, x, vision, lora)
    return blip.language_projection(x.to(blip.language_model.lm_head.weight.dtype))


def run_decoder(decoder, x: Tensor, looks: Sequence[Look], lora: Adapters, wanted: Tensor | None = None) -> Tensor:
    """OPT's last hidden states, normed, at the places `wanted` (C,), or all, for embeddings x (N, H) with positions.

    `looks` is the attention of each layer. Where nothing is wanted the last layer ends with it: what it would give
    there is read by none. Activations of layers that are set to that are computed again in the backward pass.

    torch looks for tensors in all arguments of what it will compute again: of thousands of modules in `lora`, for each
    layer, that took longer than the layer.
    """
    ends = [(layer.self_attn_layer_norm, None) for layer in decoder.layers[1:]] + [(decoder.final_layer_norm, wanted)]
    normed = decoder.layers[0].self_attn_layer_norm(x)
    for layer, look, end in zip(decoder.layers, looks, ends, strict=True):
        run = functools.partial(opt_layer, layer, look, *end, lora)
        if layer.gradient_checkpointing and layer.training:
            draws = draws_by_kernels(x, layer.self_attn.dropout)
            run = functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=not draws)
        x, normed = run(x, normed)
    return normed


def draws_by_kernels(x: Tensor, attention_dropout: float) -> bool:
    """Whether all dropouts of an OPT layer on x are drawn from the pass's seed.

    torch's generator is not used then, and a pass that computes activations again can be recorded.
    """
    return choice.use_kernels(x) and not attention_dropout


def opt_layer(layer, look: Look, next_norm, wanted, lora: Adapters, x: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
    """An OPTDecoderLayer on x (N, H) whose attention is `look`: the new x, and the norm that follows of it.

    `normed` is x as the layer's first norm makes it. Both results are of the places `wanted` (C,); None: all.
    """
    qkv, out, fc1, fc2 = group_linears(layer)
    h = look(apply_linears(qkv, normed, lora))
    if wanted is not None:
        x, h = x.index_select(0, wanted), h.index_select(0, wanted)
    h = apply_linears(out, h, lora)
    x, normed = add_and_norm(x, h, layer.dropout * layer.training, layer.final_layer_norm, lora)
    relu = isinstance(layer.activation_fn, nn.ReLU)
    h = apply_linears(fc1, normed, lora, relu=relu)
    h = apply_linears(fc2, h if relu else layer.activation_fn(h), lora, after_relu=relu)
    return add_and_norm(x, h, layer.dropout * layer.training, next_norm, lora)


def qformer_layer(layer, x: Tensor, vision: Tensor, lora: Adapters) -> Tensor:
    """A Blip2QFormerLayer on queries x (B, Q, width), which look at vision (B, P, D) in every other layer."""
    x = qformer_attention(layer.attention, x, x, lora)
    if layer.has_cross_attention:
        x = qformer_attention(layer.crossattention, x, vision, lora)
    h = apply_linears([layer.intermediate_query.dense], x, lora)
    h = apply_linears([layer.output_query.dense], layer.intermediate_query.intermediate_act_fn(h), lora)
    return qformer_add_and_norm(layer.output_query, x, h, lora)


def qformer_attention(block, x: Tensor, source: Tensor, lora: Adapters) -> Tensor:
    attention = block.attention
    if source is x:
        joined = [apply_linears([attention.query, attention.key, attention.value], x, lora)]
    else:
        joined = [apply_linears([attention.query], x, lora)]
        joined.append(apply_linears([attention.key, attention.value], source, lora))
    h = attend(joined, attention.num_attention_heads, attention.attention_dropout * attention.training)
    return qformer_add_and_norm(block.output, x, apply_linears([block.output.dense], h, lora), lora)


def qformer_add_and_norm(block, x: Tensor, h: Tensor, lora: Adapters) -> Tensor:
    return add_and_norm(x, h, block.dropout.p * block.dropout.training, block.LayerNorm, lora)[1]


def add_and_norm(x: Tensor, h: Tensor, dropout: float, layer_norm: nn.LayerNorm, lora: Adapters):
    """x + dropout(h), and layer_norm of it."""
    return norm.add_and_norm(x, h, lora.drop(layer_norm, dropout), layer_norm)


# --------------------------------------------------------------------------------------------------------------
# linear layers with LoRA


def apply_linears(
    layers: Sequence[nn.Module], x: Tensor, lora: Adapters, relu: bool = False, after_relu: bool = False
) -> Tensor:
    """What `layers`, which read the same x (..., in), give, side by side: (..., sum of out).

    With `relu` that is applied to it, and what uses it must be called with `after_relu`: that makes the gradient of
    what is below 0 zero, for both.
    """
    matrices = lora.matrices.get(layers[0], ())
    shares = [getattr(m, "p", 0.0) for m in layers[0].lora_dropout.values() if m.training] if matrices else []
    drop = lora.drop(layers[0], max(shares, default=0.0))
    y = LoraLinears.apply(x.reshape(-1, x.shape[-1]), layers, drop, relu, after_relu, *matrices)
    return y.view(*x.shape[:-1], -1)


class LoraLinears(torch.autograd.Function):
    """Frozen linear layers side by side, with or without LoRA: x (N, in), A, B -> (N, sum of out).

    The matrices are those of `copy_lora`. The layers' LoRA share a dropout mask, where peft draws one for each.
    """

    @staticmethod
    def forward(ctx, x, layers, drop, relu, after_relu, a=None, b=None):
        weight, bias = join_linears(layers)
        ctx.layers, ctx.after_relu = layers, after_relu
        if a is None:
            ctx.save_for_backward(x if after_relu else None)
            return run_linear(x, weight, bias, relu)
        ctx.has_room = spare_columns(weight) >= len(a)
        fits = ctx.has_room and spare_columns(x) >= len(a)
        low = take_spare(x, len(a)) if fits else x.new_empty(len(x), len(a))  # (N, G x R)
        beside = take_spare(weight, len(a)) if ctx.has_room else b.new_zeros(len(b), len(a))
        drop = project_low(x, a, low, drop, b, beside)
        if fits:  # one product: [x, low] times the transposed of [weight, B]
            y = run_linear(widen(x, len(a)), widen(weight, len(a)), bias, relu)
        else:
            y = torch.addmm(bias, low, beside.T).addmm_(x, weight.T)
            y = y.relu_() if relu else y
        ctx.drop = drop._replace(mask=None)
        ctx.save_for_backward(x, a, low, drop.mask, None if ctx.has_room else beside)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, *saved = ctx.saved_tensors
        weight = join_linears(ctx.layers)[0]
        if not saved:  # and so x has a gradient
            grad_x = grad_y @ weight
            if ctx.after_relu:
                grad_x.masked_fill_(x <= 0, 0)
            return grad_x, None, None, None, None, None, None
        a, low, mask, beside = saved
        groups, width = len(ctx.layers), x.shape[1]
        if ctx.has_room and ctx.needs_input_grad[0]:  # one product: gradients of [x without LoRA, low]
            grad_x, grad_low = (grad_y @ widen(weight, len(a))).split([width, len(a)], 1)
        else:
            grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
            grad_low = grad_y @ (take_spare(weight, len(a)) if ctx.has_room else beside)
        parts, lows = (matrix.unflatten(1, (groups, -1)).transpose(0, 1) for matrix in (grad_y, low))  # (G, N, .)
        grad_b = torch.bmm(parts.mT, lows).flatten(0, 1)  # (sum of out, R)
        grad_a = lora_backward(grad_x, x, grad_low, a, ctx.drop._replace(mask=mask), ctx.after_relu)
        return grad_x, None, None, None, None, grad_a, grad_b


def run_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return torch._addmm_activation(bias, x, weight.T) if relu else F.linear(x, weight, bias)


def spare_columns(matrix: Tensor) -> int:
    """Room between the rows of a matrix in memory, in values."""
    return matrix.stride(0) - matrix.shape[1]


def widen(matrix: Tensor, columns: int) -> Tensor:
    """The matrix with so many of its spare columns."""
    return matrix.as_strided((len(matrix), matrix.shape[1] + columns), matrix.stride())


def take_spare(matrix: Tensor, columns: int) -> Tensor:
    """Its spare columns (rows, columns) themselves."""
    return widen(matrix, columns)[:, matrix.shape[1] :]
