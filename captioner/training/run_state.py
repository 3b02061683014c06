"""state.json: what an unfinished run is, so that it goes on with the settings and the data that it began with.

It lies beside the run's checkpoints.
"""

import hashlib
import json
from pathlib import Path

from captioner.data.examples import Example
from captioner.data.run_record import checkpoint_folder
from captioner.runtime.errors import UserError
from captioner.runtime.files import write_json
from captioner.runtime.settings import flatten, name_fields
from config import TrainConfig

SAID = {"fingerprint": "captions, images or their split"}  # what stands in a message for a name of state.json
GROUPS = ("config", "data", "world", "way")  # of state.json: what two runs are compared by
FORMS = {
    **dict.fromkeys((*GROUPS, "versions"), dict),
    **{"changed_versions": list, "run_dir": str, "wandb_id": str, "micro_batch": int},
}
FREE_OF_CHOICE = name_fields(TrainConfig, "free")


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
    write_json(folder / "state.json", state)


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
