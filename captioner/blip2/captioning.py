"""Captions of any image from Python, in three lines.

caption = load_captioner("blip2-finetuned")
print(caption("scene.jpg"))                         # It is a night scene in rainy weather on a highway road. ...
for sentence in caption.describe("scene.jpg").sentences:
    print(f"{sentence.certainty:.2f}  {sentence.text}")
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import Blip2Processor, GenerationConfig

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.parsing import parse_caption
from captioner.blip2.generation import decode_captions, generate_tokens, make_prefix
from captioner.blip2.loading import load_finetuned, pick_device
from captioner.blip2.pixels import prepare_pixels
from captioner.blip2.sampling import DrawTokens, seed_image
from captioner.data.image_decoding import normalize_image, open_image

AT_ONCE = 16  # images that ImageCaptioner captions in one batch


class Sentence(NamedTuple):
    """A sentence of a caption."""

    text: str
    certainty: float  # mean probability that the model gave its tokens, 0 to 1


class Description(NamedTuple):
    """A caption with what it says."""

    text: str
    facts: Facts
    sentences: list[Sentence]


class ImageCaptioner:
    """A fine-tuned model that captions images: caption(image), caption([image, ...]), caption.describe(image).

    An image is a path, a PIL image, or an array of uint8, (H, W), (H, W, 3) or (H, W, 4). A list of them, of any
    length, gives a list of captions. Raises UserError for an image that can't be read.
    """

    def __init__(self, model, processor: Blip2Processor, generation: GenerationConfig, seed: int = 42):
        self.model, self.processor, self.generation, self.seed = model, processor, generation, seed

    def __call__(
        self, images, *, greedy: bool = True, finetuned: bool = True, temperature: float = 0.7, top_p: float = 0.9
    ) -> str | list[str]:
        """The caption of each image: of the likeliest tokens, or drawn as temperature and top_p say.

        What is drawn depends on the seed and on the image's file name, or on its place in the list if it has none.
        `finetuned=False` leaves the adapter out, as the model was before.
        """
        sampling = None if greedy else (temperature, top_p)
        captions = []
        for _, tokens in self._generate(images, finetuned, sampling):
            captions += decode_captions(self.processor, tokens)
        return captions if isinstance(images, list) else captions[0]

    def describe(
        self, images, *, greedy: bool = True, finetuned: bool = True, temperature: float = 0.7, top_p: float = 0.9
    ) -> Description | list[Description]:
        """The same, with the facts that each caption states and the certainty of its sentences.

        Probabilities are those of the model at temperature 1, whatever the tokens were drawn at.
        """
        sampling = None if greedy else (temperature, top_p)
        described = []
        for pixels, tokens in self._generate(images, finetuned, sampling):
            texts, certain = decode_captions(self.processor, tokens), self._measure(pixels, tokens, finetuned)
            for text, row, probabilities in zip(texts, tokens.tolist(), certain.tolist(), strict=True):
                described.append(Description(text, parse_caption(text), self._split(row, probabilities)))
        return described if isinstance(images, list) else described[0]

    def _generate(
        self, images, finetuned: bool, sampling: tuple[float, float] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, S, S) and new tokens (B, N) of AT_ONCE images after another."""
        images = images if isinstance(images, list) else [images]
        seeds = [seed_image(self.seed, name_image(image, place)) for place, image in enumerate(images)]
        for start in range(0, len(images), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            pixels = torch.stack([prepare_pixels(read_image(image), self.processor) for image in images[part]])
            draw = None if sampling is None else DrawTokens(*sampling, seeds[part], self.model.device)
            with self._adapter(finetuned):
                tokens = generate_tokens(self.model, pixels, self.generation, draw)
            yield pixels, tokens

    def _adapter(self, finetuned: bool):
        return nullcontext() if finetuned else self.model.disable_adapter()

    @torch.inference_mode()
    def _measure(self, pixels: Tensor, tokens: Tensor, finetuned: bool) -> Tensor:
        """Probability (B, N) of each of the tokens (B, N) after those before it."""
        said = tokens.masked_fill(tokens == self.model.config.image_token_index, self.generation.pad_token_id)
        ids = torch.cat([make_prefix(self.model, len(tokens)), said], dim=1)  # (B, Q+1+N); no image but in the prefix
        with self._adapter(finetuned):
            output = self.model(
                pixel_values=pixels.to(self.model.device), input_ids=ids, attention_mask=torch.ones_like(ids)
            )
        logits = output.logits[:, -tokens.shape[1] - 1 : -1]  # (B, N, V), each for the token behind its position
        chosen = logits.gather(-1, tokens[..., None]).squeeze(-1).float()
        return (chosen - logits.float().logsumexp(-1)).exp()

    def _split(self, tokens: Sequence[int], probabilities: Sequence[float]) -> list[Sentence]:
        """The sentences of a caption, whose tokens end at the end token or before the first padding."""
        sentences, ids, certain = [], [], []
        ends = (self.generation.eos_token_id, self.generation.pad_token_id)
        for token, probability in [*zip(tokens, probabilities, strict=True), (ends[0], 0.0)]:
            if token not in ends:
                ids.append(token)
                certain.append(probability)
            if ids and (token in ends or "." in self.processor.decode([token])):
                [text] = decode_captions(self.processor, [ids])
                if text:
                    sentences.append(Sentence(text, sum(certain) / len(certain)))
                ids, certain = [], []
            if token in ends:
                return sentences
        return sentences


def load_captioner(folder: str | Path, seed: int = 42, model: str | None = None) -> ImageCaptioner:
    """The fine-tuned model in a folder that main.py wrote, on the GPU if there is one.

    `model`: where the base model is by now, if not where main.py had it. Raises UserError when there is none in the
    folder, or when it can't be loaded.
    """
    return ImageCaptioner(*load_finetuned(Path(folder), pick_device(), model=model), seed)


def read_image(image: str | Path | Image | np.ndarray) -> Image:
    """An image as upright 8-bit RGB. Raises UserError when it can't be read."""
    return open_image(Path(image)) if isinstance(image, str | Path) else normalize_image(image)


def name_image(image, place: int) -> str:
    return Path(image).name if isinstance(image, str | Path) else str(place)
