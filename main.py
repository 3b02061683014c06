"""Fine-tune BLIP-2 with QLoRA on BDD100K captions.

    python main.py                                                  # Kaggle data, BLIP-2 from the hub, one GPU
    python main.py --demo                                           # drawn scenes, small model, CPU
    python main.py --labels LABELS.json --images FOLDER --model FOLDER

Labels become captions, captions and pictures a train, a validation and a test split with no ride in two of them;
LoRA is trained on the NF4 model with the Hugging Face Trainer; the adapter with the best validation loss is saved
with its processor, generation settings, configuration and split, for eval.py or plain peft.
"""

from config import TrainConfig, parse_args, run_script

if __name__ == "__main__":
    config = parse_args(TrainConfig)  # before the heavy imports, so that --help answers at once

import csv
import importlib.metadata
import json
import math
import netrc
import os
import platform
import shutil
import subprocess
import time
from datetime import datetime
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from config import UserError, config_to_json, name_run
from data import (
    DEMO_IMAGES,
    SPLIT_COLUMNS,
    Example,
    atomic_write,
    caption_labels,
    find_labels,
    index_images,
    match_images,
    read_captions,
    ride_of,
    split_by_ride,
)
from model import (
    CaptionCollator,
    CaptionDataset,
    add_lora,
    check_model,
    end_token,
    load_model,
    load_processor,
    make_generation_config,
    pick_device,
    pick_dtype,
    store_vision,
)

SPARE_TOKENS = 16  # that generation may write beyond the longest training caption
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # whose versions a run records


# --------------------------------------------------------------------------------------------------------------
# data


def prepare_splits(config: TrainConfig, run_dir: Path) -> dict[str, list[Example]]:
    """Labels -> captions CSV -> examples with pictures -> {split: examples}."""
    labels = find_labels(config)
    images = index_images(find_images(config))
    shares = {"train": config.train_share, "val": config.val_share}
    held_out: list[Example] = []
    if config.held_out == "val":
        held_out = caption_held_out(config, images, run_dir)
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    else:
        shares["test"] = 1 - sum(shares.values())
    caption_labels(config, labels, config.captions, run_dir)
    examples = match_images(read_captions(config.captions), images)
    rides = {ride_of(example.name) for example in held_out}
    by_name = {example.name: example for example in examples if ride_of(example.name) not in rides}
    if len(by_name) < len(examples):
        print(f"{len(examples) - len(by_name):,} frames are of rides that are held out, and are left out")
    names = split_by_ride(list(by_name)[: config.limit], shares, config.seed)
    splits = {split: [by_name[name] for name in names[split]] for split in names}
    splits.setdefault("test", held_out)
    print(", ".join(f"{len(examples):,} {split}" for split, examples in splits.items()) + " frames, split by ride")
    return splits


def caption_held_out(config: TrainConfig, images: dict[str, Path], run_dir: Path) -> list[Example]:
    """The examples of Kaggle's val labels, all of them the test split."""
    from acquisition import fetch_labels  # here: kagglehub takes a while to import

    captions = config.captions.with_stem(config.captions.stem + "_val")
    caption_labels(config, fetch_labels(config.kaggle_dataset, "val"), captions, run_dir / "held_out")
    return match_images(read_captions(captions), images)


def find_images(config: TrainConfig) -> Path:
    if config.images is not None:
        return config.images
    if config.labels:
        raise UserError("--labels without --images: give the folder with the pictures too")
    if config.demo:
        return DEMO_IMAGES
    from acquisition import fetch_images  # here: kagglehub takes a while to import

    return fetch_images(config.kaggle_dataset)


# --------------------------------------------------------------------------------------------------------------
# training


def make_arguments(config: TrainConfig, run_name: str, device: torch.device) -> TrainingArguments:
    dtype = pick_dtype(device)
    return TrainingArguments(
        output_dir=str(config.output),
        run_name=run_name,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of all steps
        lr_scheduler_type="linear",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must show
        prediction_loss_only=True,
        remove_unused_columns=False,  # the dataset's columns become model inputs in the collator
        label_names=["labels"],
        dataloader_num_workers=config.dataloader_workers,
        dataloader_persistent_workers=config.dataloader_workers > 0,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        report_to="wandb" if choose_wandb_mode(config.wandb) != "disabled" else "none",
    )


def choose_wandb_mode(wandb: str) -> str:
    """The mode that wandb is to run in; it is never left to ask for a login."""
    if wandb == "auto":
        wandb = os.environ.get("WANDB_MODE") or ("online" if is_logged_in_to_wandb() else "disabled")
    if wandb == "online" and not is_logged_in_to_wandb():
        raise UserError("--wandb online: not logged in; run wandb login, set WANDB_API_KEY, or use --wandb offline")
    os.environ["WANDB_MODE"] = wandb
    os.environ.setdefault("WANDB_PROJECT", "blip2-bdd100k")
    return wandb


def is_logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def train_lora(trainer: Trainer, config: TrainConfig):
    """Train, the two failures that settings can mend as UserError. Returns the Trainer's output."""
    try:
        trained = trainer.train()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--per-device-train-batch-size {config.per_device_train_batch_size}: out of GPU memory "
            f"({str(error).splitlines()[0]}); take a smaller one with more --gradient-accumulation-steps, a smaller "
            "--per-device-eval-batch-size, or --gradient-checkpointing"
        ) from None
    best = trainer.state.best_metric
    if best is None or not math.isfinite(best):
        raise UserError(
            f"the validation loss is {best}: nothing is saved; lower --learning-rate, or use a GPU with bf16 (fp16 "
            "overflows in the Q-Former)"
        )
    return trained


class RunLog(TrainerCallback):
    """Writes what the Trainer logs to `run_dir`: each record at once as a JSON line, the curves as a picture."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "metrics.jsonl").unlink(missing_ok=True)  # of an earlier run of that name
        self.records = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        record = {"step": state.global_step, **logs}
        self.records.append(record)
        with open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        plot_curves(self.records, self.run_dir / "curves.png")


def plot_curves(records: list[dict], path: Path) -> None:
    """Losses, learning rate and gradient norm over the optimiser steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "loss (nats a token)": {"loss": "training", "eval_loss": "validation"},
        "learning rate": {"learning_rate": None},
        "gradient norm": {"grad_norm": None},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for key, label in curves.items():
            points = [(record["step"], record[key]) for record in records if key in record]
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None)
        axis.set(title=title, xlabel="optimiser step")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------------
# saving


def prepare_output(output: Path) -> None:
    """Raise UserError unless the output folder can be written, before hours of training."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output {output}: can't be written ({error.strerror}); name another folder") from None


def save_finetuned(output: Path, model, processor, generation, splits, run: dict) -> None:
    """Write everything that eval.py and plain peft need, under temporary names first; run.json comes last."""
    temporary = output / f".saving.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
    processor.save_pretrained(temporary)
    generation.save_pretrained(temporary)
    write_splits(temporary / "split.csv", splits)
    for file in sorted(temporary.iterdir()):
        os.replace(file, output / file.name)
    temporary.rmdir()
    with atomic_write(output / "run.json") as file:
        json.dump(run, file, indent=2)


def write_splits(path: Path, splits: dict[str, list[Example]]) -> None:
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(SPLIT_COLUMNS)
        for split, examples in splits.items():
            writer.writerows((e.name, split, e.image.resolve(), e.caption) for e in examples)


def describe_run(config: TrainConfig, run_name: str, device: torch.device, results: dict) -> dict:
    """What is needed to tell later how an adapter came about."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    return {
        "run_name": run_name,
        "config": {**config_to_json(config), "model": model},
        "results": results,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "git_commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def main(config: TrainConfig) -> None:
    start = time.perf_counter()
    transformers_logging.set_verbosity_error()
    run_dir = name_run(config)
    device = pick_device()
    arguments = make_arguments(config, run_dir.name, device)
    if "LOCAL_RANK" not in os.environ and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without a launcher Trainer would multiply the batch by the GPUs, and use one
    set_seed(config.seed)  # before LoRA draws its first weights
    check_model(config.model, config.load_in_4bit, device)  # before hours of download

    splits = prepare_splits(config, run_dir)
    prepare_output(config.output)
    processor = load_processor(config.model)
    model = load_model(config.model, config.load_in_4bit, device)
    end = end_token(model.config)
    datasets = {
        split: CaptionDataset(splits[split], processor, config.max_caption_tokens, end) for split in ("train", "val")
    }
    longest = max(map(len, datasets["train"].caption_ids))
    generation = make_generation_config(model.config, longest + SPARE_TOKENS)
    if store_vision(model, list(datasets.values()), config.vision_store_gib):
        arguments.dataloader_num_workers, arguments.dataloader_persistent_workers = 0, False  # nothing left to decode
        print("the frozen ViT's outputs are stored: it is not needed in training")
    model = add_lora(model, config.lora_target, config.lora_rank, config.lora_alpha, config.lora_dropout)
    model.print_trainable_parameters()

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets["train"],
        eval_dataset=datasets["val"],
        data_collator=CaptionCollator(model.config),
        callbacks=[RunLog(run_dir)],
    )
    trained = train_lora(trainer, config)
    results = {**trained.metrics, "best_eval_loss": trainer.state.best_metric}
    if device.type == "cuda":
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    save_finetuned(
        config.output, model, processor, generation, splits, describe_run(config, run_dir.name, device, results)
    )
    print(f"best validation loss {trainer.state.best_metric:.4f}; curves in {run_dir / 'curves.png'}")
    print(f"adapter saved to {config.output} after {time.perf_counter() - start:.0f} s")
    print("next: python eval.py" + (" --demo" if config.demo else f" --adapter {config.output}"))


if __name__ == "__main__":
    run_script(main, config)
