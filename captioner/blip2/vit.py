"""The frozen ViT by itself: pixel values -> its outputs, and its outputs in its place in the model.

Shapes: B images at once, S image side in pixels (224), P positions of the ViT (257), D its width (1408).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from captioner.blip2.lora import get_blip2
from captioner.data.parallel import BATCH


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
    """The ViT's outputs (B, P, D) for pixels (B, 3, S, S), of BATCH images at most.

    A GPU may add up in another order for another number of rows: there, always BATCH images are computed, blank ones
    among them, so that an output does not depend on how many images came with it.
    """
    weight, count = vision.post_layernorm.weight, len(pixels)
    if weight.is_cuda:
        pixels = pixels.to(weight.device, non_blocking=True)  # if they are pinned, the CPU goes on meanwhile
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, BATCH - count))
    with torch.inference_mode():
        return vision(pixels.to(weight.dtype)).last_hidden_state[:count]
