"""The Trainer of main.py: what stops it and what it saves.

Shapes: B rows, L positions, V vocabulary.
"""

import dataclasses
import functools
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from captioner.blip2.batches import IGNORED, CaptionCollator
from captioner.data.reading import explain_dead_worker
from captioner.runtime.errors import UserError
from captioner.runtime.files import measure_free
from captioner.runtime.processes import gather
from captioner.training.checkpoints import check_disk, remove_old_checkpoints, seal_checkpoint, step_of
from captioner.training.guards import check_same_weights
from captioner.training.order import LengthSampler

WORKER_SECONDS = 5  # that a worker lives on after SIGTERM
NAMED = 8  # frames of a bad batch that are named


class Stopped(Exception):
    """Training was asked to stop, and has saved its state."""


class Step(NamedTuple):
    """An optimiser step, before it has changed any weight."""

    number: int
    is_finite: torch.Tensor  # whether loss and gradient are numbers
    loss: torch.Tensor  # of all its frames, in all processes
    norm: torch.Tensor  # of the gradient
    losses: torch.Tensor  # (P,) of its passes in this process
    rows: list[torch.Tensor]  # of each pass, the places of its frames in the dataset


class RowCollator:
    """A collator whose batches also have "index": (B,) places of their rows in the dataset, to name them by."""

    def __init__(self, collator: CaptionCollator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if torch.utils.data.get_worker_info() is not None:  # a signal to the group is for the main process to answer
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _outlive_main)
        return self.collator(rows) | {"index": torch.tensor([row["index"] for row in rows])}


def _outlive_main(number, frame) -> None:
    """End this worker, but only when the main process has had time to save what it trained."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)


class CaptionTrainer(Trainer):
    """Trainer that stops at a loss that is no number, seals its checkpoints, and validates by tokens.

    The validation loss is the mean over all caption tokens of the set, as the training loss is over those of a batch:
    the two are on one scale, whatever the batch sizes.
    """

    sampler_class = LengthSampler

    def __init__(self, *args, length_window: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.length_window = length_window
        if self.is_fsdp_enabled:
            fit_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        self.pace: Pace | None = None
        self.results: dict = {}  # what train() measured, once it has come to its end
        self._rows: list[torch.Tensor] = []  # of this optimiser step
        self._losses: list[torch.Tensor] = []
        self._writer, self._writing = ThreadPoolExecutor(1), None  # of the newest checkpoint
        self._to_write: list[Callable] = []  # what is left to the writer
        self._abandoned = threading.Event()

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._writing is not None and self._writing.done():
            self.finish_writing()  # what went wrong is told now
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer would walk over all weights at each step, for longer than a GPU takes for some."""
        return 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._rows.append(inputs.pop("index"))
        loss = self.run_pass(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def run_pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """The loss of a batch, whose gradients are added to those of the step's passes before."""
        return super().training_step(model, inputs, num_items_in_batch)

    def _prepare_for_training(self, *args):
        """Called once before the first step."""
        self.model.train()  # all of it: a model is loaded for inference, and LoRA's wrapper alone is made to train
        if self.args.world_size > 1:  # only DDP would send the first process's weights to the others
            check_same_weights(self.model)
        return super()._prepare_for_training(*args)

    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        optimizer.register_step_post_hook(raise_versions)
        return optimizer

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        """Tells the sampler its epoch, which accelerate fails to when several processes go on within one."""
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(epoch)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _clip_grad_norm(self, model):
        """Called once an optimiser step, after all gradients are there and before any weight has changed."""
        losses = torch.stack(self._losses)
        total, norm = self.clip_gradients(model, losses.sum() / self.args.world_size)
        finite = total.isfinite()
        if not self.args.fp16:  # with fp16 an infinite gradient is no accident: the scaler skips that step
            finite = finite & torch.as_tensor(norm).isfinite()
        step = Step(self.state.global_step + 1, finite, total, norm, losses, self._rows)
        self._rows, self._losses = [], []
        self.check_finite(step)
        return norm

    def clip_gradients(self, model, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the step's gradients. Returns the sum of the losses of all processes, and the norm before.

        All processes get the same: they all stop, or none.
        """
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP's, of parts
        if self.args.world_size > 1:
            torch.distributed.all_reduce(loss)
        return loss, norm

    def check_finite(self, step: Step) -> None:
        """Raise UserError, in all processes, if the step's loss or gradient is no number."""
        if not step.is_finite:
            passes = list(zip(step.losses.isfinite().tolist(), (rows.tolist() for rows in step.rows), strict=True))
            passes = list(itertools.chain.from_iterable(gather(lambda: passes)))
            bad = [row for is_good, rows in passes for row in rows if not is_good]
            bad = bad or [row for _, rows in passes for row in rows]  # the gradient alone: of any of them
            raise UserError(self._describe_bad_batch(step, bad))

    def _describe_bad_batch(self, step: Step, rows: list[int]) -> str:
        names = [self.train_dataset.examples[row].name for row in rows]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return (
            f"step {step.number}: the loss is {step.loss:g} and the gradient norm {step.norm:g}, "
            f"in the batch {', '.join(names[:NAMED])}{more}. Training stopped before that step; the last checkpoint is "
            f"kept in {self.args.output_dir}. Lower --learning-rate, look at those images, or use a GPU with bf16 "
            "(fp16 overflows in the Q-Former)"
        )

    def _get_train_sampler(self, train_dataset=None):
        if not self.length_window:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in self.train_dataset.caption_ids]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self.sampler_class(lengths, step, self.length_window, self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        """By length, against padding: the sum over the set is the same in any order."""
        lengths = [len(ids) for ids in eval_dataset.caption_ids]
        return sorted(range(len(lengths)), key=lambda row: -lengths[row])

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        model = self.model
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # sum of losses, tokens
        self.callback_handler.eval_dataloader = dataloader
        for inputs in dataloader:
            inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "index"})
            with torch.no_grad():
                losses, tokens = self._sum_losses(model, inputs)  # (B,)
            rows = torch.stack([losses.double(), tokens.double()], dim=1)  # (B, 2)
            total += self.accelerator.gather_for_metrics(rows).sum(0)  # on the GPU, which need not wait for each
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss = (total[0] / total[1]).item()
        if not math.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step}: the validation loss is {loss}; the last checkpoint is kept in "
                f"{self.args.output_dir}. Lower --learning-rate, or use a GPU with bf16 (fp16 overflows in the "
                "Q-Former)"
            )
        metrics = {f"{metric_key_prefix}_loss": loss}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataloader.dataset))

    def _sum_losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) sums of the losses of each row's tokens, and (B,) how many these are."""
        with self.compute_loss_context_manager():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits  # (B, L, V)
        losses = [
            F.cross_entropy(row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum")
            for row, label in zip(logits, inputs["labels"], strict=True)
        ]
        return torch.stack(losses), (inputs["labels"] != IGNORED).sum(1)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.finish_writing()

    def finish_writing(self) -> None:
        """Until the newest checkpoint is written and sealed, which a thread does while training goes on."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                writing.result()
            except KeyboardInterrupt:  # a second signal: what is not sealed does not count
                self._abandoned.set()
                wait([writing])
                raise

    def _save_checkpoint(self, model, trial):
        self.finish_writing()
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        copies = 4 if self.is_fsdp_enabled else 3  # weights and two moments in fp32; FSDP writes weights twice
        check_disk(folder, 4 * copies * trainable + 2**22, "a checkpoint")
        with explain_checkpoint(checkpoint):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            writes, self._to_write = self._to_write, []
            self._writing = self._writer.submit(write_checkpoint, checkpoint, writes, self._abandoned)
        if self.pace is not None:
            self.pace.after_save()

    def save_model(self, output_dir=None, _internal_call=False):
        """Of a checkpoint, the weights as they are now, written by the thread.

        With FSDP, Trainer would gather the frozen weights too.
        """
        if self.is_fsdp_enabled:
            self._save(output_dir or self.args.output_dir, state_dict=gather_trainable(self.model))
        elif not _internal_call:
            super().save_model(output_dir)
        elif self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
            self._to_write.append(functools.partial(self._save, output_dir, copy_to_cpu(weights)))

    def _save_optimizer_and_scheduler(self, output_dir):
        """As Trainer does, but AdamW's moments, of twice the size of the weights, are written by the thread."""
        if self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            moments = copy_to_cpu(self.optimizer.state_dict())
            self._to_write.append(functools.partial(torch.save, moments, Path(output_dir) / OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self):
        self.finish_writing()
        self.accelerator.wait_for_everyone()
        super()._load_best_model()


def raise_versions(optimizer: torch.optim.Optimizer, *_) -> None:
    """Count that an optimiser has written its weights, which torch's fused ones don't: captions take them anew then."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def write_checkpoint(checkpoint: Path, writes: Sequence[Callable], abandoned: threading.Event) -> None:
    """Do what is left to write of a checkpoint, seal it, and only then remove older ones; no more once `abandoned`."""
    with explain_checkpoint(checkpoint):
        for write in writes:
            if abandoned.is_set():
                return
            write()
    seal_checkpoint(checkpoint)
    remove_old_checkpoints(checkpoint.parent)


@contextmanager
def explain_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Turn what goes wrong when a checkpoint is written into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = measure_free(checkpoint.parent)  # which torch's own message does not tell
        told = "" if free is None else f"; {free / 1e6:,.0f} MB are free"
        raise explain_dead_worker(error) or UserError(
            f"{checkpoint.parent}: the checkpoint of step {step_of(checkpoint)} can't be written ({error}"
            f"{told}); the ones before are kept: see to the disk, then go on with --resume"
        ) from None


def copy_to_cpu(state):
    """The state with copies of its tensors, on the CPU, in which later steps change nothing."""
    return recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), state)


class Pace(TrainerCallback):
    """Saves within epochs every `minutes`, and saves and stops on SIGTERM and Ctrl-C.

    A second signal stops at once. Use as a context manager around train().
    """

    def __init__(self, minutes: float, steps_per_epoch: int, world_size: int):
        self.seconds, self.steps_per_epoch, self.world_size = 60 * minutes, steps_per_epoch, world_size
        self.signal: int | None = None
        self.saved = time.monotonic()
        self.asked: Callable | None = None  # on a GPU: what gives the answer to what the processes were asked last

    def __enter__(self):
        self._handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(f"\n{signal.Signals(number).name}: stops as soon as the state is saved; again: at once", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_epoch == 0 or state.global_step >= state.max_steps:
            return  # the end of an epoch is saved anyway, after its validation
        due = self.signal is not None or time.monotonic() - self.saved >= self.seconds
        if self.world_size > 1:
            due = self._is_any_due(due, args.device)
        if due:
            control.should_save = True

    def _is_any_due(self, due: bool, device: torch.device) -> bool:
        """Whether a process is due, the same in all of them; on a GPU as of the step before, so that it need not wait.

        The CPU would else launch nothing until the step is done.
        """
        flag = torch.full((1,), float(due), device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        if not flag.is_cuda:
            return bool(flag)
        before, self.asked = self.asked, send_to_cpu(flag)
        return before is not None and bool(before())

    def after_save(self) -> None:
        self.saved, self.asked = time.monotonic(), None
        if any(gather(lambda: self.signal is not None)):
            raise Stopped


def send_to_cpu(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to copy values to the CPU while the GPU goes on; what is returned gives them, without waiting for more."""
    copy = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event() if values.is_cuda else None
    if arrived:
        arrived.record()

    def get() -> torch.Tensor:
        if arrived:
            arrived.synchronize()
        return copy

    return get


def fit_fsdp(plugin, model) -> None:
    """Make accelerate's settings for FSDP fit this model: called before anything is spread.

    It wraps only layers that are there, the ViT's being gone once its outputs are stored; and losses and the sums of
    gradients, which are LoRA's alone, stay in fp32, while accelerate rounds them to the precision of the weights.
    """
    there = {type(module).__name__ for module in model.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in plugin.transformer_cls_names_to_wrap if name in there]
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )


def gather_trainable(model) -> dict[str, torch.Tensor]:
    """LoRA's whole weights, on the CPU of the first process, of a model that FSDP spreads; called in all processes."""
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
