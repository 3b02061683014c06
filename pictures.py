"""Opening pictures that come from anywhere: what can be mended is, what can't be read is named.

picture = open_picture(Path("a.jpg"))       # upright, 8 bits, RGB
unreadable = check_pictures([Path("a.jpg")])   # {path: why}
for picture in read_ahead(open_picture, paths): ...
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from config import UserError

T, R = TypeVar("T"), TypeVar("R")
FORMATS = ("JPEG", "PNG")  # decoders that are tried, whatever a file's name is
MAX_PIXELS = 50_000_000  # of a picture; a BDD100K frame has 0.9 million
DRAFT = (256, 256)  # pixels to which a JPEG is decoded at least when it is only checked
AHEAD = 256  # pictures that are read before they are asked for


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


def check_pictures(paths: Sequence[Path]) -> dict[Path, str]:
    """{path: why} of the pictures that can't be read. All of each is decoded, on all cores."""
    unreadable = {}
    with tqdm(total=len(paths), desc="checking pictures", unit="picture") as bar:
        for path, reason in zip(paths, read_ahead(_check, paths), strict=True):
            if reason is not None:
                unreadable[path] = reason
            bar.update()
    return unreadable


def read_ahead(read: Callable[[T], R], items: Iterable[T], ahead: int = AHEAD) -> Iterator[R]:
    """read(item) of each item, in order, by a thread on each core, which are at most `ahead` items ahead.

    Pillow decodes and resizes without Python's lock, so threads do as well as processes, and cost nothing to start.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = deque()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also when nobody asks for the rest
            for future in waiting:
                future.cancel()


def _check(path: Path) -> str | None:
    try:
        open_picture(path, draft=True)
    except UserError as error:
        return str(error)
    return None
