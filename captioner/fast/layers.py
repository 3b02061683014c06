"""BLIP-2's Q-Former and OPT layers written out, so that a GPU runs fewer and larger kernels than with transformers
and peft: linear layers that read the same input are one, and LoRA computes in the precision of the weights that it
adapts and adds to their result in place. What caption_loss.py, generation.py and speed.py share.

Shapes: B rows, Q image tokens, H width of the language model, P positions of the ViT and D its width, N positions of a
batch together, L queries and S keys of a row, G linear layers that read the same input, R LoRA rank.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import Blip2ForConditionalGeneration, OPTForCausalLM

from captioner.blip2.lora import get_blip2

try:
    from captioner.fast import gpu_kernels
except ImportError:  # torch for CPUs comes without Triton
    gpu_kernels = None

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # whose gradients are the same each time, unlike the others'


class Rows(NamedTuple):
    """Where rows of different lengths lie, one behind the other without padding between them."""

    starts: Tensor  # (rows + 1,) int64, the end of the last one too
    longest: int  # a length that none exceeds


class Adapters(NamedTuple):
    """LoRA's matrices of a pass, and what its dropout masks are drawn from where Triton kernels draw them."""

    matrices: dict[
        nn.Module, tuple[Tensor, Tensor]
    ]  # by a group's first layer: A (G x R, in), scaled B (sum of out, R)
    scale: float  # that each B has been multiplied by
    sites: dict[nn.Module, int]  # number of the place where a module drops values
    seed: Tensor  # (1,) int64 on the device


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


def embed_images(blip: Blip2ForConditionalGeneration, vision: Tensor, lora: Adapters) -> Tensor:
    """The language model's image tokens (B, Q, H) for the ViT's outputs (B, P, D)."""
    qformer = blip.qformer
    queries = blip.query_tokens.expand(len(vision), -1, -1).to(qformer.layernorm.weight.dtype)
    x = qformer.dropout(qformer.layernorm(queries))  # (B, Q, width of the Q-Former)
    for layer in qformer.encoder.layer:
        x = run_layer(qformer_layer, layer, x, vision.to(x.dtype), lora=lora)
    return blip.language_projection(x.to(blip.language_model.lm_head.weight.dtype))


def run_decoder(decoder, x: Tensor, rows: Rows, lora: Adapters, wanted: Tensor) -> Tensor:
    """OPT's last hidden states, normed, at the places `wanted` (C,), for embeddings x (N, H) with positions.

    Elsewhere the last layer ends with its attention: what it would give there is read by none.
    """
    ends = [(layer.self_attn_layer_norm, group_linears(layer)[0]) for layer in decoder.layers]
    ends.append((decoder.final_layer_norm, []))
    normed = decoder.layers[0].self_attn_layer_norm(x)
    for layer, (norm, readers) in zip(decoder.layers, ends[1:], strict=True):
        places = wanted if norm is decoder.final_layer_norm else None
        x, normed = run_layer(opt_layer, layer, x, normed, norm, readers, rows, places, lora=lora)
    return normed


def run_layer(function, layer, *args, lora: Adapters):
    """function(layer, *args, lora), its activations computed again in the backward pass where the layer is set to that.

    torch looks for tensors in all arguments of what it will compute again: of thousands of modules in `lora`, for each
    layer, that took longer than the layer.
    """
    run = functools.partial(function, layer, lora=lora)
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        ranks = (b.shape[1] for _, b in lora.matrices.values())
        options = {"use_reentrant": False, "context_fn": _attention_contexts}
        return checkpoint(run, *args, **options, preserve_rng_state=not draws_by_kernels(args[0], ranks))
    return run(*args)


def draws_by_kernels(x: Tensor, ranks: Iterable[int]) -> bool:
    """Whether all dropouts of layers on x with LoRA of these ranks are drawn from the pass's seed.

    torch's generator is not used then, and a pass that computes activations again can be recorded.
    """
    return use_kernels(x) and all(has_kernel_rank(x, rank) for rank in ranks)


def _attention_contexts() -> tuple:
    """Of the forward pass and of its repetition, which happens when the caller's choice of attention is gone."""
    return sdpa_kernel(ATTENTION), sdpa_kernel(ATTENTION)


def opt_layer(
    layer,
    x: Tensor,
    normed: Tensor,
    next_norm: nn.LayerNorm,
    next_readers: Sequence[nn.Module],
    rows: Rows,
    wanted: Tensor | None,
    lora: Adapters,
) -> tuple[Tensor, Tensor]:
    """An OPTDecoderLayer on x (N, H), each position seeing itself and its row's before: the new x, and next_norm(x).

    `normed` is x as the layer's first norm makes it; what next_norm makes is for `next_readers` to read. Both are of
    the places `wanted` (C,) alone, unless it is None.
    """
    attention, (qkv, out, fc1, fc2) = layer.self_attn, group_linears(layer)
    joined = [apply_linears(qkv, normed, lora)]
    h = attend(joined, attention, attention.num_heads, attention.dropout, lora, rows)
    if wanted is not None:
        x, h = x.index_select(0, wanted), h.index_select(0, wanted)
    h = apply_linears(out, h, lora)
    x, normed = add_and_norm(x, h, layer.dropout * layer.training, layer.final_layer_norm, lora, fc1)
    relu = isinstance(layer.activation_fn, nn.ReLU)
    h = apply_linears(fc1, normed, lora, relu=relu)
    h = apply_linears(fc2, h if relu else layer.activation_fn(h), lora, after_relu=relu)
    return add_and_norm(x, h, layer.dropout * layer.training, next_norm, lora, next_readers)


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
    h = attend(joined, attention, attention.num_attention_heads, attention.attention_dropout, lora)
    return qformer_add_and_norm(block.output, x, apply_linears([block.output.dense], h, lora), lora)


def qformer_add_and_norm(block, x: Tensor, h: Tensor, lora: Adapters) -> Tensor:
    return add_and_norm(x, h, block.dropout.p * block.dropout.training, block.LayerNorm, lora)[1]


# --------------------------------------------------------------------------------------------------------------
# attention


def attend(
    joined: Sequence[Tensor], module: nn.Module, heads: int, dropout: float, lora: Adapters, rows: Rows | None = None
) -> Tensor:
    """Attention (B, L, width) of queries (B, L, width) over keys and values (B, S, width).

    These are what `joined` holds, side by side: [queries, keys, values as one], or [queries, keys and values as one].
    With `rows` they and the result are (N, width), and each position sees itself and those before in its row.
    """
    dropout *= module.training
    if use_kernels(joined[0]):
        return Attention.apply(heads, dropout, rows, lora.seed, lora.sites[module], *joined)
    parts = split_joined(joined)
    if rows is None:
        return attend_by_torch(parts, heads, dropout, False)
    sizes = rows.starts.diff().tolist()
    each = zip(*(part.split(sizes) for part in parts), strict=True)
    return torch.cat([attend_by_torch([part[None] for part in row], heads, dropout, True)[0] for row in each])


def attend_by_torch(parts: Sequence[Tensor], heads: int, dropout: float, is_causal: bool) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)  # (B, heads, L or S, D)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal).transpose(1, 2).flatten(2)


def split_joined(joined: Sequence[Tensor]) -> list[Tensor]:
    """Queries, keys and values out of what `attend` takes."""
    width = sum(part.shape[-1] for part in joined) // 3
    return [piece for part in joined for piece in part.split(width, -1)]


class Attention(torch.autograd.Function):
    """attend by Triton kernels, which take and give what is side by side without copies."""

    @staticmethod
    def forward(ctx, heads, dropout, rows, seed, site, *joined):
        ctx.options = (rows is not None, dropout, seed, site, rows)
        out, sums = gpu_kernels.attend(*split_joined(joined), heads, *ctx.options)
        ctx.save_for_backward(out, sums, *joined)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        out, sums, *joined = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in joined]
        parts, grad_parts = split_joined(joined), split_joined(gradients)
        gpu_kernels.attend_backward(grad_out, parts, out, sums, grad_parts, *ctx.options)
        return None, None, None, None, None, *gradients


# --------------------------------------------------------------------------------------------------------------
# residual stream


def add_and_norm(
    x: Tensor,
    h: Tensor,
    dropout: float,
    norm: nn.LayerNorm,
    lora: Adapters,
    readers: Sequence[nn.Module] = (),
) -> tuple[Tensor, Tensor]:
    """x + dropout(h), and norm of it, whose rows leave the room that `readers` need; norm is frozen."""
    if not use_kernels(x):
        x = x + F.dropout(h, dropout)
        return x, norm(x)
    room = spare_columns(join_linears(readers)[0]) if has_joined(readers) else 0
    return AddAndNorm.apply(x, h, dropout, norm, room, lora.seed, lora.sites[norm])


class AddAndNorm(torch.autograd.Function):
    """add_and_norm by Triton kernels, without gradients of the norm's own weights."""

    @staticmethod
    def forward(ctx, x, h, dropout, norm, room, seed, site):
        total, normed, moments = gpu_kernels.residual_norm(
            x.flatten(0, -2), h.flatten(0, -2), dropout, seed, site, norm, room
        )
        ctx.save_for_backward(total, moments, seed)
        ctx.dropout, ctx.weight, ctx.site = dropout, norm.weight, site
        ctx.set_materialize_grads(False)
        return total.view(x.shape), normed.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad_total, grad_normed):
        total, moments, seed = ctx.saved_tensors
        grad_total = None if grad_total is None else grad_total.contiguous().view(total.shape)
        grad_x, grad_h = gpu_kernels.residual_norm_backward(
            *(grad_total, grad_normed.flatten(0, -2), total, moments),
            *(ctx.dropout, seed, ctx.site, ctx.weight),
        )
        return grad_x.view(grad_normed.shape), grad_h.view(grad_normed.shape), None, None, None, None, None


# --------------------------------------------------------------------------------------------------------------
# linear layers with LoRA


def use_kernels(x: Tensor) -> bool:
    """Whether Triton kernels take x: it makes none for GPUs before Ampere."""
    return gpu_kernels is not None and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def apply_linears(
    layers: Sequence[nn.Module], x: Tensor, lora: Adapters, relu: bool = False, after_relu: bool = False
) -> Tensor:
    """What `layers`, which read the same x (..., in), give, side by side: (..., sum of out).

    With `relu` that is applied to it, and what uses it must be called with `after_relu`: that makes the gradient of
    what is below 0 zero, for both.
    """
    matrices = lora.matrices.get(layers[0], ())
    dropouts = [m for m in layers[0].lora_dropout.values() if isinstance(m, nn.Dropout)] if matrices else []
    dropout = dropouts[0].p if dropouts and dropouts[0].training else 0.0
    drop = (dropout, lora.seed, lora.sites[layers[0]])
    y = LoraLinears.apply(x.reshape(-1, x.shape[-1]), layers, drop, relu, after_relu, *matrices)
    return y.view(*x.shape[:-1], -1)


class LoraLinears(torch.autograd.Function):
    """Frozen linear layers side by side, with or without LoRA: x (N, in), A, B -> (N, sum of out).

    The matrices are those of `copy_lora`. Each layer's LoRA has a dropout mask of its own, as in peft.
    """

    @staticmethod
    def forward(ctx, x, layers, drop, relu, after_relu, a=None, b=None):
        weight, bias = join_linears(layers)
        ctx.layers, ctx.drop, ctx.after_relu = layers, drop, after_relu
        if a is None:
            ctx.save_for_backward(x if after_relu else None)
            return run_linear(x, weight, bias, relu)
        rank = b.shape[1]
        ctx.has_room = has_kernel_rank(a, rank) and spare_columns(weight) >= len(a)
        room = widen(weight, len(a))[:, weight.shape[1] :] if ctx.has_room else None  # that B takes
        if ctx.has_room and spare_columns(x) >= len(a):
            # one product: [x, low] times the transposed of [weight, B]
            low = widen(x, len(a))[:, x.shape[1] :].unflatten(1, (-1, rank)).transpose(0, 1)  # (G, N, R)
            gpu_kernels.project_low(x, a, *drop, low, b, room)
            y, masks = run_linear(widen(x, len(a)), widen(weight, len(a)), bias, relu), None
        else:
            y = F.linear(x, weight, bias)
            low, masks = project_low(x, a, b, room, *drop)
            add_low_rank(y, low, b, relu)
        ctx.save_for_backward(x, a, b, low, masks)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, *saved = ctx.saved_tensors
        weight = join_linears(ctx.layers)[0]
        if not saved:
            grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
            if ctx.after_relu and grad_x is not None:
                grad_x.masked_fill_(x <= 0, 0)
            return grad_x, None, None, None, None
        a, b, low, masks = saved
        groups, rank = len(ctx.layers), b.shape[1]
        parts = grad_y.unflatten(1, (groups, -1)).transpose(0, 1)  # (G, N, out)
        if ctx.has_room and ctx.needs_input_grad[0]:
            # one product: [gradients of x without LoRA, of low]
            both = grad_y @ widen(weight, len(a))  # (N, in + G x R)
            grad_x, grad_low = both.split([x.shape[1], len(a)], 1)
            grad_low = grad_low.unflatten(1, (groups, rank)).transpose(0, 1)  # (G, N, R)
        else:
            grad_x = grad_y @ weight if ctx.needs_input_grad[0] else None
            grad_low = torch.bmm(parts, b.view(groups, -1, rank))
        grad_b = torch.bmm(parts.mT, low).view(b.shape)
        grad_a = lora_backward(grad_x, x, grad_low, a, masks, *ctx.drop, ctx.after_relu)
        return grad_x, None, None, None, None, grad_a, grad_b


def run_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return torch._addmm_activation(bias, x, weight.T) if relu else F.linear(x, weight, bias)


def spare_columns(matrix: Tensor) -> int:
    """Room between the rows of a matrix in memory, in values."""
    return matrix.stride(0) - matrix.shape[1]


def widen(matrix: Tensor, columns: int) -> Tensor:
    """The matrix with so many of its spare columns."""
    return matrix.as_strided((len(matrix), matrix.shape[1] + columns), matrix.stride())


def has_kernel_rank(x: Tensor, rank: int) -> bool:
    """Whether Triton kernels are used, and take matrices of this rank."""
    return use_kernels(x) and rank in gpu_kernels.RANKS


def project_low(
    x: Tensor, a: Tensor, b: Tensor, room: Tensor | None, dropout: float, seed: Tensor, site: int
) -> tuple[Tensor, Tensor | None]:
    """dropout(x) @ A.T of each layer (G, N, R); and the masks (G, N, in), None where they need not be kept.

    b goes into the room beside the weights, if there is one.
    """
    rank = b.shape[1]
    groups = len(a) // rank
    if has_kernel_rank(x, rank):
        low = x.new_empty(groups, len(x), rank)
        gpu_kernels.project_low(x, a, dropout, seed, site, low, b, room)
        return low, None
    if not dropout:
        return torch.stack([x @ part.T for part in a.chunk(groups)]), None
    drawn = [torch.native_dropout(x, dropout, True) for _ in range(groups)]
    low = [kept @ part.T for (kept, _), part in zip(drawn, a.chunk(groups), strict=True)]
    return torch.stack(low), torch.stack([mask for _, mask in drawn])


def add_low_rank(y: Tensor, low: Tensor, b: Tensor, relu: bool) -> None:
    """y (N, sum of out) += low (G, N, R) @ B.T of each layer in place, and then relu if asked for."""
    if has_kernel_rank(y, low.shape[2]):
        gpu_kernels.add_low_rank(y, low, b, relu)
        return
    for part, part_low, part_b in zip(y.chunk(len(low), 1), low, b.chunk(len(low)), strict=True):
        part.addmm_(part_low, part_b.T)
    if relu:
        y.relu_()


def lora_backward(
    grad_x: Tensor | None,
    x: Tensor,
    grad_low: Tensor,
    a: Tensor,
    masks: Tensor | None,
    dropout: float,
    seed: Tensor,
    site: int,
    after_relu: bool,
) -> Tensor:
    """A's gradient from that of project_low's result; adds to grad_x (N, in) in place, unless it is None."""
    groups = len(grad_low)
    if has_kernel_rank(x, grad_low.shape[2]):
        return gpu_kernels.lora_backward(grad_x, x, grad_low, a, dropout, seed, site, after_relu)
    scale, gradients = 1 / (1 - dropout), []
    for i, part in enumerate(a.chunk(groups)):
        kept = x if masks is None else torch.ops.aten.native_dropout_backward(x, masks[i], scale)
        gradients.append(grad_low[i].T @ kept)
        if grad_x is not None:
            back = grad_low[i] @ part
            grad_x += back if masks is None else torch.ops.aten.native_dropout_backward(back, masks[i], scale)
    if after_relu and grad_x is not None:
        grad_x.masked_fill_(x <= 0, 0)
    return torch.cat(gradients)


def get_base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def read_weight(base: nn.Linear) -> Tensor:
    """(out, in) weight of a layer without LoRA, in the precision in which it computes; NF4 is unpacked."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight
    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state).to(pick_compute_dtype(base))


def has_joined(layers: Sequence[nn.Module]) -> bool:
    """Whether speed.join_weights has put the layers' weights side by side."""
    return bool(layers) and hasattr(get_base(layers[0]), "joined")


def join_linears(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weight (sum of out, in) and bias (sum of out,) of layers as one; NF4 is unpacked."""
    bases = [get_base(layer) for layer in layers]
    if has_joined(layers):
        return bases[0].joined
    if len(bases) == 1:
        return read_weight(bases[0]), bases[0].bias
    bias = None if bases[0].bias is None else torch.cat([base.bias for base in bases])
    return torch.cat([read_weight(base) for base in bases]), bias


def list_lora(model) -> tuple[list[list[nn.Module]], list[nn.Parameter]]:
    """The groups of layers with active LoRA; and its weights, A of each of their layers and then B of each."""
    groups, all_a, all_b = [], [], []
    for group in list_groups(model):
        layers = [layer for layer in group if has_active_lora(layer)]
        assert len(layers) in (0, len(group)), "LoRA on some of the layers that read the same input"
        groups += [layers] if layers else []
        for layer in layers:
            [name] = layer.active_adapters
            all_a.append(layer.lora_A[name].weight)
            all_b.append(layer.lora_B[name].weight)
    return groups, all_a + all_b


def has_active_lora(layer: nn.Module) -> bool:
    return isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged


def join_lora(model) -> tuple[Tensor, list[nn.Parameter]]:
    """Put LoRA's weights behind each other in one tensor (N,), to be copied and trained as one.

    Returns the tensor and the weights, which the layers keep, as parts of it. Gradients of copy_lora's result reach
    the tensor, not its parts.
    """
    weights = list_lora(model)[1]
    whole = torch.cat([weight.detach().flatten() for weight in weights])
    bind_parts(whole, weights)
    get_blip2(model).joined_lora = whole.requires_grad_(), weights
    return whole, weights


def bind_parts(whole: Tensor, weights: Sequence[nn.Parameter]) -> None:
    """Make the weights parts of the whole, where they are not; their values go into it.

    What loads weights or moves a model to a device may put other memory in the place of theirs.
    """
    place = whole.data_ptr()
    for weight in weights:
        if weight.data_ptr() != place:
            start = (place - whole.data_ptr()) // whole.element_size()
            with torch.inference_mode(False), torch.no_grad():
                part = whole[start : start + weight.numel()].view_as(weight).copy_(weight)
            weight.data = part
        place += weight.nbytes


def copy_lora(model) -> Adapters:
    """LoRA's matrices in the precision in which their layer computes, B times LoRA's scale; gradients reach them.

    That precision differs between layers: the Q-Former of a model in fp16 stays in fp32. The scale is one for all
    layers. The seed is drawn anew.
    """
    blip, copies, scale = get_blip2(model), (), 1.0
    groups, weights = list_lora(model)
    if groups:
        [name] = groups[0][0].active_adapters
        [scale] = {layer.scaling[name] for group in groups for layer in group}
        whole, parts = getattr(blip, "joined_lora", (None, []))
        if [*map(id, parts)] == [*map(id, weights)]:
            bind_parts(whole, weights)
        else:  # not joined, or another adapter was
            whole = torch.cat([weight.flatten() for weight in weights])
        shapes = [(sum(layer.r[name] for layer in group), group[0].in_features) for group in groups]
        shapes += [(sum(layer.out_features for layer in group), group[0].r[name]) for group in groups]
        dtypes = 2 * [pick_compute_dtype(get_base(group[0])) for group in groups]
        copies = ScaledCopies.apply(shapes, dtypes, scale, whole)
    sites = {module: site for site, module in enumerate(blip.modules())}
    device = blip.query_tokens.device
    seed = torch.randint(2**62, (1,), device=device) if use_kernels(blip.query_tokens) else torch.zeros(1)
    matrices = zip(copies[: len(groups)], copies[len(groups) :], strict=True)
    return Adapters(dict(zip((group[0] for group in groups), matrices, strict=True)), scale, sites, seed)


def pick_compute_dtype(base: nn.Linear) -> torch.dtype:
    """The precision in which a layer without LoRA computes."""
    if not isinstance(base, bnb.nn.Linear4bit):
        return base.weight.dtype
    return base.compute_dtype or base.weight.quant_state.dtype


class ScaledCopies(torch.autograd.Function):
    """Hundreds of small matrices in another precision, B's times a factor, by a few kernels.

    `whole` (N,) are the weights of list_lora. Those of the layers of a group become one matrix, of `shapes` and
    `dtypes`: first the A's of each group, then the B's.
    """

    @staticmethod
    def forward(ctx, shapes, dtypes, scale, whole):
        sizes = [rows * columns for rows, columns in shapes]
        ctx.first_b, ctx.scale, ctx.dtype = sum(sizes[: len(sizes) // 2]), scale, whole.dtype
        copies = {}
        for dtype in set(dtypes):
            copy = whole.to(dtype, copy=True)
            copy[ctx.first_b :] *= scale
            copies[dtype] = copy.split(sizes)
        return tuple(copies[dtypes[i]][i].view(shape) for i, shape in enumerate(shapes))

    @staticmethod
    def backward(ctx, *gradients):
        whole = torch.cat([gradient.flatten() for gradient in gradients]).to(ctx.dtype)
        whole[ctx.first_b :] *= ctx.scale
        return None, None, None, whole
