"""Whether there is room for FastGenerator, for how many images at once, and whether with copies of the weights.

plan = plan_generation(measure_room(model, max_new_tokens), images=1200)     # None: transformers' generate()
"""

import math
from typing import NamedTuple

import torch

from captioner.blip2.captioner import SLOW_BATCH
from captioner.blip2.lora import get_blip2
from captioner.fast.decoder_weights import supports
from captioner.fast.generation import BUCKET, CHUNK, FastGenerator, round_up

FAST_BATCH = 512  # images captioned at once, where there is room and nothing else is asked for
WORKSPACE = 3 * 2**30  # bytes that passes of CHUNK images through a full-size model, and the graphs, take


class Room(NamedTuple):
    """For how many images at once FastGenerator has room."""

    copied: int  # with copies of the weights, which are faster from some images on
    packed: int  # without


class Plan(NamedTuple):
    """How FastGenerator is to caption."""

    batch_size: int
    copies: bool

    def make(self, model) -> FastGenerator:
        return FastGenerator(model, self.batch_size, copies=self.copies)


def measure_room(model, max_new_tokens: int) -> Room:
    """Room on the model's device now, none for a model that FastGenerator is not made for. Empties torch's cache."""
    if not supports(model):
        return Room(0, 0)
    if model.device.type != "cuda":
        return Room(FAST_BATCH, 0)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    return Room(
        max_batch(model, max_new_tokens, free), min(max_batch(model, max_new_tokens, free, copies=False), CHUNK)
    )


def max_batch(model, max_new_tokens: int, free_bytes: int, copies: bool = True) -> int:
    """Most rows a batch that FastGenerator has room for in `free_bytes`, which it has not yet taken any of; 0 if none.

    On a GPU those are what torch.cuda.mem_get_info() says, plus what torch has reserved and does not use.
    """
    blip2 = get_blip2(model)
    text = blip2.config.text_config
    size = blip2.get_input_embeddings().weight.element_size()
    layer = (4 * text.hidden_size + 2 * text.ffn_dim) * text.hidden_size * size  # bytes of its linear layers
    positions = round_up(blip2.config.num_query_tokens + 1 + max_new_tokens, BUCKET)
    cache = text.num_hidden_layers * 2 * text.hidden_size * positions * size
    row = cache + 12 * text.vocab_size * 4  # logits with fp32 copies, probabilities, and noise in 64 bits
    if copies:
        return max(0, (free_bytes - text.num_hidden_layers * layer - WORKSPACE) // row)
    return max(0, (free_bytes - 2 * layer) // (row + WORKSPACE // CHUNK))  # of batches up to CHUNK


def plan_generation(room: Room, images: int, batch_size: int | None = None, lean: bool = False) -> Plan | None:
    """How to caption so many images, `batch_size` at once if that is given; None where there is no room.

    Weights are copied if there is room for a batch as large as transformers' generate takes, or as large as fits
    without, and for none that is `lean`: it leaves others as much memory as it can.
    """
    copies = room.copied >= min(batch_size or SLOW_BATCH, room.packed) and not (lean and room.packed)
    fitting = room.copied if copies else room.packed
    if batch_size is None:
        most = FAST_BATCH if copies else SLOW_BATCH
        batch_size = min(most, 1 << max(fitting, 1).bit_length() - 1)  # a power of 2
        # the last batch is as large as the others
        batch_size = min(batch_size, round_up(math.ceil(images / math.ceil(images / batch_size)), 8))
    return Plan(batch_size, copies) if batch_size <= fitting else None
