"""Training to its end, whatever comes in between: a checkpoint to go on from, a full GPU, a signal."""

import gc
import math
import multiprocessing
import shlex
import shutil
import signal
import sys
from functools import partial

import torch
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback, TrainerState

from captioner.blip2.batches import get_reader
from captioner.data.parallel import LOADER_ERRORS, explain_dead_worker
from captioner.data.run_record import checkpoint_folder
from captioner.runtime.errors import UserError
from captioner.runtime.processes import ask_main, gather
from captioner.training.checkpoints import check_pickles, find_checkpoint, read_step
from captioner.training.micro_batch import find_micro_batch, list_micro_batches
from captioner.training.plain import Parts
from captioner.training.provenance import drop_parts
from captioner.training.run import Run
from captioner.training.run_state import write_state
from captioner.training.stopping import Pace, Stopped
from captioner.training.trainer import CaptionTrainer, RowCollator
from captioner.training.training_arguments import set_micro_batch, split_batch


def train_lora(
    run: Run, model, datasets: DatasetDict, parts: Parts, callbacks: list[TrainerCallback]
) -> CaptionTrainer:
    """Train to the end, from the newest intact checkpoint on if there is one. Returns the Trainer.

    When the GPU's memory does not suffice, the micro-batch is halved and the effective batch kept.
    """
    arguments, features = run.arguments, get_reader(datasets["train"]).features
    arguments.per_device_eval_batch_size = run.config.training.per_device_eval_batch_size or parts.eval_batch
    if features is not None:
        arguments.dataloader_num_workers = 0  # nothing left to decode
    if run.before is None:  # checkpoints of a run that does not go on
        ask_main(partial(shutil.rmtree, ignore_errors=True), checkpoint_folder(run.config.run.output))
    choose_micro_batch(run, model, datasets["train"], parts)
    build = partial(
        parts.trainer_class,
        model=model,
        args=arguments,
        train_dataset=datasets["train"],
        eval_dataset=datasets["val"],
        data_collator=RowCollator(parts.collator),
        callbacks=callbacks,
        length_window=run.config.training.length_window,
    )
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    start = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    try:
        while (trainer := try_to_train(run, build)) is None:
            for name, weight in weights.items():
                weight.data.copy_(start[name])
        return trainer
    finally:  # also when it was stopped, and in processes that have nothing to save
        end_workers()


def choose_micro_batch(run: Run, model, dataset: Dataset, parts: Parts) -> None:
    """The frames of a forward pass: as before, as the user says, or the most that fit in each process."""
    step, share = run.config.training.train_batch_size, split_batch(run.config, run.arguments.world_size)
    if run.state["micro_batch"] is None:
        fitting = gather(find_micro_batch, model, dataset, share, parts.collator, parts.compute_loss)
        run.state["micro_batch"] = min(fitting)
    micro = run.state["micro_batch"]
    devices = run.arguments.world_size
    shared = f", {share} on each of {devices} devices" if devices > 1 else ""
    print(f"an optimiser step takes {step} frames{shared}, {micro} at a time")


def try_to_train(run: Run, build: partial) -> CaptionTrainer | None:
    """The Trainer when it has trained to the end; None when the GPU's memory did not suffice, and less is to be tried.

    Exits the process when training was stopped, with its state saved.
    """
    state, arguments, folder = run.state, run.arguments, checkpoint_folder(run.config.run.output)
    ask_main(write_state, folder, state)
    checkpoint = ask_main(find_checkpoint, folder)
    done, steps = ask_main(read_step, checkpoint) if checkpoint else (0, None)
    set_micro_batch(arguments, state["micro_batch"], run.config.training.train_batch_size)
    trainer = build()
    if checkpoint:
        ask_main(check_pickles, checkpoint)
        print(f"goes on after step {done:,} of {steps:,}, from {checkpoint}")
    if done and done == steps:  # only the saving was left to do
        trainer.state = ask_main(TrainerState.load_from_json, str(checkpoint / "trainer_state.json"))
        trainer._load_best_model()
        trainer.results = {"epoch": trainer.state.epoch}
        return trainer
    batches = math.ceil(len(trainer.train_dataset) / (state["micro_batch"] * arguments.world_size))
    steps_per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    try:
        with Pace(run.config.run.save_minutes, steps_per_epoch, arguments.world_size) as trainer.pace:
            trainer.add_callback(trainer.pace)
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.results = drop_parts(output.metrics, done)
            return trainer
    except Stopped:
        flags = [flag for flag in sys.argv[1:] if flag not in ("--resume", "--overwrite")]
        command = shlex.join(["python", "main.py", *flags, "--resume"])
        print(f"saved after step {trainer.state.global_step:,} of {trainer.state.max_steps:,}; go on with\n{command}")
        sys.exit(128 + trainer.pace.signal if trainer.pace.signal else 0)
    except LOADER_ERRORS as error:
        if not isinstance(error, torch.OutOfMemoryError):
            raise (explain_dead_worker(error) or error) from None
        reason = str(error).splitlines()[0]
    take_less(run, reason)
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return None


def take_less(run: Run, reason: str) -> None:
    """Halve the micro-batch. Raises UserError, with the reason why there is too little memory, when it can't be."""
    state, arguments, step = run.state, run.arguments, run.config.training.train_batch_size
    smaller = [size for size in list_micro_batches(state["micro_batch"]) if size <= state["micro_batch"] // 2]
    if not smaller or arguments.world_size > 1:
        raise UserError(
            f"out of GPU memory with {state['micro_batch']} frames a forward pass ({reason}); take a smaller "
            "--per-device-train-batch-size or --per-device-eval-batch-size, or --gradient-checkpointing"
        )
    state["micro_batch"] = smaller[0]
    arguments.per_device_eval_batch_size = max(1, arguments.per_device_eval_batch_size // 2)
    print(f"out of GPU memory: from here on {smaller[0]} frames a forward pass, {step} a step")


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
