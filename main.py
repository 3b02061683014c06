"""Fine-tune BLIP-2 with QLoRA on BDD100K captions.

    python main.py                                                  # Kaggle data, BLIP-2 from the hub, one GPU
    python main.py --demo                                           # drawn scenes, small model, CPU
    python main.py --labels LABELS.json --images FOLDER --model FOLDER
    python main.py --captions CAPTIONS.csv --images FOLDER          # your own captions

Labels become captions, captions and images a train, a validation and a test split with no ride in two of them;
LoRA is trained on the NF4 model with the Hugging Face Trainer; the adapter with the best validation loss is saved
with its processor, generation settings, configuration and split, for eval.py or plain peft.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where the package is, which PYTHONSAFEPATH leaves out

from captioner.runtime.cli import run_script, start_imports
from config import TrainConfig, parse_args

if __name__ == "__main__":
    config = parse_args(TrainConfig)  # before the heavy imports, so that --help answers at once
    start_imports()

import dataclasses
import importlib.util
import time
from collections.abc import Callable

import torch
from transformers import set_seed

from captioner.blip2.batches import get_reader, make_datasets
from captioner.blip2.generation import make_generation_config
from captioner.blip2.loading import check_model, load_model, load_processor, pick_device
from captioner.blip2.lora import add_lora
from captioner.data.splits import prepare_splits
from captioner.publishing.publish import publish
from captioner.runtime.files import lock_folder
from captioner.runtime.machine import describe_machine
from captioner.runtime.processes import ask_main
from captioner.training.check import check_run
from captioner.training.dashboard import make_callbacks
from captioner.training.plain import PlainWay
from captioner.training.run import open_run, save_run
from captioner.training.train import train_lora

SPARE_TOKENS = 16  # that generation may write beyond the longest training caption


def main(config: TrainConfig) -> None:
    if config.check:
        return check_run(config, train, choose_way)
    train(config, choose_way)


def train(config: TrainConfig, choose_way: Callable[..., PlainWay]) -> None:
    with lock_folder(config.run.output, "--output"):
        start, device = time.perf_counter(), pick_device()
        run = open_run(config, device)
        if run is None:  # it has come to its end before
            return publish(config)
        print(describe_machine(config.run.output, run.arguments.dataloader_num_workers))
        set_seed(config.training.seed)  # before LoRA draws its first weights
        model_config = check_model(config.base.model, config.base.load_in_4bit, device, config.base.image_size)
        splits = ask_main(prepare_splits, config, run.folder)
        processor = load_processor(config.base.model, config.base.image_size, model_config)
        way = choose_way(config, model_config, device)
        splits = way.check_images(splits, processor)
        model = load_model(config.base.model, config.base.load_in_4bit, device, config.base.image_size, checked=True)
        splits, features = way.encode_images(model, processor, splits)
        model = add_lora(model, *dataclasses.astuple(config.lora))
        parts = way.make_parts(model)
        model.print_trainable_parameters()
        run.note_inputs(splits, model, parts.way)
        datasets = make_datasets(config, splits, processor, model.config, features)
        generation = make_generation_config(model.config, get_reader(datasets["train"]).longest + SPARE_TOKENS)
        captioner = way.make_captioner(processor, generation, config.run.val_captions)
        trainer = train_lora(run, model, datasets, parts, make_callbacks(run, datasets["val"], captioner))
        way.finish()
        save_run(run, trainer, processor, generation, splits)
        if run.is_main:
            if not config.check:
                print(f"adapter saved to {config.run.output} after {time.perf_counter() - start:.0f} s")
            publish(config)
            if not config.check:
                print(f"next: python eval.py{' --demo' * config.demo} --adapter {config.run.output}")


def choose_way(config: TrainConfig, model_config, device: torch.device) -> PlainWay:
    """The fast way where that folder is there and wanted; it falls back on the plain one where it is not possible."""
    if config.fast.fast == "off" or importlib.util.find_spec("captioner.fast") is None:
        return PlainWay(config)
    from captioner.fast.door import FastWay

    return FastWay(config, model_config, device)


if __name__ == "__main__":
    run_script(main, config)
