"""For how many images at once FastGenerator has room.

size = pick_batch_size(measure_room(model, max_new_tokens), images=1200, most=FAST_BATCH)     # 0: none
"""

import math

import bitsandbytes as bnb
import torch

from captioner.blip2.lora import get_blip2
from captioner.fast.generation import BUCKET, CHUNK, round_up
from captioner.fast.layers import supports

FAST_BATCH = 512  # images captioned at once, where there is room and nothing else is asked for
WORKSPACE = 3 * 2**30  # bytes that passes of CHUNK images through a full-size model, and the graphs, take


def measure_room(model, max_new_tokens: int) -> int:
    """Room on the model's device now, none for a model that FastGenerator is not made for. Empties torch's cache."""
    if not supports(model):
        return 0
    if model.device.type != "cuda":
        return FAST_BATCH
    torch.cuda.empty_cache()
    return max_batch(model, max_new_tokens, torch.cuda.mem_get_info()[0])


def max_batch(model, max_new_tokens: int, free_bytes: int) -> int:
    """Most rows a batch that FastGenerator has room for in `free_bytes`, which it has not yet taken any of; 0 if none.

    On a GPU those are what torch.cuda.mem_get_info() says, plus what torch has reserved and does not use.
    """
    blip2 = get_blip2(model)
    text, decoder = blip2.config.text_config, blip2.language_model.model.decoder
    size = blip2.get_input_embeddings().weight.element_size()
    if any(isinstance(layer, bnb.nn.Linear4bit) for layer in decoder.modules()):  # a layer, unpacked as it is used
        free_bytes -= 2 * (4 * text.hidden_size + 2 * text.ffn_dim) * text.hidden_size * size
    positions = round_up(blip2.config.num_query_tokens + 1 + max_new_tokens, BUCKET)
    cache = text.num_hidden_layers * 2 * text.hidden_size * positions * size
    row = cache + 12 * text.vocab_size * 4  # logits with fp32 copies, probabilities, and noise in 64 bits
    few = free_bytes // (row + WORKSPACE // CHUNK)
    return max(0, few if few < CHUNK else (free_bytes - WORKSPACE) // row)


def pick_batch_size(room: int, images: int, most: int) -> int:
    """A power of 2 that there is room for, or less, so that the last batch is as large as the others; 0: no room."""
    if not room:
        return 0
    size = min(most, 1 << room.bit_length() - 1)
    return min(size, round_up(math.ceil(images / math.ceil(images / size)), 8))
