"""Captions files as people have them -> one table.

table = read_captions(Path("captions.csv"))      # columns name, caption, split, group; one row a caption
"""

import csv
import functools
import io
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from captioner.bdd100k.file_kinds import name_kind
from captioner.data.image_files import LEADS_OUT, clean_name
from captioner.data.written_values import flatten, unpack_texts
from captioner.runtime.errors import UserError, escape_controls

COLUMNS = ("name", "caption", "split", "group")  # of the table
IMAGE_COLUMNS = ("name", "file_name", "image", "image_id")  # usual titles; the first that is there counts
TEXT_COLUMNS = ("raw_caption", "caption", "text")
SPLIT_COLUMN = "split"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
METADATA = ("metadata.csv", "metadata.jsonl")  # of an imagefolder, beside the images
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # as of an emoji that was cut: no UTF-8
MAX_CHARACTERS = 10_000  # of a caption: about as many as OPT's 2,048 positions hold
HEAD = 1 << 16  # bytes in which labels show that they are labels
LISTED = 3  # lines that a message gives as examples
TOKEN_FILE = re.compile(r"[^\t\n]+#\d+\t")  # Flickr's 1000268201.jpg#0<tab>A child.
LABELS = re.compile(rb'"(labels|frames|box2d|poly2d|timeofday)"\s*:')  # of BDD100K
CAPTIONS = re.compile(rb'"(raw_caption|caption|text)"\s*:')
WANTED = (
    "a CSV, a tab-separated file or JSON lines with an image and a text column, COCO's captions, Flickr's token file, "
    "or a folder of images with metadata.csv or metadata.jsonl"
)


def read_captions(path: Path, group_column: str | None = None) -> pd.DataFrame:
    """A table with a row for each caption of a captions file or an imagefolder.

    Columns: name (of the image, with its folder below that of the images), caption (with single spaces), split (train,
    val, test, or "" where the file has no such column) and group ("" without `group_column`). The index is the line, or
    for COCO the number of the annotation, as its name says. Rows without a caption or of an unknown split are left out,
    which is printed. Raises UserError, with the file, the line, what was found and what is wanted.
    """
    if path.is_dir():
        return _read_image_folder(path, group_column)
    table = _read_file(path)
    columns = {"name": _take_column(path, table, IMAGE_COLUMNS), "caption": _take_column(path, table, TEXT_COLUMNS)}
    if SPLIT_COLUMN in table:
        columns["split"] = table[SPLIT_COLUMN]
    if group_column:
        columns["group"] = _take_column(path, table, [group_column.strip().lower()])
    return check_captions(path, pd.DataFrame(columns))


def _take_column(path: Path, table: pd.DataFrame, titles: Sequence[str]) -> pd.Series:
    """The first column that is there, whose gaps the others fill: rows of JSON may differ in their keys."""
    columns = [table[title] for title in titles if title in table]
    if not columns:
        wanted = titles[0] if len(titles) == 1 else f"one of {', '.join(titles)}"
        found = ", ".join(map(str, table.columns))
        raise UserError(f"{path}: has no column {wanted}; its columns are {escape_controls(found)[:200]}")
    return functools.reduce(lambda first, other: first.where(first.notna(), other), columns)


# --------------------------------------------------------------------------------------------------------------
# files


def _read_file(path: Path) -> pd.DataFrame:
    """All columns of a captions file, texts as str, with the lines as index; of COCO with the file names."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        _refuse_labels(path, head)
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such captions file; --captions takes {WANTED}") from None
    except (OSError, UnicodeDecodeError) as error:
        kind = _name_kind(head) if isinstance(error, UnicodeDecodeError) else None
        reason = f"{kind}; {WANTED} is wanted, in UTF-8" if kind else f"{error}; captions are read in UTF-8"
        raise UserError(f"{path}: can't be read as captions: {reason}") from None
    if text[:HEAD].lstrip().startswith(("{", "[")):
        return _read_json(path, text)
    if TOKEN_FILE.match(text):
        rows = [line.partition("\t")[::2] for line in io.StringIO(text, newline=None)]
        table = pd.DataFrame(rows, pd.RangeIndex(1, len(rows) + 1, name="line"), ["name", "caption"], dtype=str)
        table["name"] = table["name"].str.replace(r"#\d+\s*$", "", regex=True)
        return table
    return _read_table(path, text)


def _name_kind(head: bytes) -> str | None:
    """What a file is that is no captions file; None if that is not known."""
    kind = name_kind(head)
    return None if kind is None or "CSV" in kind[0] else kind[0]


def _refuse_labels(path: Path, head: bytes) -> None:
    is_json = head.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (b"{", b"[")
    if is_json and LABELS.search(head) and not CAPTIONS.search(head):
        raise UserError(
            f"{path}: these are BDD100K's labels, no captions; give them with --labels in place of --captions"
        )


def _read_table(path: Path, text: str) -> pd.DataFrame:
    """A table with titles in its first line, whose separator is the one that finds an image and a text column there."""
    separator, titles = _find_separator(path, text)
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise UserError(f"{path}, line 1: two columns are titled {twice[0]!r}; give each a title of its own")
    try:
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):  # of rows that are too long
            table = pd.read_csv(
                io.StringIO(text), sep=separator, header=0, names=titles, index_col=False, dtype=str,
                keep_default_na=False, skip_blank_lines=False,
            ).fillna("")  # fmt: skip
    except (pd.errors.ParserError, pd.errors.ParserWarning):
        raise UserError(_explain_row(path, text, separator)) from None
    inner = sum(table[title].str.count("\n") for title in titles)  # line ends within quotes
    return table.set_axis(pd.Index(inner.cumsum() - inner + table.index + 2, name="line"))


def _find_separator(path: Path, text: str) -> tuple[str, list[str]]:
    """The separator, and the titles in small letters."""
    start, titles = io.StringIO(text, newline="").readline(HEAD), []
    for separator in SEPARATORS:
        cells = next(csv.reader([start], delimiter=separator), [])
        found = [cell.strip().lower() or f"column {number}" for number, cell in enumerate(cells, start=1)]
        if set(found) & set(IMAGE_COLUMNS) and set(found) & set(TEXT_COLUMNS):
            return separator, found
        titles = max(titles, found, key=len)
    kind = _name_kind(text[:HEAD].encode())
    found = escape_controls(", ".join(titles))[:200] or "nothing"
    found += f" ({kind})" if kind else ""
    raise UserError(
        f"{path}, line 1: found {found}; wanted the titles of an image column ({', '.join(IMAGE_COLUMNS)}) and "
        f"of a text column ({', '.join(TEXT_COLUMNS)}), separated by {', '.join(SEPARATORS.values())}"
    )


def _explain_row(path: Path, text: str, separator: str) -> str:
    """What is wrong with a table that pandas can't read, with its line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    width, start, end = len(next(reader)), 1, 1  # lines of the row
    try:
        for row in reader:
            start, end = end + 1, reader.line_num
            if len(row) > width:
                return (
                    f"{path}, line {start}: {len(row)} fields, and the first line has {width}; put a text that has "
                    f'a {SEPARATORS[separator]} in quotes, "like this"'
                )
    except csv.Error:  # a field without end
        start = end + 1
    return f"{path}, line {start}: a quote is opened there and never closed"


def _read_json(path: Path, text: str) -> pd.DataFrame:
    """COCO's captions, an array of rows, or JSON lines."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        rows = dict(_read_json_lines(path, text))
        return _tabulate(rows.values(), pd.Index(rows, name="line"))
    if isinstance(document, dict) and "annotations" in document:
        return _join_coco(path, document)
    rows = document if isinstance(document, list) else [document]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: wanted rows of {{{IMAGE_COLUMNS[0]!r}: ..., {TEXT_COLUMNS[1]!r}: ...}} in it")
    return _tabulate(rows, pd.RangeIndex(1, len(rows) + 1, name="row"))


def _tabulate(rows: Iterable[dict], index: pd.Index) -> pd.DataFrame:
    """JSON's rows, their values as they are, the keys in small letters; of two alike the first that is not null."""
    small_rows = []
    for row in rows:
        small: dict[str, object] = {}
        for key, value in row.items():
            key = key.strip().lower().encode(errors="replace").decode()  # half a character is no text for pandas
            if small.get(key) is None:
                small[key] = value
        small_rows.append(small)
    return pd.DataFrame(small_rows, index, dtype=object)  # else whole numbers among nulls become 1.0


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"found {line[:40]!r}")
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number}: wanted an object with an image and a text in each line "
                f"({escape_controls(str(error))[:200]})"
            ) from None
        yield number, row


def _join_coco(path: Path, document: dict) -> pd.DataFrame:
    """COCO's {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]} as one table."""
    names: dict[object, str] = {}
    try:
        for image in document["images"]:
            number, name = image["id"], image.get("file_name")
            if names.setdefault(number, name) != name:
                raise UserError(
                    f"{path}: two images have the id {number!r:.40}, {names[number]!r:.80} and {name!r:.80}: of files "
                    "that are put together, each image needs an id of its own"
                )
        if not names:
            raise ValueError("no images")
        annotations = document["annotations"]
        table = _tabulate(annotations, pd.RangeIndex(1, len(annotations) + 1, name="annotation"))
        table["name"] = pd.Series(map(names.get, table["image_id"]), table.index, dtype=object)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: COCO's captions must have images with id and file_name, and annotations with image_id ({error!r})"
        ) from None
    if "caption" not in table:
        raise UserError(f"{path}: its annotations have no caption: of COCO's files, take captions_*.json")
    unknown = table.index[table["name"].isna()]
    if len(unknown):
        raise UserError(f"{path}, annotation {unknown[0]}: no image has the id {table.loc[unknown[0], 'image_id']}")
    if twice := [str(name) for name, ids in Counter(names.values()).items() if name and ids > 1]:
        found = escape_controls(", ".join(twice[:LISTED]))[:200]
        print(f"{path}: {len(twice):,} file names have several ids ({found}): their captions are taken together")
    return table


def _read_image_folder(folder: Path, group_column: str | None) -> pd.DataFrame:
    """The captions of an imagefolder: of its metadata file, or of those in its folders train, validation and test."""
    tables = []
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        files = [file for file in sorted(place.iterdir()) if file.name.lower() in METADATA and file.is_file()]
        if len(files) > 1:
            raise UserError(f"{files[0]}: {files[1].name} lies beside it; keep the one that is meant")
        split = SPLIT_NAMES.get(place.name.lower())
        if files and place != folder and split is None:
            print(f"{files[0]} is not read: a folder of a split has one of the names {', '.join(SPLIT_NAMES)}")
            continue
        for file in files:
            table = read_captions(file, group_column)
            if place != folder:
                table["name"], table["split"] = place.name + "/" + table["name"], split
            tables.append(table)
    if not tables:
        raise UserError(f"{folder}: a folder without {' or '.join(METADATA)}; --captions takes {WANTED}")
    return pd.concat(tables)


# --------------------------------------------------------------------------------------------------------------
# rows


def check_captions(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with all columns and clean texts, without rows that have no caption or are of an unknown split.

    Both are counted and printed. Raises UserError with the line of a bad row, in the unit that the index is named for.
    """
    table = _list_captions(path, table)
    for column in table:
        if not isinstance(table[column].dtype, pd.StringDtype):
            table = _take_texts(path, table, column)
        table[column] = table[column].fillna("").str.strip()  # pandas has null among texts as NaN
    table["caption"] = table["caption"].map(lambda text: " ".join(text.split()))  # a line end would end the caption
    table["name"] = table["name"].map(clean_name)
    empty = table["caption"] == ""
    _tell_left_out(path, table[empty & (table["name"] != "")].index, "have no caption")
    table = table[~empty].copy()
    if table.empty:
        raise UserError(f"{path}: no captions in it; --captions takes {WANTED}")
    _refuse(path, table, table["name"] == "", "caption", "it has no image")
    outside = "an image is named by its path below the folder of images"
    _refuse(path, table, table["name"].map(lambda name: bool(LEADS_OUT.match(name))), "name", outside)
    too_long = f"a caption has at most {MAX_CHARACTERS:,} characters"
    _refuse(path, table, table["caption"].str.len() > MAX_CHARACTERS, "caption", too_long)
    if "split" in table:
        splits = table["split"].str.lower().map(SPLIT_NAMES)
        if splits.isna().all():
            _refuse(path, table, splits.isna(), "split", f"a split is one of {', '.join(SPLIT_NAMES)}")
        others = table["split"][splits.isna()]
        found = escape_controls(", ".join(map(repr, others.unique()[:LISTED])))[:200]
        _tell_left_out(path, others.index, f"are of splits other than train, val and test ({found})")
        table = table.assign(split=splits)[splits.notna()]
    for column in table.columns.difference(["name", "caption"]):
        differs = table[column] != table.groupby("name")[column].transform("first")
        _refuse(path, table, differs, column, f"its image has another {column} above")
    return table.reindex(columns=COLUMNS, fill_value="")


def _list_captions(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table with a row for each caption of a list, also of one that was written as text, and "" for an empty one.

    Raises UserError where most rows have another value that was written as text, or one has where most have lists.
    """
    pairs = [(unpack_texts(value) if isinstance(value, str) else flatten(value), value) for value in table["caption"]]
    lists = sum(bool(texts) and isinstance(value, str) and texts != [value] for texts, value in pairs)
    odd = pd.Series([texts is None for texts, _ in pairs], table.index)
    if 2 * max(lists, odd.sum()) > len(table):
        _refuse(path, table, odd, "caption", "it is a value written as text, no caption: give each as it is")
    captions = [[value] if texts is None else texts or [""] for texts, value in pairs]
    rows = [row for row, texts in enumerate(captions) for _ in texts]
    return table.iloc[rows].assign(caption=pd.Series([*itertools.chain(*captions)], table.index[rows], dtype=object))


def _take_texts(path: Path, table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The table with a column of JSON as texts, whole numbers as 1."""
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in table[column]]
    texts = pd.Series(values, table.index, dtype=object)
    table = table.assign(**{column: texts})
    _refuse(path, table, ~texts.map(type).isin((str, int)) & texts.notna(), column, f"its {column} is no text")
    halves = pd.Series([bool(HALF_CHARACTER.search(str(text))) for text in texts], table.index)
    _refuse(path, table, halves, column, f"its {column} has half a character in it")
    return table.assign(**{column: texts.where(texts.notna(), "").map(str)})


def _refuse(path: Path, table: pd.DataFrame, bad: pd.Series, column: str, why: str) -> None:
    """Raise UserError for the first bad row, if there is one."""
    if bad.any():
        line = bad.idxmax()
        value = escape_controls(str(table[column][bad].iloc[0]))[:80]
        raise UserError(f"{path}, {table.index.name} {line}: {why}; found {value!r}")


def _tell_left_out(path: Path, rows: pd.Index, why: str) -> None:
    if len(rows):
        first = ", ".join(map(str, rows[:LISTED])) + ", ..." * (len(rows) > LISTED)
        print(f"{path}: {len(rows):,} rows {why} and are left out ({rows.name} {first})")
