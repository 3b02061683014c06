"""The Trainer of main.py: what stops it, what it saves, and how many frames fit into one forward pass.

Shapes: B rows, L positions, V vocabulary.
"""

import math
import pickle
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import EvalLoopOutput

from caption_loss import caption_nll
from checkpoints import check_disk, seal_checkpoint
from config import UserError
from model import IGNORED, CaptionCollator, CaptionDataset
from pictures import explain_dead_worker
from speed import FastStep, LengthSampler

CPU_MICRO_BATCH = 4  # frames a forward pass on a CPU, where more only take memory
SPARE_MEMORY = 0.05  # share of a GPU that a micro-batch must leave free
WORKER_SECONDS = 5  # that a worker lives on after SIGTERM
NAMED = 8  # frames of a bad batch that are named


class Stopped(Exception):
    """Training was asked to stop, and has saved its state."""


class RowCollator:
    """A collator whose batches also have "index": (B,) places of their rows in the dataset, to name them by.

    With `pin` it puts tensors of the CPU into pinned memory, where the loader can't since others are on the GPU: a copy
    from elsewhere would wait for all that the GPU has to do.
    """

    def __init__(self, collator: CaptionCollator, pin: bool = False):
        self.collator, self.pin = collator, pin

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if torch.utils.data.get_worker_info() is not None:  # a signal to the group is for the main process to answer
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _outlive_main)
        batch = self.collator(rows) | {"index": torch.tensor([row["index"] for row in rows])}
        return {k: v.pin_memory() if v.device.type == "cpu" else v for k, v in batch.items()} if self.pin else batch


def _outlive_main(number, frame) -> None:
    """End this worker, but only when the main process has had time to save what it trained."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)


class CaptionTrainer(Trainer):
    """Trainer that stops at a loss that is no number, seals its checkpoints, and validates by tokens.

    The validation loss is the mean over all caption tokens of the set, as the training loss is over those of a batch:
    the two are on one scale, whatever the batch sizes.
    """

    def __init__(self, *args, fast_step: FastStep | None = None, length_window: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_step, self.length_window = fast_step, length_window
        self.pace: Pace | None = None
        self._rows: list[torch.Tensor] = []  # of this optimiser step
        self._losses: list[torch.Tensor] = []
        self._unchecked: tuple | None = None  # what check_finite needs to know of the last step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._rows.append(inputs.pop("index"))
        if self.fast_step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            if not model.training:
                model.train()
            loss = self.fast_step(self._prepare_inputs(inputs), num_items_in_batch)
        self._losses.append(loss)
        return loss

    def _clip_grad_norm(self, model):
        """Called once an optimiser step, after all gradients are there and before any weight has changed."""
        if self.fast_step is None:
            norm = super()._clip_grad_norm(model)
        else:  # the same, without a walk over the thousands of frozen weights
            norm = torch.nn.utils.clip_grad_norm_(self.fast_step.weights, self.args.max_grad_norm)
        losses = torch.stack(self._losses)  # (accumulation steps,)
        # with fp16 an infinite gradient is no accident: the scaler skips that step
        finite = losses.isfinite() if self.args.fp16 else losses.isfinite() & torch.as_tensor(norm).isfinite()
        self.check_finite()
        all_finite = finite.all().to("cpu", non_blocking=True)  # on its way while the GPU goes on
        arrived = torch.cuda.Event() if finite.is_cuda else None
        if arrived:
            arrived.record()
        self._unchecked = (arrived, all_finite, self.state.global_step + 1, losses, norm, finite, self._rows)
        self._rows, self._losses = [], []
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if self.fast_step is not None and optimizer.defaults.get("fused"):
            # the GPU itself leaves the step out; to look now would have it wait until the next one is launched
            optimizer.found_inf = 1 - finite.all().float()
        else:
            self.check_finite()
        return norm

    def check_finite(self) -> None:
        """Raise UserError if the last step's loss or gradient was no number. It has not changed any weight then."""
        if self._unchecked is None:
            return
        (arrived, all_finite, step, losses, norm, finite, batches), self._unchecked = self._unchecked, None
        if arrived:
            arrived.synchronize()  # with that step alone: what was launched after it runs on
        if not all_finite:
            bad = [row for rows, good in zip(batches, finite.tolist(), strict=True) if not good for row in rows]
            raise UserError(self._describe_bad_batch(step, losses, norm, bad))

    def _describe_bad_batch(self, step, losses, norm, rows) -> str:
        names = [self.train_dataset.examples[int(row)].name for row in rows]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return (
            f"step {step}: the loss is {losses.sum().item():g} and the gradient norm {norm:g}, "
            f"in the batch {', '.join(names[:NAMED])}{more}. Training stopped before that step; the last checkpoint is "
            f"kept in {self.args.output_dir}. Lower --learning-rate, look at those pictures, or use a GPU with bf16 "
            "(fp16 overflows in the Q-Former)"
        )

    def _get_train_sampler(self, train_dataset=None):
        if not self.length_window:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in self.train_dataset.caption_ids]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthSampler(lengths, step, self.length_window, self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        """By length, against padding: the sum over the set is the same in any order."""
        rows = range(len(eval_dataset))
        return sorted(rows, key=lambda row: -len(eval_dataset.caption_ids[row]))

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        self.check_finite()
        model = self.model
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, tokens
        self.callback_handler.eval_dataloader = dataloader
        for inputs in dataloader:
            inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "index"})
            with torch.no_grad():
                losses = self._sum_losses(model, inputs)  # (B,)
            rows = torch.stack([losses.double(), (inputs["labels"] != IGNORED).sum(1).double()], dim=1)  # (B, 2)
            total += self.accelerator.gather_for_metrics(rows).sum(0).cpu()
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

    def _sum_losses(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(B,) sums of the losses of each row's tokens."""
        if self.fast_step is not None:
            return self.fast_step.evaluate(inputs)
        with self.compute_loss_context_manager():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits  # (B, L, V)
        losses = [
            F.cross_entropy(row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum")
            for row, label in zip(logits, inputs["labels"], strict=True)
        ]
        return torch.stack(losses)

    def _save_checkpoint(self, model, trial):
        self.check_finite()
        folder = Path(self.args.output_dir)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        check_disk(folder, 12 * trainable + 2**22, "a checkpoint")  # weights and two moments in fp32
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(folder).free / 1e6  # which torch's own message does not tell
            raise explain_dead_worker(error) or UserError(
                f"{folder}: the checkpoint of step {self.state.global_step} can't be written ({error}; {free:,.0f} MB "
                "are free); the ones before are kept: see to the disk, then go on with --resume"
            ) from None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(folder / f"checkpoint-{self.state.global_step}")
        if self.pace is not None:
            self.pace.after_save()


class Pace(TrainerCallback):
    """Saves within epochs every `minutes`, and saves and stops on SIGTERM and Ctrl-C.

    A second signal stops at once. Use as a context manager around train().
    """

    def __init__(self, minutes: float, steps_per_epoch: int, world_size: int):
        self.seconds, self.steps_per_epoch, self.world_size = 60 * minutes, steps_per_epoch, world_size
        self.signal: int | None = None
        self.saved = time.monotonic()

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
        if self.world_size > 1:  # all processes save at the same step
            flag = torch.tensor([float(due)], device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            due = bool(flag.item())
        if due:
            control.should_save = True

    def after_save(self) -> None:
        self.saved = time.monotonic()
        stop = self.signal is not None
        if self.world_size > 1:
            stop = any(_gather(stop, self.world_size))
        if stop:
            raise Stopped


def _gather(value, world_size: int) -> list:
    values = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def check_pickles(checkpoint: Path) -> None:
    """Raise UserError unless what is pickled in a checkpoint holds tensors and numbers alone; nothing of it is run."""
    remedy = "is not opened; if the checkpoint is your own, start anew with --overwrite"
    for name in ("adapter_model.bin", "pytorch_model.bin"):
        if (checkpoint / name).exists():
            raise UserError(f"{checkpoint / name}: a pickle, which this program never writes, {remedy}")
    for path in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        try:
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: holds other things than tensors ({reason}) and {remedy}") from None


# --------------------------------------------------------------------------------------------------------------
# micro-batch


def list_micro_batches(batch_size: int) -> list[int]:
    """The sizes that divide an effective batch of `batch_size` on one device, largest first."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def find_micro_batch(
    model, dataset: CaptionDataset, collator: CaptionCollator, batch_size: int, device, dtype, fast: bool
) -> int:
    """The most frames, of those that divide `batch_size`, whose forward and backward pass fit the device.

    Tried with the longest captions of the dataset; on a CPU the most up to CPU_MICRO_BATCH. Gradients are cleared.
    """
    sizes = list_micro_batches(batch_size)
    if device.type == "cpu":
        return next(size for size in sizes if size <= CPU_MICRO_BATCH)
    longest = sorted(range(len(dataset)), key=lambda row: -len(dataset.caption_ids[row]))
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # bytes of AdamW's state
    total = torch.cuda.get_device_properties(device).total_memory
    outside = total - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)  # of other programs
    for size in sizes:
        rows = [dataset[longest[place % len(longest)]] for place in range(size)]
        torch.cuda.reset_peak_memory_stats(device)
        if _fits(model.train(), {k: v.to(device) for k, v in collator(rows).items()}, dtype, fast):
            peak = torch.cuda.max_memory_allocated(device)
            if peak + moments + outside <= (1 - SPARE_MEMORY) * total:
                break
    torch.cuda.reset_peak_memory_stats(device)
    return size


def _fits(model, batch: dict[str, torch.Tensor], dtype: torch.dtype, fast: bool) -> bool:
    try:
        if fast:
            loss = caption_nll(model, **batch).sum()
        else:
            with torch.autocast("cuda", dtype):
                loss = model(**batch).loss
        loss.backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad()
        torch.cuda.empty_cache()
