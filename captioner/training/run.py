"""A training run: trained to its end, described, saved."""

import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments

from captioner.data.reading import LOADER_ERRORS, explain_dead_worker
from captioner.data.run_record import read_run
from captioner.data.splits import find_images_root, write_splits
from captioner.runtime.errors import UserError, get_or_none
from captioner.runtime.files import atomic_write
from captioner.runtime.processes import ask_main
from captioner.training.arguments import set_micro_batch
from captioner.training.checkpoints import (
    checkpoint_folder,
    find_checkpoint,
    list_changes,
    read_state,
    read_step,
    write_state,
)
from captioner.training.guards import check_pickles
from captioner.training.micro_batch import list_micro_batches
from captioner.training.trainer import CaptionTrainer, Pace, Stopped
from config import TrainConfig, config_to_json

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # whose versions a run records
GIT_SECONDS = 10  # for git to answer
FINISHED = ".checkpoints-of-a-finished-run"


def train_lora(
    config: TrainConfig, arguments: TrainingArguments, state: dict, model, make_trainer: Callable[[int], CaptionTrainer]
) -> tuple[CaptionTrainer, dict]:
    """Train to the end, from the newest intact checkpoint on if there is one. Returns the Trainer and its metrics.

    make_trainer(done) gives a Trainer of the model with these arguments, `done` steps after the first. When the GPU's
    memory does not suffice, the micro-batch is halved and the effective batch kept.
    """
    folder = checkpoint_folder(config.output)
    start = {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    while True:
        ask_main(write_state, folder, state)
        checkpoint = ask_main(find_checkpoint, folder)
        if checkpoint:
            check_pickles(checkpoint)
        done, steps = read_step(checkpoint) if checkpoint else (0, None)
        set_micro_batch(arguments, state["micro_batch"], config.train_batch_size)
        trainer = make_trainer(done)
        if checkpoint:
            print(f"goes on after step {done:,} of {steps:,}, from {checkpoint}")
        if done and done == steps:  # only the saving was left to do
            trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            trainer._load_best_model()
            return trainer, {}
        batches = math.ceil(len(trainer.train_dataset) / (state["micro_batch"] * arguments.world_size))
        steps_per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
        try:
            with Pace(config.save_minutes, steps_per_epoch, arguments.world_size) as trainer.pace:
                trainer.add_callback(trainer.pace)
                return trainer, trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        except Stopped:
            command = " ".join(["python main.py", *(flag for flag in sys.argv[1:] if flag != "--resume"), "--resume"])
            print(
                f"saved after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; go on with\n{command}"
            )
            sys.exit(128 + trainer.pace.signal if trainer.pace.signal else 0)
        except LOADER_ERRORS as error:
            if not isinstance(error, torch.OutOfMemoryError):
                raise (explain_dead_worker(error) or error) from None
            reason = str(error).splitlines()[0]
        smaller = [size for size in list_micro_batches(state["micro_batch"]) if size <= state["micro_batch"] // 2]
        if not smaller or arguments.world_size > 1:
            raise UserError(
                f"out of GPU memory with {state['micro_batch']} frames a forward pass ({reason}); take a smaller "
                "--per-device-train-batch-size or --per-device-eval-batch-size, or --gradient-checkpointing"
            )
        state["micro_batch"] = smaller[0]
        arguments.per_device_eval_batch_size = max(1, arguments.per_device_eval_batch_size // 2)
        print(f"out of GPU memory: from here on {smaller[0]} frames a forward pass, {config.train_batch_size} a step")
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        for name, weight in model.named_parameters():
            if name in start:
                weight.data.copy_(start[name])


def prepare_output(output: Path) -> None:
    """Raise UserError unless the output folder can be written, before hours of training."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
        for left in (*output.glob(".saving.*"), *output.glob(".*.tmp"), output / FINISHED):  # of a killed process
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: can't be written ({error.strerror}); name another folder") from None


def save_finetuned(output: Path, model, weights, processor, generation, splits, run: dict) -> None:
    """Write everything that eval.py and plain peft need, under temporary names first; run.json comes last.

    `weights` are the adapter's, where the model has but a part of them; None: the model's own.
    """
    temporary = output / f".saving.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary, state_dict=weights)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
        processor.save_pretrained(temporary)
        generation.save_pretrained(temporary)
        write_splits(temporary / "split.csv", splits)
        for file in sorted(temporary.iterdir()):
            os.replace(file, output / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{output}: the adapter can't be saved ({error}); the checkpoints are kept: see to the disk, then go on "
            "with --resume, which has nothing left to train"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name in ("scores.json", "README.md"):  # of an adapter that was here before
        (output / name).unlink(missing_ok=True)
    with atomic_write(output / "run.json") as file:
        json.dump(run | {"images_root": str(find_images_root(splits))}, file, indent=2)


def describe_state(config: TrainConfig, world_size: int) -> dict:
    """What an unfinished run must have in common with the one that goes on with it, beside its data."""
    model = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    return {
        "config": {**config_to_json(config), "model": model},
        "world": {"processes": world_size},
    }


def describe_run(state: dict, run_name: str, device: torch.device, results: dict) -> dict:
    """What is needed to tell later how an adapter came about; None for what can't be found out."""
    return {
        "run_name": run_name,
        **state,
        "results": results,
        "versions": {package: get_or_none(importlib.metadata.version, package) for package in PACKAGES},
        "python": get_or_none(platform.python_version),
        "git_commit": get_or_none(read_commit),
        "device": get_or_none(name_device, device),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def read_commit() -> str | None:
    """The commit of this program, if it lies in a git repository."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": GIT_SECONDS}
    return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, **options).strip() or None


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type


def is_finished(config: TrainConfig) -> bool:
    """Whether a run with these settings has come to its end in the output folder."""
    if read_state(checkpoint_folder(config.output)) or not (config.output / "run.json").is_file():
        return False
    return not list_changes({"config": read_run(config.output)["config"]}, describe_state(config, 1) | {"world": {}})


def remove_checkpoints(output: Path) -> None:
    """At the end of a run; renamed first, so that what a kill leaves of them is not taken for an unfinished run."""
    if checkpoint_folder(output).exists():
        checkpoint_folder(output).rename(output / FINISHED)
        shutil.rmtree(output / FINISHED, ignore_errors=True)


def end_workers() -> None:
    """Kill processes that decode ahead for steps that don't come: the interpreter would wait for them."""
    child_ends = getattr(signal, "SIGCHLD", None)  # None: Windows, which has no such signal
    if child_ends is not None:
        before = signal.signal(child_ends, signal.SIG_DFL)  # torch would report them as crashed
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    if child_ends is not None:
        signal.signal(child_ends, before or signal.SIG_DFL)  # None: not one that Python set
