"""Generation by the model's own generate(), which fast/generation.py stands in for: pixel values -> captions."""

import re

import torch
from torch import Tensor
from transformers import GenerationConfig

from captioner.blip2.batches import prefix_ids
from captioner.blip2.sampling import DrawTokens


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
def generate_tokens(
    model, pixel_values: Tensor, generation: GenerationConfig, draw: DrawTokens | None = None, **options
) -> Tensor:
    """New tokens (B, N) for pixel_values (B, 3, S, S); `options` override `generation`.

    Greedy, unless `draw` chooses the tokens or `options` say otherwise (do_sample=True). Where the ViT's outputs
    (B, P, D) stand in for it (see vit.py), pixel_values are those.
    """
    prefix = make_prefix(model, len(pixel_values))  # (B, Q+1)
    tokens = model.generate(
        pixel_values=pixel_values.to(model.device),  # the ViT takes any precision
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        generation_config=GenerationConfig(**{**generation.to_diff_dict(), **options}),
        logits_processor=[] if draw is None else [draw],
    )  # (B, Q+1+N): the prefix comes back too
    return tokens[:, prefix.shape[1] :]


def generate_captions(
    model, processor, pixel_values: Tensor, generation: GenerationConfig, draw: DrawTokens | None = None, **options
) -> list[str]:
    """The captions of generate_tokens()."""
    return decode_captions(processor, generate_tokens(model, pixel_values, generation, draw, **options))


def make_prefix(model, rows: int) -> Tensor:
    return torch.tensor([prefix_ids(model.config)], device=model.device).expand(rows, -1)  # (rows, Q+1)


def decode_captions(processor, tokens: Tensor) -> list[str]:
    """Captions of new tokens (B, N), each on one line."""
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    return [re.sub(r"\s+", " ", text).strip() for text in texts]


class GreedyCaptioner:
    """captioner(model, pixel_values) -> greedy captions, of a model that is being trained."""

    def __init__(self, processor, generation: GenerationConfig):
        self.processor, self.generation = processor, generation

    def prepare(self, model) -> None:
        """Called once before each validation's images: for what a faster way has to make ready."""

    def __call__(self, model, pixel_values: Tensor) -> list[str]:
        return generate_captions(model, self.processor, pixel_values, self.generation, do_sample=False)

    def finish(self) -> None:
        """Called after them."""
