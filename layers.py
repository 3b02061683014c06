"""BLIP-2's Q-Former and OPT layers written out, so that a GPU runs fewer and larger kernels than with transformers
and peft: linear layers that read the same input are one, and LoRA computes in the precision of the weights that it
adapts and adds to their result in place. What caption_loss.py, generation.py and speed.py share.

Shapes: B rows, Q image tokens, T text tokens, H width of the language model, P positions of the ViT and D its width,
N positions of a batch together, R LoRA rank.
"""

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import Blip2ForConditionalGeneration, OPTForCausalLM

try:
    import gpu_kernels
except ImportError:  # torch without CUDA comes without Triton
    gpu_kernels = None

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # whose gradients are the same each time, unlike the others'
Matrices = dict[nn.Module, tuple[Tensor, Tensor]]  # of a linear layer's LoRA: A (R, in), scaled B (out, R)


def get_blip2(model) -> Blip2ForConditionalGeneration:
    """The BLIP-2 inside a PeftModel, with its LoRA layers; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def group_linears(layer) -> list[list[nn.Module]]:
    """The linear layers of an OPT layer in the order of their use; those in a group read the same input."""
    attention = layer.self_attn
    return [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.out_proj], [layer.fc1], [layer.fc2]]


def group_qformer_linears(layer) -> list[list[nn.Module]]:
    """The same of a Q-Former layer's part for queries."""
    groups = []
    for block in (layer.attention, layer.crossattention if layer.has_cross_attention else None):
        if block is not None:
            q, k, v = block.attention.query, block.attention.key, block.attention.value
            groups += [[q, k, v]] if block is layer.attention else [[q], [k, v]]
            groups.append([block.output.dense])
    return [*groups, [layer.intermediate_query.dense], [layer.output_query.dense]]


def list_groups(model) -> list[list[nn.Module]]:
    """The linear layers of the language model and the Q-Former, those that read the same input together."""
    blip = get_blip2(model)
    groups = [group for layer in blip.language_model.model.decoder.layers for group in group_linears(layer)]
    return groups + [group for layer in blip.qformer.encoder.layer for group in group_qformer_linears(layer)]


def is_written_out(model) -> bool:
    """Whether a model is a BLIP-2 of the form that the functions here compute, as the one with OPT-2.7B is."""
    blip = get_blip2(model)
    if not isinstance(blip, Blip2ForConditionalGeneration) or not isinstance(blip.language_model, OPTForCausalLM):
        return False
    config, decoder = blip.config.text_config, blip.language_model.model.decoder
    return (
        config.do_layer_norm_before
        and config.enable_bias
        and decoder.final_layer_norm is not None
        and decoder.project_in is None
        and decoder.project_out is None
        and not blip.config.qformer_config.use_qformer_text_input
    )


def embed_images(blip: Blip2ForConditionalGeneration, vision: Tensor, lora: Matrices) -> Tensor:
    """The language model's image tokens (B, Q, H) for the ViT's outputs (B, P, D)."""
    qformer = blip.qformer
    queries = blip.query_tokens.expand(len(vision), -1, -1).to(qformer.layernorm.weight.dtype)
    x = qformer.dropout(qformer.layernorm(queries))  # (B, Q, width of the Q-Former)
    for layer in qformer.encoder.layer:
        x = run_layer(qformer_layer, layer, x, vision.to(x.dtype), lora)
    return blip.language_projection(x.to(blip.language_model.lm_head.weight.dtype))


def run_layer(function, layer, *args) -> Tensor:
    """function(layer, *args), its activations computed again in the backward pass where the layer is set to that."""
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return checkpoint(function, layer, *args, use_reentrant=False, context_fn=_attention_contexts)
    return function(layer, *args)


def _attention_contexts() -> tuple:
    """Of the forward pass and of its repetition, which happens when the caller's choice of attention is gone."""
    return sdpa_kernel(ATTENTION), sdpa_kernel(ATTENTION)


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
            add_low_rank(part, low, b.T)
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
            if grad_x is not None:
                add_low_rank(grad_x, grad_low, a, mask, 1 / (1 - ctx.dropout))
        return grad_x, None, None, *gradients


def add_low_rank(out: Tensor, low: Tensor, matrix: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> None:
    """out (N, M) += mask * (low (N, R) @ matrix (R, M)) * scale in place; no mask counts as one of ones."""
    if gpu_kernels and out.is_cuda and low.shape[1] in gpu_kernels.RANKS:
        gpu_kernels.add_low_rank(out, low, matrix, mask, scale)
    elif mask is None:
        out.addmm_(low, matrix, alpha=scale)
    else:
        out.add_(torch.ops.aten.native_dropout_backward(low @ matrix, mask, scale))


def get_base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def read_weight(base: nn.Linear) -> Tensor:
    """(out, in) weight of a layer without LoRA, in the precision in which it computes; NF4 is unpacked."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight
    weight = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    return weight.to(base.compute_dtype or weight.dtype)


def join_linears(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weight (sum of out, in) and bias (sum of out,) of layers as one; NF4 is unpacked."""
    bases = [get_base(layer) for layer in layers]
    if hasattr(bases[0], "joined"):  # see speed.join_weights
        return bases[0].joined
    weights = [read_weight(base) for base in bases]
    if len(bases) == 1:
        return weights[0], bases[0].bias
    return torch.cat(weights), None if bases[0].bias is None else torch.cat([base.bias for base in bases])


def copy_lora(model) -> Matrices:
    """LoRA's matrices in the precision in which their layer computes, B times LoRA's scale; gradients reach them.

    That differs between layers: the Q-Former of a model in fp16 stays in fp32.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged
    ]
    weights, scales, dtypes = [], [], []
    for layer in layers:
        [name], base = layer.active_adapters, get_base(layer)
        is_packed = isinstance(base, bnb.nn.Linear4bit)
        dtypes += 2 * [(base.compute_dtype or base.weight.quant_state.dtype) if is_packed else base.weight.dtype]
        weights += [layer.lora_A[name].weight, layer.lora_B[name].weight]
        scales += [1.0, layer.scaling[name]]
    if not layers:
        return {}
    copies = ScaledCopies.apply(dtypes, scales, *weights)
    return dict(zip(layers, zip(copies[::2], copies[1::2], strict=True), strict=True))


class ScaledCopies(torch.autograd.Function):
    """Hundreds of small weights in another precision and times a factor each, by a few kernels."""

    @staticmethod
    def forward(ctx, dtypes, scales, *weights):
        ctx.scales, ctx.dtypes = scales, [weight.dtype for weight in weights]
        return tuple(copy_all(weights, dtypes, scales))

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *copy_all(gradients, ctx.dtypes, ctx.scales)


def copy_all(tensors: Sequence[Tensor], dtypes: list[torch.dtype], scales: list[float]) -> list[Tensor]:
    copies = [
        torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    ]
    torch._foreach_copy_(copies, list(tensors))
    torch._foreach_mul_(copies, scales)
    return copies
