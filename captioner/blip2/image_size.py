"""Images of another size than the checkpoint's: lights and signs of a street vanish at 224 pixels.

    set_image_size(model.config, 364)
    resize_positions(model)

The ViT's position embeddings, one for each patch of PATCH x PATCH pixels, are interpolated once, when the model is
loaded, by transformers' own interpolate_pos_encoding: later calls need no word about it.
"""

import torch
from transformers import Blip2Config, Blip2Processor

from captioner.runtime.errors import UserError


def set_image_size(config: Blip2Config, size: int | None) -> None:
    """Note in a model's configuration how many pixels its images have a side; None: as many as they had.

    Raises UserError unless that is a multiple of the ViT's patches.
    """
    patch = config.vision_config.patch_size
    if size is not None and size % patch:
        raise UserError(f"--image-size {size}: must be a multiple of {patch}, the side of this model's patches")
    config.vision_config.image_size = size or config.vision_config.image_size


def set_processor_size(processor: Blip2Processor, size: int | None) -> None:
    """Have the processor make images of that many pixels a side; None: of as many as before."""
    if size is not None:
        processor.image_processor.size = {"height": size, "width": size}


def resize_positions(model) -> None:
    """Fit the ViT's position embeddings (1, 1 + patches, D) to the image size that the model's configuration has."""
    embeddings, vision = model.vision_model.embeddings, model.config.vision_config
    side, patches = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    old = embeddings.position_embedding
    if old.shape[1] == patches + 1:
        return
    with torch.no_grad():
        new = embeddings.interpolate_pos_encoding(old.new_empty(1, patches + 1, old.shape[2]), side, side)
    embeddings.position_embedding = torch.nn.Parameter(new.contiguous(), requires_grad=False)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = side, patches, patches + 1
