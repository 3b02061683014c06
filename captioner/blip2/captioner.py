"""A fine-tuned model's captions of many images, by its own generate()."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging

from captioner.blip2.generation import generate_captions
from captioner.blip2.loading import load_finetuned, pick_device
from captioner.blip2.pixels import read_each
from captioner.blip2.sampling import DrawTokens, seed_image
from captioner.blip2.vit import run_vision, take_vision_out
from captioner.data.parallel import BATCH, one_ahead
from captioner.runtime.errors import UserError
from captioner.runtime.processes import find_place, gather
from config import EvalConfig

SLOW_BATCH = 16  # images captioned at once, unless --batch-size says how many


class Captioner:
    """The fine-tuned model with its processor and settings, in each process."""

    way = "generate"  # transformers' function

    def __init__(self, config: EvalConfig, images: int):
        """`images` are to be captioned."""
        self.config = config
        gather(self._load)
        self.batch_size = config.generation.batch_size or SLOW_BATCH
        self._prepare(images)
        place, processes = find_place()
        if place == 0 and processes > 1:
            print(f"captioning in {processes} processes")

    def _load(self) -> None:
        logging.set_verbosity_error()
        config = self.config
        self.model, self.processor, self.generation = load_finetuned(
            config.adapter, pick_device(), config.base, config.model
        )
        if config.generation.max_new_tokens is not None:
            self.generation.max_new_tokens = config.generation.max_new_tokens
            room = self.model.config.text_config.max_position_embeddings - self.model.config.num_query_tokens - 1
            if config.generation.max_new_tokens > room:
                raise UserError(
                    f"--max-new-tokens {config.generation.max_new_tokens}: the model has room for {room}; take fewer"
                )
        self.vision = take_vision_out(self.model)

    def _prepare(self, images: int) -> None:
        """Called in all processes, once each has its model: for what a faster way to caption has to make ready."""

    def map_batches(
        self,
        images: Sequence[tuple[str, Path]],
        work: Callable,
        unreadable: dict[str, str],
        finished: Collection[str] = frozenset(),
    ) -> Iterator[list[tuple]]:
        """Rows (name, result) of batch after batch, the same in every process.

        A batch is `batch_size` images in a row. work(names, outputs of the ViT (B, P, D)) gives the B results of those
        that can be read; the others go into `unreadable` with why. Of N processes the r-th works on batches r, r + N,
        ...; after N batches the results are exchanged. Batches whose images are all in `finished` are passed over.
        """
        place, processes = find_place()
        batches = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        batches = [batch for batch in batches if any(name not in finished for name, _ in batch)]
        mine = batches[place::processes]
        reading = one_ahead(self._read_batches(mine, self._read_all([image for batch in mine for _, image in batch])))
        with tqdm(total=sum(map(len, batches)), desc="captioning", unit="image", disable=place > 0) as progress:
            for first in range(0, len(batches), processes):
                now = batches[first : first + processes]
                for rows, reasons in gather(self._do_batch, reading, work, finished):
                    unreadable.update(reasons)
                    yield rows
                progress.update(sum(map(len, now)))

    def _read_all(self, images: Sequence[Path]) -> Iterator:
        """What the ViT reads of each image, or why it can't be read: by processes, which start at the call."""
        dtype, side = self.vision.post_layernorm.weight.dtype, self.model.config.vision_config.image_size
        return read_each(images, self.processor, dtype, side, self.config.blank)  # pixels (3, S, S)

    def _read_batches(self, batches: Sequence[Sequence], reading: Iterator) -> Iterator[tuple]:
        """Of each batch, as _read_all gave them: (names, what the ViT reads of them, {name: why not} of the others)."""
        for batch in batches:
            names, inputs, unreadable = [], [], {}
            for (name, _), read in zip(batch, reading, strict=False):
                if isinstance(read, str):
                    unreadable[name] = read
                else:
                    names.append(name)
                    inputs.append(read)
            yield names, inputs, unreadable

    def _do_batch(self, reading: Iterator[tuple], work: Callable, finished: Collection[str]):
        """Rows of this process's next batch, and {name: why not}; nothing where it has none left."""
        names, inputs, unreadable = next(reading, ((), (), {}))
        if all(name in finished for name in names):
            return [], unreadable
        try:
            return list(zip(names, work(names, self._run_vision(inputs)), strict=True)), unreadable
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            size = self.batch_size
            raise UserError(f"--batch-size {size}: too large for the GPU ({reason}); take a smaller one") from None

    def _run_vision(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The ViT's outputs (B, P, D) for B images (3, S, S).

        They come out of memory that is pinned, and go to a GPU one by one: to put them together first takes new memory.
        """
        parts = torch.stack([image.to(self.model.device, non_blocking=True) for image in inputs]).split(BATCH)
        return torch.cat([run_vision(self.vision, part) for part in parts])

    def describe_way(self) -> dict[str, str]:
        """How captions come about, for the signature of their scores."""
        how = self.config.generation
        decoding = "greedy" if how.greedy else f"T{how.temperature:g}-p{how.top_p:g}-seed{how.seed}"
        return {"decoding": decoding, "batch": str(self.batch_size), "by": self.way}

    def caption(self, names: Sequence[str], outputs: torch.Tensor) -> list[str]:
        """Captions for outputs (B, P, D) of the ViT, of images of those names.

        What is drawn for an image depends on the seed and its name alone. Its probabilities may differ in their last
        digits with the size of the batch, and on a CPU with the number of threads, as numbers are then added up in
        another order.
        """
        seeds = [seed_image(self.config.generation.seed, name) for name in names]
        return self._generate(outputs, seeds)

    def _generate(self, outputs: torch.Tensor, seeds: list[int]) -> list[str]:
        how, draw = self.config.generation, None
        if not how.greedy:
            draw = DrawTokens(how.temperature, how.top_p, seeds, self.model.device)
        return generate_captions(self.model, self.processor, outputs, self.generation, draw)

    def describe_memory(self) -> str:
        used = torch.cuda.max_memory_allocated() / 2**30
        return f", {used:.2f} GiB of GPU memory at most" if used else ""

    def caption_untuned(self, names: Sequence[str], outputs) -> list[str]:
        """The same without the adapter: what --base gives."""
        with self.model.disable_adapter():
            return self.caption(names, outputs)

    def encode(self, outputs) -> np.ndarray:
        """(B, D) image features of length 1: the frozen ViT's pooled output, from its outputs (B, P, D)."""
        with torch.inference_mode():
            pooled = self.vision.post_layernorm(outputs[:, 0]).float()
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
