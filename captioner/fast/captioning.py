"""Captions by FastGenerator, wherever it can stand in for transformers' generate()."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from captioner.blip2.captioner import Captioner
from captioner.blip2.captioning import GreedyCaptioner, decode_captions
from captioner.blip2.vision import hash_image, read_each, run_vision
from captioner.data.reading import read_ahead
from captioner.fast.decoder_weights import supports
from captioner.fast.generation import FastGenerator
from captioner.fast.generation_plan import Room, measure_room, plan_generation
from captioner.fast.vision_store import open_store
from captioner.runtime.errors import UserError
from captioner.runtime.processes import gather

ROOM = 256  # images that there must be memory for, so that training beside them keeps some


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
            self.lean = room.copied < ROOM
            plan = plan_generation(room, self.count, lean=self.lean)
            self.generator = plan and plan.make(model)

    def __call__(self, model, pixel_values: Tensor) -> list[str]:
        if self.generator is None:
            return super().__call__(model, pixel_values)
        captions = []
        for part in pixel_values.to(self.generator.dtype).split(self.generator.batch_size):
            tokens = self.generator.generate(part, self.generation.max_new_tokens)
            captions += decode_captions(self.processor, tokens)
        return captions

    def finish(self) -> None:
        if self.lean:
            self.generator = None


class FastCaptioner(Captioner):
    """Captioner with the store of the ViT's outputs, and FastGenerator where that is wanted and possible."""

    def _load(self) -> None:
        super()._load()
        settings = self.model.config.vision_config
        self.store = None if self.config.blank else open_store(self.config, self.vision, settings, self.processor)

    def _prepare(self, images: int) -> None:
        longest = self.generation.max_new_tokens
        rooms = gather(measure_room, self.model, longest)  # batches are of one size in all processes
        gather(self._make_generator, Room(*map(min, zip(*rooms, strict=True))), images)

    def _make_generator(self, room: Room, images: int) -> None:
        """Choose the batch size, and the fast way to generate where that is wanted and possible."""
        wanted, size = self.config.fast.fast, self.config.generation.batch_size
        self.generator, plan = None, None
        if wanted == "on" or (wanted == "auto" and self.model.device.type == "cuda"):
            plan = plan_generation(room, images, size)
        if plan is not None:
            self.batch_size, self.generator = plan.batch_size, plan.make(self.model)
        elif wanted == "on" and not supports(self.model):
            raise UserError("--fast on: not made for this language model; use --fast auto")
        elif wanted == "on":
            raise UserError(
                f"--fast on: the GPU has room for {max(room)} images at once in this way; take a --batch-size of no "
                "more, or --fast auto"
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
        return "FastGenerator" if self.generator.weights.copied else "FastGenerator-packed"

    def finish(self) -> None:
        """Say how many outputs were in the store, and wait for those that are being written."""
        if self.store is not None:
            print(self.store.describe())
            self.store.close()
