"""Captions of many images at once: OPT written out, with a cache of fixed size and one CUDA graph for a step.

transformers' generate() launches some 1,500 kernels for each token, and a GPU that captions hundreds of images waits
for them. Here a step is captured once and then replayed as a whole, and rows whose caption has ended leave the batch.

Shapes: B rows of a batch, n rows that are still decoded, Q image tokens a row, T tokens that are fed at once, N new
tokens, L positions of the cache that are read, H heads of width D, E = H x D, V tokens of the vocabulary, S image side.
A row is [Q image embeddings][bos][new tokens]; all rows have the same length, so one position counter does for all.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.blip2.lora import get_blip2
from captioner.blip2.sampling import pick_tokens
from captioner.fast.adapters import Adapters, copy_lora
from captioner.fast.kernels import choice as kernel_choice
from captioner.fast.kernels.attention import attend_one, attend_rows
from captioner.fast.layers import embed_images, run_decoder
from captioner.fast.speed import record_graph

BUCKET = 32  # positions by which the part of the cache that is read grows
CHUNK = 128  # images that ViT, Q-Former and the prefix's pass take at once
CHECK_EVERY = 8  # steps between two looks at whether every caption has ended: each look waits for the GPU

Choice = tuple[float, float]  # temperature and top_p


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def look_back(cache: Tensor, positions: Tensor, qkv: Tensor) -> Tensor:
    """A layer's attention of the tokens at `positions` (T,) of each row: qkv (n x T, 3E) -> (n x T, E).

    Several look back on themselves, at the beginning of the row; one on the cache of keys and values (2, n, H, L, D),
    into which all go.
    """
    new = qkv.view(cache.shape[1], len(positions), 3, cache.shape[2], -1)  # (n, T, 3, H, D)
    if len(positions) == 1:
        return attend_one(new[:, 0], *cache, positions).flatten(1)
    cache.index_copy_(3, positions, new[:, :, 1:].permute(2, 0, 3, 1, 4))
    return attend_rows(*new.unbind(2), is_causal=True).flatten(0, 1)


class DecodingState:
    """What a step reads and writes in place, so that a recorded one finds it where it was.

    The cache, the tokens so far, and which rows are still decoded: the first n, in the order of `rows`. For up to
    `size` rows of up to `positions` positions.
    """

    def __init__(self, blip2, size: int, positions: int):
        text, like = blip2.config.text_config, blip2.get_input_embeddings().weight
        heads = text.num_attention_heads
        self.pad, self.eos, self.prefix = text.pad_token_id, text.eos_token_id, blip2.config.num_query_tokens + 1
        shape = (text.num_hidden_layers, 2, size, heads, positions, text.hidden_size // heads)  # keys and values
        self.cache = torch.empty(shape, dtype=like.dtype, device=like.device)
        whole = {"dtype": torch.long, "device": like.device}
        self.tokens = torch.empty(size, positions, **whole)  # of all rows, from position 0 on
        self.seeds = torch.empty(size, **whole)  # of all rows
        self.rows = torch.empty(size, **whole)  # which of `tokens` a decoded row is
        self.finished = torch.empty(size, dtype=torch.bool, device=like.device)
        self.position = torch.empty(1, **whole)  # of the token that a decoded row is fed

    def start(self, rows: int, seeds: Sequence[int]) -> None:
        """Empty the state; rows behind the first `rows` count as finished, whatever their seeds."""
        self.cache.zero_()  # a position that is masked counts 0 times its value, and 0 times NaN is NaN
        self.tokens.fill_(self.pad)
        torch.arange(len(self.rows), out=self.rows)
        torch.ge(self.rows, rows, out=self.finished)
        self.seeds[: len(seeds)] = torch.tensor(seeds, dtype=torch.long)
        self.position.fill_(self.prefix - 1)

    def write(self, token: Tensor) -> None:
        """Append the next token (n,) of each decoded row; of those that have ended it is padding."""
        n = len(token)
        token = token.masked_fill(self.finished[:n], self.pad)
        self.finished[:n] |= token == self.eos
        self.position += 1
        self.tokens.index_put_((self.rows[:n], self.position.expand(n)), token)

    def keep_unfinished(self, size: int, smaller: int, position: int) -> None:
        """Move the unfinished of the first `size` rows to the front, among the first `smaller`; `position` of the
        cache are filled."""
        kept = self.finished[:size].byte().argsort(stable=True)[:smaller].sort().values
        for state in (self.rows, self.finished):
            state[:smaller] = state[kept]
        for part in self.cache.flatten(0, 1):  # (B, H, positions, D); one at a time, as each needs a copy
            part[:smaller, :, :position] = part[kept, :, :position]

    def read(self, rows: int, position: int) -> Tensor:
        """The new tokens (rows, N) up to `position`, N as the longest caption; this waits for the GPU."""
        tokens = self.tokens[:rows, self.prefix : position + 1]
        goes_on = ((tokens == self.eos).cumsum(1) == 0).any(0)  # (N,) whether some caption does behind a place
        return tokens[:, : int(goes_on.sum()) + 1].clone()


class FastGenerator:
    """Captions of up to `max_new_tokens` for batches of up to `batch_size` images; the model is in eval mode.

    Reads the model's weights where they are. Keeps a copy of LoRA's, a cache of batch_size rows, and the graphs, all
    of which later calls use again.
    """

    def __init__(self, model, batch_size: int, max_new_tokens: int, bucket: int = BUCKET):
        """For a model that `supports` accepts; the part of the cache that is read grows by `bucket` positions."""
        self.model = get_blip2(model)
        self.decoder = self.model.language_model.model.decoder
        self.prefix = self.model.config.num_query_tokens + 1  # Q + 1
        self.end = self.prefix + max_new_tokens  # where the longest caption ends
        limit = self.decoder.max_target_positions
        assert self.end <= limit, f"{max_new_tokens} new tokens, but OPT has {limit} positions"
        self.batch_size, self.bucket = batch_size, bucket
        self.step_size = -(-batch_size // 8)  # n is a multiple of it, so that there are few graphs
        embedding = self.decoder.embed_tokens.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self.use_kernels = kernel_choice.use_kernels(embedding)
        self.use_graphs = self.device.type == "cuda"
        self.loras: dict[tuple, Adapters] = {}  # by adapted layers
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.use_graphs else None
        with torch.inference_mode():
            self.state = DecodingState(self.model, batch_size, round_up(self.end, bucket))

    @torch.inference_mode()
    def generate(self, pixel_values: Tensor, choice: Choice | None = None, seeds: Sequence[int] = ()) -> Tensor:
        """(B, N) new tokens for pixel_values (B, 3, S, S), N as the longest caption.

        A row ends with eos and is filled up with pad. Greedy, or drawn as pick_tokens says with `choice` and the
        rows' `seeds`.
        """
        rows = len(pixel_values)
        assert 0 < rows <= self.batch_size, f"{rows} images in a batch of {self.batch_size}"
        self._copy_lora()
        self.state.start(rows, seeds)
        self._read_prefix(pixel_values, choice)

        size = self._round_rows(rows)  # n
        position = self.prefix  # of the token that is fed next; state.position is the same on the GPU
        while position < self.end - 1:
            if (position - self.prefix) % CHECK_EVERY == 0:
                unfinished = size - int(self.state.finished[:size].sum())
                if unfinished == 0:
                    break
                # a few finished rows may stay, to fill up to a size that has few graphs
                if (smaller := self._round_rows(unfinished)) <= 0.75 * size:
                    self.state.keep_unfinished(size, smaller, position)
                    size = smaller
            # the kernel reads no more of the cache than is filled, whatever its length
            length = self.state.cache.shape[4] if self.use_kernels else round_up(position + 1, self.bucket)
            self._run_step(size, length, choice)
            position += 1
        return self.state.read(rows, position)

    def _copy_lora(self) -> None:
        """Take LoRA's weights as they are now, to where recorded steps read them."""
        now = copy_lora(self.model)
        self.lora = self.loras.setdefault(tuple(now.matrices), now)  # another where it was switched on or off
        for layer, matrices in now.matrices.items():
            for kept, matrix in zip(self.lora.matrices[layer], matrices, strict=True):
                kept.copy_(matrix)

    def _round_rows(self, rows: int) -> int:
        return min(round_up(rows, self.step_size), self.batch_size)

    def _read_prefix(self, pixel_values: Tensor, choice: Choice | None) -> None:
        """Fill the cache with image tokens and bos, and choose the first new token of each row."""
        positions = torch.arange(self.prefix, device=self.device)
        bos = self.decoder.embed_tokens.weight[self.model.config.text_config.bos_token_id]  # (E,)
        last, caches = [], self.state.cache[:, :, : len(pixel_values)].split(CHUNK, 2)
        for pixels, cache in zip(pixel_values.split(CHUNK), caches, strict=True):
            vision = self.model.vision_model(pixel_values=pixels.to(self.device)).last_hidden_state  # (., P, D)
            image = embed_images(self.model, vision, self.lora)  # (., Q, E)
            prefix = torch.cat([image.to(self.dtype), bos.expand(len(image), 1, -1)], dim=1)  # (., Q+1, E)
            last.append(self._run_layers(prefix, positions, cache))
        self._choose(torch.cat(last), choice)

    def _run_layers(self, x: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
        """OPT's outputs (n, E) at the last of `positions` (T,), for embeddings x (n, T, E).

        Their keys and values go into the cache (layers, 2, n, H, L, D).
        """
        (n, length, _), table = x.shape, self.decoder.embed_positions
        x = x + F.embedding(positions + table.offset, table.weight)
        looks = [functools.partial(look_back, layer, positions) for layer in cache]
        last = torch.arange(length - 1, n * length, length, device=x.device)
        return run_decoder(self.decoder, x.flatten(0, 1), looks, self.lora, last if length > 1 else None)

    def _choose(self, last: Tensor, choice: Choice | None) -> None:
        """Choose the next token of each row from OPT's last output (n, E), and write it down. Nothing waits here."""
        logits = self.model.language_model.lm_head(last)  # (n, V)
        if choice is None:
            token = logits.argmax(-1)
        else:
            place = self.state.position + 1 - self.prefix  # of the token in its caption
            token = pick_tokens(logits, *choice, self.state.seeds[self.state.rows[: len(last)]], place)
        self.state.write(token)

    def _step(self, size: int, length: int, choice: Choice | None) -> None:
        """Feed the first `size` rows their current token, and choose the next; `length` is L."""
        state = self.state
        x = self.decoder.embed_tokens(state.tokens[state.rows[:size, None], state.position])  # (n, 1, E)
        self._choose(self._run_layers(x, state.position, state.cache[:, :, :size, :, :length]), choice)

    def _run_step(self, size: int, length: int, choice: Choice | None) -> None:
        """_step, by a graph if there is one. The first step of its kind runs without, which warms it up, and is then
        captured for those that follow; capturing runs nothing."""
        key = (id(self.lora), size, length, choice)
        if key in self.graphs:
            self.graphs[key].replay()
            return
        self._step(size, length, choice)
        if self.use_graphs:
            self.graphs[key], _ = record_graph(lambda: self._step(size, length, choice), self.pool)
