"""Images -> pixel values, as the ViT takes them: one at a time, or many by processes.

Shapes: B images at once, S image side in pixels (224).
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Processor

from captioner.data.image_decoding import open_image
from captioner.data.parallel import read_batches
from captioner.runtime.errors import UserError


def load_pixels(image: Path, processor: Blip2Processor, blank: bool = False) -> Tensor:
    """(3, S, S) pixel values of an image file, or of a black image of its size."""
    opened = open_image(image)
    return prepare_pixels(Image.new("RGB", opened.size) if blank else opened, processor)


def prepare_pixels(image: Image.Image, processor: Blip2Processor) -> Tensor:
    """(3, S, S) pixel values of an RGB image.

    The same numbers as the processor gives, which copies the image several times on its way.
    """
    prepare = processor.image_processor
    if not (prepare.do_resize and prepare.do_rescale and prepare.do_normalize and "height" in prepare.size):
        return prepare(image, return_tensors="pt")["pixel_values"][0]
    small = np.asarray(image.resize((prepare.size["width"], prepare.size["height"]), prepare.resample))  # (S, S, 3)
    values = list_values(prepare)
    return torch.from_numpy(np.stack([values[channel].take(small[:, :, channel]) for channel in range(3)]))


@functools.cache
def list_values(image_processor) -> np.ndarray:
    """(3, 256) pixel values that the processor makes of each level of each channel."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)  # an image of 256 x 1
    made = image_processor(Image.fromarray(levels), do_resize=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(made[0, :, 0], dtype=np.float32)  # of (1, 3, 1, 256)


def start_reading(
    images: Sequence[Path], processor, dtype: torch.dtype, side: int, blank: bool = False
) -> Iterator[tuple[Tensor, list[str | None]]]:
    """Read images by processes, which start at the call; see load_pixels for `blank`.

    Of B images at a time: pixels (B, 3, S, S) of those that can be read, and for each of all why it can't be read.
    """
    read = functools.partial(_read, processor=processor, blank=blank)
    return read_batches(read, images, functools.partial(_stack, dtype=dtype), 3 * side**2 * dtype.itemsize)


def read_each(images: Sequence[Path], processor, dtype: torch.dtype, side: int, blank: bool) -> Iterator[Tensor | str]:
    """The same image by image, in order: its pixels (3, S, S), or why it can't be read."""
    batches = start_reading(images, processor, dtype, side, blank)
    return itertools.chain.from_iterable(itertools.starmap(_list_each, batches))


def _list_each(pixels: Tensor, reasons: list[str | None]) -> list[Tensor | str]:
    readable = iter(pixels)
    return [next(readable) if reason is None else reason for reason in reasons]


def _read(image: Path, processor, blank: bool) -> Tensor | str:
    """(3, S, S) pixel values, or why there are none."""
    try:
        return load_pixels(image, processor, blank)
    except UserError as error:
        return str(error)


def _stack(read: list[Tensor | str], dtype: torch.dtype) -> tuple[Tensor, list[str | None]]:
    """What start_reading gives of a batch."""
    pixels = [item.to(dtype) for item in read if not isinstance(item, str)]
    reasons = [item if isinstance(item, str) else None for item in read]
    return torch.stack(pixels) if pixels else torch.empty(0), reasons
