"""Training that survives: the same adapter however often it was stopped, guards, micro-batches, processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT
from PIL import Image
from training_runs import read_log, train, train_until

from captioner.data import splits
from captioner.fast import speed
from captioner.fast.trainer import FastTrainer
from captioner.runtime.errors import UserError
from captioner.training import checkpoints, trainer, training_arguments
from captioner.training.checkpoints import find_checkpoint
from captioner.training.order import LengthSampler
from captioner.training.provenance import OF_A_PART
from config import TrainConfig, make_config

STEPS_PER_EPOCH = 3


# --------------------------------------------------------------------------------------------------------------
# the same adapter


def test_the_same_seed_gives_the_same_adapter(folder, settings, undisturbed):
    assert train(settings) == undisturbed[0]
    assert not (folder / "blip2-finetuned" / "checkpoints").exists()


@pytest.mark.parametrize(
    "step",
    [
        STEPS_PER_EPOCH + 1,
        pytest.param(STEPS_PER_EPOCH, marks=pytest.mark.slow),
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2 * STEPS_PER_EPOCH, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_adapter(folder, settings, undisturbed, step, capsys):
    """SIGTERM in the midst and at the end of an epoch; the command that goes on is named."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", "--images", "my images", "--overwrite"])
        train_until(settings, step)
    said = capsys.readouterr().out
    assert f"saved after step {step} of 6; go on with\npython main.py --images 'my images' --resume\n" in said
    assert train(settings, resume=True) == undisturbed[0]
    said = capsys.readouterr().out
    assert f"goes on after step {step} of 6" in said
    of_whole, of_parts = (
        json.loads((run / "blip2-finetuned/run.json").read_text())["results"] for run in (undisturbed[1], folder)
    )
    assert of_whole.keys() - of_parts.keys() == set(OF_A_PART)  # the Trainer's, which are wrong of a run in two parts
    records = read_log()
    assert sorted(record["step"] for record in records if "loss" in record) == list(
        range(1, 7)
    )  # none lost, none twice


def test_a_run_that_was_moved_keeps_its_best_weights(folder, settings, undisturbed):
    """Only the saving is left to do, of weights that a checkpoint names by the folder where it was."""
    train_until(settings, 2 * STEPS_PER_EPOCH, output=folder / "blip2-finetuned")
    Path("elsewhere").mkdir()
    shutil.move("blip2-finetuned", "elsewhere/blip2-finetuned")
    os.chdir("elsewhere")
    assert train(settings, resume=True) == undisturbed[0]


def test_a_killed_run_goes_on_by_itself(folder, settings, undisturbed, scenes, tiny_checkpoint):
    """SIGKILL to the process and its workers in the second epoch; the same command again needs no flag."""
    flags = ["--labels", scenes / "labels.json", "--images", scenes / "images", "--model", tiny_checkpoint]
    flags += ["--num-train-epochs", 2, "--train-batch-size", 4, "--per-device-train-batch-size", 2]
    flags += ["--dataloader-workers", 1, "--warmup-ratio", 0, "--learning-rate", 1e-2, "--logging-steps", 1]
    flags += ["--val-captions", 0, "--wandb", "disabled", "--run-name", "run", "--save-minutes", 0]
    command = [sys.executable, str(ROOT / "main.py"), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as run:
        while not Path("blip2-finetuned/checkpoints/checkpoint-4/manifest.json").exists():
            assert run.poll() is None
        os.killpg(run.pid, signal.SIGKILL)
    assert train(settings, save_minutes=0.0) == undisturbed[0]


def test_a_damaged_checkpoint_is_passed_over(folder, settings, undisturbed, capsys):
    train_until(settings, STEPS_PER_EPOCH + 2, save_minutes=0.0)
    checkpoints = folder / "blip2-finetuned" / "checkpoints"
    with open(checkpoints / "checkpoint-5" / "optimizer.pt", "r+b") as file:
        file.seek(100)
        file.write(b"\0\1\2\3")
    (checkpoints / "checkpoint-4" / "manifest.json").unlink()  # was killed as it wrote
    assert train(settings, resume=True) == undisturbed[0]
    said = capsys.readouterr().out
    assert "checkpoint-5 is damaged (optimizer.pt has changed)" in said
    assert "checkpoint-4 is damaged (manifest.json is missing" in said
    assert "goes on after step 3 of 6" in said


@pytest.mark.slow
def test_other_settings_are_refused_with_what_differs(folder, settings, undisturbed):
    train_until(settings, 2)
    with pytest.raises(UserError) as refused:
        train(settings, learning_rate=1e-3, lora_rank=8)
    assert "--learning-rate: was 0.01, is 0.001" in str(refused.value)
    assert "--lora-rank: was 16, is 8" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert find_checkpoint(folder / "blip2-finetuned" / "checkpoints") is not None  # nothing is lost by asking
    assert train(settings, overwrite=True) == undisturbed[0]


@pytest.mark.parametrize(
    ("flags", "batch"),
    [
        ({}, 64),  # of validation, in the fast way
        ({"train_batch_size": 128}, 128),
        ({"train_batch_size": 128, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 8}, 32),
        ({"per_device_eval_batch_size": 100}, 100),
    ],
)
def test_shared_memory_is_to_hold_the_largest_batch(monkeypatch, flags, batch):
    asked = []
    monkeypatch.setattr(training_arguments, "pick_workers", lambda wanted, batch: asked.append(batch) or 0)
    training_arguments.make_arguments(make_config(TrainConfig, **flags), torch.device("cpu"))
    assert asked == [batch]


def test_resume_without_an_unfinished_run_is_refused(folder, settings):
    with pytest.raises(UserError, match="no unfinished run"):
        train(settings, resume=True)


# --------------------------------------------------------------------------------------------------------------
# order


def test_a_batch_has_frames_of_about_one_length():
    lengths = [7 * n % 101 for n in range(1000)]
    sampler = LengthSampler(lengths, batch_size=16, window=10, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(1000)) and len(sampler) == 1000
    assert list(sampler) == order
    batches = [[lengths[row] for row in order[first : first + 16]] for first in range(0, 1000, 16)]
    spreads = [max(batch) - min(batch) for batch in batches]
    assert sorted(spreads)[len(spreads) // 2] < 20  # of 100
    sampler.set_epoch(1)
    assert list(sampler) != order and sorted(sampler) == list(range(1000))


# --------------------------------------------------------------------------------------------------------------
# guards


@pytest.mark.parametrize("trainer_class", [checkpoints.SealedTrainer, trainer.CaptionTrainer, FastTrainer])
def test_each_private_method_that_is_overridden_is_transformers(trainer_class):
    """And is named: a release of transformers that renames one would leave ours out without a word."""
    for name in trainer.PRIVATE_HOOKS:
        assert callable(getattr(checkpoints.Trainer, name, None)), name
    overridden = {name for name in vars(trainer_class) if name.startswith("_") and not name.startswith("__")}
    assert overridden <= set(trainer.PRIVATE_HOOKS), overridden


@pytest.mark.parametrize("fast", ["off", "on"])
def test_a_loss_that_is_no_number_stops_the_run(folder, settings, fast):
    """The batch is named, no weight has changed, the checkpoint before is kept."""
    real = checkpoints.Trainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = real(self, model, inputs, num_items_in_batch)
        return loss * float("nan") if self.state.global_step == STEPS_PER_EPOCH + 1 else loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as stopped:
        if fast == "off":
            patch.setattr(checkpoints.Trainer, "training_step", training_step)
        else:
            step = speed.FastStep.__call__
            calls = iter(range(1000))  # two a step

            def fail(self, *args):
                return step(self, *args) * (float("nan") if next(calls) // 2 == STEPS_PER_EPOCH + 1 else 1)

            patch.setattr(speed.FastStep, "__call__", fail)
        train(settings, fast=fast)
    message = str(stopped.value)
    assert "step 5: the loss is nan" in message and "bf16" in message
    assert message.count(".jpg") == 4
    assert find_checkpoint(folder / "blip2-finetuned" / "checkpoints").name == "checkpoint-3"


@pytest.mark.slow
def test_out_of_memory_takes_fewer_frames_a_pass(folder, settings, capsys):
    """The effective batch stays, and the adapter is that of a run with the smaller micro-batch from the start."""
    expected = train(settings, per_device_train_batch_size=1, output=Path("blip2-finetuned"))
    shutil.rmtree("blip2-finetuned")
    capsys.readouterr()
    real = checkpoints.Trainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if len(inputs["labels"]) > 1 and self.state.global_step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, model, inputs, num_items_in_batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Trainer, "training_step", training_step)
        assert train(settings) == expected
    assert "out of GPU memory: from here on 1 frames a forward pass, 4 a step" in capsys.readouterr().out


def test_out_of_memory_with_one_frame_a_pass_is_an_error(folder, settings, monkeypatch):
    def training_step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(checkpoints.Trainer, "training_step", training_step)
    with pytest.raises(UserError, match=r"out of GPU memory with 1 frames .*--gradient-checkpointing"):
        train(settings, per_device_train_batch_size=1)


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(folder, settings, undisturbed, monkeypatch):
    real, calls = checkpoints.check_disk, []

    def check_disk(where, need):
        calls.append(need)
        real(where, need if len(calls) < 3 else 10**18)  # at the start, and for the first checkpoint

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=r"MB free.*--resume"):
        patch.setattr(checkpoints, "check_disk", check_disk)
        train(settings)
    assert train(settings, resume=True) == undisturbed[0]


def test_images_are_mended_or_left_out(folder, settings, scenes, capsys):
    """CMYK, 16 bits and EXIF rotation train; a truncated file is left out, counted and listed; many stop the run."""
    from captioner.data.image_decoding import open_image

    shutil.copytree(scenes / "images", "images")
    paths = sorted(Path("images").iterdir())
    upright = Image.open(paths[0]).convert("RGB")
    upright.convert("CMYK").save(paths[0], "JPEG")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(paths[1], "JPEG", exif=exif)
    assert open_image(paths[1]).size == upright.size
    Image.new("I;16", (64, 36), 40_000).save(paths[2], "PNG")
    assert open_image(paths[2]).getpixel((3, 3)) == (156, 156, 156)
    bad = paths[3]
    bad.write_bytes(bad.read_bytes()[:400])
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(splits, "MAX_UNREADABLE", 0.06)
        train(settings, images=Path("images"), num_train_epochs=1)
    said = capsys.readouterr().out
    assert "1 of 20 images can't be read and are left out" in said and bad.name in said
    assert bad.name not in Path("blip2-finetuned/split.csv").read_text()
    for path in paths[4:7]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"4 of 20 images can't be read, more than 5%"):
        train(settings, images=Path("images"), output=Path("other"))


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a" + bytes(50), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS\n"]
)
def test_what_is_no_image_is_refused(tmp_path, content):
    from captioner.data.image_decoding import open_image

    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg: not readable as an image"):
        open_image(tmp_path / "a.jpg")


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    from captioner.data.image_decoding import open_image

    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"30000 x 30000 pixels|exceeds limit"):
        open_image(tmp_path / "bomb.png")


# --------------------------------------------------------------------------------------------------------------
# batches and processes


def test_micro_batches_give_the_same_gradients(folder, settings):
    """Weighted by tokens: four passes of one frame are one pass of four, to rounding. A mean of means is not."""
    for name, size in (("one", 1), ("four", 4)):
        Path(name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(name)
            train(settings, per_device_train_batch_size=size, lora_dropout=0.0, max_steps=1, learning_rate=1e-3)
    losses = []
    for name in ("one", "four"):
        records = read_log(Path(name))
        losses.append(next((record["loss"], record["grad_norm"]) for record in records if "loss" in record))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_and_validation_loss_are_on_one_scale(folder, settings, scenes):
    """With the weights held still, the loss over a set is the same number, trained or validated on."""
    train(settings, learning_rate=1e-12, lora_dropout=0.0, num_train_epochs=1, per_device_eval_batch_size=3)
    records = read_log()
    losses = [record["loss"] for record in records if "loss" in record]
    [validation] = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert sum(losses) / len(losses) == pytest.approx(validation, rel=0.1)  # other images, the same model


# --------------------------------------------------------------------------------------------------------------
# what it shows


def test_captions_of_each_epoch_leave_no_trace_in_the_adapter(folder, settings, undisturbed):
    assert train(settings, val_captions=2) == undisturbed[0]
    records = read_log()
    assert sum("val_BLEU-4" in record for record in records) == 2
    assert Path("logs/run/captions.md").read_text().count("- reference:") == 4
    assert Path("logs/run/dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert all(record["samples_per_second"] > 0 for record in records if "loss" in record)


def test_each_step_is_logged(undisturbed):
    """With its loss, the norm of its gradient, and a learning rate that falls to 0."""
    _, folder = undisturbed
    records = read_log(folder)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in steps)
    rates = [record["learning_rate"] for record in steps]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(1e-2) and rates[-1] > 0


@pytest.mark.slow
def test_logged_speed_is_that_of_training_alone(folder, settings, monkeypatch):
    pause = 2.0  # seconds that a validation and a checkpoint take longer

    def slow(method):
        def wait(self, *args, **kwargs):
            time.sleep(pause)
            return method(self, *args, **kwargs)

        return wait

    for name in ("evaluate", "_save_checkpoint"):
        monkeypatch.setattr(trainer.CaptionTrainer, name, slow(getattr(trainer.CaptionTrainer, name)))
    train(settings, val_captions=0, logging_steps=1)
    records = read_log()
    speeds = [record["samples_per_second"] for record in records if "loss" in record]
    assert len(speeds) > 2
    assert min(speeds) > settings["train_batch_size"] / pause


def test_training_goes_on_when_wandb_fails(folder, settings, undisturbed, monkeypatch, capsys):
    import wandb

    class Failing:
        def log(self, *args):
            raise RuntimeError("the service is gone")

        def finish(self):
            raise AssertionError("left alone")

    monkeypatch.setattr(wandb, "init", lambda **kwargs: Failing())
    assert train(settings, wandb="offline") == undisturbed[0]
    assert "wandb fails from here on" in capsys.readouterr().out


def test_a_run_that_goes_on_goes_on_in_wandb(folder, settings, monkeypatch):
    import wandb

    started = []
    monkeypatch.setattr(wandb, "init", lambda **how: started.append(how) or mock.Mock())
    monkeypatch.setenv("WANDB_MODE", "disabled")  # which the run changes, and this puts back
    monkeypatch.setenv("WANDB_PROJECT", "my-project")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    train_until(settings, 2, wandb="online")
    train(settings, wandb="online")
    first, second = started
    assert first == second and first["id"] and first["resume"] == "allow" and first["project"] == "my-project"
    train(settings, wandb="online", overwrite=True)
    assert started[2]["id"] != first["id"]
