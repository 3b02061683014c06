"""The frozen ViT by itself: images to pixels, by processes, and pixels to its outputs.

Shapes: B images at once, S image side in pixels (224), P positions of the ViT (257), D its width (1408).
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from captioner.blip2.batches import load_pixels
from captioner.blip2.lora import get_blip2
from captioner.data.reading import BATCH, read_batches
from captioner.runtime.errors import UserError


class StoredVision(torch.nn.Module):
    """Stands in place of the ViT and passes on what the ViT gave before."""

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)  # (B, P, D)


def take_vision_out(model) -> torch.nn.Module:
    """The model's ViT, in whose place its outputs are taken from here on."""
    blip2 = get_blip2(model)
    vision, blip2.vision_model = blip2.vision_model, StoredVision()
    return vision


def run_vision(vision, pixels: Tensor) -> Tensor:
    """The ViT's outputs (B, P, D) for pixels (B, 3, S, S), BATCH images at a time.

    A GPU may add up in another order for another number of rows: there, always BATCH images are computed, blank ones
    among them, so that an output does not depend on how many images came with it.
    """
    weight, outputs = vision.post_layernorm.weight, []
    for part in pixels.split(BATCH):
        count = len(part)
        if weight.is_cuda:
            part = part.pin_memory().to(weight.device, non_blocking=True)  # the GPU goes on meanwhile
            part = F.pad(part, (0, 0, 0, 0, 0, 0, 0, BATCH - count))
        with torch.inference_mode():
            outputs.append(vision(part.to(weight.dtype)).last_hidden_state[:count])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def start_reading(
    images: Sequence[Path], processor, dtype: torch.dtype, side: int, blank: bool = False
) -> Iterator[tuple[Tensor, list[str | None]]]:
    """What processes make of images from the call on, BATCH at a time; see load_pixels for `blank`.

    (pixels (B, 3, S, S) of those that can be read, why not for each of all).
    """
    read = functools.partial(_read, processor=processor, blank=blank)
    return read_batches(read, images, functools.partial(_stack, dtype=dtype), 3 * side**2 * dtype.itemsize)


def read_each(images: Sequence[Path], processor, dtype: torch.dtype, side: int, blank: bool) -> Iterator[Tensor | str]:
    """Pixels (3, S, S) of each image in order, or why it can't be read; see load_pixels for `blank`.

    By processes, which start at the call.
    """
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
    """(pixels of those that could be read, why not for each of all)."""
    pixels = [item.to(dtype) for item in read if not isinstance(item, str)]
    reasons = [item if isinstance(item, str) else None for item in read]
    return torch.stack(pixels) if pixels else torch.empty(0), reasons
