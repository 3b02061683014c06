"""The kernels that train a model, built ahead: Triton takes seconds for that, which a GPU can use for other things."""

import torch
from torch import nn

from captioner.blip2.lora import get_blip2
from captioner.fast.kernels import choice
from captioner.fast.kernels.dropout import Drop
from captioner.fast.kernels.head import softmax_nll
from captioner.fast.kernels.lora import lora_backward, project_low
from captioner.fast.kernels.norm import AddAndNorm

SIZE = 16  # rows and columns of what the kernels are tried with: they are built for any number of them
# Of LoRA: layers that read the same input, whether that has a gradient, and whether it is a ReLU's result
FORMS = ((3, True, False), (1, True, True), (1, True, False), (2, False, False), (3, False, False))


def build_kernels(model, rank: int) -> None:
    """Build what training a model with LoRA of that rank takes, on the model's GPU. Draws no random numbers.

    These are all of them for ranks that are multiples of 16. What else a pass needs is built when it comes to it.
    """
    blip = get_blip2(model)
    like = blip.get_input_embeddings().weight.detach()
    if not choice.use_kernels(like):
        return
    with torch.cuda.device_of(like):  # a new thread's current GPU is the first
        places = torch.zeros(SIZE, dtype=torch.int64, device=like.device)
        x, drop = like.new_zeros(SIZE, SIZE), Drop(0.0, places[:1], site=0)
        for layers, has_gradient, after_relu in FORMS:
            a, b = x.new_zeros(layers * rank, SIZE), x.new_zeros(layers * SIZE, rank)
            low = x.new_zeros(SIZE, len(a))
            project_low(x, a, low, drop, b, b.new_zeros(len(b), len(a)))
            lora_backward(x if has_gradient else None, x, low, a, drop, after_relu)
        for width in (blip.config.qformer_config.hidden_size, blip.config.text_config.hidden_size):
            x = like.new_zeros(SIZE, width).requires_grad_()
            sums = AddAndNorm.apply(x, x, drop, nn.LayerNorm(width, device=like.device, dtype=like.dtype))
            torch.autograd.grad(sums, x, sums)
        softmax_nll(like.new_zeros(SIZE, len(like)), places, -100, 1.0)
