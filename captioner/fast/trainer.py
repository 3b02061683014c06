"""The Trainer of main.py with the fast step: FastStep's passes, packed batches, and no waiting for the GPU."""

import functools
from collections.abc import Callable

import torch
from transformers.trainer_pt_utils import nested_gather

from captioner.blip2.batches import CaptionCollator
from captioner.blip2.lora import get_blip2
from captioner.fast.caption_loss import sum_nll
from captioner.fast.layers import draws_by_kernels
from captioner.fast.packing import PackedCollator, PackedSampler
from captioner.fast.speed import FastStep, JoinedAdamW
from captioner.training.trainer import CaptionTrainer, Step, send_to_cpu
from config import TrainConfig


def speed_up(config: TrainConfig, model) -> tuple[Callable[..., CaptionTrainer], CaptionCollator, Callable]:
    """What stands in for CaptionTrainer, its collator, and micro_batch.compute_loss; see speed.use_fast_step."""
    graphs = config.fast.cuda_graphs and model.device.type == "cuda"
    if config.training.gradient_checkpointing:  # which asks torch for its generator's state if that draws dropouts
        graphs = graphs and draws_by_kernels(get_blip2(model).query_tokens, [config.lora.lora_rank])
    return functools.partial(FastTrainer, cuda_graphs=graphs), PackedCollator(model.config), sum_nll


class FastTrainer(CaptionTrainer):
    """CaptionTrainer whose passes are FastStep's.

    Each step is launched before the one before it has ended: only then is that one looked at, logged, and found to have
    no number for a loss.
    """

    sampler_class = PackedSampler

    def __init__(self, *args, cuda_graphs: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_step = FastStep(self.model, cuda_graphs)
        self._record: tuple | None = None  # of a logged step, that is yet to be written
        self._unchecked: tuple | None = None  # the last step, and what gives whether it is finite

    # one step

    def run_pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        if not model.training:  # after validation: to tell thousands of modules at each step would take long
            model.train()
        is_last = self.accelerator.sync_gradients
        loss = self.fast_step(self._prepare_inputs(inputs), num_items_in_batch, is_last)
        return loss * self.args.world_size  # as Trainer's own, which it averages over the processes

    def clip_gradients(self, model, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fast_step.add_up(loss), self.fast_step.clip(self.args.max_grad_norm)

    def _sum_losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = inputs["starts"].diff()[:-1] - model.config.num_query_tokens  # at each place but the image's
        return self.fast_step.evaluate(inputs), tokens

    # what a run begins with

    def _prepare_for_training(self, *args):
        """The fast step adds up gradients itself, so nothing is wrapped in DDP."""
        self.model.zero_grad = self.fast_step.zero_grad  # Trainer's walks over thousands of modules
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)  # what else it does stays
        return super()._prepare_for_training(*args)

    def create_optimizer(self, *args):
        _, options = self.get_optimizer_cls_and_kwargs(self.args)  # AdamW's
        self.optimizer_cls_and_kwargs = JoinedAdamW, options | {"fast_step": self.fast_step}
        return super().create_optimizer(*args)

    def _get_eval_sampler(self, eval_dataset):
        lengths = [len(ids) for ids in eval_dataset.caption_ids]
        return self.sampler_class(lengths, self.args.eval_batch_size, len(lengths), self.args.seed)

    # a step is checked when the one after it has been launched

    def check_finite(self, step: Step) -> None:
        self._check_last()
        self._unchecked = step, send_to_cpu(step.is_finite)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if optimizer.defaults.get("fused"):
            # the GPU itself leaves the step out; to look now would have it wait until the next one is launched
            optimizer.found_inf = 1 - step.is_finite.float()
        else:
            self._check_last()

    def _check_last(self) -> None:
        """Raise UserError if the last step's loss or gradient was no number. It has not changed any weight then."""
        if self._unchecked is not None:
            (step, is_finite), self._unchecked = self._unchecked, None
            super().check_finite(step._replace(is_finite=is_finite()))

    def evaluation_loop(self, *args, **kwargs):
        self._check_last()
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        self._check_last()
        super()._save_checkpoint(model, trial)

    # and logged then

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        self._write_record()
        control, state = self.control, self.state
        is_due = control.should_log and state.global_step > self._globalstep_last_logged
        if is_due and not (control.should_evaluate or control.should_save):
            loss = nested_gather(tr_loss, self.args.parallel_mode).mean()
            values = send_to_cpu(torch.stack([loss, torch.as_tensor(grad_norm, device=loss.device)]))
            tr_loss -= tr_loss
            steps = state.global_step - self._globalstep_last_logged
            self._record = (values, steps, learning_rate, state.global_step, state.epoch)
            self._globalstep_last_logged, control.should_log = state.global_step, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _write_record(self) -> None:
        """Log what is due of an earlier step, as of then."""
        if self._record is None:
            return
        (values, steps, learning_rate, *then), self._record = self._record, None
        loss, norm = values().tolist()
        self._total_loss_scalar += loss
        state, is_due = self.state, self.control.should_log
        now, (state.global_step, state.epoch) = (state.global_step, state.epoch), then
        try:
            self.log({"loss": loss / steps, "grad_norm": norm, "learning_rate": learning_rate})
        finally:
            state.global_step, state.epoch = now
            self.control.should_log = is_due

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._write_record()
