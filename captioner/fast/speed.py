"""What makes training fast on a GPU beside the loss as written out in caption_loss.py.

NF4 weights are unpacked once instead of at each use where there is room (unpack_nf4); weights of layers that read the
same input lie side by side (join_weights); the launches of a pass are recorded once and replayed, with LoRA's weights,
gradients and AdamW's moments as one tensor each (FastStep); passes are without padding (packing.PackedCollator) and of
about one size (packing.PackedSampler). trainer.py trains with them.
"""

import functools
from collections.abc import Callable

import bitsandbytes as bnb
import peft
import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.fast.adapters import list_lora
from captioner.fast.caption_loss import caption_nll
from captioner.fast.kernels import lora
from captioner.fast.layers import supports
from captioner.fast.linears import get_base, has_active_lora, join_linears, list_groups, read_weight
from captioner.runtime.errors import UserError
from captioner.runtime.processes import is_sharded
from config import TrainConfig

# --------------------------------------------------------------------------------------------------------------
# weights


def unpack_nf4(model) -> int:
    """Put layers of 16 bits with the same values in place of the NF4 layers. Returns how many.

    The product of an NF4 layer is computed from unpacked weights at each use: doing it once changes no digit.
    """
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    for name, layer in packed.items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(read_weight(layer), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)
    return len(packed)


def merge_lora(model) -> bool:
    """Add LoRA to the weights that it adapts, unless some of them are NF4. Returns whether it was done."""
    adapted = list(filter(has_active_lora, model.modules()))
    if any(isinstance(layer.base_layer, bnb.nn.Linear4bit) for layer in adapted):
        return False
    for layer in adapted:
        peft.tuners.lora.Linear.merge(layer)  # that of a layer that was NF4 would quantise the sum
    return bool(adapted)


def join_weights(model) -> None:
    """Put weights of layers that read the same input beside each other in memory, to be used as one.

    Where Triton kernels are used, there is room for LoRA beside them, which so needs fewer products of its own. The
    layers keep their weights, as parts of it. NF4 weights stay as they are.
    """
    for group in list_groups(model):
        bases = [get_base(layer) for layer in group]
        room = count_ranks(group)
        if (len(bases) == 1 and not room) or any(isinstance(base, bnb.nn.Linear4bit) for base in bases):
            continue
        weight, bias = (part.detach() for part in join_linears(group))
        if room:
            weight = F.pad(weight, (0, room))[:, : weight.shape[1]]
        bases[0].joined = weight, bias
        sizes = [base.out_features for base in bases]
        for base, weight_part, bias_part in zip(bases, weight.split(sizes), bias.split(sizes), strict=True):
            base.weight.data, base.bias.data = weight_part, bias_part


def count_ranks(group) -> int:
    """The sum of the ranks of layers' LoRA; 0 where there is no room for them, or it would misalign rows in memory."""
    ranks = sum(sum(layer.r.values()) for layer in group if has_active_lora(layer))
    return ranks if lora.use_kernels(get_base(group[0]).weight, ranks) and ranks % 8 == 0 else 0


def has_room_to_unpack(model, device: torch.device, times: float = 3) -> bool:
    """Whether a GPU has so many times the memory free that the weights of NF4 layers take in 16 bits."""
    if device.type != "cuda":
        return False
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    need = 2 * sum(layer.in_features * layer.out_features for layer in layers)  # bytes
    return torch.cuda.mem_get_info(device)[0] > times * need


# --------------------------------------------------------------------------------------------------------------
# one pass


def record_graph(work: Callable[[], Tensor | None], pool=None) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """A CUDA graph that does what work() launches, and its result, which each replay writes anew.

    Such work must have been done before: libraries set themselves up then, which can't be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may pin memory
        result = work()
    return graph, result


class FastStep:
    """Loss and gradients of one micro-batch: step(batch, tokens) -> loss, gradients are added up; and validation.

    LoRA's weights are one tensor, `whole` (N,), which an optimiser takes as its only parameter, and so are their
    gradients, `whole.grad`. On a GPU with `cuda_graphs` a pass is recorded as a CUDA graph for each size of batch; the
    random numbers are those of a pass that is not.
    """

    def __init__(self, model, cuda_graphs: bool):
        self.model, self.cuda_graphs = model, cuda_graphs
        self.weights = list_lora(model)[1]  # which the layers keep, as parts of the whole
        self.whole = torch.nn.Parameter(torch.nn.utils.parameters_to_vector(self.weights))
        torch.nn.utils.vector_to_parameters(self.whole, self.weights)
        self.whole.grad = torch.zeros_like(self.whole)
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if cuda_graphs else None

    def __call__(self, batch: dict[str, Tensor], tokens: Tensor | int, scale: Tensor | float = 1.0) -> Tensor:
        """batch as of PackedCollator on the model's device; tokens of the whole optimiser step, for the mean.

        `scale`: what gradients, but not the loss, are multiplied by.
        """
        device, factors = batch["labels"].device, {"tokens": tokens, "scale": scale}
        factors = {name: torch.as_tensor(x, dtype=torch.float32, device=device) for name, x in factors.items()}
        return self._run(self._learn, batch | factors)

    def zero_grad(self) -> None:
        """Begin an optimiser step anew."""
        self.whole.grad.zero_()

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) sums of each row's losses, without gradients; the model is in eval mode."""
        return self._run(self._sum, batch)

    def _sum(self, **batch) -> Tensor:
        return caption_nll(self.model, **batch, whole=self.whole)

    def _learn(self, tokens: Tensor, scale: Tensor, **batch) -> Tensor:
        loss = self._sum(**batch).sum() / tokens
        self.whole.grad += torch.autograd.grad(loss * scale, self.whole)[0]
        return loss.detach()

    def _run(self, work: Callable, batch: dict[str, Tensor]) -> Tensor:
        """work(**batch), from a recording where passes are recorded."""
        assert self.weights[0].data_ptr() == self.whole.data_ptr(), "LoRA's weights were moved out of the whole"
        if not self.cuda_graphs:
            return work(**batch)
        key = (work.__name__, len(batch["labels"]), len(batch["starts"]), batch["longest"])
        if key not in self.recordings:
            self.recordings[key] = self._record(work, batch)
        inputs, graph, result = self.recordings[key]
        for name, value in batch.items():
            if torch.is_tensor(value):
                inputs[name].copy_(value)
        graph.replay()
        return result.clone()

    def _record(self, work: Callable, batch: dict[str, Tensor]) -> tuple[dict, torch.cuda.CUDAGraph, Tensor]:
        """Where a batch is to be put, the recording, and its result."""
        inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        random, gradients = torch.cuda.get_rng_state(), self.whole.grad.clone()
        if not any(name == work.__name__ for name, *_ in self.recordings):
            work(**inputs)
        graph, result = record_graph(functools.partial(work, **inputs), self.pool)
        self.whole.grad.copy_(gradients)
        torch.cuda.set_rng_state(random)
        return inputs, graph, result


def find_obstacle(config: TrainConfig, model, device: torch.device) -> str | None:
    """What FastStep is not made for; None where it is wanted and possible."""
    obstacle = None if supports(model) else "a language model of another form than OPT-2.7B's"
    if is_sharded():
        obstacle = "weights that FSDP spreads over the GPUs"
    if config.fast.fast == "on" and obstacle:
        raise UserError(f"--fast on: not made for {obstacle}; use --fast auto")
    return obstacle if config.fast.fast == "on" or device.type == "cuda" else "a CPU (--fast on takes it all the same)"
