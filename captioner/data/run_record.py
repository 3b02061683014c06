"""What main.py wrote about its run: run.json."""

from pathlib import Path

from captioner.runtime.errors import UserError
from captioner.runtime.files import read_json


def read_run(folder: Path) -> dict:
    """What main.py wrote about its run: settings, data, versions. Its settings name the base model at least."""
    path, remedy = folder / "run.json", "train again with python main.py"
    run = read_json(path, remedy)
    config = run.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise UserError(f"{path}: can't be read (its config names no base model); {remedy}")
    return run
