"""The Trainer of main.py with the fast step: FastStep's passes and packed batches."""

import functools
from collections.abc import Callable

import torch

from captioner.blip2.batches import CaptionCollator
from captioner.blip2.lora import get_blip2
from captioner.fast.caption_loss import sum_nll
from captioner.fast.layers import draws_by_kernels
from captioner.fast.packing import PackedCollator, PackedSampler
from captioner.fast.speed import FastStep, JoinedAdamW
from captioner.training.trainer import CaptionTrainer
from config import TrainConfig


def speed_up(config: TrainConfig, model) -> tuple[Callable[..., CaptionTrainer], CaptionCollator, Callable]:
    """What stands in for CaptionTrainer, its collator, and micro_batch.compute_loss; see speed.use_fast_step."""
    graphs = config.cuda_graphs and model.device.type == "cuda"
    if config.gradient_checkpointing:  # which asks torch for its generator's state if that draws dropouts
        graphs = graphs and draws_by_kernels(get_blip2(model).query_tokens, [config.lora_rank])
    return functools.partial(FastTrainer, cuda_graphs=graphs), PackedCollator(model.config), sum_nll


class FastTrainer(CaptionTrainer):
    """CaptionTrainer whose passes are FastStep's."""

    sampler_class = PackedSampler

    def __init__(self, *args, cuda_graphs: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_step = FastStep(self.model, cuda_graphs)

    # one step

    def run_pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        if not model.training:  # after validation: to tell thousands of modules at each step would take long
            model.train()
        is_last = self.accelerator.sync_gradients
        loss = self.fast_step(self._prepare_inputs(inputs), num_items_in_batch, is_last)
        return loss * self.args.world_size  # as Trainer's own, which it averages over the processes

    def clip_gradients(self, model, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fast_step.add_up(loss), self.fast_step.clip(self.args.max_grad_norm)

    def sum_losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
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
