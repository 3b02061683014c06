"""What lets a training run survive: checkpoints that prove themselves intact, and the settings that they belong to.

While a run is unfinished, `<output>/checkpoints/` holds state.json and the Trainer's checkpoint-<step> folders. A
checkpoint counts only once its manifest of SHA-256 sums is written, which comes last.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from captioner.data.captions import Example
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, measure_free
from captioner.runtime.settings import flatten, name_fields
from config import TrainConfig

MANIFEST = "manifest.json"
UNREADABLE = (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError)  # what damaged files lead to
SAID = {"fingerprint": "captions, images or their split"}  # what stands in a message for a name of state.json
GROUPS = ("config", "data", "world", "way")  # of state.json: what two runs are compared by
FORMS = {
    **dict.fromkeys((*GROUPS, "versions"), dict),
    **{"changed_versions": list, "run_dir": str, "wandb_id": str, "micro_batch": int},
}
FREE_OF_CHOICE = name_fields(TrainConfig, "free")


def checkpoint_folder(output: Path) -> Path:
    """Where the checkpoints of an unfinished run are."""
    return output / "checkpoints"


# --------------------------------------------------------------------------------------------------------------
# checkpoints


def seal_checkpoint(checkpoint: Path) -> None:
    """Write the sums of all its files: from now on it is intact, or known not to be."""
    sums = {file.name: hash_file(file) for file in sorted(checkpoint.iterdir()) if file.is_file()}
    with atomic_write(checkpoint / MANIFEST) as file:
        json.dump(sums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_old_checkpoints(folder: Path) -> None:
    """All but the newest, one before it to fall back to, and the best that each of them names."""
    checkpoints, kept = list_checkpoints(folder), set()
    for checkpoint in [checkpoint for checkpoint in checkpoints if (checkpoint / MANIFEST).exists()][:2]:
        with suppress(*UNREADABLE):  # not intact: nothing to fall back to
            kept |= {checkpoint.name, name_best(checkpoint) or checkpoint.name}
    for checkpoint in checkpoints:
        if checkpoint.name not in kept:
            shutil.rmtree(checkpoint, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """From the newest on, intact or not."""
    found = (path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint's name tells."""
    return int(checkpoint.name.split("-")[1])


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
    """The newest intact checkpoint. Damaged newer ones are deleted, which is said; so can be written anew."""
    for checkpoint in list_checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        print(f"{checkpoint} is damaged ({damage}): deleted, an earlier one is used")
        shutil.rmtree(checkpoint)
    return None


def read_step(checkpoint: Path) -> tuple[int, int]:
    """(optimiser steps done, optimiser steps of the whole run) of a checkpoint."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["global_step"], state["max_steps"]


def check_disk(folder: Path, need: int, what: str) -> None:
    """Raise UserError unless `need` bytes are free where `folder` is."""
    free = measure_free(folder)
    if free is not None and free < need:
        raise UserError(
            f"{folder}: {free / 1e6:,.0f} MB free, {what} needs {need / 1e6:,.0f} MB; the checkpoints before are kept: "
            "free some space, then go on with --resume"
        )


# --------------------------------------------------------------------------------------------------------------
# the run that they belong to


def fingerprint_data(splits: dict[str, list[Example]]) -> dict:
    """What the splits hold, as JSON types: frames of each, and a SHA-256 over names, captions and image sizes."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        for e in examples:
            try:
                size = e.image.stat().st_size
            except OSError as error:
                raise UserError(f"{e.image}: can't be read any more ({error.strerror}); see to the folder") from None
            captions = "\0".join(e.captions)
            digest.update(f"{split}\0{e.name}\0{size}\0{captions}\n".encode())
    return {
        "fingerprint": digest.hexdigest(),
        "frames": {split: len(examples) for split, examples in splits.items()},
    }


def write_state(folder: Path, state: dict) -> None:
    with atomic_write(folder / "state.json") as file:
        json.dump(state, file, indent=1)


def read_state(folder: Path) -> dict | None:
    """What write_state wrote there; None when no run is unfinished."""
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError("no JSON object")
        if wrong := [key for key, form in FORMS.items() if not isinstance(state.get(key, form()), form)]:
            raise ValueError(f"{wrong[0]} is {state[wrong[0]]!r:.40}")
        return state
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'state.json'}: not readable ({error}); start anew with --overwrite") from None


def list_changes(before: dict, now: dict) -> list[str]:
    """What differs between two states in settings that change what is learnt, one line each; of `now`'s groups."""
    lines = []
    for group in [group for group in GROUPS if group in now]:
        old, new = before.get(group) or {}, now.get(group) or {}
        if group == "config":  # a program of another time may have had other settings
            defaults = flatten(TrainConfig())
            old = {name: old.get(name, defaults.get(name)) for name in new}
        for name in dict.fromkeys([*old, *new]):
            was, is_now = old.get(name), new.get(name)
            if was != is_now and not (group == "config" and name in FREE_OF_CHOICE):
                flag = f"--{name.replace('_', '-')}" if group == "config" else f"{group} {name}"
                flag += f" ({SAID[name]})" if name in SAID else ""
                lines.append(f"  {flag}: was {was}, is {is_now}")
    return lines


def find_unfinished(output: Path, state: dict, resume: bool, overwrite: bool) -> dict | None:
    """The state of the unfinished run in `output` that is to go on; None when training starts anew.

    Raises UserError when there is one that can't go on with these settings, and for --resume when there is none.
    """
    folder = checkpoint_folder(output)
    if overwrite:
        return None
    before = read_state(folder)
    if before is None:
        if resume:
            raise UserError(f"--resume: no unfinished run in {output}; leave --resume away to train anew")
        return None
    refuse_changes(output, before, state)
    return before


def refuse_changes(output: Path, before: dict, now: dict) -> None:
    """Raise UserError unless the unfinished run in `output`, of state `before`, can go on as `now`."""
    if changes := list_changes(before, now):
        raise UserError(
            f"{output}: holds an unfinished run with other settings:\n" + "\n".join(changes) + "\n"
            "go on with the settings it had, train anew with --overwrite, or name another --output"
        )
