"""The Trainer of main.py: what it checks, and how it validates and saves.

Shapes: B rows, L positions, V vocabulary.
"""

import dataclasses
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from captioner.blip2.batches import IGNORED, CaptionCollator
from captioner.data.reading import explain_dead_worker
from captioner.runtime.errors import UserError
from captioner.runtime.files import measure_free
from captioner.training.checkpoints import check_disk, remove_old_checkpoints, seal_checkpoint, step_of
from captioner.training.guards import check_same_weights
from captioner.training.order import LengthSampler
from captioner.training.pace import Pace
from captioner.training.step_check import Step, check_steps

WORKER_SECONDS = 5  # that a worker lives on after SIGTERM
# The methods of transformers' Trainer that are not public and are overridden, here and in the fast way. A release
# that renames one of them would silently leave it out: tests/training/test_training.py looks for each.
PRIVATE_HOOKS = (
    "_prepare_for_training",  # once, before the first step
    "_run_epoch",  # around an epoch
    "_clip_grad_norm",  # once an optimiser step, after all gradients are there and before any weight has changed
    "_maybe_log_save_evaluate",  # after each optimiser step and at the end of an epoch
    "_save_checkpoint",
    "_get_train_sampler",
    "_get_eval_sampler",
)


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
        if self.pin:
            pinned = {k: v.pin_memory() for k, v in batch.items() if torch.is_tensor(v) and v.device.type == "cpu"}
            batch |= pinned
        return batch


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
        self._rows: list[torch.Tensor] = []  # of the passes of this optimiser step
        self._losses: list[torch.Tensor] = []
        self._steps: list[Step] = []  # that nobody has looked at

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer would walk over all weights at each step, for longer than a GPU takes for some."""
        return 0

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
        losses = torch.stack(self._losses)
        total, norm = self.clip_gradients(model, losses.sum() / self.args.world_size)
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

    def clip_gradients(self, model, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the step's gradients. Returns the sum of the losses of all processes, and the norm before.

        All processes get the same: they all stop, or none.
        """
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP's, of parts
        if self.args.world_size > 1:
            torch.distributed.all_reduce(loss)
        return loss, norm

    def check_steps(self) -> None:
        steps, self._steps = self._steps, []
        check_steps(steps, self.train_dataset.examples, self.args.output_dir)

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

    # checkpoints

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        copies = 4 if self.is_fsdp_enabled else 3  # weights and two moments in fp32; FSDP writes weights twice
        check_disk(folder, 4 * copies * trainable + 2**22, "a checkpoint")
        with explain_checkpoint(checkpoint):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(checkpoint)
                remove_old_checkpoints(folder)
        if self.pace is not None:
            self.pace.after_save()

    def save_model(self, output_dir=None, _internal_call=False):
        """With FSDP, Trainer would gather the frozen weights too."""
        if self.is_fsdp_enabled:
            self._save(output_dir or self.args.output_dir, state_dict=gather_trainable(self.model))
        else:
            super().save_model(output_dir, _internal_call)


def raise_versions(optimizer: torch.optim.Optimizer, *_) -> None:
    """Count that an optimiser has written its weights, which torch's fused ones don't: captions take them anew then."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


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
