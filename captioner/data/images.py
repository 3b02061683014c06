"""Image files: which there are, and opening those that come from anywhere. Needs Pillow alone.

picture = open_picture(Path("a.jpg"))       # upright, 8 bits, RGB
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from captioner.data.captions import Example
from captioner.runtime.errors import UserError
from captioner.runtime.files import is_inside
from config import DEMO_DATA, TrainConfig

FORMATS = ("JPEG", "PNG")  # decoders that are tried, whatever a file's name is
MAX_PIXELS = 50_000_000  # of a picture; a BDD100K frame has 0.9 million
DRAFT = (256, 256)  # pixels to which a JPEG is decoded at least when it is only checked
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
DEMO_IMAGES = DEMO_DATA / "images"


def open_picture(path: Path, draft: bool = False) -> Image.Image:
    """The picture in `path` as upright 8-bit RGB: CMYK, grey, palette, 16 bits and EXIF rotation are converted.

    `draft` decodes all of a JPEG, but to an eighth of its size at least, which takes half the time. Raises UserError,
    with the reason, for what is no JPEG or PNG, is cut off, or has more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}")
            if draft:
                picture.draft("RGB", DRAFT)
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
            return _to_rgb(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not readable as a picture ({error}); remove it or fetch it again") from None


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        grey = np.asarray(picture).astype(np.float64) / 257
        picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def index_images(folder: Path) -> dict[str, Path]:
    """{file name: path} of the pictures below `folder`. The first of equal names in alphabetical order counts.

    A link to a file outside of the folder is passed over.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder with the pictures with --images, or try --demo")
    index: dict[str, Path] = {}
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            # os.walk enters no linked folder: only a file that is a link itself can lead out
            if name.lower().endswith(IMAGE_SUFFIXES) and (not path.is_symlink() or is_inside(path, folder)):
                index.setdefault(name, path)
    if not index:
        raise UserError(f"{folder}: no picture in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return index


def match_images(captions: dict[str, str], images: dict[str, Path]) -> list[Example]:
    """The captions that have a picture. Prints how many have none; raises UserError when that is all of them."""
    examples = [Example(name, images[name], caption) for name, caption in captions.items() if name in images]
    missing = len(captions) - len(examples)
    if not examples:
        name = next(iter(captions), "none")
        raise UserError(
            f"none of the {len(captions)} captioned frames has a picture: {name}, for one, is not among the "
            f"{len(images)} pictures; give the folder that belongs to the labels with --images"
        )
    if missing:
        print(f"{missing:,} of {len(captions):,} captioned frames have no picture and are left out")
    return examples


def find_images(config: TrainConfig) -> Path:
    if config.images is not None:
        return config.images
    if config.labels:
        raise UserError("--labels without --images: give the folder with the pictures too")
    if config.demo:
        return DEMO_IMAGES
    from captioner.bdd100k.download import fetch_images  # here: kagglehub takes a while to import

    return fetch_images(config.kaggle_dataset)


def find_pictures(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, file) of the pictures in `paths`, a name being the path below the folder that was given."""
    pictures: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            below = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            below = [file for file in below if is_inside(file, path)]  # no link leads out of the folder
            found = {str(file.relative_to(path)): file for file in sorted(below)}
            if not found:
                raise UserError(f"{path}: no picture in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif path.is_file():
            found = {path.name: path}
        else:
            raise UserError(f"{path}: no such picture or folder; --images takes pictures and folders of them")
        if twice := found.keys() & pictures.keys():
            raise UserError(f"{path}: {sorted(twice)[0]} came before; give the folder above both instead")
        pictures |= found
    return list(pictures.items())
