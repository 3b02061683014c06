"""What makes training fast on a GPU beside the loss as written out in caption_loss.py.

Levers, each with a switch in config.py: NF4 weights unpacked once instead of at each use (unpack_nf4); weights of
layers that read the same input side by side (join_weights); the launches of one forward and backward pass recorded once
and replayed (FastStep); passes without padding (packing.PackedCollator) of about one size (packing.PackedSampler). With
FastStep, LoRA's weights, gradients and AdamW's moments are one tensor each (JoinedAdamW). trainer.py trains with them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from captioner.blip2.loading import pick_dtype
from captioner.blip2.lora import get_blip2
from captioner.fast import caption_loss
from captioner.fast.caption_loss import caption_nll, embed_pixels, text_nll
from captioner.fast.layers import (
    bind_parts,
    copy_lora,
    get_base,
    has_active_lora,
    has_kernel_rank,
    join_linears,
    join_lora,
    list_groups,
    list_matrices,
    read_weight,
)
from captioner.runtime.errors import UserError
from captioner.runtime.processes import is_sharded
from config import TrainConfig

T = TypeVar("T")
INPUTS = ("pixel_values", "input_ids", "labels", "starts", "longest")  # of a pass
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW's state
UNPACKING_ROOM = 3  # the GPU must have so many times the memory free that unpacked weights take


# --------------------------------------------------------------------------------------------------------------
# weights


def unpack_nf4(model) -> int:
    """Put layers of 16 bits with the same values in place of the NF4 layers. Returns how many.

    The product of an NF4 layer is computed from unpacked weights at each use: doing it once changes no digit.
    """
    packed = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, bnb.nn.Linear4bit)
    ]
    for parent, name, layer in packed:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(read_weight(layer), requires_grad=False)
        plain.bias = layer.bias
        setattr(parent, name, plain)
    return len(packed)


def join_weights(model) -> None:
    """Put weights of layers that read the same input beside each other in memory, to be used as one.

    Where Triton kernels are used, there is room for LoRA beside them, which so needs fewer products of its own. The
    layers keep their weights, as parts of it. NF4 weights stay as they are.
    """
    for group in list_groups(model):
        bases = [get_base(layer) for layer in group]
        room = sum(count_rank(layer) for layer in group)
        if (len(bases) == 1 and not room) or any(isinstance(base, bnb.nn.Linear4bit) for base in bases):
            continue
        weight, bias = (part.detach() for part in join_linears(group))
        if room:
            weight = F.pad(weight, (0, room))[:, : weight.shape[1]]
        bases[0].joined = weight, bias
        sizes = [base.out_features for base in bases]
        for base, weight_part, bias_part in zip(bases, weight.split(sizes), bias.split(sizes), strict=True):
            base.weight.data, base.bias.data = weight_part, bias_part


def count_rank(layer) -> int:
    """The rank of the layer's LoRA if Triton kernels take it, else 0."""
    ranks = layer.r.values() if has_active_lora(layer) else ()
    return sum(rank for rank in ranks if has_kernel_rank(layer.weight, rank))


def has_room_to_unpack(model, device: torch.device) -> bool:
    """Whether a GPU has memory to spare for the weights of NF4 layers in 16 bits."""
    if device.type != "cuda":
        return False
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    need = 2 * sum(layer.in_features * layer.out_features for layer in layers)  # bytes
    return torch.cuda.mem_get_info(device)[0] > UNPACKING_ROOM * need


# --------------------------------------------------------------------------------------------------------------
# one pass


def record_graph(work: Callable[[], T], pool=None, warm_up: bool = True) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph that does what work() launches, and the tensors that each replay writes anew.

    `warm_up` does the work once before: libraries set themselves up then, which must not be recorded.
    """
    if warm_up:
        run_aside(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may pin memory
        result = work()
    return graph, result


def run_aside(work: Callable[[], object]) -> None:
    """Do the work on another stream, as what comes before a recording must be."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)


def add_over_processes(parts: Iterable[Tensor]) -> list:
    """Make each tensor the sum over all processes in the background; what is returned waits for it."""
    if not torch.distributed.is_initialized():
        return []
    return [torch.distributed.all_reduce(part, async_op=True) for part in parts if part.numel()]


class FastStep:
    """Loss and gradients of one micro-batch: step(batch, tokens) -> loss, gradients are added to .grad; and validation.

    All gradients are parts of one tensor. A pass has two stages: several processes add up the gradients of the language
    model's LoRA while those of the Q-Former's are computed, and these with add_up. On a GPU with `cuda_graphs` each
    stage is recorded as a CUDA graph for each size of batch; the random numbers are those of a pass that is not.
    """

    def __init__(self, model, cuda_graphs: bool):
        self.model, self.cuda_graphs = model, cuda_graphs
        self.whole, self.weights = join_lora(model)  # (N,) and the parts of it that are trained
        self.sums = self.whole.new_zeros(len(self.whole) + 1)  # gradients, and a place for the loss; see add_up
        self.flat = self.whole.grad = self.sums[:-1]
        parts = self.split(self.flat)
        self.gradients = [part.view_as(weight) for part, weight in zip(parts, self.weights, strict=True)]

        # where B's begin, and which part is the language model's: see list_lora
        text = {id(weight) for weight in get_blip2(model).language_model.parameters()}
        all_a, all_b = self.weights[: len(self.weights) // 2], self.weights[len(self.weights) // 2 :]
        self.first_b = sum(weight.numel() for weight in all_a)
        start = sum(weight.numel() for weight in all_a if id(weight) not in text)
        end = self.first_b + sum(weight.numel() for weight in all_b if id(weight) in text)
        self.text, self.ends = slice(start, end), (slice(start), slice(end, None))

        self.adding: list = []  # what processes add up in the background
        self.recordings: dict[tuple, tuple] = {}
        self.pool = torch.cuda.graph_pool_handle() if cuda_graphs else None

    def __call__(self, batch: dict[str, Tensor], tokens: Tensor | int, is_last: bool) -> Tensor:
        """batch as of PackedCollator on the model's device; tokens of the whole optimiser step, for the mean.

        `is_last`: no other pass of the optimiser step follows.
        """
        assert not self.adding, "a pass after the last"
        before = None if self.weights[0].grad is None else self.flat.clone()  # of this step's passes
        tokens = torch.as_tensor(tokens, dtype=torch.float32, device=batch["labels"].device)
        stages = self._run(self._learn, {name: batch[name] for name in INPUTS} | {"tokens": tokens})
        loss = next(stages).clone()
        if before is not None:
            self.flat[self.text] += before[self.text]
        if is_last:
            self.adding = add_over_processes([self.flat[self.text]])
        next(stages, None)
        if before is not None:
            for end in self.ends:
                self.flat[end] += before[end]
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        return loss

    def zero_grad(self) -> None:
        """Begin an optimiser step anew."""
        for weight in self.weights:
            weight.grad = None

    def split(self, whole: Tensor) -> Sequence[Tensor]:
        """The part of each weight of a tensor (N,)."""
        return whole.split([weight.numel() for weight in self.weights])

    def add_up(self, loss: Tensor) -> Tensor:
        """Make the gradients, and the loss that is returned, the sums over all processes.

        Called in each, after the last pass of an optimiser step. As each loss is divided by the tokens of the whole
        step, these are the gradients of the step's mean.
        """
        self.sums[-1] = loss
        rest = add_over_processes([self.sums[end] for end in self.ends])
        assert self.adding or not rest or self.text.start == self.text.stop, "no pass was the last"
        for work in (*self.adding, *rest):
            work.wait()
        self.adding = []
        return self.sums[-1].clone()

    def clip(self, max_norm: float) -> Tensor:
        """The norm of all gradients, which are scaled down to it if it is larger: clip_grad_norm_."""
        norm = torch.linalg.vector_norm(self.flat)
        self.flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1))
        return norm

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,) sums of each row's losses, without gradients; the model is in eval mode."""
        return next(self._run(self._sum, {name: batch[name] for name in INPUTS})).clone()

    # Each stage gives its result, and the stage after it or None.

    def _sum(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return caption_nll(self.model, **batch), None

    def _learn(self, batch: dict[str, Tensor]) -> tuple[Tensor, Callable | None]:
        """The loss, and gradients of the language model's LoRA, which are written, not added."""
        lora = copy_lora(self.model)
        image = embed_pixels(self.model, batch["pixel_values"], lora)
        read = image.detach().requires_grad_()
        loss = text_nll(self.model, read, lora, **batch).sum() / batch["tokens"]

        text, qformer, start = [], [], 0  # matrices, and where their gradients go
        for matrix in list_matrices(lora):
            part = text if self.text.start <= start < self.text.stop else qformer
            part.append((matrix, self.flat[start : start + matrix.numel()].view_as(matrix)))
            start += matrix.numel()
        wanted = [matrix for matrix, _ in text] + ([read] if qformer else [])
        gradients = list(torch.autograd.grad(loss, wanted))
        grad_image = gradients.pop() if qformer else None
        if text:
            torch._foreach_copy_([place for _, place in text], gradients)
            self.flat[self.first_b : self.text.stop] *= lora.scale

        def learn_qformer() -> tuple[None, None]:
            matrices, places = zip(*qformer, strict=True)
            torch._foreach_copy_(places, torch.autograd.grad(image, matrices, grad_image))
            self.flat[self.ends[1]] *= lora.scale
            return None, None

        return loss.detach(), learn_qformer if qformer else None

    def _run(self, stage: Callable, batch: dict[str, Tensor]) -> Iterator[Tensor | None]:
        """The results of stage(batch) and of those after it, each of which is run when its result is asked for."""
        return self._replay(stage, batch) if self.cuda_graphs else run_stages(functools.partial(stage, batch))

    def _replay(self, stage: Callable, batch: dict[str, Tensor]) -> Iterator[Tensor | None]:
        """The same from recordings."""
        bind_parts(self.whole, self.weights)  # a recording reads the whole
        key = (stage.__name__, len(batch["labels"]), len(batch["starts"]), batch["longest"])
        if key not in self.recordings:
            self.recordings[key] = self._record(stage, batch)
        inputs, stages = self.recordings[key]
        for name, value in batch.items():
            if torch.is_tensor(value):
                inputs[name].copy_(value)
        for graph, result in stages:
            graph.replay()
            yield result

    def _record(self, stage: Callable, batch: dict[str, Tensor]) -> tuple[dict, list[tuple]]:
        """Where a batch is to be put, and the recording and the result of each stage."""
        inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in batch.items()}
        random, stages = torch.cuda.get_rng_state(), []
        following = functools.partial(stage, inputs)
        if not any(name == stage.__name__ for name, *_ in self.recordings):
            run_aside(lambda: list(run_stages(following)))  # a whole pass: each stage goes on from the one before
        while following is not None:
            graph, (result, following) = record_graph(following, self.pool, warm_up=False)
            stages.append((graph, result))
        torch.cuda.set_rng_state(random)
        return inputs, stages


def run_stages(stage: Callable | None) -> Iterator:
    """The result of each stage, a function that gives it and the stage after it or None."""
    while stage is not None:
        result, stage = stage()
        yield result


class JoinedAdamW(torch.optim.AdamW):
    """AdamW of a FastStep's weights, computed as of one tensor.

    The fused kernel has one block of threads for each 65,536 values of a weight, and LoRA's have fewer: most of a GPU
    would be idle. The state of each weight is a part of one tensor too, and is saved and loaded as AdamW's.
    """

    def __init__(self, groups: list[dict], fast_step: FastStep, **options):
        super().__init__(groups, **options)
        self.fast_step = fast_step
        self.joined = torch.optim.AdamW([fast_step.whole], **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        [group] = [group for group in self.param_groups if group["params"]]
        self.joined.param_groups[0] |= {name: value for name, value in group.items() if name != "params"}
        if hasattr(self, "found_inf"):  # the kernel leaves the step out
            self.joined.found_inf = self.found_inf
        self.joined.step()
        if not self.state:
            self._share_state()

    def state_dict(self) -> dict:
        for state in self.state.values():
            state["step"] = self.joined.state[self.fast_step.whole]["step"].clone()  # AdamW counts each weight's
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.state:
            states = [self.state[weight] for weight in self.fast_step.weights]
            moments = {name: torch.cat([state[name].flatten() for state in states]) for name in MOMENTS}
            self.joined.state[self.fast_step.whole] = {"step": states[0]["step"].clone(), **moments}
            self._share_state()

    def _share_state(self) -> None:
        """Make each weight's state a part of the whole."""
        whole = self.joined.state[self.fast_step.whole]
        moments = zip(*(self.fast_step.split(whole[name]) for name in MOMENTS), strict=True)
        for weight, parts in zip(self.fast_step.weights, moments, strict=True):
            views = {name: part.view_as(weight) for name, part in zip(MOMENTS, parts, strict=True)}
            self.state[weight] = {"step": whole["step"], **views}


def use_fast_step(config: TrainConfig, model, device: torch.device) -> bool:
    """Whether FastStep is wanted and possible."""
    obstacle = (
        "weights that FSDP spreads over the GPUs"
        if is_sharded()
        else "a GPU without bf16"
        if pick_dtype(device) == torch.float16
        else "a language model of another form than OPT-2.7B's"
        if not caption_loss.supports(model)
        else None
    )
    if config.fast.fast == "on" and obstacle:
        raise UserError(f"--fast on: not made for {obstacle}; use --fast auto")
    return config.fast.fast == "on" or (device.type == "cuda" and not obstacle)
