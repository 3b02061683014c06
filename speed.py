"""What makes training fast on a GPU: the same loss and gradients, to rounding, in fewer and larger steps.

Levers, each with a switch in config.py: logits only where there is text, and none of them kept (caption_nll); LoRA in
the precision of the weights it adapts (speed_up_lora); NF4 weights unpacked once instead of at each use (unpack_nf4);
the launches of one forward and backward pass recorded once and replayed (CapturedStep); frames of a length beside each
other (LengthSampler).

Shapes: B rows, Q image tokens, T text tokens with bos and newline, H width of the language model, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import IGNORED

CHUNK = 512  # text positions whose logits are in memory at once
PADDED_TO = 16  # text lengths are rounded up to a multiple of it: a recording for each
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # whose gradients are the same each time, unlike the others'
UNPACKING_ROOM = 3  # the GPU must have so many times the memory free that unpacked weights take


# --------------------------------------------------------------------------------------------------------------
# the loss


class FrozenHeadNLL(torch.autograd.Function):
    """-log p of each target under softmax(hidden @ weight.T), with the gradient computed in the forward pass.

    hidden (N, H), weight (V, H) without gradient, targets (N,) with IGNORED where nothing is to be learnt -> (N,) fp32.
    Logits of CHUNK positions exist at a time, and none are kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            kept = targets[part] != IGNORED
            target = targets[part].clamp(min=0)[:, None]  # (C, 1)
            logits = (hidden[part] @ weight.T).float()  # (C, V)
            log_p = logits.log_softmax(-1)
            nll[part] = -log_p.gather(1, target)[:, 0] * kept
            p = log_p.exp_()
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            gradient[part] = (p * kept[:, None]).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None].to(gradient.dtype), None, None


@sdpa_kernel(ATTENTION)
def caption_nll(model, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, **_) -> Tensor:
    """(B,) sums of -log p over each row's caption tokens, of a batch as CaptionCollator makes it.

    The sum over rows divided by the tokens is Blip2ForConditionalGeneration's loss. The frozen ViT runs without
    gradients, rows need no attention mask since padding stands on the right of a causal model, and the language
    model's head sees text positions only.
    """
    blip = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        vision = blip.vision_model(pixel_values=pixel_values).last_hidden_state  # (B, P, D)
    qformer, decoder = blip.qformer, blip.language_model.model.decoder
    queries = blip.query_tokens.expand(len(pixel_values), -1, -1)  # (B, Q, ...)
    queries = qformer.dropout(qformer.layernorm(queries.to(qformer.layernorm.weight.dtype)))
    encoded = qformer.encoder(
        queries, encoder_hidden_states=vision.to(queries.dtype), query_length=queries.shape[1]
    ).last_hidden_state
    text = decoder.embed_tokens(input_ids[:, queries.shape[1] :])  # (B, T, H): bos, caption, newline, padding
    image = blip.language_projection(encoded.to(text.dtype)).to(text.dtype)  # (B, Q, H)
    hidden = torch.cat([image, text], dim=1)
    first = decoder.embed_positions.offset
    hidden = hidden + decoder.embed_positions.weight[first : first + hidden.shape[1]]
    for layer in decoder.layers:
        hidden = layer(hidden, attention_mask=None)
    hidden = decoder.final_layer_norm(hidden)[:, queries.shape[1] : -1]  # (B, T-1, H)
    targets = labels[:, queries.shape[1] + 1 :]  # (B, T-1)
    nll = FrozenHeadNLL.apply(hidden.flatten(0, 1), blip.language_model.lm_head.weight, targets.flatten())
    return nll.view(targets.shape).sum(1)


def supports_caption_nll(model) -> bool:
    """Whether the language model is an OPT of the form that caption_nll spells out."""
    config = model.config.text_config
    return (
        config.model_type == "opt"
        and config.do_layer_norm_before
        and config.word_embed_proj_dim == config.hidden_size
        and not config.layerdrop
        and not getattr(config, "_remove_final_layer_norm", False)
    )


# --------------------------------------------------------------------------------------------------------------
# LoRA


def speed_up_lora(model) -> None:
    """Have LoRA compute in its layer's precision: a few large kernels instead of a dozen with casts to fp32 and back.

    The weights stay fp32, as do their gradients and AdamW's state.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(_lora_forward, module, module.forward)


def _lora_forward(layer: LoraLayer, plain_forward, x: Tensor, *args, **kwargs) -> Tensor:
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or args or kwargs:
        return plain_forward(x, *args, **kwargs)
    [name] = layer.active_adapters
    a, b = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight.to(x.dtype)  # (R, in), (out, R)
    result = layer.base_layer(x)
    low = F.linear(layer.lora_dropout[name](x), a).flatten(0, -2)  # (N, R)
    return torch.addmm(result.flatten(0, -2), low, b.T, alpha=layer.scaling[name]).view(result.shape)


# --------------------------------------------------------------------------------------------------------------
# weights


def unpack_nf4(model) -> int:
    """Put layers of 16 bits with the same values in place of the NF4 layers. Returns how many.

    The product of an NF4 layer is computed from unpacked weights at each use: doing it once changes no digit.
    """
    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]
    for parent, name, layer in packed:
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight.to(layer.compute_dtype or weight.dtype), requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)
    return len(packed)


def has_room_to_unpack(model, device: torch.device) -> bool:
    """Whether a GPU has memory to spare for the weights of NF4 layers in 16 bits."""
    if device.type != "cuda":
        return False
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    need = 2 * sum(layer.in_features * layer.out_features for layer in layers)  # bytes
    return torch.cuda.mem_get_info(device)[0] > UNPACKING_ROOM * need


# --------------------------------------------------------------------------------------------------------------
# one pass


class FastStep:
    """Loss and gradients of one micro-batch: step(batch, tokens) -> loss, gradients are added to .grad.

    On a GPU with `cuda_graphs` the pass is recorded as a CUDA graph for each shape of batch, texts being padded to a
    multiple of PADDED_TO; the random numbers are those of a pass that is not.
    """

    def __init__(self, model, cuda_graphs: bool):
        self.model, self.cuda_graphs = model, cuda_graphs
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.gradients = [torch.zeros_like(weight) for weight in self.weights]
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if cuda_graphs else None

    def __call__(self, batch: dict[str, Tensor], tokens: Tensor | int) -> Tensor:
        """batch as of CaptionCollator on the model's device; tokens of the whole optimiser step, for the mean."""
        if self.weights[0].grad is None:  # the first pass of an optimiser step
            torch._foreach_zero_(self.gradients)
        batch = {name: batch[name] for name in ("pixel_values", "input_ids", "labels")}
        tokens = torch.as_tensor(tokens, dtype=torch.float32, device=batch["labels"].device)
        loss = self._replay(batch, tokens) if self.cuda_graphs else self._run(batch, tokens)
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        return loss

    def _run(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        loss = caption_nll(self.model, **batch).sum() / tokens
        torch._foreach_add_(self.gradients, torch.autograd.grad(loss, self.weights))
        return loss.detach()

    def _replay(self, batch: dict[str, Tensor], tokens: Tensor) -> Tensor:
        padding = -batch["labels"].shape[1] % PADDED_TO
        batch["input_ids"] = F.pad(batch["input_ids"], (0, padding), value=self.model.config.text_config.pad_token_id)
        batch["labels"] = F.pad(batch["labels"], (0, padding), value=IGNORED)
        key = tuple(batch["labels"].shape)
        if key not in self.recordings:
            self.recordings[key] = self._record(batch, tokens)
        graph, inputs, loss = self.recordings[key]
        for name, value in {**batch, "tokens": tokens}.items():
            inputs[name].copy_(value)
        graph.replay()
        return loss.clone()

    def _record(self, batch: dict[str, Tensor], tokens: Tensor) -> tuple:
        inputs = {name: value.clone() for name, value in {**batch, "tokens": tokens}.items()}
        batch = {name: inputs[name] for name in batch}
        before, random = [gradient.clone() for gradient in self.gradients], torch.cuda.get_rng_state()
        side = torch.cuda.Stream()  # libraries set themselves up in a first pass, which must not be recorded
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(batch, inputs["tokens"])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # others may pin memory
            loss = self._run(batch, inputs["tokens"])
        torch._foreach_copy_(self.gradients, before)
        torch.cuda.set_rng_state(random)
        return graph, inputs, loss


# --------------------------------------------------------------------------------------------------------------
# order


class LengthSampler(torch.utils.data.Sampler):
    """Random order in which the `batch_size` frames of a step have captions of about one length.

    Of `window` batches that follow each other in a random order, frames are sorted by length and dealt out to batches,
    and the batches shuffled. The order depends on seed and epoch alone, so that a run can go on within an epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, window: int, seed: int):
        self.lengths, self.batch_size, self.window, self.seed = lengths, batch_size, window, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.window * self.batch_size
        for start in range(0, len(order), size):
            part = sorted(order[start : start + size], key=lambda row: self.lengths[row])
            batches = [part[first : first + self.batch_size] for first in range(0, len(part), self.batch_size)]
            short = batches.pop() if len(batches[-1]) < self.batch_size else []  # stays last
            for batch in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[batch]
            yield from short
