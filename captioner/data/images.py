"""Image files: which there are, and opening those that come from anywhere. Needs Pillow alone.

image = open_image(Path("a.jpg"))       # upright, 8 bits, RGB
"""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from captioner.data.captions import Example
from captioner.runtime.errors import UserError, escape_controls
from captioner.runtime.files import is_inside
from config import DEMO_DATA, TrainConfig

FORMATS = ("JPEG", "PNG")  # decoders that are tried, whatever a file's name is
MAX_PIXELS = 50_000_000  # of an image; a BDD100K frame has 0.9 million
DRAFT = (256, 256)  # pixels to which a JPEG is decoded at least when it is only checked
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png")
OTHER_SUFFIXES = (
    *(".webp", ".bmp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ppm", ".tga"),
    *(".dng", ".cr2", ".nef", ".arw"),
)
MAGIC = {  # how files begin that are often named .jpg
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"GIF8": "GIF",
    b"version https://git-lfs": "a Git LFS pointer, fetch the file itself with git lfs pull",
    b"<": "a web page or XML",
}
DEMO_IMAGES = DEMO_DATA / "images"


def open_image(path: Path, draft: bool = False) -> Image.Image:
    """The image in `path` as upright 8-bit RGB: CMYK, grey, palette, 16 bits and EXIF rotation are converted.

    `draft` decodes all of a JPEG, but to an eighth of its size at least, which takes half the time. Raises UserError,
    with the reason, for what is no JPEG or PNG, is cut off, or has more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            if draft:
                image.draft("RGB", DRAFT)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = name_kind(path) or error
        raise UserError(f"{path}: not readable as an image ({reason}); remove it or fetch it again") from None


def name_kind(path: Path) -> str | None:
    """What a file is that is no JPEG and no PNG; None if that is not known."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError:
        return None
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if start[4:8] == b"ftyp":
        kind = "HEIC or AVIF"
    return kind and f"it is {kind}: images must be JPEG or PNG"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def list_images(folder: Path) -> list[Path]:
    """The images below `folder`, in alphabetical order within each folder.

    What is passed over is printed: links that lead out of the folder, and images of kinds that are not read. Raises
    UserError when there is nothing else.
    """
    found, links, others = [], [], Counter()
    for parent, folders, files in os.walk(folder):  # which enters no linked folder
        folders.sort()
        links += [path for path in (Path(parent, name) for name in folders) if leads_out(path, folder)]
        for name in sorted(files):
            path, suffix = Path(parent, name), os.path.splitext(name)[1].lower()
            if suffix in OTHER_SUFFIXES:
                others[suffix] += 1
            elif suffix not in IMAGE_SUFFIXES or name.startswith("._"):  # ._: what macOS keeps beside a file
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


def index_images(folder: Path) -> dict[str, Path]:
    """{file name: path} of the images below `folder`. The first of equal names in alphabetical order counts."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder with the images with --images, or try --demo")
    index: dict[str, Path] = {}
    for path in list_images(folder):
        index.setdefault(path.name, path)
    return index


def match_images(captions: dict[str, str], images: dict[str, Path]) -> list[Example]:
    """The captions that have an image. Prints how many have none; raises UserError when that is all of them."""
    examples = [Example(name, images[name], caption) for name, caption in captions.items() if name in images]
    missing = len(captions) - len(examples)
    if not examples:
        name = next(iter(captions), "none")
        same = next((image for image in images if Path(image).stem == Path(name).stem), None)
        remedy = "give the folder that belongs to the labels with --images"
        raise UserError(
            f"none of the {len(captions)} captioned frames has an image: {name}, for one, is not among the "
            f"{len(images)} images; {f'{same} is: give both one suffix' if same else remedy}"
        )
    if missing:
        print(f"{missing:,} of {len(captions):,} captioned frames have no image and are left out")
    return examples


def find_image_folder(config: TrainConfig) -> Path:
    if config.data.images is not None:
        return config.data.images
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
        if twice := found.keys() & images.keys():
            raise UserError(f"{path}: {sorted(twice)[0]} came before; give the folder above both instead")
        images |= found
    return list(images.items())
