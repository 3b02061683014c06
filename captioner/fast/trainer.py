"""The Trainer of main.py with the fast step: FastStep's passes and packed batches."""

import functools
from collections.abc import Callable

import torch

from captioner.blip2.batches import CaptionCollator, list_lengths
from captioner.data.parallel import one_ahead
from captioner.fast.caption_loss import caption_nll
from captioner.fast.layers import draws_by_kernels
from captioner.fast.packing import PackedCollator, PackedSampler
from captioner.fast.speed import FastStep
from captioner.training.trainer import CaptionTrainer
from config import TrainConfig


def speed_up(config: TrainConfig, model) -> tuple[Callable[..., CaptionTrainer], CaptionCollator, Callable]:
    """What stands in for CaptionTrainer, its collator, and micro_batch.compute_loss."""
    weight, lean = model.get_input_embeddings().weight, config.training.gradient_checkpointing
    # checkpointing asks torch for its generator's state if that draws dropouts
    graphs = weight.is_cuda and (not lean or draws_by_kernels(weight, model.config.text_config.attention_dropout))

    def compute_loss(model, batch: dict) -> torch.Tensor:
        return caption_nll(model, **batch).sum()

    return functools.partial(FastTrainer, cuda_graphs=graphs), PackedCollator(model.config), compute_loss


class FastTrainer(CaptionTrainer):
    """CaptionTrainer whose passes are FastStep's, and whose optimiser has one parameter, all of LoRA's weights."""

    sampler_class = PackedSampler

    def __init__(self, *args, cuda_graphs: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fast_step = FastStep(self.model, cuda_graphs)
        self.source = self.batches = None  # of an epoch: the iterator over batches that Trainer has, and ours over it

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:  # the model lives on, and must not hold recorded passes, whose memory others need
            vars(self.model).pop("zero_grad", None)
            self.fast_step.recordings.clear()
            self.source = self.batches = None

    def get_batch_samples(self, epoch_iterator, *args):
        """Batches are put together by a thread: where a loss has just been read, a GPU has nothing to do meanwhile."""
        if self.source is not epoch_iterator:  # worker processes make batches ahead anyway
            self.source = epoch_iterator
            self.batches = epoch_iterator if self.args.dataloader_num_workers else one_ahead(epoch_iterator)
        return super().get_batch_samples(self.batches, *args)

    def run_pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        if not model.training:  # after validation: to tell thousands of modules at each step would take long
            model.train()
        scale = torch.ones((), device=model.device)
        # of fp16, in which small gradients would be lost; the optimiser's step divides
        if (scaler := self.accelerator.scaler) is not None:
            scale = scaler.scale(scale)
        loss = self.fast_step(self._prepare_inputs(inputs), num_items_in_batch, scale)
        return loss * self.args.world_size  # as Trainer's own, which it averages over the processes

    def clip_gradients(self, model) -> torch.Tensor:
        whole = self.fast_step.whole
        if self.args.world_size > 1:
            torch.distributed.all_reduce(whole.grad)
        return self.accelerator.clip_grad_norm_([whole], self.args.max_grad_norm)

    def sum_losses(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = inputs["starts"].diff()[:-1] - model.config.num_query_tokens  # at each place but the image's
        return self.fast_step.evaluate(inputs), tokens

    def _prepare_for_training(self, *args):
        """The fast step adds up gradients itself, so nothing is wrapped in DDP."""
        self.model.zero_grad = self.fast_step.zero_grad  # Trainer's walks over thousands of modules, 3 ms a step
        prepare = self.accelerator.prepare_model  # the model is where it is to be
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
        return super()._prepare_for_training(*args)

    def create_optimizer(self, *args):
        """A fused AdamW gives each 65,536 values of a parameter a block of threads: most of a GPU would be idle with
        LoRA's hundreds of small ones."""
        return super().create_optimizer(torch.nn.ParameterList([self.fast_step.whole]))

    def _get_eval_sampler(self, eval_dataset):
        lengths = list_lengths(eval_dataset)
        return self.sampler_class(lengths, self.args.eval_batch_size, len(lengths), self.args.seed)
