"""Predictions files: captions by image name, from any model, with the references that they are scored against.

JSON lines, {"name": ..., "prediction": ..., "references": [...]} each, or a JSON array of such rows, or CSV with the
columns name, prediction and any number of columns reference, reference2 and so on. A "ride" says which images are
frames of one ride, if their names don't. COCO's results are read too. References may also come from a file of their
own: another predictions file, or captions in any form that training takes.
"""

import csv
import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from captioner.data.image_files import clean_name
from captioner.data.splits import is_frame_name, ride_of
from captioner.data.written_values import NO_TEXTS, is_list, parse_literal
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write

WANTED = 'must be {"name": TEXT, "prediction": TEXT, "references": [TEXT, ...]}'
REFERENCE = re.compile(r"references?_?\d*")  # fields of a row that are references
HEAD = 1 << 16  # characters in which a CSV's titles are
REFERENCE_KEY = re.compile(rf'"{REFERENCE.pattern}"\s*:')  # in JSON


class Prediction(NamedTuple):
    """A generated caption and what it is scored against."""

    name: str
    prediction: str
    references: list[str]
    floors: Mapping[str, str] = MappingProxyType({})  # captions of the same image to beat, by their origin
    ride: str | None = None  # which it is a frame of; None: as its name says


class References(dict[str, list[str]]):
    """References by name, and the names that stand behind the numbers of a COCO file."""

    def __init__(self):
        self.names: dict[int, str] = {}


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write JSON lines."""
    with atomic_write(path) as file:
        file.writelines(map(format_prediction, predictions))


def format_prediction(prediction: Prediction) -> str:
    row = {name: value for name, value in prediction._asdict().items() if value or name not in ("floors", "ride")}
    return json.dumps(row) + "\n"  # in ASCII: whatever is in the text, the file is valid UTF-8


def find_ride(prediction: Prediction) -> str:
    """The ride that a prediction's image is a frame of; where nothing tells it, one of its own."""
    name = prediction.name
    return prediction.ride or (ride_of(name) if is_frame_name(name) else name)


def add_rides(predictions: Iterable[Prediction], groups: Mapping[str, str]) -> list[Prediction]:
    """The predictions, with the rides that `groups`, by name, tell of images whose names and rows tell none.

    A group that is named as its image is one of its own, and tells nothing of rides.
    """
    told = []
    for row in predictions:
        group = groups.get(row.name, "")
        own = ("", row.name.lower(), Path(row.name).stem.lower())
        if not row.ride and not is_frame_name(row.name) and group.lower() not in own:
            row = row._replace(ride=group)
        told.append(row)
    return told


def read_predictions(path: Path, references: References | None = None) -> tuple[list[Prediction], Counter]:
    """The predictions of a file that have a reference, and how many were left out, by reason.

    `references` by name, if given, replace those in the file. Raises UserError with the line for one that is malformed
    or whose name came before, and when nothing is left.
    """
    rows: dict[str, Prediction] = {}
    for place, row in _unpack_rows(_read_rows(path, _read_text(path))):
        if isinstance(row.name, int):
            row = row._replace(name=_name_image(row.name, references or References(), place))
        if row.name in rows:
            raise UserError(f"{place}: {row.name[:80]} came before; each image is scored once")
        rows[row.name] = row
    if not rows:
        raise UserError(f"{path}: no predictions in it")
    if all(row.prediction.lstrip().startswith("[") and parse_literal(row.prediction) for row in rows.values()):
        raise UserError(f"{path}: its predictions are lists written as text; write the one text of each without [ ]")
    left_out: Counter[str] = Counter()
    if references is not None:
        known = {name: name if name in references else clean_name(name) for name in rows}
        left_out["references without a prediction"] = len(references.keys() - known.values())
        rows = {name: row._replace(references=references.get(known[name], [])) for name, row in rows.items()}
    scored = [row for row in rows.values() if row.references]
    left_out["predictions without a reference"] = len(rows) - len(scored)
    if not scored:
        name = next(iter(rows))
        raise UserError(
            f"{path}: none of its {len(rows)} predictions has a reference, {name[:80]} for one; give captions, or "
            "predictions that have references, under the same names with --references"
        )
    return scored, +left_out


def read_references(path: Path) -> References:
    """{name: references} of a predictions file that has them, or of captions in any form that read_captions takes."""
    references, text = References(), "" if path.is_dir() else _read_text(path)
    if _has_references(path, text):
        for place, row in _unpack_rows(_read_rows(path, text)):
            if row.name in references:
                raise UserError(f"{place}: {str(row.name)[:80]} came before")
            if row.references:
                references[row.name] = row.references
    else:
        for name, caption in _read_captions(path, text):
            references.setdefault(name, []).append(caption)
        references.names |= _read_coco_names(text)
    if not references:
        raise UserError(f"{path}: no references in it")
    return references


def _has_references(path: Path, text: str) -> bool:
    """Whether a file is one of predictions that have references."""
    if path.suffix.lower() == ".csv":
        titles = next(csv.reader([io.StringIO(text, newline="").readline(HEAD)]), [])
        return "prediction" in titles and any(title.startswith("reference") for title in titles)
    return REFERENCE_KEY.search(text) is not None


def _read_captions(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """(name of its image, caption) of each caption of a file with that text."""
    from captioner.data.caption_files import read_captions  # here: pandas takes a while to import

    try:
        with tempfile.TemporaryDirectory() as folder:
            if not (path.is_dir() or path.is_file()):  # a pipe, which gives its text once
                path = Path(folder, "references.json" if text.lstrip().startswith(("{", "[")) else "references.csv")
                path.write_text(text, encoding="utf-8")
            table = read_captions(path)
    except UserError as error:  # which speaks of main.py's flag
        raise UserError(str(error).replace("--captions", "--references")) from None
    yield from zip(table["name"], table["caption"], strict=True)


def _read_coco_names(text: str) -> dict[int, str]:
    """{id: file name} of the images of COCO's captions; none of other files."""
    document = _parse_document(text) if '"annotations"' in text else None
    images = document.get("images", []) if isinstance(document, dict) else []
    return {image["id"]: image["file_name"] for image in images if "id" in image and "file_name" in image}


def _unpack_rows(rows: Iterable[tuple[str, Prediction]]) -> list[tuple[str, Prediction]]:
    """The rows (place, row), and of their references those that are captions.

    Lists of captions that pandas or a JSON writer has turned into text are unpacked. Raises UserError where most rows
    have another value that was written as text, or one has where most have lists: it would be scored as if it were a
    caption. A few such texts among captions are captions, in brackets or quotes, or stand for a missing one.
    """
    rows = list(rows)
    lists, odd = 0, []
    for place, row in rows:
        for text in row.references:
            value = parse_literal(text)
            lists += is_list(value)
            if value is not None and not is_list(value):
                odd.append((place, text))
    if odd and 2 * max(lists, len(odd)) > len(rows):
        place, text = odd[0]
        raise UserError(
            f"{place}: the references column holds {text[:80]!r}, a value written as text, no caption: give each "
            "reference as it is, in a column of its own (reference, reference2 ...), or write JSON lines with "
            '"references": [TEXT, ...]'
        )
    if lists or odd:
        rows = [(place, row._replace(references=_unpack_references(row.references))) for place, row in rows]
    return rows


def _unpack_references(texts: Sequence[str]) -> list[str]:
    """The captions in `texts`, some of which may be lists written as text, and some words for a missing one."""
    references = []
    for text in texts:
        value = parse_literal(text)
        if is_list(value):
            references += filter(str.strip, value)
        elif text.strip().lower() not in NO_TEXTS:
            references.append(text)
    return references


def _read_text(path: Path) -> str:
    """All of a file at once, which may be a pipe."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); predictions and references are read in UTF-8") from None


def _read_rows(path: Path, text: str) -> Iterator[tuple[str, Prediction]]:
    """(place, row) of each row of a predictions file, whose text is given."""
    if path.suffix.lower() == ".csv":
        yield from _read_csv(io.StringIO(text, newline=""), path)
        return
    document = _parse_document(text)
    if isinstance(document, dict) and "annotations" in document:
        raise UserError(f"{path}: COCO's captions, no predictions; give them with --references")
    if isinstance(document, list):
        for number, row in enumerate(document, start=1):
            place = f"{path}, row {number}"
            yield place, _make_prediction(row, place)
    elif document is not None:
        yield str(path), _make_prediction(document, f"{path}, line 1")
    else:
        yield from _read_json_lines(re.split("\r\n?|\n", text), path)


def _parse_document(text: str) -> dict | list | None:
    """A file that is one JSON object or an array of objects; None for others, such as JSON lines."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    rows = document if isinstance(document, list) else [document]
    return document if any(isinstance(row, dict) for row in rows) else None


def _read_json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Prediction]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{place}: {WANTED} ({str(error)[:200]})") from None
            yield place, _make_prediction(row, place)


def _make_prediction(row, place: str) -> Prediction:
    """A row of JSON types, of this project or of COCO's results, whose name is a number. Raises UserError."""
    try:
        from_coco = "name" not in row and {"image_id", "caption"} <= row.keys()
        if from_coco:
            row = {"name": row["image_id"], "prediction": row["caption"]}
        references = [row[key] for key in row if REFERENCE.fullmatch(key)]
        prediction = Prediction(row["name"], row["prediction"], [], row.get("floors", {}), row.get("ride"))
        floors = [*prediction.floors.values()]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: {WANTED} ({str(error)[:200]})") from None
    for value in references:
        prediction.references.extend(value if isinstance(value, list) else [value])
    texts = [prediction.prediction, *prediction.references, *floors, prediction.ride or ""]
    named = type(prediction.name) is str or (from_coco and type(prediction.name) is int)
    if not named or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{place}: {WANTED}")
    return prediction._replace(references=list(filter(str.strip, prediction.references)))


def _name_image(number: int, references: References, place: str) -> str:
    """The name of an image that COCO's results give by number."""
    name = references.names.get(number, str(number))
    if not references.names and name not in references:
        raise UserError(
            f"{place}: COCO's results, image_id {number}: give the captions file that has the file_name of each "
            'image_id with --references, or write lines of {"name": FILE NAME, "prediction": TEXT}'
        )
    return name


def _read_csv(file: Iterable[str], path: Path) -> Iterator[tuple[str, Prediction]]:
    reader = csv.DictReader(file)
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise UserError(f"{path}: two of its columns have the same title; number them: reference, reference2 ...")
        if not {"name", "prediction"} <= set(columns):
            raise UserError(
                f"{path}: no column name or no column prediction: its columns must be name, prediction, reference ..., "
                f"not {', '.join(columns)[:200]}; captions are given with --references"
            )
        if unknown := [c for c in columns if c.startswith("reference") and not REFERENCE.fullmatch(c)]:
            raise UserError(
                f"{path}: column {unknown[0][:80]}: columns of references are reference, reference2 ...; rename it"
            )
        reference_columns = [column for column in columns if REFERENCE.fullmatch(column) or column == "raw_caption"]
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: must have {len(columns)} fields")
            references = list(filter(str.strip, (row[column] for column in reference_columns)))
            yield place, Prediction(row["name"], row["prediction"], references, ride=row.get("ride"))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: can't be read ({error})") from None
