"""Captions by FastGenerator, wherever it can stand in for transformers' generate()."""

import torch
from torch import Tensor

from captioner.blip2.captioning import GreedyCaptioner, decode_captions
from captioner.fast.generation import FastGenerator, max_batch, supports

ROOM = 256  # pictures that there must be memory for, so that training beside it keeps some


class FastGreedyCaptioner(GreedyCaptioner):
    """GreedyCaptioner of up to `count` pictures at once, faster where the model and the GPU's memory allow it.

    Copies of the weights, and graphs, stay until it goes.
    """

    def __init__(self, processor, generation, count: int):
        super().__init__(processor, generation)
        self.count = count
        self.generator: FastGenerator | None = None

    def __call__(self, model, pixel_values: Tensor) -> list[str]:
        if self.generator is None and supports(model) and self._has_room(model):
            self.generator = FastGenerator(model, self.count)
        if self.generator is None:
            return super().__call__(model, pixel_values)
        tokens = self.generator.generate(pixel_values.to(self.generator.dtype), self.generation.max_new_tokens)
        return decode_captions(self.processor, tokens)

    def _has_room(self, model) -> bool:
        if not torch.cuda.is_available():
            return True
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        return max_batch(model, self.generation.max_new_tokens, free) >= max(ROOM, self.count)
