"""How an image is decoded: a file of any origin, or an image in memory, to upright 8-bit RGB. Needs Pillow alone.

image = open_image(Path("a.jpg"))
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from captioner.bdd100k.file_kinds import name_kind
from captioner.runtime.errors import UserError

FORMATS = ("JPEG", "PNG")  # decoders that are tried, whatever a file's name is
MAX_PIXELS = 50_000_000  # of an image; a BDD100K frame has 0.9 million
DRAFT = (256, 256)  # pixels to which a JPEG is decoded at least when it is only checked
HEAD = 4096  # bytes in which a file shows what it is


def open_image(path: Path, draft: bool = False) -> Image.Image:
    """The image in `path` as upright 8-bit RGB: CMYK, grey, palette, 16 bits and EXIF rotation are converted.

    `draft` decodes all of a JPEG, but to an eighth of its size at least, which takes half the time. Raises UserError,
    with the reason, for what is no JPEG or PNG, is cut off, or has more than MAX_PIXELS.
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            _check_size(image)
            if draft:
                image.draft("RGB", DRAFT)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = _name_kind(path) or error
        remedy = "check the path" if isinstance(error, FileNotFoundError) else "remove it or fetch it again"
        raise UserError(f"{path}: not readable as an image ({reason}); {remedy}") from None


def _name_kind(path: Path) -> str | None:
    """What a file is that is no JPEG and no PNG; None if that is not known."""
    try:
        with open(path, "rb") as file:
            what, remedy = name_kind(file.read(HEAD)) or ("", "")
    except OSError:
        return None
    if not what or any(form in what for form in FORMATS):
        return None
    return f"{what}: {remedy if 'fetch the file' in remedy else 'images must be JPEG or PNG'}"


def normalize_image(image: Image.Image | np.ndarray) -> Image.Image:
    """The same of an image that is in memory; an array is (H, W), (H, W, 3) or (H, W, 4) of uint8.

    The image handed in stays as it is. Raises UserError for what can't be decoded, is too large, or is no image.
    """
    try:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
                raise ValueError(f"an array of {image.dtype} and shape {image.shape}")
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise TypeError(f"it is a {type(image).__name__}")
        _check_size(image)
        return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f"not usable as an image ({error}): give a file, a PIL image, or an array of uint8 and shape (H, W), "
            "(H, W, 3) or (H, W, 4)"
        ) from None


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
