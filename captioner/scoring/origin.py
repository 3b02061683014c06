"""Where predictions come from: the training run behind them, and what its record and split say. No torch.

origin = find_origin(Path("blip2-finetuned"), Path("logs/run/predictions.jsonl"), names)
training, groups = read_origin_split(origin, names)
"""

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from captioner.data.run_record import read_run
from captioner.data.splits import is_frame_name, read_rows
from captioner.runtime.errors import UserError

# settings of the run that scores.json keeps
KEPT = ("demo", "captions", "class_names", "lanes", "merge_duplicates", "min_box_size", "without_scene")


class Origin(NamedTuple):
    """The training run behind some predictions."""

    record: Path  # the file that tells of it
    config: dict  # its settings
    adapter: Path  # what it saved

    def to_json(self) -> dict:
        """What scores.json keeps of it."""
        kept = {name: self.config[name] for name in KEPT if name in self.config}
        return {"record": str(self.record), "adapter": str(self.adapter), **kept}


def find_origin(adapter: Path, predictions: Path | None = None, names: Collection[str] | None = None) -> Origin | None:
    """The run whose record, run.json or the scores.json of these predictions, lies beside them, or else the adapter's.

    With `names`, of the images that were captioned, the adapter is one that nobody named: it counts only if all of them
    are in its split. None where there is no record, or, with a note, one that can't be read.
    """
    if predictions is not None:
        if (predictions.parent / "run.json").is_file():
            adapter, names = predictions.parent, None
        elif (origin := _read_scores(predictions)) is not None:
            return origin
    record = adapter / "run.json"
    if names is not None and not {name for name, *_ in _read_split(adapter)}.issuperset(names):
        return None
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
        kept = scores["trained_with"]
        if Path(scores["predictions"]).name != predictions.name or not isinstance(kept, dict):
            return None
        return Origin(record, kept, Path(kept.get("adapter") or scores["config"]["adapter"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_origin_split(origin: Origin | None, names: Collection[str]) -> tuple[list[str] | None, dict[str, str]]:
    """The captions that the run was trained on, and {name: group} of its other images.

    (None, {}) unless all images `names` are among those others.
    """
    if origin is None:
        return None, {}
    rows = _read_split(origin.adapter)
    held_out = {name: group for name, split, _, group in rows if split != "train"}
    if not held_out.keys() >= set(names):
        return None, {}
    return [caption for _, split, caption, _ in rows if split == "train"], held_out


def _read_split(adapter: Path) -> list[tuple[str, str, str, str]]:
    """(name, split, caption, group) of each row of the adapter's split.csv; none where it can't be read."""
    try:
        rows = read_rows(adapter / "split.csv")
        return [(row["name"], row["split"], row["raw_caption"], row.get("group") or "") for row in rows]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error):
        return []


def is_bdd100k(origin: Origin | None, names: Collection[str]) -> bool:
    """Whether captions are known to be of BDD100K's labels: named as its frames, by a run on them."""
    other = origin is None or origin.config.get("demo") or origin.config.get("captions")
    return not other and all(map(is_frame_name, names))
