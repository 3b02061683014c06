"""Captions by FastGenerator, wherever it can stand in for transformers' generate(), and for how many images at once."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor

from captioner.blip2.captioner import SLOW_BATCH, Captioner
from captioner.blip2.generation import GreedyCaptioner, decode_captions
from captioner.blip2.lora import get_blip2
from captioner.fast.features import FeatureFile, find_folder
from captioner.fast.generation import BUCKET, CHUNK, FastGenerator, round_up
from captioner.fast.layers import supports
from captioner.fast.speed import has_room_to_unpack, join_weights, merge_lora, unpack_nf4
from captioner.runtime.errors import UserError
from captioner.runtime.processes import gather

FAST_BATCH = 512  # images captioned at once, where there is room and nothing else is asked for
WORKSPACE = 3 * 2**30  # bytes that passes of CHUNK images through a full-size model, and the graphs, take
ROOM = 256  # images that there must be memory for, so that training beside them keeps some
UNPACKING_ROOM = 2  # the GPU must have so many times the memory free that unpacked weights take
AMPLE_ROOM = 12  # the same for those of the ViT, which is needed where its outputs are not kept, and for less long


class FastGreedyCaptioner(GreedyCaptioner):
    """GreedyCaptioner of `count` images, faster where the model and the GPU's memory allow it.

    Where memory is ample, the generator stays from one validation to the next. Elsewhere it takes little, and gives
    that back each time.
    """

    def __init__(self, processor, generation, count: int):
        super().__init__(processor, generation)
        self.count = count
        self.generator: FastGenerator | None = None
        self.lean = False

    def prepare(self, model) -> None:
        if self.generator is None:
            room = measure_room(model, self.generation.max_new_tokens)
            self.lean = room < ROOM
            size = pick_batch_size(room, self.count, SLOW_BATCH if self.lean else FAST_BATCH)
            self.generator = FastGenerator(model, size, self.generation.max_new_tokens) if size else None

    def __call__(self, model, pixel_values: Tensor) -> list[str]:
        if self.generator is None:
            return super().__call__(model, pixel_values)
        parts = map(self.generator.generate, pixel_values.to(self.generator.dtype).split(self.generator.batch_size))
        return [caption for tokens in parts for caption in decode_captions(self.processor, tokens)]

    def finish(self) -> None:
        if self.lean:
            self.generator = None


class FastCaptioner(Captioner):
    """Captioner that reads the ViT's outputs where main.py has kept them, with FastGenerator where that is possible."""

    def _load(self) -> None:
        super()._load()
        setting = "off" if self.config.blank else self.config.fast.features
        folder = find_folder(setting, self.config.adapter, self.model.device)
        self.features = folder and FeatureFile(folder, self.vision, self.model.config.vision_config, self.processor)

    def _prepare(self, images: int) -> None:
        """Choose the batch size, and the fast way to generate where that is wanted and possible."""
        self.generator, self.is_merged = None, False
        if self.config.fast.fast == "on" or self.model.device.type == "cuda":
            if has_room_to_unpack(self.vision, self.model.device, AMPLE_ROOM):
                unpack_nf4(self.vision)
            # weights are the same, and batches of one size, in all processes
            unpacks = all(gather(has_room_to_unpack, self.model, self.model.device, UNPACKING_ROOM))
            room = min(gather(self._make_room, unpacks))
            gather(self._make_generator, room, images)

    def _make_room(self, unpacks: bool) -> int:
        """For how many images there is room, with the weights as the generator reads them."""
        if supports(self.model):
            if unpacks:
                unpack_nf4(self.model)
            self.is_merged = not self.config.model_floors and merge_lora(self.model)
            join_weights(self.model)
        return measure_room(self.model, self.generation.max_new_tokens)

    def _make_generator(self, room: int, images: int) -> None:
        size = self.config.generation.batch_size or pick_batch_size(room, images, FAST_BATCH)
        if 0 < size <= room:
            self.batch_size = size
            self.generator = FastGenerator(self.model, size, self.generation.max_new_tokens)
            return
        reason = f"there is room for {room} images at once in the fast way"
        reason = reason if supports(self.model) else "the fast way is not made for this language model"
        if self.config.fast.fast == "on":
            raise UserError(f"--fast on: {reason}; take a --batch-size of no more, or --fast auto")
        print(f"captions come from transformers' generate(): {reason}")

    def _read_all(self, images: Sequence[Path]) -> Iterator[Tensor | str]:
        """The ViT's output (P, D) of an image where main.py has kept it, else what is read of the image."""
        kept = self.features.read(images) if self.features else {}
        if kept:
            print(f"{self.features.folder} has the frozen ViT's outputs of {len(kept):,} of {len(images):,} images")
        read = super()._read_all([image for image in images if image not in kept])
        return (kept[image] if image in kept else next(read) for image in images)

    def _run_vision(self, inputs: Sequence[Tensor]) -> Tensor:
        pixels = [each for each in inputs if each.dim() == 3]
        computed = iter(super()._run_vision(pixels) if pixels else ())
        outputs = [next(computed) if each.dim() == 3 else each for each in inputs]
        return torch.stack([output.to(self.model.device, non_blocking=True) for output in outputs])

    def _generate(self, outputs: Tensor, seeds: list[int]) -> list[str]:
        if self.generator is None:
            return super()._generate(outputs, seeds)
        how = self.config.generation
        choice = None if how.greedy else (how.temperature, how.top_p)
        return decode_captions(self.processor, self.generator.generate(outputs, choice, seeds))

    @property
    def way(self) -> str:
        way = super().way if self.generator is None else "FastGenerator"
        return f"{way}-merged" if self.is_merged else way


# --------------------------------------------------------------------------------------------------------------
# how many images at once


def measure_room(model, max_new_tokens: int) -> int:
    """Room on the model's device now, none for a model that FastGenerator is not made for. Empties torch's cache."""
    if not supports(model):
        return 0
    if model.device.type != "cuda":
        return FAST_BATCH
    torch.cuda.empty_cache()
    return max_batch(model, max_new_tokens, torch.cuda.mem_get_info()[0])


def max_batch(model, max_new_tokens: int, free_bytes: int) -> int:
    """Most rows a batch that FastGenerator has room for in `free_bytes`, which it has not yet taken any of; 0 if none.

    On a GPU those are what torch.cuda.mem_get_info() says, plus what torch has reserved and does not use.
    """
    blip2 = get_blip2(model)
    text, decoder = blip2.config.text_config, blip2.language_model.model.decoder
    size = blip2.get_input_embeddings().weight.element_size()
    if any(isinstance(layer, bnb.nn.Linear4bit) for layer in decoder.modules()):  # a layer, unpacked as it is used
        free_bytes -= 2 * (4 * text.hidden_size + 2 * text.ffn_dim) * text.hidden_size * size
    positions = round_up(blip2.config.num_query_tokens + 1 + max_new_tokens, BUCKET)
    cache = text.num_hidden_layers * 2 * text.hidden_size * positions * size
    row = cache + 12 * text.vocab_size * 4  # logits with fp32 copies, probabilities, and noise in 64 bits
    few = free_bytes // (row + WORKSPACE // CHUNK)
    return max(0, few if few < CHUNK else (free_bytes - WORKSPACE) // row)


def pick_batch_size(room: int, images: int, most: int) -> int:
    """2, 3, 4, 6, 8, 12, 16 and so on that there is room for, or less, to make batches of one size; 0: no room."""
    if not room:
        return 0
    size = 1 << room.bit_length() - 1
    size = min(most, size + size // 2 if room >= 1.5 * size else size)  # the same where a little more memory is free
    return math.ceil(images / math.ceil(images / size))
