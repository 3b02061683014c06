"""The Trainer of main.py: what it checks, and how it validates.

Shapes: B rows, L positions, V vocabulary.
"""

import math
import signal

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import EvalLoopOutput

from captioner.blip2.batches import IGNORED, CaptionCollator, get_reader, list_lengths
from captioner.runtime.errors import UserError
from captioner.training.checkpoints import SealedTrainer
from captioner.training.guards import Step, check_same_weights, check_steps
from captioner.training.order import LengthSampler

WORKER_SECONDS = 5  # that a worker lives on after SIGTERM


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


# The private methods of transformers' Trainer that SealedTrainer, CaptionTrainer and FastTrainer override. A release of
# transformers that renames one would silently pass over ours: tests/training/test_training.py looks for each.
PRIVATE_HOOKS = (
    "_prepare_for_training",  # once, before the first step
    "_run_epoch",  # around an epoch
    "_clip_grad_norm",  # once an optimiser step, after all gradients are there and before any weight has changed
    "_maybe_log_save_evaluate",  # after each optimiser step and at the end of an epoch
    "_save_checkpoint",
    "_save_rng_state",
    "_load_best_model",
    "_get_train_sampler",
    "_get_eval_sampler",
)


class CaptionTrainer(SealedTrainer):
    """Trainer that stops at a loss that is no number, and validates by tokens.

    The validation loss is the mean over all caption tokens of the set, as the training loss is over those of a batch:
    the two are on one scale, whatever the batch sizes.
    """

    sampler_class = LengthSampler

    def __init__(self, *args, length_window: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.length_window = length_window
        self._rows: list[torch.Tensor] = []  # of the passes of this optimiser step
        self._losses: list[torch.Tensor] = []
        self._steps: list[Step] = []  # that nobody has looked at

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer would walk over all weights at each step, for longer than a GPU takes for some."""
        return 0

    def log(self, logs, *args, **kwargs):
        logs.pop("total_flos", None)  # which are not counted
        super().log(logs, *args, **kwargs)

    # one step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._rows.append(inputs.pop("index"))
        loss = self.run_pass(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        return loss

    def run_pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """The loss of a batch, whose gradients are added to those of the step's passes before."""
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        losses, norm = torch.stack(self._losses), self.clip_gradients(model)
        total = losses.sum() / self.args.world_size
        if self.args.world_size > 1:  # all processes get the same: they all stop at a bad one, or none
            torch.distributed.all_reduce(total)
        finite = total.isfinite()
        if not self.args.fp16:  # with fp16 an infinite gradient is no accident: the scaler skips that step
            finite = finite & torch.as_tensor(norm).isfinite()
        self._steps.append(Step(self.state.global_step + 1, finite, total, norm, losses, self._rows))
        self._rows, self._losses = [], []
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if optimizer.defaults.get("fused") and not self.is_fsdp_enabled:
            # the optimiser itself leaves a bad step out: to look now would have the GPU wait for the next step's launch
            optimizer.found_inf = 1 - finite.float()
        else:
            self.check_steps()
        return norm

    def clip_gradients(self, model) -> torch.Tensor:
        """Clip the step's gradients. Returns their norm before, the same in all processes."""
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP's, of parts

    def check_steps(self) -> None:
        steps, self._steps = self._steps, []
        check_steps(steps, self.train_dataset, self.args.output_dir)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.check_steps()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # what a run begins with

    def _prepare_for_training(self, *args):
        self.model.train()  # all of it: a model is loaded for inference, and LoRA's wrapper alone is made to train
        if self.args.world_size > 1:  # only DDP would send the first process's weights to the others
            check_same_weights(self.model)
        return super()._prepare_for_training(*args)

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        """Tells the sampler its epoch, which accelerate fails to when several processes go on within one."""
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        if hasattr(batches.sampler, "set_epoch"):
            batches.sampler.set_epoch(epoch)
        get_reader(self.train_dataset).epoch = epoch  # before workers start that read rows
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if not self.length_window:
            return super()._get_train_sampler(train_dataset)
        lengths = list_lengths(self.train_dataset)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self.sampler_class(lengths, step, self.length_window, self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        """By length, against padding: the sum over the set is the same in any order."""
        lengths = list_lengths(eval_dataset)
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
                losses, tokens = self.sum_losses(model, inputs)  # (B,)
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

    def sum_losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) sums of the losses of each row's tokens, and (B,) how many these are."""
        with self.compute_loss_context_manager():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits  # (B, L, V)
        losses = [
            F.cross_entropy(row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum")
            for row, label in zip(logits, inputs["labels"], strict=True)
        ]
        return torch.stack(losses), (inputs["labels"] != IGNORED).sum(1)
