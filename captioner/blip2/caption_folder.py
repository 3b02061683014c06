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
from captioner.data.images import find_images
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


def caption_folder(
    config: EvalConfig, run_dir: Path, make_captioner: Callable[[EvalConfig, int], Captioner]
) -> FolderCaptions:
    """Caption the images of --images. Each caption goes to captions.jsonl in `run_dir` as soon as it is there.

    Captions that an earlier run under this name has written are taken over. A run that goes on has the batches of one
    that was never stopped, and so the same captions, as long as the same images are there and can be read. Of a batch
    that was half written, all is generated again and the rest written.
    """
    images, finished = ask_main(_open, config, run_dir)
    unreadable: dict[str, str] = {}
    if not images.keys() <= finished.keys():
        path, before = run_dir / "captions.jsonl" if find_place()[0] == 0 else Path(os.devnull), frozenset(finished)
        with (
            make_captioner(config, len(images)) as captioner,
            explain_writing(path, REMEDY),
            open(path, "a", encoding="utf-8") as file,
        ):
            for rows in captioner.map_batches(list(images.items()), captioner.caption, unreadable, before):
                for name, caption in rows:
                    if name not in before:
                        file.write(format_row(name, caption))
                        finished[name] = caption
                file.flush()
    return FolderCaptions(images, {name: finished[name] for name in images if name in finished}, unreadable)


def _open(config: EvalConfig, run_dir: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The images of --images by name, and {name: caption} of those that an earlier run did."""
    images = dict(find_images(config.images))
    run_dir.mkdir(parents=True, exist_ok=True)
    finished = read_finished(run_dir / "captions.jsonl", config)
    if finished:
        done = sum(name in finished for name in images)
        print(f"{done:,} of {len(images):,} images were captioned before")
    return images, finished


def read_finished(path: Path, config: EvalConfig) -> dict[str, str]:
    """{name: caption} of an earlier run under this name, which must have had the same settings."""
    settings = dataclasses.asdict(config.generation) | {"adapter": str(config.adapter), "base": config.base}
    settings |= {"blank": config.blank, "fast": config.fast.fast}
    settings |= {"images": [str(image.resolve()) for image in config.images], "trained": read_run(config.adapter)}
    noted = path.with_name("settings.json")
    if not path.exists():
        write_json(noted, settings)
        return {}
    try:
        same = json.loads(noted.read_text()) == settings
        *lines, unfinished = path.read_bytes().split(b"\n")  # the run may have been stopped while it wrote a line
        texts = [line.decode("utf-8") for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.parent}: an earlier run that can't be read ({error}); take another --run-name"
        ) from None
    if not same:
        raise UserError(f"{path}: was written with other settings; take another --run-name, or those of {noted}")
    rows = dict(parse_row(text, f"{path}, line {n}") for n, text in enumerate(texts, start=1) if text.strip())
    if unfinished:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(unfinished))
    return rows


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
