"""What main.py wrote about its run, run.json, which adapter lies beside it, and what a folder is that has none."""

import re
from pathlib import Path

from captioner.runtime.errors import UserError, get_or_none
from captioner.runtime.files import hash_file, read_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def checkpoint_folder(output: Path) -> Path:
    """Where the checkpoints of an unfinished run are."""
    return output / "checkpoints"


def read_run(folder: Path) -> dict:
    """What main.py wrote about its run: settings, data, versions. Its settings name the base model at least."""
    path, remedy = folder / "run.json", "train again with python main.py"
    if not path.exists():
        raise explain_adapter(folder)
    run = read_json(path, remedy)
    config = run.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise UserError(f"{path}: can't be read (its config names no base model); {remedy}")
    return run


def hash_adapter(folder: Path) -> str | None:
    """SHA-256 of the weights in an adapter's folder, by which it is known again; None where they can't be read."""
    return get_or_none(hash_file, folder / ADAPTER_WEIGHTS)


def explain_adapter(folder: Path) -> UserError:
    """Why `folder` can't be evaluated, which lacks run.json, split.csv or both, and what helps."""
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return UserError(
            f"{folder}: no such folder; if that is its name on the hub, fetch it with hf download {folder} --local-dir "
            "FOLDER first, and give that folder with --adapter"
        )
    if not (folder / "adapter_config.json").is_file():
        if not folder.exists():
            return UserError(
                f"{folder}: no such folder; train one with python main.py --output {folder} "
                "(the demo's: python main.py --demo)"
            )
        if checkpoint_folder(folder).exists():
            return UserError(f"{folder}: its run is unfinished; go on with it by the command that began it")
        return UserError(f"{folder}: no fine-tuned model in it; name the folder that main.py wrote, or train one")
    if not (folder / "run.json").is_file():
        return UserError(
            f"{folder}: an adapter that main.py did not write: run.json, which names its base model and settings, is "
            "missing; caption with plain peft, and score the captions with eval.py --predictions FILE"
        )
    return UserError(
        f"{folder}: has no split.csv, which --push-to-hub does not upload: caption images with --images FOLDER, or "
        "give the folder that main.py wrote"
    )
