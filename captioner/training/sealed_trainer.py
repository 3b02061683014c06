"""A Trainer whose checkpoints prove themselves intact, and are there for all processes of a run."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer

from captioner.data.reading import explain_dead_worker
from captioner.runtime.errors import UserError, lacks_memory
from captioner.runtime.files import measure_free
from captioner.runtime.processes import gather, share_folder
from captioner.training.checkpoints import check_disk, remove_old_checkpoints, seal_checkpoint, step_of
from captioner.training.pace import Pace

# The methods of transformers' Trainer that are not public and are overridden, here, in CaptionTrainer and in the fast
# way. A release that renames one would silently leave it out: tests/training/test_training.py looks for each.
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


class SealedTrainer(Trainer):
    """Trainer that seals its checkpoints, keeps those that are needed, and stops once `pace` says so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            fit_fsdp(self.accelerator.state.fsdp_plugin, self.model)
        self.pace: Pace | None = None
        self.results: dict = {}  # what train() measured, once it has come to its end

    def train(self, resume_from_checkpoint: str | None = None):
        self.check_disk()  # an epoch before the first checkpoint is due
        folder = resume_from_checkpoint and Path(resume_from_checkpoint)
        with share_folder(folder) if folder else nullcontext() as here:
            return super().train(resume_from_checkpoint=here and str(here))

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        self.check_disk()
        with explain_checkpoint(checkpoint):
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:  # in all processes: Trainer asks the disk, which may be another machine's
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{self.state.best_global_step}")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal_checkpoint(checkpoint)
                remove_old_checkpoints(folder)
        if self.pace is not None:
            self.pace.after_save()

    def check_disk(self) -> None:
        """Raise UserError where there is no room for a checkpoint."""
        trainable = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        copies = 4 if self.is_fsdp_enabled else 3  # weights and two moments in fp32; FSDP writes weights twice
        check_disk(Path(self.args.output_dir), 4 * copies * trainable + 2**22, "a checkpoint")

    def save_model(self, output_dir=None, _internal_call=False):
        """With FSDP, Trainer would gather the frozen weights too."""
        if self.is_fsdp_enabled:
            self._save(output_dir or self.args.output_dir, state_dict=gather_trainable(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_rng_state(self, output_dir):
        """Of all processes, written by the first: machines may have no folder in common."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            states = gather(lambda: {path.name: path.read_bytes() for path in Path(folder).iterdir()})
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            for name, content in dict(item for state in states for item in state.items()).items():
                (Path(output_dir) / name).write_bytes(content)

    def _load_best_model(self):
        self.accelerator.wait_for_everyone()
        best = Path(self.args.output_dir, Path(self.state.best_model_checkpoint).name)  # the run may have been moved
        with share_folder(best) as here:
            self.state.best_model_checkpoint = str(here)
            super()._load_best_model()
        self.state.best_model_checkpoint = str(best)


@contextmanager
def explain_checkpoint(checkpoint: Path) -> Iterator[None]:
    """Turn what goes wrong when a checkpoint is written into a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if lacks_memory(error):  # it is not the disk's fault
            raise
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
