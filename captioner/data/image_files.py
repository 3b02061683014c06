"""Image files: which there are in a folder, and which of them is the one that a caption names. None is opened.

examples = match_images(captions, Path("images"))
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn
from unicodedata import normalize

from captioner.bdd100k.file_kinds import is_hidden
from captioner.data.examples import Example
from captioner.runtime.errors import UserError, escape_controls
from captioner.runtime.files import is_inside
from config import DEMO_DATA, TrainConfig

if TYPE_CHECKING:  # who reads a split does without
    import pandas as pd

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png")
OTHER_SUFFIXES = (
    *(".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".tga"),
    *(".dng", ".cr2", ".nef", ".arw"),
)
# Names of images that are no path below a folder: absolute ones, addresses, .. and control characters.
LEADS_OUT = re.compile(r"[/~]|[A-Za-z]:|\w+://|(.*/)?\.\.(/|$)|.*[\0-\x1f\x7f]", re.DOTALL)
LISTED = 5  # names that a message gives
DEMO_IMAGES = DEMO_DATA / "images"


def clean_name(name: str) -> str:
    """An image's name as captions and predictions are matched by: with / between folders, and no ./ before them."""
    return name.strip().replace("\\", "/").removeprefix("./")


def list_images(folder: Path) -> list[Path]:
    """The images below `folder`, in alphabetical order within each folder.

    What is passed over is printed: links that lead out of the folder, and images of kinds that are not read. Raises
    UserError when there is nothing else.
    """
    found, links, others = [], [], Counter()
    for parent, folders, files in os.walk(folder):  # which enters no linked folder
        folders[:] = sorted(name for name in folders if not is_hidden([name]))
        links += [path for path in (Path(parent, name) for name in folders) if leads_out(path, folder)]
        for name in sorted(files):
            path, suffix = Path(parent, name), os.path.splitext(name)[1].lower()
            if suffix in OTHER_SUFFIXES:
                others[suffix] += 1
            elif suffix not in IMAGE_SUFFIXES or is_hidden([name]):
                continue
            elif leads_out(path, folder):
                links.append(path)
            else:
                found.append(path)
    passed_over = []
    if links:
        counts = Counter("folders" if link.is_dir() else "images" for link in links)
        target = links[0].resolve()
        counted = " and ".join(f"{count:,} {kind}" for kind, count in counts.items())
        passed_over.append(
            f"{counted} are links that lead out of the folder and are passed over: give the folder that they lead to, "
            f"{target if target.is_dir() else target.parent}"
        )
    if others:
        passed_over.append(
            f"{others.total():,} images of other kinds ({', '.join(others)}) are passed over: convert them to "
            "JPEG or PNG"
        )
    if not found:
        raise UserError("; ".join([f"{folder}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})", *passed_over]))
    for reason in passed_over:
        tell_once(f"{folder}: {reason}")
    return found


def leads_out(path: Path, folder: Path) -> bool:
    return path.is_symlink() and not is_inside(path, folder)


@functools.cache
def tell_once(note: str) -> None:
    print(escape_controls(note))


def index_images(folder: Path, flag: str = "--images") -> dict[str, list[Path]]:
    """{file name: paths} of the images below `folder`, that `flag` names."""
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give the folder with the images")
    index: dict[str, list[Path]] = {}
    for path in list_images(folder):
        index.setdefault(normalize("NFC", path.name), []).append(path)  # macOS writes é as e and an accent
    return index


def locate_images(names: Iterable[str], folder: Path, index: dict[str, list[Path]] | None = None) -> dict[str, Path]:
    """{name: path} of those names that have an image below `folder`, whose index_images() may be given.

    Names with folders are paths below it; else the file name counts, at any depth. A name without a suffix of images
    stands for the file that has one. Raises UserError, which lists them, for names that several files have.
    """
    names, index = list(names), index or index_images(folder)
    are_paths = any("/" in name for name in names)
    found: dict[str, Path] = {}
    twice: dict[str, list[Path]] = {}
    for name in names:
        path = folder / normalize("NFC", name)
        suffixes = ("",) if path.suffix.lower() in IMAGE_SUFFIXES else IMAGE_SUFFIXES
        paths = [file for suffix in suffixes for file in index.get(path.name + suffix, ())]
        if are_paths:
            paths = [file for file in paths if normalize("NFC", str(file.parent)) == normalize("NFC", str(path.parent))]
        if len(paths) > 1:
            twice[name] = paths
        elif paths:
            found[name] = paths[0]
    if twice:
        listed = "\n".join(f"  {name}: {', '.join(map(str, paths))}" for name, paths in list(twice.items())[:LISTED])
        more = "\n  ..." if len(twice) > LISTED else ""
        raise UserError(
            f"{folder}: {len(twice):,} names stand for several images each; give the folder that is meant, or name "
            f"images by their path below it:\n{listed}{more}"
        )
    return found


def match_images(
    captions: "pd.DataFrame", folder: Path, most_missing: float = 1.0, index: dict[str, list[Path]] | None = None
) -> list[Example]:
    """The images below `folder` that have captions, a table of read_captions, in its order; see locate_images.

    How many captioned images aren't there is printed; raises UserError when that is all of them, or more than the share
    `most_missing`.
    """
    rows = captions.groupby("name", sort=False).agg({"caption": list, "group": "first"})
    images = locate_images(rows.index, folder, index)
    if len(set(images.values())) < len(images):
        _refuse_second_names(images)
    examples = [
        Example(name, images[name], texts[0], group, tuple(texts[1:]))
        for name, texts, group in rows.itertuples()
        if name in images
    ]
    missing = [name for name in rows.index if name not in images]
    if not examples:
        _explain_no_match(missing, folder)
    if missing:
        told = f"{len(missing):,} of {len(rows):,} captioned images are not in {folder}"
        if len(missing) > most_missing * len(rows):
            names = ", ".join(missing[:LISTED])
            raise UserError(f"{told}, more than {most_missing:.0%}: is it complete? The first: {names}")
        print(f"{told} and are left out")
    return examples


def _refuse_second_names(images: Mapping[str, Path]) -> NoReturn:
    """Raise UserError for an image with two names: it might be in two splits."""
    names: dict[Path, str] = {}
    for name, image in images.items():
        if image in names:
            raise UserError(f"{image}: captions name it {names[image]!r} and {name!r}; give it one name")
        names[image] = name


def _explain_no_match(names: Sequence[str], folder: Path) -> NoReturn:
    images, wanted = list_images(folder), PurePosixPath(names[0])
    same = next((image for image in images if image.stem == wanted.stem), None)
    above = next((parent for parent in folder.absolute().parents if os.path.isfile(parent / wanted)), None)
    if same and wanted.suffix and same.suffix != wanted.suffix:
        remedy = f"{same.name} is: give both one suffix"
    else:
        remedy = f"give the folder that belongs to the captions with --images{f' {above}' if above else ''}"
    raise UserError(
        f"none of the {len(names)} captioned images is in {folder}: {names[0]}, for one, is not among its "
        f"{len(images)} images; {remedy}"
    )


def find_image_folder(config: TrainConfig) -> Path:
    """The folder of the images. Raises UserError for a folder that was given and has none."""
    if config.data.images is not None:
        index_images(config.data.images)
        return config.data.images
    if config.data.captions is not None and config.data.captions.is_dir():
        return config.data.captions
    if config.source.labels:
        raise UserError("--labels without --images: give the folder with the images too")
    if config.demo:
        return DEMO_IMAGES
    from captioner.bdd100k.download import fetch_images  # here: kagglehub takes a while to import

    return fetch_images(config.source.kaggle_dataset)


def find_images(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, file) of the images in `paths`, a name being the path below the folder that was given."""
    images: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            found = {str(file.relative_to(path)): file for file in sorted(list_images(path)) if file.is_file()}
        elif path.is_file():
            found = {path.name: path}
        else:
            raise UserError(f"{path}: no such image or folder; --images takes images and folders of them")
        twice = [name for name in found.keys() & images.keys() if not found[name].samefile(images[name])]
        if twice:
            raise UserError(f"{path}: {min(twice)} came before; give the folder above both instead")
        images |= found
    return list(images.items())


def name_images(paths: Sequence[Path]) -> dict[str, Path]:
    """{name: file} of the images in `paths`, by the names that find_images gives them and by their file names.

    A name that several files have stands for none of them.
    """
    by_path: dict[str, set[Path]] = {}
    by_file: dict[str, set[Path]] = {}
    for path in paths:
        for name, file in find_images([path]):
            by_path.setdefault(name, set()).add(file)
            by_file.setdefault(normalize("NFC", file.name), set()).add(file)
    return {name: min(files) for name, files in {**by_file, **by_path}.items() if len(files) == 1}
