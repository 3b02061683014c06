"""Captions of any images, in a file that grows with them, so that a run that was stopped goes on from there.

captions = caption_folder(config, run_dir, make_captioner)      # run_dir/captions.jsonl
"""

import csv
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from captioner.blip2.captioner import Captioner
from captioner.data.image_files import find_images
from captioner.data.run_record import read_run
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, explain_writing, write_json
from captioner.runtime.processes import ask_main, find_place
from config import EvalConfig

REMEDY = "the captions before are kept: see to the disk, then give the same command and --run-name again"


class FolderCaptions(NamedTuple):
    """Captions of images that were given as files and folders, by the names that find_images gives them."""

    images: dict[str, Path]
    captions: dict[str, str]  # in the order of the images
    unreadable: dict[str, str]  # why


class Earlier(NamedTuple):
    """What an earlier run under the same name has done."""

    captions: dict[str, str]  # by name
    way: dict[str, str]  # how they came about, as Captioner.describe_way tells; empty if there is no such run


def caption_folder(
    config: EvalConfig, run_dir: Path, make_captioner: Callable[[EvalConfig, int], Captioner]
) -> FolderCaptions:
    """Caption the images of --images. Each caption goes to captions.jsonl in `run_dir` as soon as it is there.

    Captions that an earlier run under this name has written are taken over. A run that goes on has the batches of one
    that was never stopped, whatever memory is free now, and so the same captions, as long as the same images are there
    and can be read. Of a batch that was half written, all is generated again and the rest written.
    """
    images, earlier = ask_main(_open, config, run_dir)
    finished, unreadable = dict(earlier.captions), {}
    if not images.keys() <= finished.keys():
        path = run_dir / "captions.jsonl" if find_place()[0] == 0 else Path(os.devnull)
        if config.generation.batch_size is None and earlier.way:
            generation = dataclasses.replace(config.generation, batch_size=int(earlier.way["batch"]))
            config = dataclasses.replace(config, generation=generation)
        captioner = make_captioner(config, len(images))
        ask_main(_note_way, config, run_dir, earlier, captioner.describe_way())
        pairs = list(images.items())
        for rows in captioner.map_batches(pairs, captioner.caption, unreadable, earlier.captions.keys()):
            new = [(name, caption) for name, caption in rows if name not in earlier.captions]
            finished |= dict(new)
            with explain_writing(path, REMEDY), open(path, "a", encoding="utf-8") as file:
                file.writelines(format_row(name, caption) for name, caption in new)
    return FolderCaptions(images, {name: finished[name] for name in images if name in finished}, unreadable)


def _open(config: EvalConfig, run_dir: Path) -> tuple[dict[str, Path], Earlier]:
    """The images of --images by name, and what an earlier run has done."""
    images = dict(find_images(config.images))
    run_dir.mkdir(parents=True, exist_ok=True)
    path, table = run_dir / "captions.jsonl", run_dir / "captions.csv"
    if table.exists() and not path.exists():
        raise UserError(f"{table}: was written by another script; take another --run-name")
    earlier = read_earlier(path, describe_settings(config))
    if earlier.captions:
        done = sum(name in earlier.captions for name in images)
        print(f"{done:,} of {len(images):,} images were captioned before")
    return images, earlier


def _note_way(config: EvalConfig, run_dir: Path, earlier: Earlier, way: dict[str, str]) -> None:
    if not earlier.way:
        write_json(run_dir / "settings.json", describe_settings(config) | {"way": way})
    elif way != earlier.way:
        print(f"note: captions before were made with {earlier.way}, from here on it is {way}: a few may differ")


def describe_settings(config: EvalConfig) -> dict:
    """The settings that a run which goes on must share with the one before."""
    generation = dataclasses.asdict(config.generation)
    del generation["batch_size"]  # which changes no more than last digits
    settings = generation | {"adapter": str(config.adapter), "base": config.base, "blank": config.blank}
    settings |= {"model": config.model} if config.model else {}
    return settings | {
        "images": [str(image.resolve()) for image in config.images],
        "trained": read_run(config.adapter),
    }


def read_earlier(path: Path, settings: dict) -> Earlier:
    """The captions in `path`, captions.jsonl of a run with these settings. A line that it didn't finish is cut off."""
    if not path.exists():
        return Earlier({}, {})
    noted = path.with_name("settings.json")
    try:
        found = json.loads(noted.read_text())
        way = found.pop("way", {})
        if way and int(way["batch"]) < 1:
            raise ValueError("no batch size")
        *lines, unfinished = path.read_bytes().split(b"\n")
        texts = [line.decode("utf-8") for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path.parent}: an earlier run that can't be read ({error}); take another --run-name"
        ) from None
    if found != settings:
        raise UserError(f"{path}: was written with other settings; take another --run-name, or those of {noted}")
    rows = dict(parse_row(text, f"{path}, line {n}") for n, text in enumerate(texts, start=1) if text.strip())
    if unfinished:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(unfinished))
    return Earlier(rows, way)


def write_captions(path: Path, captions: dict[str, str]) -> None:
    """Write captions by name as CSV, without references."""
    with atomic_write(path) as file:
        rows = [("name", "prediction"), *captions.items()]
        csv.writer(file).writerows([text.encode(errors="backslashreplace").decode() for text in row] for row in rows)


def format_row(name: str, caption: str) -> str:
    """A line of captions.jsonl, which is a predictions file without references."""
    return json.dumps({"name": name, "prediction": caption, "references": []}) + "\n"  # in ASCII, so always UTF-8


def parse_row(line: str, place: str) -> tuple[str, str]:
    """(name, caption) of such a line. Raises UserError with the place."""
    try:
        row = json.loads(line)
        name, caption = row["name"], row["prediction"]
        if not isinstance(name, str) or not isinstance(caption, str):
            raise TypeError("no text")
        return name, caption
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        wanted = '{"name": TEXT, "prediction": TEXT}'
        raise UserError(f"{place}: must be {wanted} ({str(error)[:200]}); take another --run-name") from None
