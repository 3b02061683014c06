"""What the steps of FastGenerator read and write in place, so that a recorded step finds it where it was."""

from collections.abc import Sequence

import torch
from torch import Tensor


class DecodingState:
    """The cache, the tokens so far, and which rows are still decoded: the first n, in the order of `rows`.

    Shapes as in generation.py. For up to `size` rows of up to `positions` positions.
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
        self.current = torch.empty(size, **whole)  # token that a decoded row is fed
        self.finished = torch.empty(size, dtype=torch.bool, device=like.device)
        self.position = torch.empty(1, **whole)  # of `current`

    @property
    def positions(self) -> int:
        return self.cache.shape[4]

    def start(self, rows: int, seeds: Sequence[int]) -> None:
        """Empty the state; rows behind the first `rows` count as finished."""
        self.cache.zero_()  # a position that is masked counts 0 times its value, and 0 times NaN is NaN
        self.tokens.fill_(self.pad)
        torch.arange(len(self.rows), out=self.rows)
        self.current.fill_(self.pad)
        self.finished.fill_(False)
        self.finished[rows:] = True
        self.seeds.fill_(0)
        self.seeds[: len(seeds)] = torch.tensor(seeds, dtype=torch.long)
        self.position.fill_(self.prefix - 1)

    def write(self, token: Tensor) -> None:
        """Append the next token (n,) of each decoded row; of those that have ended it is padding."""
        n = len(token)
        token = token.masked_fill(self.finished[:n], self.pad)
        self.current[:n] = token
        self.finished[:n] |= token == self.eos
        self.position += 1
        self.tokens.index_put_((self.rows[:n], self.position.expand(n)), token)

    def keep_unfinished(self, size: int, smaller: int, position: int) -> None:
        """Move the unfinished of the first `size` rows to the front, among the first `smaller`; `position` of the
        cache are filled."""
        kept = self.finished[:size].byte().argsort(stable=True)[:smaller].sort().values
        for state in (self.rows, self.current, self.finished):
            state[:smaller] = state[kept]
        for part in self.cache.flatten(0, 1):  # (B, H, positions, D); one at a time, as each needs a copy
            part[:smaller, :, :position] = part[kept, :, :position]

    def read(self, rows: int, position: int) -> Tensor:
        """The new tokens (rows, N) up to `position`, N as the longest caption; this waits for the GPU."""
        tokens = self.tokens[:rows, self.prefix : position + 1]
        ended = tokens == self.eos
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens.shape[1])
        return tokens[:, : int(lengths.max())].clone()
