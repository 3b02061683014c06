"""Where predictions come from: the training run behind them, and what its record and split say. No torch.

origin = find_origin(Path("blip2-finetuned"), Path("logs/run/predictions.jsonl"))
training = read_training_captions(origin, names)
"""

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from captioner.data.run_record import read_run
from captioner.runtime.errors import UserError
from captioner.scoring.predictions import is_frame_name

KEPT = (
    "demo",
    "captions",
    "class_names",
    "lanes",
    "merge_duplicates",
    "min_box_size",
    "without_scene",
)  # settings, in scores.json


class Origin(NamedTuple):
    """The training run behind some predictions."""

    record: Path  # the file that tells of it
    config: dict  # its settings
    adapter: Path  # what it saved

    def to_json(self) -> dict:
        """What scores.json keeps of it."""
        return {"record": str(self.record), **{name: self.config[name] for name in KEPT if name in self.config}}


def find_origin(adapter: Path, predictions: Path | None = None) -> Origin | None:
    """The run whose record, run.json or the scores.json of these predictions, lies beside them, or else the adapter's.

    None where there is no record, or, with a note, one that can't be read.
    """
    if predictions is not None:
        if (predictions.parent / "run.json").is_file():
            adapter = predictions.parent
        elif (origin := _read_scores(predictions)) is not None:
            return origin
    record = adapter / "run.json"
    try:
        return Origin(record, read_run(adapter)["config"], adapter) if record.is_file() else None
    except UserError as error:
        print(f"note: {error}")
        return None


def _read_scores(predictions: Path) -> Origin | None:
    """What eval.py, which wrote the predictions, wrote of the run into the scores.json beside them."""
    record = predictions.with_name("scores.json")
    try:
        scores = json.loads(record.read_text(encoding="utf-8"))
        if Path(scores["predictions"]).name != predictions.name or not isinstance(scores["trained_with"], dict):
            return None
        return Origin(record, scores["trained_with"], Path(scores["config"]["adapter"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_training_captions(origin: Origin | None, names: Collection[str]) -> list[str] | None:
    """The captions that the run was trained on; None unless all images `names` are of its other splits."""
    if origin is None:
        return None
    try:
        with open(origin.adapter / "split.csv", encoding="utf-8", newline="") as file:
            rows = [(row["name"], row["split"], row["raw_caption"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        return None
    held_out = {name for name, split, _ in rows if split != "train"}
    return [caption for _, split, caption in rows if split == "train"] if held_out.issuperset(names) else None


def is_bdd100k(origin: Origin | None, names: Collection[str]) -> bool:
    """Whether captions are known to be of BDD100K's labels: named as its frames, by a run on them."""
    other = origin is None or origin.config.get("demo") or origin.config.get("captions")
    return not other and all(map(is_frame_name, names))
