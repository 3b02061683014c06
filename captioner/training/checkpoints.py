"""Checkpoints: what they hold, how they prove themselves intact, which are kept, and which one a run goes on from.

While a run is unfinished, `<output>/checkpoints/` holds state.json (see run_state.py) and folders checkpoint-<step>:

    adapter_model.safetensors, adapter_config.json    # LoRA's weights
    optimizer.pt, scheduler.pt, scaler.pt             # AdamW's moments, the learning rate, with fp16 the loss's scale
    rng_state*.pth                                    # the random numbers of each process
    trainer_state.json                                # the step, the losses so far, which checkpoint was the best
    manifest.json                                     # SHA-256 sums of all these, written last: without it none counts
"""

import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals

from captioner.data.parallel import explain_dead_worker
from captioner.runtime.errors import UserError, lacks_memory
from captioner.runtime.files import atomic_write, hash_file, measure_free
from captioner.runtime.processes import gather, share_folder
from captioner.training.fsdp import fit_fsdp, gather_trainable
from captioner.training.stopping import Pace

MANIFEST = "manifest.json"
UNREADABLE = (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError)  # what damaged files lead to


# --------------------------------------------------------------------------------------------------------------
# writing


class SealedTrainer(Trainer):
    """Trainer that seals its checkpoints, keeps those that are needed, and stops once `pace` says so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            fit_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        self.pace: Pace | None = None
        self.results: dict = {}  # what train() measured, once it has come to its end

    def train(self, resume_from_checkpoint: str | None = None):
        self.check_disk()  # an epoch before the first checkpoint is due
        folder = resume_from_checkpoint and Path(resume_from_checkpoint)
        with share_folder(folder) if folder else nullcontext() as here:
            return super().train(resume_from_checkpoint=here and str(here))

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        self.check_disk()
        with explain_checkpoint(checkpoint):
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:  # in all processes: Trainer asks the disk, which may be another machine's
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(checkpoint)
                remove_old_checkpoints(folder)
        if self.pace is not None:
            self.pace.after_save()

    def check_disk(self) -> None:
        """Raise UserError where there is no room for a checkpoint."""
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        copies = 4 if self.is_fsdp_enabled else 3  # weights and two moments in fp32; FSDP writes weights twice
        check_disk(Path(self.args.output_dir), 4 * copies * trainable + 2**22)

    def save_model(self, output_dir=None, _internal_call=False):
        """With FSDP, Trainer would gather the frozen weights too."""
        if self.is_fsdp_enabled:
            self._save(output_dir or self.args.output_dir, state_dict=gather_trainable(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir):
        """Of all processes, written by the first: machines may have no folder in common."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            states = gather(lambda: {path.name: path.read_bytes() for path in Path(folder).iterdir()})
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            for name, content in dict(item for state in states for item in state.items()).items():
                (Path(output_dir) / name).write_bytes(content)

    def _load_best_model(self):
        self.accelerator.wait_for_everyone()
        best = Path(self.args.output_dir, Path(self.state.best_model_checkpoint).name)  # the run may have been moved
        with share_folder(best) as here:
            self.state.best_model_checkpoint = str(here)
            super()._load_best_model()
        self.state.best_model_checkpoint = str(best)


@contextmanager
def explain_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Turn what goes wrong when a checkpoint is written into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):  # it is not the disk's fault
            raise
        free = measure_free(checkpoint.parent)  # which torch's own message does not tell
        told = "" if free is None else f"; {free / 1e6:,.0f} MB are free"
        raise explain_dead_worker(error) or UserError(
            f"{checkpoint.parent}: the checkpoint of step {step_of(checkpoint)} can't be written ({error}"
            f"{told}); the ones before are kept: see to the disk, then go on with --resume"
        ) from None


def check_disk(folder: Path, need: int) -> None:
    """Raise UserError unless the `need` bytes of a checkpoint are free where `folder` is."""
    free = measure_free(folder)
    if free is not None and free < need:
        raise UserError(
            f"{folder}: {free / 1e6:,.0f} MB free, a checkpoint needs {need / 1e6:,.0f} MB; the checkpoints before are "
            "kept: free some space, then go on with --resume"
        )


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the sums of all its files: from now on it is intact, or known not to be."""
    sums = {file.name: hash_file(file) for file in sorted(checkpoint.iterdir()) if file.is_file()}
    with atomic_write(checkpoint / MANIFEST) as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def remove_old_checkpoints(folder: Path) -> None:
    """Keep the newest, the one before it to fall back to, and the best that each of the two names."""
    checkpoints, kept = list_checkpoints(folder), set()
    for checkpoint in [checkpoint for checkpoint in checkpoints if (checkpoint / MANIFEST).exists()][:2]:
        with suppress(*UNREADABLE):  # not intact: nothing to fall back to
            kept |= {checkpoint.name, name_best(checkpoint) or checkpoint.name}
    for checkpoint in checkpoints:
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------
# reading


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, intact or not."""
    found = (path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint's name tells."""
    return int(checkpoint.name.split("-")[1])


def read_step(checkpoint: Path) -> tuple[int, int]:
    """(optimiser steps done, optimiser steps of the whole run) of a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["global_step"], state["max_steps"]


def name_best(checkpoint: Path) -> str | None:
    """The name of the checkpoint that was the best so far; None before the first validation. Raises UNREADABLE."""
    best = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
    if best is not None and not Path(best).name:
        raise ValueError(f"best_model_checkpoint {best!r}")
    return best and Path(best).name


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or with the best one before it that it names; None for an intact one."""
    try:
        sums = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in sums.items():
            if hash_file(checkpoint / name) != expected:
                return f"{name} has changed"
        read_step(checkpoint)
        best = name_best(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing: it was not written to its end"
    except UNREADABLE as error:
        return f"not readable ({error})"
    if best is not None and best != checkpoint.name:
        damage = find_damage(checkpoint.with_name(best))
        return damage and f"it needs {best}, and there {damage}"
    return None


def find_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint. Damaged newer ones are deleted, which is printed: they will be written anew."""
    for checkpoint in list_checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        print(f"{checkpoint} is damaged ({damage}): deleted, an earlier one is used")
        shutil.rmtree(checkpoint)
    return None


def check_pickles(checkpoint: Path) -> None:
    """Raise UserError unless what is pickled in a checkpoint holds tensors and numbers alone; nothing of it is run."""
    remedy = "is not opened; if the checkpoint is your own, start anew with --overwrite"
    for name in ("adapter_model.bin", "pytorch_model.bin"):
        if (checkpoint / name).exists():
            raise UserError(f"{checkpoint / name}: a pickle, which this program never writes, {remedy}")
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth"), *checkpoint.glob("*.bin")]):
        if path.name == "training_args.bin":  # nothing reads it
            continue
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: holds other things than tensors ({reason}) and {remedy}") from None
