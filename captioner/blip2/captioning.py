"""Captions by the model's own generate."""

import re

import torch
from torch import Tensor
from transformers import GenerationConfig

from captioner.blip2.batches import prefix_ids


def make_generation_config(model_config, max_new_tokens: int) -> GenerationConfig:
    """Settings that are saved beside the adapter; generate() of BLIP-2 knows none of them by itself."""
    text = model_config.text_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


@torch.inference_mode()
def generate_captions(model, processor, pixel_values: Tensor, generation: GenerationConfig, **options) -> list[str]:
    """Captions of pixel_values (B, 3, S, S); `options` override `generation` (do_sample, temperature, ...).

    Where the ViT's outputs (B, P, D) stand in for it (see vision.py), pixel_values are those.
    """
    prefix = torch.tensor([prefix_ids(model.config)], device=model.device).expand(len(pixel_values), -1)  # (B, Q+1)
    tokens = model.generate(
        pixel_values=pixel_values.to(model.device),  # the ViT takes any precision
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        generation_config=GenerationConfig(**{**generation.to_diff_dict(), **options}),
    )  # (B, Q+1+T): the prefix comes back too
    return decode_captions(processor, tokens[:, prefix.shape[1] :])


class GreedyCaptioner:
    """captioner(model, pixel_values) -> greedy captions, of a model that is being trained."""

    def __init__(self, processor, generation: GenerationConfig):
        self.processor, self.generation = processor, generation

    def __call__(self, model, pixel_values: Tensor) -> list[str]:
        return generate_captions(model, self.processor, pixel_values, self.generation, do_sample=False)


def decode_captions(processor, tokens: Tensor) -> list[str]:
    """Captions of new tokens (B, N), each on one line."""
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [re.sub(r"\s+", " ", text).strip() for text in texts]
