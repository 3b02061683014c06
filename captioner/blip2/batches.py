"""Examples -> batches with masked labels."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Blip2Processor

from captioner.data.captions import Example
from captioner.data.images import open_image
from captioner.data.splits import TRAINED_ON
from config import TrainConfig

IGNORED = -100  # label of a position that carries no loss

Features = Mapping[Path, Tensor]  # the ViT's output (P, D) of each image


def load_pixels(image: Path, processor: Blip2Processor, blank: bool = False) -> Tensor:
    """(3, S, S) pixel values of an image file, or of a black image of its size.

    The same numbers as the processor gives, which copies the image several times on its way.
    """
    opened, prepare = open_image(image), processor.image_processor
    if blank:
        opened = Image.new("RGB", opened.size)
    if not (prepare.do_resize and prepare.do_rescale and prepare.do_normalize and "height" in prepare.size):
        return prepare(opened, return_tensors="pt")["pixel_values"][0]
    small = np.asarray(opened.resize((prepare.size["width"], prepare.size["height"]), prepare.resample))  # (S, S, 3)
    values = list_values(prepare)
    return torch.from_numpy(np.stack([values[channel].take(small[:, :, channel]) for channel in range(3)]))


@functools.cache
def list_values(image_processor) -> np.ndarray:
    """(3, 256) pixel values that the processor makes of each level of each channel."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)  # an image of 256 x 1
    made = image_processor(Image.fromarray(levels), do_resize=False, return_tensors="np")["pixel_values"][
        0
    ]  # (3, 1, 256)
    return np.ascontiguousarray(made[:, 0], dtype=np.float32)


def end_token(model_config) -> int:
    """The token that ends a caption: OPT's own end token in BLIP-2, a newline."""
    return model_config.text_config.eos_token_id


def tokenize_captions(captions: Sequence[str], processor: Blip2Processor, max_tokens: int, end: int) -> list[list[int]]:
    """Tokens of each caption and the end token, which comes after any cut so that it is never lost."""
    tokens = processor.tokenizer(list(captions), add_special_tokens=False)["input_ids"] if captions else []
    return [[*ids[:max_tokens], end] for ids in tokens]


class CaptionDataset(Dataset):
    """Examples as {"index": place, "pixel_values": (3, S, S), "caption_ids": list of tokens with the end token}.

    Where `features` holds the ViT's output (P, D) of each image, it stands in for the pixels (see vision.py).
    """

    def __init__(
        self,
        examples: Sequence[Example],
        processor: Blip2Processor,
        max_tokens: int,
        end: int,
        features: Features | None = None,
    ):
        self.examples, self.processor = examples, processor
        self.caption_ids = tokenize_captions([e.caption for e in examples], processor, max_tokens, end)
        self.features = features

    @property
    def longest(self) -> int:
        """Tokens of the longest caption, its end token included."""
        return max(map(len, self.caption_ids))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        image = self.examples[index].image
        pixels = load_pixels(image, self.processor) if self.features is None else self.features[image]
        return {"index": index, "pixel_values": pixels, "caption_ids": self.caption_ids[index]}


def prefix_ids(model_config) -> list[int]:
    """[Q x <image>][bos]: what stands before the text, in training as in generation."""
    image = [model_config.image_token_index] * model_config.num_query_tokens
    return [*image, model_config.text_config.bos_token_id]


class CaptionCollator:
    """Rows of CaptionDataset -> a batch for Blip2ForConditionalGeneration, right-padded to the longest caption."""

    def __init__(self, model_config):
        self.prefix = prefix_ids(model_config)
        self.pad = model_config.text_config.pad_token_id

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        longest = max(len(row["caption_ids"]) for row in rows)
        input_ids, labels, mask = [], [], []
        for row in rows:
            caption = row["caption_ids"]
            padding = longest - len(caption)
            input_ids.append(self.prefix + caption + [self.pad] * padding)
            labels.append([IGNORED] * len(self.prefix) + caption + [IGNORED] * padding)
            mask.append([1] * (len(self.prefix) + len(caption)) + [0] * padding)
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),  # (B, 3, S, S)
            "input_ids": torch.tensor(input_ids),  # (B, Q+1+T)
            "attention_mask": torch.tensor(mask),  # (B, Q+1+T)
            "labels": torch.tensor(labels),  # (B, Q+1+T)
        }


def make_datasets(
    config: TrainConfig, splits: dict[str, list[Example]], processor, model_config, features: Features | None
) -> dict[str, CaptionDataset]:
    """What is trained on, with the ViT's outputs of all its images, if they are kept."""
    how = config.training.max_caption_tokens, end_token(model_config), features
    return {split: CaptionDataset(splits[split], processor, *how) for split in TRAINED_ON}
