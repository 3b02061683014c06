"""The Trainer's settings: learning-rate schedule, precision, what is saved and when, and frames a forward pass."""

import os

import torch
from transformers import TrainingArguments

from captioner.blip2.loading import pick_dtype
from captioner.data.run_record import checkpoint_folder
from captioner.runtime.errors import UserError
from captioner.runtime.machine import pick_workers
from captioner.runtime.processes import WAITING
from config import TrainConfig

EVAL_BATCH = 64  # frames a validation pass at most, unless the user says how many


def make_arguments(config: TrainConfig, device: torch.device) -> TrainingArguments:
    """The Trainer's settings, but for the frames a pass (see set_micro_batch and train_lora)."""
    dtype, training = pick_dtype(device), config.training
    batch = max(
        training.per_device_train_batch_size or training.train_batch_size,
        training.per_device_eval_batch_size or EVAL_BATCH,
    )
    arguments = TrainingArguments(
        output_dir=str(checkpoint_folder(config.run.output)),
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
        **(checkpoint_activations() if training.gradient_checkpointing else {}),
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=training.warmup_ratio,  # below 1 it is a share of all steps
        lr_scheduler_type="linear",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        seed=training.seed,
        eval_strategy="epoch",
        save_strategy="epoch",  # and within epochs, see stopping.Pace
        save_total_limit=None,  # see checkpoints.remove_old_checkpoints
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=config.run.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN must show
        prediction_loss_only=True,
        remove_unused_columns=False,  # the dataset's columns become model inputs in the collator
        label_names=["labels"],
        dataloader_num_workers=pick_workers(training.dataloader_workers, batch),
        dataloader_persistent_workers=False,  # they would take their seed once, and a run that goes on again
        dataloader_pin_memory=device.type == "cuda",
        accelerator_config={"non_blocking": device.type == "cuda"},
        ddp_find_unused_parameters=False,
        ddp_timeout=WAITING,
        average_tokens_across_devices=True,  # a loss is divided by the tokens of the step in all processes
        report_to="none",  # see dashboard.RunLog
        disable_tqdm=False,  # else without a bar where transformers' own messages are switched off
    )
    if "LOCAL_RANK" not in os.environ and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without a launcher Trainer would multiply the batch by the GPUs, and use one
    return arguments


def checkpoint_activations() -> dict:
    """TrainingArguments that recompute activations, under the name that the installed transformers has for them."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def set_micro_batch(arguments: TrainingArguments, micro_batch: int, batch_size: int) -> None:
    """Make `batch_size` frames an optimiser step of passes of `micro_batch` frames on each device."""
    arguments.per_device_train_batch_size = micro_batch
    arguments.gradient_accumulation_steps = batch_size // (micro_batch * arguments.world_size)


def split_batch(config: TrainConfig, world_size: int) -> int:
    """Frames that each device takes of an optimiser step."""
    share, rest = divmod(config.training.train_batch_size, world_size)
    micro = config.training.per_device_train_batch_size
    if rest or (micro and share % micro):
        raise UserError(
            f"--train-batch-size {config.training.train_batch_size}: must be a multiple of the {world_size} processes"
            + (f" times --per-device-train-batch-size {micro}" if micro else "")
        )
    return share
