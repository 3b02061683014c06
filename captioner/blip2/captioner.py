"""A fine-tuned model's captions of many images. Torch is imported when it is loaded, not before."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioner.data.reading import one_ahead, read_ahead
from captioner.runtime.cli import import_bitsandbytes, without_collector
from captioner.runtime.errors import UserError
from captioner.runtime.processes import find_place, gather
from config import EvalConfig

FAST_BATCH, SLOW_BATCH = 512, 16  # pictures captioned at once, unless --batch-size says how many


class Captioner:
    """The fine-tuned model with its processor and settings, in each process."""

    def __init__(self, config: EvalConfig, pictures: int):
        """`pictures` are to be captioned."""
        self.config = config
        sizes = gather(self._load)  # batches are of one size in all processes, which share them out
        gather(self._make_generator, *map(min, zip(*sizes, strict=True)), pictures)
        self.options = {"do_sample": not config.greedy}
        if not config.greedy:
            self.options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        if config.max_new_tokens is not None:
            self.options["max_new_tokens"] = config.max_new_tokens
        place, processes = find_place()
        if place == 0 and processes > 1:
            print(f"captioning in {processes} processes")

    def _load(self) -> tuple[int, int]:
        """Load the model; returns for how many pictures at once the fast way to generate has room, 0 if it can't be:
        with copies of the weights and without."""
        with without_collector():
            import_bitsandbytes()  # before transformers and peft do
            import torch
            from transformers.utils import logging

            from captioner.blip2.loading import load_finetuned, pick_device
            from captioner.fast.generation import CHUNK, max_batch, supports
            from captioner.fast.vision_store import open_store, take_vision_out

        logging.set_verbosity_error()
        config = self.config
        self.model, self.processor, self.generation = load_finetuned(config.adapter, pick_device(), config.base)
        self.store = None if config.blank else open_store(config, self.model, self.processor)  # of real pictures
        self.vision = take_vision_out(self.model)
        self.longest = config.max_new_tokens or self.generation.max_new_tokens
        if not supports(self.model):
            return 0, 0
        if self.model.device.type != "cuda":
            return FAST_BATCH, 0
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        with_copies, without = (max_batch(self.model, self.longest, free, copies) for copies in (True, False))
        return with_copies, min(without, CHUNK)

    def _make_generator(self, with_copies: int, without: int, pictures: int) -> None:
        """Choose the batch size, and the fast way to generate (generation.py) where that is wanted and possible."""
        from captioner.fast.generation import FastGenerator, round_up, supports

        self.batch_size, self.generator = self.config.batch_size or SLOW_BATCH, None
        wanted = self.config.fast_generation
        if wanted == "off" or (wanted == "auto" and self.model.device.type != "cuda"):
            return
        size = self.config.batch_size
        copies = with_copies >= min(size or SLOW_BATCH, without)
        fitting = with_copies if copies else without
        if size is None:
            most = FAST_BATCH if copies else SLOW_BATCH
            size = min(most, 1 << max(fitting, 1).bit_length() - 1)  # a power of 2
            size = min(size, round_up(math.ceil(pictures / math.ceil(pictures / size)), 8))  # the last one too
        if size <= fitting:
            self.batch_size, self.generator = size, FastGenerator(self.model, size, copies=copies)
        elif wanted == "on" and not supports(self.model):
            raise UserError("--fast-generation on: not made for this language model; use --fast-generation auto")
        elif wanted == "on":
            raise UserError(
                f"--fast-generation on: the GPU has room for {fitting} pictures at once in this way; take a "
                "--batch-size of no more, or --fast-generation auto"
            )

    def map_batches(
        self,
        pictures: Sequence[tuple[str, Path]],
        work: Callable,
        unreadable: dict[str, str],
        finished: Collection[str] = frozenset(),
    ) -> Iterator[list[tuple]]:
        """Rows (name, result) of batch after batch, the same in every process.

        A batch is `batch_size` pictures in a row. work(index of the batch, outputs of the ViT (B, P, D)) gives the B
        results of those that can be read; the others go into `unreadable` with why. Of N processes the r-th works on
        batches r, r + N, ...; after N batches the results are exchanged. Batches with no picture to do that is not in
        `finished` are passed over.
        """
        place, processes = find_place()
        size = self.batch_size
        batches = [(index, pictures[size * index : size * (index + 1)]) for index in range(-(-len(pictures) // size))]
        batches = [(index, batch) for index, batch in batches if any(name not in finished for name, _ in batch)]
        total = sum(len(batch) for _, batch in batches)
        mine = [batch for _, batch in batches[place::processes]]
        reading = one_ahead(self._read_batches(mine, self._read_all([image for batch in mine for _, image in batch])))
        with tqdm(total=total, desc="captioning", unit="picture", disable=place > 0) as progress:
            for first in range(0, len(batches), processes):
                now = batches[first : first + processes]
                index = now[place][0] if place < len(now) else None
                for rows, reasons in gather(self._do_batch, index, reading, work, finished):
                    unreadable.update(reasons)
                    yield rows
                progress.update(sum(len(batch) for _, batch in now))

    def _read_all(self, images: Sequence[Path]) -> Iterator[tuple | str]:
        """(SHA-256 of the file if there is a store, stored output of the ViT (P, D) or else pixel values (3, S, S)).

        For a picture that can't be read, why. Outputs are read ahead by threads, pictures decoded by processes, which
        start at the call.
        """
        from captioner.fast.vision_store import hash_picture, read_each

        store, settings = self.store, self.model.config.vision_config
        how = (self.processor, self.vision.post_layernorm.weight.dtype, settings.image_size, self.config.blank)
        sums = [None] * len(images) if store is None else list(read_ahead(hash_picture, images, at_once=32))
        is_stored = [store is not None and store.has(sha256) for sha256 in sums]
        stored = read_ahead(store.load, itertools.compress(sums, is_stored), 2 * self.batch_size) if store else iter(())
        decoded = read_each([image for image, there in zip(images, is_stored, strict=True) if not there], *how)

        def read(image: Path, sha256: str | None, is_there: bool) -> tuple | str:
            found = next(stored) if is_there else next(decoded)
            if found is None:  # damaged in the store
                found = next(read_each([image], *how))
            return found if isinstance(found, str) else (sha256, found)

        return itertools.starmap(read, zip(images, sums, is_stored, strict=True))

    def _read_batches(self, batches: Sequence[Sequence], reading: Iterator[tuple | str]) -> Iterator[tuple]:
        """Of each batch, as _read_all gave them: (names, SHA-256 of each, outputs or pixels of each, {name: why not}).

        Where all outputs are stored they are one tensor (B, P, D), in pinned memory if there is a GPU.
        """
        import torch

        for batch in batches:
            names, sums, outputs, unreadable = [], [], [], {}
            for (name, _), read in zip(batch, reading, strict=False):
                if isinstance(read, str):
                    unreadable[name] = read
                else:
                    names.append(name)
                    sums.append(read[0])
                    outputs.append(read[1])
            if outputs and all(output.dim() == 2 for output in outputs):
                pin, like = self.model.device.type == "cuda", outputs[0]
                room = torch.empty(len(outputs), *like.shape, dtype=like.dtype, pin_memory=pin)
                outputs = torch.stack(outputs, out=room)
            yield names, sums, outputs, unreadable

    def _do_batch(self, index: int | None, reading: Iterator[tuple], work: Callable, finished: Collection[str]):
        import torch

        if index is None:
            return [], {}
        names, sums, outputs, unreadable = next(reading)
        if all(name in finished for name in names):
            return [], unreadable
        try:
            return list(zip(names, work(index, self._run_vision(sums, outputs)), strict=True)), unreadable
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            size = self.batch_size
            raise UserError(f"--batch-size {size}: too large for the GPU ({reason}); take a smaller one") from None

    def _run_vision(self, sums: Sequence[str | None], outputs):
        """The ViT's outputs (B, P, D) for what _read_batches gave: those that it has not are computed, and saved."""
        import torch

        from captioner.fast.vision_store import run_vision

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

    def finish(self) -> None:
        """Say how many outputs were in the store, and wait for those that are being written."""
        if self.store is not None:
            print(self.store.describe())
            self.store.close()

    def caption(self, index: int, outputs) -> list[str]:
        """Captions for outputs (B, P, D) of the ViT. Sampling depends on seed and the batch's index, on no other batch.

        So whichever process has a batch, and whatever came before, its captions are the same; on a CPU only with as
        many threads, which decide in what order numbers are added up.
        """
        import torch

        from captioner.blip2.captioning import decode_captions, generate_captions

        mixed = np.random.SeedSequence((self.config.seed, index)).generate_state(1)  # a CPU takes 32 bits of a seed
        seed = int(mixed[0])
        if self.generator is not None:
            options = {
                name: self.options[name] for name in ("do_sample", "temperature", "top_p") if name in self.options
            }
            tokens = self.generator.generate(outputs, self.longest, **options, seed=seed)
            return decode_captions(self.processor, tokens)
        torch.manual_seed(seed)
        return generate_captions(self.model, self.processor, outputs, self.generation, **self.options)

    def describe_memory(self) -> str:
        import torch

        used = torch.cuda.max_memory_allocated() / 2**30
        return f", {used:.2f} GiB of GPU memory at most" if used else ""

    def caption_untuned(self, index: int, outputs) -> list[str]:
        """The same without the adapter: what --base gives."""
        with self.model.disable_adapter():
            return self.caption(index, outputs)

    def encode(self, outputs) -> np.ndarray:
        """(B, D) image features of length 1: the frozen ViT's pooled output, from its outputs (B, P, D)."""
        import torch

        with torch.inference_mode():
            pooled = self.vision.post_layernorm(outputs[:, 0]).float()
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
