"""A training run in its output folder: opened, or gone on with; saved."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from captioner.data.examples import Example
from captioner.data.run_record import checkpoint_folder, read_run
from captioner.data.splits import find_images_root, write_splits
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, is_inside, name_run, read_json
from captioner.runtime.processes import ask_main, go_on_alone, is_sharded
from captioner.runtime.settings import flatten
from captioner.training.fsdp import check_sharding, gather_trainable
from captioner.training.provenance import describe_run, note_versions
from captioner.training.run_state import find_unfinished, fingerprint_data, list_changes, read_state, refuse_changes
from captioner.training.tracking import choose_wandb_mode
from captioner.training.trainer import CaptionTrainer
from captioner.training.training_arguments import make_arguments, split_batch
from config import TrainConfig, make_default

FINISHED = ".checkpoints-of-a-finished-run"


@dataclass
class Run:
    """A training run: a new one, or one that goes on."""

    config: TrainConfig
    device: torch.device
    arguments: TrainingArguments
    wandb_mode: str
    before: dict | None  # state.json of the run that goes on
    folder: Path  # in logs/
    state: dict  # what state.json is to say

    @property
    def is_main(self) -> bool:
        return self.arguments.process_index == 0

    def note_inputs(self, splits: dict[str, list[Example]], model, way: str) -> None:
        """Note the data, the model and the way of training, "plain" or "fast".

        Raises UserError unless a run that goes on has the data and the way that it had. What the data are the main
        process says, for all: machines may have them at other places.
        """
        self.state["way"] = {"training": way}
        self.state["data"] = ask_main(fingerprint_data, splits)
        if (source := self.folder / "captions.json").is_file():  # of a data set on the hub
            self.state["captions"] = read_json(source, "start anew with --overwrite")
        self.state["images_root"] = str(find_images_root(splits))  # which split.csv is relative to
        self.state["model_commit"] = getattr(model.config, "_commit_hash", None)  # that the hub's name stood for
        if self.before:
            ask_main(refuse_changes, self.config.run.output, self.before, self.state)
        note_versions(self.state, self.before)


def open_run(config: TrainConfig, device: torch.device) -> Run | None:
    """The run in the output folder, where the processes of a launcher join; None if it has come to its end.

    Raises UserError when there is an unfinished run that can't go on with these settings.
    """
    transformers_logging.set_verbosity_error()
    if is_sharded():
        check_sharding(config)
    wandb_mode = choose_wandb_mode(config.run.wandb)
    arguments = make_arguments(config, device)  # which joins the processes
    split_batch(config, arguments.world_size)
    output = config.run.output
    if config.run.resume and ask_main(is_finished, config):
        print(f"the run in {output} is finished, nothing is left to train")
        go_on_alone()
        return None
    state = ask_main(describe_state, config, arguments.world_size)
    before = ask_main(find_unfinished, output, state, config.run.resume, config.run.overwrite)
    folder = ask_main(choose_folder, config.run.run_name, before)
    ask_main(prepare_output, output)
    if before is None and (output / "run.json").is_file():
        print(f"note: {output} has a finished adapter, which this run replaces at its end; --output FOLDER keeps both")
    state["run_dir"] = str(folder)
    state["wandb_id"] = (before or {}).get("wandb_id") or uuid.uuid4().hex[:8]
    state["micro_batch"] = (before or {}).get("micro_batch") or config.training.per_device_train_batch_size
    return Run(config, device, arguments, wandb_mode, before, folder, state)


def choose_folder(run_name: str | None, before: dict | None) -> Path:
    """The folder of a run in logs/: a new one, or that of the run that goes on, if its state names one in logs/."""
    named = Path(before["run_dir"]) if before and before.get("run_dir") else None
    if named and is_inside(named, Path("logs")) and named.resolve() != Path("logs").resolve():
        return named
    return name_run(run_name)


def is_finished(config: TrainConfig) -> bool:
    """Whether a run has come to its end in the output folder.

    Settings that are left at their defaults are taken for its own. Raises UserError when others are not.
    """
    output = config.run.output
    if read_state(checkpoint_folder(output)) or not (output / "run.json").is_file():
        return False
    settings, defaults = describe_state(config, 1)["config"], flatten(make_default(TrainConfig, config.demo))
    given = {name: value for name, value in settings.items() if value != defaults[name]}
    if changes := list_changes({"config": read_run(output)["config"]}, {"config": given}):
        raise UserError(
            f"--resume: the run in {output} is finished, with other settings:\n" + "\n".join(changes) + "\n"
            "leave these out to take its adapter as it is, or train with them into another --output"
        )
    return True


def prepare_output(output: Path) -> None:
    """Raise UserError unless the output folder can be written, before hours of training, and is nobody else's."""
    own = (output / "run.json").exists() or checkpoint_folder(output).exists()
    try:
        foreign = [] if own else [path.name for path in output.glob("[!.]*") if path.is_file()]
        if foreign:
            raise UserError(
                f"--output {output}: holds files that no run has written, {min(foreign)} for one, and a run's would be "
                "put among them, or over them; name a new folder"
            )
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
        for left in (*output.glob(".saving.*"), *output.glob(".*.tmp"), output / FINISHED):  # of a killed process
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: can't be written ({error.strerror}); name another folder") from None


def describe_state(config: TrainConfig, world_size: int) -> dict:
    """What an unfinished run must have in common with the one that goes on with it, beside its data."""
    model = str(Path(config.base.model).resolve()) if Path(config.base.model).is_dir() else config.base.model
    return {"config": {**flatten(config), "model": model}, "world": {"processes": world_size}}


def save_run(run: Run, trainer: CaptionTrainer, processor, generation, splits: dict[str, list[Example]]) -> None:
    """Write the adapter that the Trainer has trained, and what eval.py and plain peft need with it.

    All processes call it; the main one writes.
    """
    weights = gather_trainable(trainer.model) if is_sharded() else None
    if not run.is_main:
        return
    results = {**trainer.results, "best_eval_loss": trainer.state.best_metric}
    if run.device.type == "cuda":
        results["peak_memory_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
    output = run.config.run.output

    def write(folder: Path) -> None:
        trainer.model.save_pretrained(folder, state_dict=weights)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
        processor.save_pretrained(folder)
        generation.save_pretrained(folder)
        write_splits(folder / "split.csv", splits)

    fill_folder(output, write)
    for name in ("scores.json", "README.md"):  # of an adapter that was here before
        (output / name).unlink(missing_ok=True)
    with atomic_write(output / "run.json") as file:  # last: what it stands beside is whole
        json.dump(describe_run(run.state, run.folder.name, run.device, results), file, indent=2)
    remove_checkpoints(output)
    if not run.config.check:
        print(f"best validation loss {trainer.state.best_metric:.4f}; curves in {run.folder / 'dashboard.png'}")


def fill_folder(output: Path, write: Callable[[Path], None]) -> None:
    """Have write(folder) write files under a temporary name, and move them to `output` when all are there."""
    temporary = output / f".saving.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        for file in sorted(temporary.iterdir()):
            os.replace(file, output / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{output}: the adapter can't be saved ({error}); the checkpoints are kept: see to the disk, then go on "
            "with --resume, which has nothing left to train"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_checkpoints(output: Path) -> None:
    """At the end of a run; renamed first, so that what a kill leaves of them is not taken for an unfinished run."""
    if checkpoint_folder(output).exists():
        checkpoint_folder(output).rename(output / FINISHED)
        shutil.rmtree(output / FINISHED, ignore_errors=True)
