"""What lies beside an adapter's weights, read for whoever publishes it, without this machine's folders."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from captioner.data.run_record import ADAPTER_WEIGHTS
from captioner.runtime.errors import UserError
from captioner.runtime.files import read_json, split_revision
from captioner.runtime.settings import name_paths
from captioner.scoring.scores import SCHEMA_VERSION
from config import EvalConfig, TrainConfig

ADAPTER = ("adapter_config.json", ADAPTER_WEIGHTS)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PATH_FIELDS = name_paths(TrainConfig) | name_paths(EvalConfig)


def check_adapter(folder: Path) -> None:
    """Raise UserError unless the folder has an adapter that main.py wrote."""
    missing = [name for name in (*ADAPTER, "run.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no fine-tuned model in it ({missing[0]} is missing); name the folder that main.py wrote, or "
            "train one"
        )


def read_scores(folder: Path) -> dict | None:
    """scores.json of the folder; None where there is none, or, with a note, one of another version."""
    if not (folder / "scores.json").is_file():
        return None
    scores = read_json(folder / "scores.json", "write it again with python eval.py")
    if not isinstance(scores.get("config", {}), dict):
        raise UserError(f"{folder / 'scores.json'}: its config is no JSON object; write it again with python eval.py")
    if scores.get("schema") != SCHEMA_VERSION:
        print(
            f"note: {folder / 'scores.json'}: not read: it is of form {scores.get('schema')}, and this program writes "
            f"{SCHEMA_VERSION}; score anew with python eval.py --adapter {folder}"
        )
        return None
    return scores


def strip_paths(record: dict) -> dict:
    """A JSON object without the folders of this machine: of a path in it only the last part stays."""
    config = record.get("config", {})
    named = {name: take_names(value) for name, value in config.items() if name in PATH_FIELDS}
    return take_names({**record, "config": {**config, **named}} if config else record, only_absolute=True)


def take_names(value, only_absolute: bool = False):
    """JSON types with the last part of each path in place of the path."""
    if isinstance(value, dict):
        return {key: take_names(item, only_absolute) for key, item in value.items()}
    if isinstance(value, list):
        return [take_names(item, only_absolute) for item in value]
    if not isinstance(value, str):
        return value
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return PureWindowsPath(value).name if absolute or not only_absolute else value


def name_base(run: dict) -> str | None:
    """The base model's name on the hub; None for a local folder."""
    source, _ = split_revision(run["config"]["model"])
    return source if HUB_NAME.fullmatch(source) and not Path(source).is_dir() else None
