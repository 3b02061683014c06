"""The door to what exists for speed alone: main.py asks for FastWay where this folder is there.

Each method falls back on the plain way's where the fast one is not wanted or not possible.
"""

import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from captioner.blip2.captioning import GreedyCaptioner
from captioner.blip2.loading import pick_dtype
from captioner.blip2.vision import start_reading, take_vision_out
from captioner.data import reading
from captioner.data.splits import TRAINED_ON, leave_out_unreadable, list_images
from captioner.fast.captioning import FastGreedyCaptioner
from captioner.fast.speed import has_room_to_unpack, join_weights, unpack_nf4, use_fast_step
from captioner.fast.trainer import speed_up
from captioner.fast.vision_store import (
    compute_outputs,
    find_folder,
    fits_memory,
    has_outputs,
    open_store,
    record_vision,
)
from captioner.runtime.processes import ask_main, find_place, gather
from captioner.training.plain import Parts, PlainWay, Splits
from config import TrainConfig

EVAL_BATCH = 64  # frames a validation pass with all of a GPU's memory


class FastWay(PlainWay):
    """The ViT's outputs kept, passes that are recorded once, captions by a recorded generator."""

    def __init__(self, config: TrainConfig, model_config, device: torch.device):
        super().__init__(config)
        self.model_config, self.device = model_config, device
        self.store = None
        self.images: list[Path] = []  # whose outputs are computed, those that are trained on first
        self.ahead: Iterator | None = None  # what is made of them while the model is loaded
        self.unreadable: dict[Path, str] = {}

    def check_images(self, splits: Splits, processor) -> Splits:
        folder, trained_on = find_folder(self.config, self.device), list_images(splits, TRAINED_ON)
        vision, dtype = self.model_config.vision_config, pick_dtype(self.device)
        limit, cuda = self.config.fast.vision_store_gib, self.device.type == "cuda"
        if not all(gather(fits_memory, vision, dtype, len(trained_on), limit, cuda)):
            return super().check_images(splits, processor)
        test = list_images(splits, ["test"])  # whose outputs eval.py finds in the folder
        if folder is None:
            self.unreadable = ask_main(reading.check_images, test)
        self.images = [*trained_on, *(test if folder is not None and find_place()[0] == 0 else [])]
        if folder is None or not has_outputs(folder):
            how = {"hashes": folder is not None, "pin": cuda}
            self.ahead = start_reading(self.images, processor, dtype, vision.image_size, **how)
        return splits

    def encode_images(self, model, processor, splits: Splits) -> tuple[Splits, torch.Tensor | None]:
        if not self.images:
            return super().encode_images(model, processor, splits)
        vision, settings = take_vision_out(model), model.config.vision_config
        store = open_store(self.config, vision, settings, processor, write=find_place()[0] == 0)
        self.store = store
        speed = self.config.fast
        if speed.cuda_graphs and speed.unpack_nf4 != "off" and use_fast_step(self.config, model, self.device):
            vision = record_vision(vision)
        kept = len(list_images(splits, TRAINED_ON))
        outputs, found = compute_outputs(vision, settings, processor, self.images, store, kept, self.ahead)
        if store is not None:
            print(store.describe())
        self.ahead = None
        del vision
        gc.collect()  # now, not when memory is short
        for unreadable in gather(lambda: found):
            self.unreadable |= unreadable
        print("the frozen ViT's outputs are stored: it is not needed in training")
        return leave_out_unreadable(splits, self.unreadable), outputs

    def make_parts(self, model) -> Parts:
        plain = super().make_parts(model)
        if not use_fast_step(self.config, model, self.device):
            return plain
        unpack, lean = self.config.fast.unpack_nf4, self.config.training.gradient_checkpointing
        if unpack == "on" or (unpack == "auto" and not lean and has_room_to_unpack(model, self.device)):
            print(f"NF4 values of {unpack_nf4(model)} layers are unpacked: more memory, fewer computations")
        join_weights(model)
        return Parts(*speed_up(self.config, model), plain.eval_batch if lean else EVAL_BATCH)

    def make_captioner(self, processor, generation, count: int) -> GreedyCaptioner:
        return FastGreedyCaptioner(processor, generation, count)

    def finish(self) -> None:
        if self.store is not None:
            self.store.close()

    def close(self) -> None:
        if self.store is not None:
            self.store.close(finish=False)
