"""Predictions files: captions by picture name, from any model, with the references that they are scored against.

JSON lines, {"name": ..., "prediction": ..., "references": [...]} each, or CSV with the columns name, prediction and any
number of columns whose title begins with "reference". References may also come from a file of their own.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from captioner.data.captions import CSV_HEADER
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write

LISTED = 3  # names that a message gives as examples
WANTED = 'must be {"name": TEXT, "prediction": TEXT, "references": [TEXT, ...]}'


class Prediction(NamedTuple):
    """A generated caption and what it is scored against."""

    name: str
    prediction: str
    references: list[str]
    floors: Mapping[str, str] = MappingProxyType({})  # captions of the same picture to beat, by their origin


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write JSON lines."""
    with atomic_write(path) as file:
        for prediction in predictions:
            file.write(format_prediction(prediction))


def format_prediction(prediction: Prediction) -> str:
    row = prediction._asdict()
    if not prediction.floors:
        del row["floors"]
    return json.dumps(row) + "\n"  # in ASCII: whatever is in the text, the file is valid UTF-8


def read_predictions(path: Path, references: dict[str, list[str]] | None = None) -> tuple[list[Prediction], Counter]:
    """The predictions of a file that have a reference, and how many were left out, by reason.

    `references` by name, if given, replace those in the file. Raises UserError with the line for one that is malformed
    or whose name came before, and when nothing is left.
    """
    read = _read_csv if path.suffix.lower() == ".csv" else _read_json_lines
    rows: dict[str, Prediction] = {}
    for place, row in _open(path, read):
        if row.prediction is None:
            raise UserError(f"{path}: has no column prediction; a captions CSV is given with --references")
        if row.name in rows:
            raise UserError(f"{place}: {row.name[:80]} came before; each picture is scored once")
        rows[row.name] = row
    if not rows:
        raise UserError(f"{path}: no predictions in it")
    left_out: Counter[str] = Counter()
    if references is not None:
        left_out["references without a prediction"] = len(references.keys() - rows.keys())
        rows = {name: row._replace(references=references.get(name, [])) for name, row in rows.items()}
    scored = [row for row in rows.values() if row.references]
    left_out["predictions without a reference"] = len(rows) - len(scored)
    if not scored:
        name = next(iter(rows))
        raise UserError(
            f"{path}: none of its {len(rows)} predictions has a reference, {name[:80]} for one; give a captions CSV or "
            "a predictions file that has them, under the same names, with --references"
        )
    return scored, +left_out


def read_references(path: Path) -> dict[str, list[str]]:
    """{name: references} of a captions CSV (name,raw_caption) or a predictions file."""
    references: dict[str, list[str]] = {}
    read = _read_csv if path.suffix.lower() == ".csv" else _read_json_lines
    for place, row in _open(path, read):
        if row.references:
            if row.name in references:
                raise UserError(f"{place}: {row.name[:80]} came before")
            references[row.name] = row.references
    if not references:
        raise UserError(f"{path}: no references in it")
    return references


def _open(path: Path, read: Callable[[Iterable[str], Path], Iterator]) -> Iterator[tuple[str, Prediction]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from read(file, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read ({error}); it takes JSON lines or a CSV, in UTF-8") from None


def _read_json_lines(file: Iterable[str], path: Path) -> Iterator[tuple[str, Prediction]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, parse_prediction(line, place)


def parse_prediction(line: str, place: str) -> Prediction:
    """One JSON line. Raises UserError with the place."""
    try:
        row = json.loads(line)
        prediction = Prediction(row["name"], row["prediction"], row.get("references", []), row.get("floors", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{place}: {WANTED} ({str(error)[:200]})") from None
    if not isinstance(prediction.references, list) or not isinstance(prediction.floors, dict):
        raise UserError(f"{place}: {WANTED}")
    texts = [*prediction[:2], *prediction.references, *prediction.floors.values()]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: {WANTED}")
    return prediction


def _read_csv(file: Iterable[str], path: Path) -> Iterator[tuple[str, Prediction]]:
    reader = csv.DictReader(file)
    columns = reader.fieldnames or []
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: two of its columns have the same title; number them: reference, reference2 ...")
    if "name" not in columns or not {"prediction", CSV_HEADER[1]} & set(columns):
        raise UserError(f"{path}: its columns must be name, prediction, reference ..., not {', '.join(columns)[:200]}")
    reference_columns = [column for column in columns if column.startswith("reference") or column == CSV_HEADER[1]]
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{place}: must have {len(columns)} fields")
        references = [row[column] for column in reference_columns if row[column].strip()]
        yield place, Prediction(row["name"], row.get("prediction"), references)


def name_examples(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:LISTED]) + ", ..." * (len(names) > LISTED)
