"""The door to what exists for speed alone: main.py asks for FastWay where this folder is there.

Each method falls back on the plain way's where the fast one is not wanted or not possible.
"""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from captioner.blip2.batches import Features
from captioner.blip2.generation import GreedyCaptioner
from captioner.blip2.loading import pick_dtype
from captioner.blip2.pixels import start_reading
from captioner.blip2.vit import take_vision_out
from captioner.data.splits import leave_out_unreadable, list_split_images
from captioner.fast.building import build_kernels
from captioner.fast.captioning import FastGreedyCaptioner
from captioner.fast.features import FeatureFile, choose_place, has_rows, keep_features, measure_row
from captioner.fast.speed import find_obstacle, has_room_to_unpack, join_weights, unpack_nf4
from captioner.fast.trainer import speed_up
from captioner.runtime.processes import ask_main, find_place
from captioner.training.plain import Parts, PlainWay, Splits
from captioner.training.training_arguments import EVAL_BATCH
from config import TrainConfig


class FastWay(PlainWay):
    """The ViT's outputs kept, passes that are recorded once, captions by a recorded generator."""

    def __init__(self, config: TrainConfig, model_config, device: torch.device):
        super().__init__(config)
        self.model_config, self.device = model_config, device
        self.place: Path | None = None  # where the ViT's outputs are kept
        self.reading: Iterator | None = None  # the images that they are made of, decoded while the model is loaded

    def check_images(self, splits: Splits, processor) -> Splits:
        vision, dtype, images = self.model_config.vision_config, pick_dtype(self.device), list_split_images(splits)
        self.place = ask_main(choose_place, self.config, len(images) * measure_row(vision, dtype), self.device)
        if self.place is None:
            return super().check_images(splits, processor)
        if not has_rows(self.place):
            index, processes = find_place()
            self.reading = start_reading(images[index::processes], processor, dtype, vision.image_size)
        return splits

    def encode_images(self, model, processor, splits: Splits) -> tuple[Splits, Features | None]:
        if self.place is None:
            return super().encode_images(model, processor, splits)
        vision = take_vision_out(model)
        file = FeatureFile(self.place, vision, model.config.vision_config, processor)
        if has_room_to_unpack(vision, self.device):
            unpack_nf4(vision)  # which the file is not known by, and which changes no digit
        images = list_split_images(splits)  # eval.py finds those of the test split
        with ThreadPoolExecutor(1) as pool:
            if not find_obstacle(self.config, model, self.device):  # what fails there fails again where it is needed
                pool.submit(build_kernels, model, self.config.lora.lora_rank)
            features, unreadable = keep_features(file, self.config.fast.features_disk_gib, images, self.reading)
        self.reading = None
        del vision, file
        gc.collect()  # the ViT: now, not when memory is short
        return leave_out_unreadable(splits, unreadable), features

    def make_parts(self, model) -> Parts:
        plain = super().make_parts(model)
        if reason := find_obstacle(self.config, model, self.device):
            print(f"training takes the plain way: the fast one is not made for {reason}")
            return plain
        lean = self.config.training.gradient_checkpointing
        if not lean and has_room_to_unpack(model, self.device) and (count := unpack_nf4(model)):
            print(f"NF4 values of {count} layers are unpacked: more memory, fewer computations")
        join_weights(model)
        return Parts(*speed_up(self.config, model), plain.eval_batch if lean else EVAL_BATCH, "fast")

    def make_captioner(self, processor, generation, count: int) -> GreedyCaptioner:
        return FastGreedyCaptioner(processor, generation, count)
