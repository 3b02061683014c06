"""Examples -> batches with masked labels."""

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Blip2Processor

from captioner.blip2.pixels import load_pixels
from captioner.data.examples import Example, tabulate_examples
from captioner.data.splits import TRAINED_ON
from config import TrainConfig

if TYPE_CHECKING:  # it takes a while to import
    from datasets import Dataset, DatasetDict

IGNORED = -100  # label of a position that carries no loss

Features = Mapping[Path, Tensor]  # the ViT's output (P, D) of each image


def tokenize_captions(captions: Sequence[str], processor: Blip2Processor, max_tokens: int, end: int) -> list[list[int]]:
    """Tokens of each caption and the end token, which comes after any cut so that it is never lost.

    How many are cut is printed. What looks like a special token, as <image>, is text like any other.
    """
    options = {"add_special_tokens": False, "split_special_tokens": True}
    tokens = processor.tokenizer(list(captions), **options)["input_ids"] if captions else []
    if cut := sum(len(ids) > max_tokens for ids in tokens):
        print(f"{cut:,} of {len(tokens):,} captions have more than {max_tokens} tokens and are cut")
    return [[*ids[:max_tokens], end] for ids in tokens]


class RowReader:
    """Gives rows of a table of examples as they are trained on: a transform of `datasets`.

    {"index": places, "pixel_values": (3, S, S) each, "caption_ids": tokens with the end token}. Once there are
    `features`, the ViT's output of each image, these stand in for the pixels. Of several captions of an image, each
    epoch has another, in an order that depends on seed and row alone, until all had their turn.
    """

    def __init__(self):
        self.processor: Blip2Processor | None = None
        self.caption_ids: list[list[list[int]]] = []  # of each row, of each of its captions
        self.features: Features | None = None
        self.seed, self.epoch = 0, 0

    def __deepcopy__(self, memo) -> "RowReader":
        return self  # `datasets` copies a table's transform with its format: this one may hold gigabytes of features

    @property
    def longest(self) -> int:
        """Tokens of the longest caption, its end token included."""
        return max(len(ids) for captions in self.caption_ids for ids in captions)

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        if self.features is not None:
            pixels = [self.features[Path(image)] for image in rows["image"]]
        else:
            pixels = [load_pixels(Path(image), self.processor) for image in rows["image"]]
        drawn = [self.draw_caption(index) for index in rows["index"]]
        return {"index": rows["index"], "pixel_values": pixels, "caption_ids": drawn}

    def draw_caption(self, index: int) -> list[int]:
        """The tokens of the caption that the row has in this epoch."""
        captions = self.caption_ids[index]
        if len(captions) == 1:
            return captions[0]
        turn, place = divmod(self.epoch, len(captions))
        return random.Random(f"{self.seed} {index} {turn}").sample(captions, len(captions))[place]


def make_dataset(
    examples: Sequence[Example], processor: Blip2Processor, max_tokens: int, end: int, seed: int = 0
) -> "Dataset":
    """The examples as a table whose rows a RowReader gives."""
    table, reader = tabulate_examples(examples), RowReader()
    table.set_transform(reader)  # while it is empty: `datasets` computes a hash of all that it holds
    tokens = iter(tokenize_captions([text for e in examples for text in e.captions], processor, max_tokens, end))
    reader.caption_ids = [list(itertools.islice(tokens, len(example.captions))) for example in examples]
    reader.processor, reader.seed = processor, seed
    return table


def get_reader(table: "Dataset") -> RowReader:
    return table.format["format_kwargs"]["transform"]


def list_lengths(table: "Dataset") -> list[int]:
    """Tokens of each row's longest caption, its end token included."""
    return [max(map(len, captions)) for captions in get_reader(table).caption_ids]


def prefix_ids(model_config) -> list[int]:
    """[Q x <image>][bos]: what stands before the text, in training as in generation."""
    image = [model_config.image_token_index] * model_config.num_query_tokens
    return [*image, model_config.text_config.bos_token_id]


class CaptionCollator:
    """Rows of RowReader -> a batch for Blip2ForConditionalGeneration, right-padded to the longest caption."""

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
) -> "DatasetDict":
    """All splits as tables, with the ViT's outputs of all images trained on, if they are kept."""
    from datasets import DatasetDict

    tables, training = DatasetDict(), config.training
    end = model_config.text_config.eos_token_id  # OPT's own end token in BLIP-2, a newline
    for split in TRAINED_ON:
        tables[split] = make_dataset(splits[split], processor, training.max_caption_tokens, end, training.seed)
        get_reader(tables[split]).features = features
    tables["test"] = tabulate_examples(splits["test"])
    return tables
