"""The plain way to train, which is complete. What fast/ has for speed stands in for single methods of it.

way = PlainWay(config)
splits = way.check_images(splits, processor)                        # before the model is fetched
splits, features = way.encode_images(model, processor, splits)
parts = way.make_parts(model)                                       # for CaptionTrainer
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from captioner.blip2.batches import CaptionCollator, Features
from captioner.blip2.generation import GreedyCaptioner
from captioner.data.examples import Example
from captioner.data.image_decoding import open_image
from captioner.data.parallel import read_batches
from captioner.data.splits import leave_out_unreadable, list_split_images
from captioner.runtime.errors import UserError
from captioner.runtime.processes import ask_main
from captioner.training.micro_batch import compute_loss
from captioner.training.trainer import CaptionTrainer
from config import TrainConfig

Splits = dict[str, list[Example]]


class Parts(NamedTuple):
    """What a training run is put together from."""

    trainer_class: Callable[..., CaptionTrainer]
    collator: CaptionCollator
    compute_loss: Callable[..., torch.Tensor]  # of a batch, to find out what fits; see micro_batch.find_micro_batch
    eval_batch: int  # frames a validation pass, unless the user says how many
    way: str = "plain"  # which of the ways it is: the order of frames and the optimiser's state depend on it


class PlainWay:
    """Each image decoded for each batch, transformers' and peft's own modules, generate()."""

    eval_batch = 16

    def __init__(self, config: TrainConfig):
        self.config = config

    def check_images(self, splits: Splits, processor) -> Splits:
        """The splits without images that can't be read. Raises UserError when these are too many."""
        return leave_out_unreadable(splits, ask_main(find_unreadable, list_split_images(splits)))

    def encode_images(self, model, processor, splits: Splits) -> tuple[Splits, Features | None]:
        """The splits, and the ViT's outputs of all images trained on; None: they are not kept."""
        return splits, None

    def make_parts(self, model) -> Parts:
        """What trains the model, which has its LoRA by now."""
        if self.config.demo:
            torch.set_num_threads(1)  # of steps as small as the demo's, several threads mostly wait for each other
        return Parts(CaptionTrainer, CaptionCollator(model.config), compute_loss, self.eval_batch)

    def make_captioner(self, processor, generation, count: int) -> GreedyCaptioner:
        """What captions `count` validation images after each epoch."""
        return GreedyCaptioner(processor, generation)

    def finish(self) -> None:
        """Called when training has come to its end."""


def find_unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """{path: why} of the images that can't be read. All of each is decoded, on all cores."""
    reasons = itertools.chain.from_iterable(read_batches(_explain_unreadable, paths, list))
    checked = tqdm(zip(paths, reasons, strict=True), "checking images", len(paths), unit="image")
    return {path: reason for path, reason in checked if reason is not None}


def _explain_unreadable(path: Path) -> str | None:
    try:
        open_image(path, draft=True)
    except UserError as error:
        return str(error)
    return None
