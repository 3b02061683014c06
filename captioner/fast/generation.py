"""Captions of many images at once: OPT written out, with a cache of fixed size and one CUDA graph for a step.

transformers' generate() launches some 1,500 kernels for each token, and a GPU that captions hundreds of images waits
for them. Here a step is captured once and then replayed as a whole, and rows whose caption has ended leave the batch.

Shapes: B rows of a batch, n rows that are still decoded, Q image tokens a row, T tokens that are fed at once, N new
tokens, L positions of the cache that are read, H heads of width D, E = H x D, V tokens of the vocabulary, S image side.
A row is [Q image embeddings][bos][new tokens]; all rows have the same length, so one position counter does for all.
"""

import functools
from collections.abc import Callable, Sequence

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional as F

from captioner.blip2.lora import get_blip2
from captioner.blip2.sampling import pick_tokens
from captioner.fast.adapters import copy_lora
from captioner.fast.kernels import choice
from captioner.fast.kernels.attention import attend_one, attend_rows
from captioner.fast.layers import apply_linears, embed_images, is_written_out
from captioner.fast.linears import get_base, group_linears, list_groups, read_weight
from captioner.fast.speed import record_graph

BUCKET = 32  # positions by which the part of the cache that is read grows
CHUNK = 128  # images that ViT, Q-Former and the prefix's pass take at once
CHECK_EVERY = 8  # steps between two looks at whether every caption has ended: each look waits for the GPU
WORKSPACE = 3 * 2**30  # bytes that passes of CHUNK images through a full-size model, and the graphs, take


# --------------------------------------------------------------------------------------------------------------
# the model's parts


def is_plain(linear: torch.nn.Module) -> bool:
    """Whether the layer is an nn.Linear or Linear4bit, bare or with LoRA that is no variant like DoRA."""
    if isinstance(linear, LoraLayer):
        if linear.lora_variant or any(matrix.bias is not None for matrix in linear.lora_B.values()):
            return False
        linear = linear.base_layer
    return type(linear) in (torch.nn.Linear, bnb.nn.Linear4bit)


def supports(model) -> bool:
    """Whether FastGenerator can caption with this model; where not, transformers' generate() can."""
    return is_written_out(model) and all(is_plain(linear) for group in list_groups(model) for linear in group)


def copy_linear(linear: torch.nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Write a layer's `weight` (out, in) and `bias` (out,) as they act now: dequantised, active LoRA added."""
    base = get_base(linear)
    weight.copy_(read_weight(base))
    bias.copy_(base.bias)
    if isinstance(linear, LoraLayer) and not linear.disable_adapters and not linear.merged:
        for name in linear.active_adapters:
            if name in linear.lora_A:
                a, b = linear.lora_A[name].weight, linear.lora_B[name].weight  # (rank, in), (out, rank)
                weight.addmm_(b.to(weight.dtype), a.to(weight.dtype), alpha=linear.scaling[name])


def describe_lora(module: torch.nn.Module) -> list[tuple]:
    """What changes whenever LoRA below the module gives something else: what is on, and the versions of its weights.

    torch's fused optimisers don't raise them; CaptionTrainer does.
    """
    return [
        (
            layer.disable_adapters,
            layer.merged,
            *layer.active_adapters,
            *((w.data_ptr(), w._version) for w in layer.parameters()),
        )
        for layer in module.modules()
        if isinstance(layer, LoraLayer)
    ]


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def max_batch(model, max_new_tokens: int, free_bytes: int, copies: bool = True) -> int:
    """Most rows a batch that FastGenerator has room for in `free_bytes`, which it has not yet taken any of; 0 if none.

    On a GPU those are what torch.cuda.mem_get_info() says, plus what torch has reserved and does not use.
    """
    blip2 = get_blip2(model)
    text = blip2.config.text_config
    size = blip2.get_input_embeddings().weight.element_size()
    layer = (4 * text.hidden_size + 2 * text.ffn_dim) * text.hidden_size * size  # bytes of its linear layers
    positions = round_up(blip2.config.num_query_tokens + 1 + max_new_tokens, BUCKET)
    cache = text.num_hidden_layers * 2 * text.hidden_size * positions * size
    row = cache + 6 * text.vocab_size * 4  # logits with fp32 copies, probabilities and noise
    if copies:
        return max(0, (free_bytes - text.num_hidden_layers * layer - WORKSPACE) // row)
    return max(0, (free_bytes - 2 * layer) // (row + WORKSPACE // CHUNK))  # of batches up to CHUNK


# --------------------------------------------------------------------------------------------------------------
# generation


class FastGenerator:
    """Captions batches of up to `batch_size` images with a model that `supports` accepts, in eval mode.

    Keeps a copy of OPT's linear layers, unquantised and with LoRA added (5 GB for OPT-2.7B in bf16), a cache of
    batch_size rows, and the graphs, all of which later calls use again. Without `copies` each step unpacks the layers
    and computes LoRA beside them. A call takes the weights anew if a training step or disable_adapter() has changed
    them since the last one.
    """

    def __init__(self, model, batch_size: int, bucket: int = BUCKET, cuda_graphs: bool = True, copies: bool = True):
        """Decode in CUDA graphs, on a GPU, unless `cuda_graphs` is False; `bucket` positions of the cache at a time."""
        self.model = get_blip2(model)
        self.decoder = self.model.language_model.model.decoder
        text = self.model.config.text_config
        self.eos, self.pad, self.bos = text.eos_token_id, text.pad_token_id, text.bos_token_id
        self.heads, self.layers = text.num_attention_heads, text.num_hidden_layers
        self.prefix = self.model.config.num_query_tokens + 1  # Q + 1
        self.batch_size, self.bucket = batch_size, bucket
        self.step_size = -(-batch_size // 8)  # n is a multiple of it, so that there are few graphs
        embedding = self.decoder.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self.use_kernel = choice.use_kernels(embedding)
        self.use_graphs = cuda_graphs and self.device.type == "cuda"
        self.cache = self.taken = None
        self.copies: list[tuple[list[torch.nn.Module], Tensor, Tensor]] = []  # a group's layers, weight and bias
        make = self._make_copy if copies else self._make_reader
        with torch.inference_mode():
            self.linears = [[make(group) for group in group_linears(layer)] for layer in self.decoder.layers]

    def _make_copy(self, group: list[torch.nn.Module]) -> Callable[[Tensor], Tensor]:
        """A group as one linear layer, with room for its weight (out, in) and bias (out,)."""
        out = sum(linear.out_features for linear in group)
        options = {"device": self.device, "dtype": self.dtype}
        weight, bias = torch.empty(out, group[0].in_features, **options), torch.empty(out, **options)
        self.copies.append((group, weight, bias))
        return functools.partial(F.linear, weight=weight, bias=bias)

    def _make_reader(self, group: list[torch.nn.Module]) -> Callable[[Tensor], Tensor]:
        """A group as one linear layer, whose weights are read at each use."""
        return lambda x: apply_linears(group, x, self.lora)

    @torch.inference_mode()
    def generate(
        self,
        pixel_values: Tensor,
        max_new_tokens: int,
        choice: tuple[float, float] | None = None,
        seeds: Sequence[int] = (),
    ) -> Tensor:
        """(B, N) new tokens for pixel_values (B, 3, S, S), N as the longest caption and at most max_new_tokens.

        A row ends with eos and is filled up with pad. Greedy, or drawn as pick_tokens says with `choice`, temperature
        and top_p, and the rows' `seeds`.
        """
        rows = len(pixel_values)
        assert 0 < rows <= self.batch_size, f"{rows} images in a batch of {self.batch_size}"
        self._make_room(max_new_tokens)
        self._take_weights()
        self._start(rows, seeds)
        self._read_prefix(pixel_values, choice)

        size = self._round_rows(rows)  # n
        end = self.prefix + max_new_tokens  # where the longest caption ends
        position = self.prefix  # of the token that is fed next; self.position is the same on the GPU
        while position < end - 1:
            at_border = position % self.bucket == 0
            if at_border or (position - self.prefix) % CHECK_EVERY == 0:
                unfinished = size - int(self.finished[:size].sum())
                if unfinished == 0:
                    break
                if at_border:
                    size = self._drop_finished(size, unfinished, position)
            # the kernel reads no more of the cache than is filled, whatever its length
            length = self.cache.shape[4] if self.use_kernel else round_up(position + 1, self.bucket)
            self._run_step(size, length, choice)
            position += 1

        tokens = self.tokens[:rows, self.prefix : position + 1]
        ended = tokens == self.eos
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return tokens[:, : int(lengths.max())].clone()

    def _make_room(self, max_new_tokens: int) -> None:
        """Allocate what the steps read and write in place, unless what an earlier call allocated is long enough."""
        positions = round_up(self.prefix + max_new_tokens, self.bucket)
        limit = self.decoder.max_target_positions
        assert self.prefix + max_new_tokens <= limit, f"{max_new_tokens} new tokens, but OPT has {limit} positions"
        if self.cache is not None and positions <= self.cache.shape[4]:
            return
        self.cache = None  # frees the old one first
        self._forget_graphs()
        size, width = self.batch_size, self.decoder.config.hidden_size // self.heads
        shape = (self.layers, 2, size, self.heads, positions, width)  # keys and values
        self.cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.tokens = torch.empty(size, positions, dtype=torch.long, device=self.device)  # whole rows
        self.rows = torch.empty(size, dtype=torch.long, device=self.device)  # which of `tokens` a decoded row is
        self.current = torch.empty(size, dtype=torch.long, device=self.device)  # token that a decoded row is fed
        self.finished = torch.empty(size, dtype=torch.bool, device=self.device)
        self.seeds = torch.empty(size, dtype=torch.long, device=self.device)  # of whole rows
        self.position = torch.empty(1, dtype=torch.long, device=self.device)  # of `current`

    def _forget_graphs(self) -> None:
        """And their memory: torch takes no more graphs into a pool that had some and has none."""
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.use_graphs else None

    def _take_weights(self) -> None:
        """Of LoRA and, where layers are copied, of these, unless nothing has changed since the last call."""
        if describe_lora(self.model) == self.taken:
            return
        self.lora = copy_lora(self.model)
        self.taken = describe_lora(self.model)  # copying may have moved weights
        if not self.copies:
            self._forget_graphs()  # they read the former matrices
        for group, weight, bias in self.copies:
            parts = zip(group, weight.chunk(len(group)), bias.chunk(len(group)), strict=True)
            for linear, weight_part, bias_part in parts:
                copy_linear(linear, weight_part, bias_part)

    def _start(self, rows: int, seeds: Sequence[int]) -> None:
        """Empty the state; rows behind the first `rows` count as finished."""
        self.cache.zero_()  # a position that is masked counts 0 times its value, and 0 times NaN is NaN
        self.tokens.fill_(self.pad)
        torch.arange(self.batch_size, out=self.rows)
        self.current.fill_(self.pad)
        self.finished.fill_(False)
        self.finished[rows:] = True
        self.seeds.fill_(0)
        self.seeds[: len(seeds)] = torch.tensor(seeds, dtype=torch.long)
        self.position.fill_(self.prefix - 1)

    def _round_rows(self, rows: int) -> int:
        return min(round_up(rows, self.step_size), self.batch_size)

    def _read_prefix(self, pixel_values: Tensor, choice: tuple | None) -> None:
        """Fill the cache with image tokens and bos, and choose the first new token of each row."""
        positions = torch.arange(self.prefix, device=self.device)
        bos = self.decoder.embed_tokens(torch.tensor([[self.bos]], device=self.device))  # (1, 1, E)
        last, start = [], 0
        for pixels in pixel_values.split(CHUNK):
            vision = self.model.vision_model(pixel_values=pixels.to(self.device)).last_hidden_state  # (., P, D)
            image = embed_images(self.model, vision, self.lora)  # (., Q, E)
            prefix = torch.cat([image.to(self.dtype), bos.expand(len(image), -1, -1)], dim=1)  # (., Q+1, E)
            cache = self.cache[:, :, start : start + len(image)]
            last.append(self._run_layers(prefix, positions, cache, None)[:, -1])
            start += len(image)
        self._choose(torch.cat(last), choice)

    def _run_layers(self, x: Tensor, positions: Tensor, cache: Tensor, mask: Tensor | None) -> Tensor:
        """OPT's outputs (n, T, E) for embeddings x (n, T, E) at `positions` (T,), which go into the cache.

        Looks back on the cache (layers, 2, n, H, L, D) through `mask` (L,); without one, on x alone.
        """
        n, length, _ = x.shape
        table = self.decoder.embed_positions
        x = x + F.embedding(positions + table.offset, table.weight)
        for layer, (qkv, out, fc1, fc2), (keys, values) in zip(self.decoder.layers, self.linears, cache, strict=True):
            new = qkv(layer.self_attn_layer_norm(x)).view(n, length, 3, self.heads, -1)
            if mask is not None and self.use_kernel:
                seen = attend_one(new[:, 0], keys, values, positions)  # (n, H, D)
            else:
                q, k, v = new.permute(2, 0, 3, 1, 4)  # (n, H, T, D)
                keys.index_copy_(2, positions, k)
                values.index_copy_(2, positions, v)
                if mask is None:
                    seen = attend_rows(*new.unbind(2), is_causal=True)
                else:
                    mask_of_all = mask.expand(n, self.heads, 1, -1)
                    seen = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_of_all).transpose(1, 2)
            x = x + out(seen.reshape(n, length, -1))
            x = x + fc2(layer.activation_fn(fc1(layer.final_layer_norm(x))))
        return self.decoder.final_layer_norm(x)

    def _choose(self, last: Tensor, choice: tuple | None) -> None:
        """Choose the next token of each row from OPT's last output (n, E), and write it down. Nothing waits here."""
        n = len(last)
        logits = self.model.language_model.lm_head(last)  # (n, V)
        if choice is None:
            token = logits.argmax(-1)
        else:
            place = self.position + 1 - self.prefix  # of the token in its caption
            token = pick_tokens(logits, *choice, self.seeds[self.rows[:n]], place)
        token = token.masked_fill(self.finished[:n], self.pad)
        self.current[:n] = token
        self.finished[:n] |= token == self.eos
        self.position += 1
        self.tokens.index_put_((self.rows[:n], self.position.expand(n)), token)

    def _step(self, size: int, length: int, choice: tuple | None) -> None:
        """Feed the first `size` rows their current token, and choose the next; `length` is L."""
        seen = torch.arange(length, device=self.device) <= self.position
        mask = torch.zeros(length, dtype=self.dtype, device=self.device).masked_fill(~seen, -torch.inf)
        x = self.decoder.embed_tokens(self.current[:size, None])  # (n, 1, E)
        self._choose(self._run_layers(x, self.position, self.cache[:, :, :size, :, :length], mask)[:, 0], choice)

    def _run_step(self, size: int, length: int, choice: tuple | None) -> None:
        """_step, by a graph if there is one. The first step of its kind runs without, which warms it up, and is then
        captured for those that follow; capturing runs nothing."""
        key = (size, length, choice)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self._step(size, length, choice)
        if self.use_graphs:
            self.graphs[key], _ = record_graph(lambda: self._step(size, length, choice), self.pool, warm_up=False)

    def _drop_finished(self, size: int, unfinished: int, position: int) -> int:
        """Move the unfinished rows to the front and drop others if that saves a quarter; returns how many are left.

        A few finished ones may be among them, to fill up to a size that has few graphs.
        """
        smaller = self._round_rows(unfinished)
        if smaller > 0.75 * size:
            return size
        kept = self.finished[:size].byte().argsort(stable=True)[:smaller].sort().values
        for state in (self.rows, self.current, self.finished):
            state[:smaller] = state[kept]
        for part in self.cache.flatten(0, 1):  # (B, H, positions, D); one at a time, as each needs a copy
            part[:smaller, :, :position] = part[kept, :, :position]
        return smaller
