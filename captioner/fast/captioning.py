"""Captions by FastGenerator, wherever it can stand in for transformers' generate()."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from captioner.blip2.captioner import SLOW_BATCH, Captioner
from captioner.blip2.captioning import GreedyCaptioner, decode_captions
from captioner.fast.features import FeatureFile, find_folder
from captioner.fast.generation import CHUNK, FastGenerator, max_batch, round_up, supports
from captioner.runtime.errors import UserError
from captioner.runtime.processes import gather

FAST_BATCH = 512  # images captioned at once, unless --batch-size says how many
ROOM = 256  # images that there must be memory for, so that training beside it keeps some


class FastGreedyCaptioner(GreedyCaptioner):
    """GreedyCaptioner of up to `count` images at once, faster where the model and the GPU's memory allow it.

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


class FastCaptioner(Captioner):
    """Captioner that reads the ViT's outputs where main.py has kept them, with FastGenerator where that is possible."""

    def _load(self) -> None:
        super()._load()
        folder = None
        if self.config.fast.fast != "off" and not self.config.blank:
            folder = find_folder(self.config.fast.features, self.config.adapter, self.model.device)
        self.features = folder and FeatureFile(folder, self.vision, self.model.config.vision_config, self.processor)

    def _prepare(self, images: int) -> None:
        sizes = gather(self._measure_room)  # batches are of one size in all processes, which share them out
        gather(self._make_generator, *map(min, zip(*sizes, strict=True)), images)

    def _measure_room(self) -> tuple[int, int]:
        """For how many images at once FastGenerator has room, 0 if it can't be: with copies of the weights, and
        without."""
        if not supports(self.model):
            return 0, 0
        if self.model.device.type != "cuda":
            return FAST_BATCH, 0
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        with_copies, without = (
            max_batch(self.model, self.generation.max_new_tokens, free, copies) for copies in (True, False)
        )
        return with_copies, min(without, CHUNK)

    def _make_generator(self, with_copies: int, without: int, images: int) -> None:
        """Choose the batch size, and the fast way to generate where that is wanted and possible."""
        self.batch_size, self.generator = self.config.generation.batch_size or SLOW_BATCH, None
        wanted = self.config.fast.fast
        if wanted == "off" or (wanted == "auto" and self.model.device.type != "cuda"):
            return
        size = self.config.generation.batch_size
        copies = with_copies >= min(size or SLOW_BATCH, without)
        fitting = with_copies if copies else without
        if size is None:
            most = FAST_BATCH if copies else SLOW_BATCH
            size = min(most, 1 << max(fitting, 1).bit_length() - 1)  # a power of 2
            size = min(size, round_up(math.ceil(images / math.ceil(images / size)), 8))  # the last one too
        if size <= fitting:
            self.batch_size, self.generator = size, FastGenerator(self.model, size, copies=copies)
        elif wanted == "on" and not supports(self.model):
            raise UserError("--fast on: not made for this language model; use --fast auto")
        elif wanted == "on":
            raise UserError(
                f"--fast on: the GPU has room for {fitting} images at once in this way; take a "
                "--batch-size of no more, or --fast auto"
            )

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
        tokens = self.generator.generate(outputs, self.generation.max_new_tokens, choice, seeds)
        return decode_captions(self.processor, tokens)

    @property
    def way(self) -> str:
        if self.generator is None:
            return super().way
        return "FastGenerator" if self.generator.copies else "FastGenerator-packed"
