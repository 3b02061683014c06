"""Captions by FastGenerator, wherever it can stand in for transformers' generate()."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from captioner.blip2.captioner import SLOW_BATCH, Captioner
from captioner.blip2.captioning import GreedyCaptioner, decode_captions
from captioner.blip2.vision import hash_image, read_each, run_vision
from captioner.data.reading import read_ahead
from captioner.fast.generation import CHUNK, FastGenerator, max_batch, round_up, supports
from captioner.fast.vision_store import open_store
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
    """Captioner with the store of the ViT's outputs, and FastGenerator where that is wanted and possible."""

    def _load(self) -> None:
        super()._load()
        settings = self.model.config.vision_config
        self.store = None if self.config.blank else open_store(self.config, self.vision, settings, self.processor)

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

    def _read_all(self, images: Sequence[Path]) -> Iterator[tuple[str | None, Tensor] | str]:
        """(SHA-256 of the file if there is a store, stored output of the ViT (P, D) or else pixel values (3, S, S)).

        Outputs are read ahead by threads.
        """
        store, side = self.store, self.model.config.vision_config.image_size
        how = (self.processor, self.vision.post_layernorm.weight.dtype, side, self.config.blank)
        sums = [None] * len(images) if store is None else list(read_ahead(hash_image, images, at_once=32))
        is_stored = [store is not None and store.has(sha256) for sha256 in sums]
        stored = read_ahead(store.load, itertools.compress(sums, is_stored), 2 * self.batch_size) if store else iter(())
        decoded = read_each([image for image, there in zip(images, is_stored, strict=True) if not there], *how)

        def read(image: Path, sha256: str | None, is_there: bool) -> tuple[str | None, Tensor] | str:
            found = next(stored) if is_there else next(decoded)
            if found is None:  # damaged in the store
                found = next(read_each([image], *how))
            return found if isinstance(found, str) else (sha256, found)

        return itertools.starmap(read, zip(images, sums, is_stored, strict=True))

    def _collect(self, inputs: list[tuple[str | None, Tensor]]) -> tuple[list[str | None], Sequence[Tensor]]:
        """(SHA-256 of each, outputs or pixels of each).

        Where all outputs are stored they are one tensor (B, P, D), in pinned memory if there is a GPU.
        """
        sums, outputs = [sha256 for sha256, _ in inputs], [output for _, output in inputs]
        if outputs and all(output.dim() == 2 for output in outputs):
            pin, like = self.model.device.type == "cuda", outputs[0]
            room = torch.empty(len(outputs), *like.shape, dtype=like.dtype, pin_memory=pin)
            outputs = torch.stack(outputs, out=room)
        return sums, outputs

    def _run_vision(self, inputs: tuple[list[str | None], Sequence[Tensor]]) -> Tensor:
        """Outputs that the store has not are computed, and saved."""
        sums, outputs = inputs
        missing = [row for row, output in enumerate(outputs) if output.dim() == 3]
        if self.store is not None:
            self.store.count(len(outputs) - len(missing), len(outputs))
        if not missing:
            return outputs.to(self.model.device, non_blocking=True)
        computed = run_vision(self.vision, torch.stack([outputs[row] for row in missing]))
        for row, output in zip(missing, computed, strict=True):
            outputs[row] = output
        if self.store is not None:
            kept = computed.to("cpu", non_blocking=True)  # pinned, so that a slow disk holds up no GPU memory
            self.store.save([sums[row] for row in missing], list(kept))
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

    def finish(self) -> None:
        """Say how many outputs were in the store, and wait for those that are being written."""
        if self.store is not None:
            print(self.store.describe())
            self.store.close()
