"""A data set on the Hugging Face hub, or a copy of one, as a table of captions and image files.

captions, images = fetch_captions("user/name@revision", run_dir)     # a table, and a folder for our decoder to read
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from tqdm import tqdm

from captioner.data.caption_files import METADATA, SPLIT_NAMES, TEXT_COLUMNS, check_captions
from captioner.data.image_files import IMAGE_SUFFIXES
from captioner.runtime.errors import UserError, escape_controls
from captioner.runtime.files import atomic_write, write_json

if TYPE_CHECKING:  # it takes a while to import
    from datasets import Dataset, DatasetDict

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w.-]+)?")
COMMIT = re.compile("[0-9a-f]{40}")
IMAGES = "images"  # in the run folder, or beside it
SOURCE = "captions.json"  # in the run folder


def is_data_set(captions: Path) -> bool:
    """Whether --captions names a data set: user/name that is no file, or a folder with tables in place of metadata."""
    if captions.is_dir():
        names = {path.name.lower() for path in captions.glob("**/*")}
        return names.isdisjoint(METADATA) and any(name.endswith(".parquet") for name in names)
    return not captions.exists() and bool(HUB_NAME.fullmatch(str(captions)))


def fetch_captions(name: str, run_dir: Path, group_column: str | None = None) -> tuple[pd.DataFrame, Path]:
    """The captions of a data set, as read_captions gives them, and the folder of its images, which are written.

    Those of a commit on the hub are written once, to a folder beside that of the run; those of a copy, which may
    change, to `run_dir`/images. Of several splits those are read that are train, validation or test, by any usual name.
    Which commit was read is kept in `run_dir`/captions.json. Raises UserError when the data set can't be had, or has no
    images or captions.
    """
    sets, commit = _load(name)
    has_splits = len(sets) > 1  # a single one is split here, whatever it is called
    if has_splits:
        sets = _leave_out_others(name, sets)
    columns, tables = {split: _find_columns(name, table, group_column) for split, table in sets.items()}, []
    repo = name.partition("@")[0]
    folder = run_dir.parent / IMAGES / f"{repo.replace('/', '--')}@{commit}" if commit else run_dir / IMAGES
    for split, table in sets.items():
        rows = _write_images(table, columns[split], folder / split, keep=bool(commit))
        frame = pd.DataFrame(rows, columns=["name", "caption", *(["group"] if group_column else [])], dtype=object)
        tables.append(frame.assign(split=split) if has_splits else frame)
    captions = pd.concat(tables, ignore_index=True)
    write_json(run_dir / SOURCE, {"data_set": repo, "commit": commit})
    return check_captions(Path(name), captions.rename_axis("row")), folder


def _load(name: str) -> tuple["DatasetDict", str | None]:
    """The splits of a data set, its images undecoded, and the commit that was read."""
    from datasets import Image, load_dataset
    from huggingface_hub import HfApi

    repo, _, revision = name.partition("@")
    try:
        if Path(name).is_dir():
            sets, commit = load_dataset(name), None
        else:
            is_commit = COMMIT.fullmatch(revision)
            commit = revision if is_commit else HfApi().dataset_info(repo, revision=revision or None).sha
            sets = load_dataset(repo, revision=commit)
    except Exception as error:  # of the hub, the network, the files: they have no common type
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"--captions {name}: no such file, and no data set that can be had from the hub ({escape_controls(said)}); "
            "check the name and the connection, and log in with hf auth login if it is private"
        ) from None
    for split, table in sets.items():
        for column, feature in table.features.items():
            if isinstance(feature, Image):
                sets[split] = sets[split].cast_column(column, Image(decode=False))
    return sets, commit


def _leave_out_others(name: str, sets: "DatasetDict") -> dict[str, "Dataset"]:
    """The splits whose names are known. How many rows the others have is printed."""
    known = {split: table for split, table in sets.items() if split.lower() in SPLIT_NAMES}
    others = {split: len(table) for split, table in sets.items() if split not in known}
    found = escape_controls(", ".join(others))[:200]
    if not known:
        raise UserError(f"--captions {name}: its splits are {found}; one of {', '.join(SPLIT_NAMES)} is wanted")
    if others:
        rows = sum(others.values())
        print(f"{name}: {rows:,} rows are of splits other than train, val and test ({found}) and are left out")
    return known


def _find_columns(name: str, table: "Dataset", group_column: str | None) -> list[str]:
    """The columns of images, captions and groups, by their names in any case."""
    from datasets import Image

    images = [column for column, feature in table.features.items() if isinstance(feature, Image)]
    names = {column.lower(): column for column in table.features}
    texts = [names[column] for column in TEXT_COLUMNS if column in names]
    missing = [f"a text column ({', '.join(TEXT_COLUMNS)})"] * (not texts) + ["a column of images"] * (not images)
    if group_column and group_column.lower() not in names:
        missing.append(f"the column {group_column}")
    if missing:
        found = escape_controls(", ".join(table.features))[:200]
        raise UserError(f"--captions {name}: lacks {' and '.join(missing)}; its columns are {found}")
    return [images[0], texts[0], *([names[group_column.lower()]] if group_column else [])]


def _write_images(table: "Dataset", columns: list[str], folder: Path, keep: bool) -> Iterator[tuple]:
    """(name, caption or list of them, group) of each row, whose image is then in the `folder` of its split.

    Files that are there stay if they are to `keep`.
    """
    rows = tqdm(table.select_columns(columns), f"writing {folder.name} images", unit="image")
    for number, row in enumerate(rows):
        image, *values = (row[column] for column in columns)
        source = Path((image or {}).get("path") or "")
        content = (image or {}).get("bytes") or (source.read_bytes() if source.is_file() else b"")
        suffix = source.suffix.lower() if source.suffix.lower() in IMAGE_SUFFIXES else ".jpg"
        file = folder / f"{number:06d}{suffix}"
        if not (keep and file.exists()):
            with atomic_write(file, binary=True) as writing:
                writing.write(content)
        yield f"{folder.name}/{file.name}", *values
