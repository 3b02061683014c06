"""Captions by the model's own generate(): of batches, of a model in training, and of any image in three lines.

caption = load_captioner("blip2-finetuned")
print(caption("scene.jpg"))                         # It is a night scene in rainy weather on a highway road. ...
for sentence in caption.describe("scene.jpg").sentences:
    print(f"{sentence.certainty:.2f}  {sentence.text}")
"""

import re
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
from captioner.blip2.batches import prefix_ids
from captioner.blip2.loading import load_finetuned, pick_device
from captioner.blip2.pixels import prepare_pixels
from captioner.blip2.sampling import DrawTokens, seed_image
from captioner.data.image_decoding import normalize_image, open_image

AT_ONCE = 16  # images that ImageCaptioner captions in one batch


def make_generation_config(model_config, max_new_tokens: int) -> GenerationConfig:
    """Settings that are saved beside the adapter; generate() of BLIP-2 knows none of them by itself."""
    text = model_config.text_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


@torch.inference_mode()
def generate_tokens(
    model, pixel_values: Tensor, generation: GenerationConfig, draw: DrawTokens | None = None, **options
) -> Tensor:
    """New tokens (B, N) for pixel_values (B, 3, S, S); `options` override `generation`.

    Greedy, unless `draw` chooses the tokens or `options` say otherwise (do_sample=True). Where the ViT's outputs
    (B, P, D) stand in for it (see vit.py), pixel_values are those.
    """
    prefix = _make_prefix(model, len(pixel_values))  # (B, Q+1)
    tokens = model.generate(
        pixel_values=pixel_values.to(model.device),  # the ViT takes any precision
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        generation_config=GenerationConfig(**{**generation.to_diff_dict(), **options}),
        logits_processor=[] if draw is None else [draw],
    )  # (B, Q+1+N): the prefix comes back too
    return tokens[:, prefix.shape[1] :]


def generate_captions(
    model, processor, pixel_values: Tensor, generation: GenerationConfig, draw: DrawTokens | None = None, **options
) -> list[str]:
    """The captions of generate_tokens()."""
    return decode_captions(processor, generate_tokens(model, pixel_values, generation, draw, **options))


def _make_prefix(model, rows: int) -> Tensor:
    return torch.tensor([prefix_ids(model.config)], device=model.device).expand(rows, -1)  # (rows, Q+1)


def decode_captions(processor, tokens: Tensor) -> list[str]:
    """Captions of new tokens (B, N), each on one line."""
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [re.sub(r"\s+", " ", text).strip() for text in texts]


class GreedyCaptioner:
    """captioner(model, pixel_values) -> greedy captions, of a model that is being trained."""

    def __init__(self, processor, generation: GenerationConfig):
        self.processor, self.generation = processor, generation

    def prepare(self, model) -> None:
        """Called once before each validation's images: for what a faster way has to make ready."""

    def __call__(self, model, pixel_values: Tensor) -> list[str]:
        return generate_captions(model, self.processor, pixel_values, self.generation, do_sample=False)

    def finish(self) -> None:
        """Called after them."""


# --------------------------------------------------------------------------------------------------------------
# from Python


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
        ids = torch.cat([_make_prefix(self.model, len(tokens)), said], dim=1)  # (B, Q+1+N); no image but in the prefix
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


def load_captioner(folder: str | Path, seed: int = 42) -> ImageCaptioner:
    """The fine-tuned model in a folder that main.py wrote, on the GPU if there is one.

    Raises UserError when there is none in it, or when it can't be loaded.
    """
    return ImageCaptioner(*load_finetuned(Path(folder), pick_device()), seed)


def read_image(image: str | Path | Image | np.ndarray) -> Image:
    """An image as upright 8-bit RGB. Raises UserError when it can't be read."""
    return open_image(Path(image)) if isinstance(image, str | Path) else normalize_image(image)


def name_image(image, place: int) -> str:
    return Path(image).name if isinstance(image, str | Path) else str(place)
