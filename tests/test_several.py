"""Training in two processes, joined by gloo on the CPU: the same losses and weights as in one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import ROOT
from safetensors.torch import load_file
from test_training import hash_adapter, train

from checkpoints import find_checkpoint
from config import UserError
from speed import LengthSampler

STEPS_PER_EPOCH = 3

# what a test puts in the way of main.py; `rank` is the process's place
NO_DDP = "torch.nn.parallel.DistributedDataParallel.__init__ = None"
STOP = """
real = training.Pace.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    if rank == 1 and state.global_step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    real(self, args, state, control, **kwargs)
training.Pace.on_step_end = on_step_end
"""
NAN = """
real = training.FastStep.__call__
calls = iter(range(1000))  # two a step
def fail(self, *args):
    loss = real(self, *args)
    if rank == 1 and next(calls) == 2 * {steps} + 1:
        {what}
    return loss
training.FastStep.__call__ = fail
"""
SENT_NAN = """
import speed
real = speed.add_over_processes
calls = iter(range(1000))  # two a step, first with the language model's gradients
def add_over_processes(parts):
    if rank == 1 and next(calls) == 2 * {steps}:
        parts[0][0] = float("nan")
    return real(parts)
speed.add_over_processes = add_over_processes
"""
PLAIN_NAN = """
real = training.Trainer.training_step
def training_step(self, *args, **options):
    loss = real(self, *args, **options)
    return loss * float("nan") if rank == 1 and self.state.global_step == 3 else loss
training.Trainer.training_step = training_step
"""
OTHER_SEED = """
real = main.add_lora
def add_lora(*args):
    torch.manual_seed(rank)
    return real(*args)
main.add_lora = add_lora
"""


FSDP = """
import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
real_arguments, real_gather = main.make_arguments, main.gather_trainable
def make_arguments(*args):
    arguments = real_arguments(*args)
    arguments.device  # joins the processes; accelerate leaves FSDP out where it sees no GPUs
    accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments
def gather_trainable(model):
    print(f"{sum(isinstance(weight, DTensor) for weight in model.parameters())} weights are spread")
    return real_gather(model)
main.make_arguments, main.gather_trainable = make_arguments, gather_trainable
"""
BY_FSDP = ("--config_file", ROOT / "fsdp.yaml", "--mixed_precision", "no")  # exact on a CPU


@pytest.fixture
def launch(settings, tmp_path):
    """launch(folder, *flags, patch=source): main.py in two processes; what it printed and its exit code."""

    # --cpu starts one process; with --multi_gpu it starts two wherever it is
    def start(folder: str, *flags, patch: str = "", how=("--multi_gpu",)) -> subprocess.CompletedProcess:
        Path(folder).mkdir(exist_ok=True)
        script = tmp_path / "patched.py"
        script.write_text(
            f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, main, training\n"
            f"from config import TrainConfig, parse_args, run_script\nrank = int(os.environ['RANK'])\n{patch}\n"
            "run_script(main.main, parse_args(TrainConfig))\n"
        )
        given = {"--labels": settings["labels"][0], "--images": settings["images"], "--model": settings["model"]}
        given |= {"--num-train-epochs": 2, "--train-batch-size": 4, "--per-device-train-batch-size": 1}
        given |= {"--dataloader-workers": 0, "--warmup-ratio": 0, "--learning-rate": 1e-3, "--logging-steps": 1}
        given |= {"--val-captions": 0, "--wandb": "disabled", "--run-name": "run", "--lora-dropout": 0}
        given |= {"--fast-step": "on", **dict(zip(flags[::2], flags[1::2], strict=True))}
        command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, how), "--num_processes", "2"]
        command += ["--main_process_port", "0", str(script)]
        command += [str(word) for pair in given.items() for word in pair if word is not None]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    return start


def list_differences(one: Path, other: Path) -> torch.Tensor:
    """Of each weight of two adapters."""
    a, b = (load_file(folder / "blip2-finetuned" / "adapter_model.safetensors") for folder in (one, other))
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a])


def read_figures(folder: str, *keys: str) -> list[float]:
    records = [json.loads(line) for line in Path(folder, "logs/run/metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records for key in keys if key in record]


def train_one(settings, **changes) -> None:
    """Train in folder "one" in this process as `launch` does, but for `changes` and without the fast step."""
    Path("one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir("one")
        train(settings, lora_dropout=0.0, dataloader_workers=0, learning_rate=1e-3, **changes)


def check_same_run(relative: float = 1e-4) -> None:
    """Folders "one" and "two" have the same losses, and the same weights to 1e-6, steps being of 1e-3.

    One in 1,000 may differ by 1e-4: AdamW divides a gradient near 0, which is the rounding of a sum, by its own size.
    """
    differences = list_differences(Path("one"), Path("two"))
    assert differences.max() < 1e-4 and (differences > 1e-6).float().mean() < 1e-3
    losses = [read_figures(name, "loss", "eval_loss", "grad_norm") for name in ("one", "two")]
    assert len(losses[0]) == 2 * (2 * STEPS_PER_EPOCH + 1)
    assert losses[0] == pytest.approx(losses[1], rel=relative)


@pytest.mark.parametrize(
    ("target", "micro_batch"),
    [("both", 2), ("both", 1), ("lm", 2)],  # test_training.py has the run without the fast step
)
def test_two_processes_match_one(folder, settings, launch, target, micro_batch):
    """The losses of one process, and its weights; only the main process writes."""
    train_one(settings, fast_step="on", lora_target=target)
    flags = ("--lora-target", target, "--per-device-train-batch-size", micro_batch)
    done = launch("two", *flags, "--vision-store-gib", 2 - micro_batch, patch=NO_DDP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("adapter saved to") == 1
    runs = [json.loads(Path(n, "blip2-finetuned/run.json").read_text()) for n in ("one", "two")]
    assert [run["world"]["processes"] for run in runs] == [1, 2]
    check_same_run()


def test_two_stopped_processes_go_on_to_the_same_adapter(folder, launch):
    """With dropout; the signal reaches one of them, and both stop."""
    flags = ("--lora-dropout", 0.1, "--learning-rate", 1e-2, "--length-window", 1)
    done = launch("undisturbed", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    stopped = launch("stopped", *flags, patch=STOP)
    assert stopped.returncode != 0 and "saved after step 4 of 6" in stopped.stdout
    assert find_checkpoint(Path("stopped/blip2-finetuned/checkpoints")).name == "checkpoint-4"
    resumed = launch("stopped", *flags)
    assert resumed.returncode == 0 and "goes on after step 4 of 6" in resumed.stdout, resumed.stderr[-3000:]
    assert hash_adapter(Path("stopped")) == hash_adapter(Path("undisturbed"))


@pytest.mark.parametrize("what", ["loss = loss * float('nan')", "self.flat[0] = float('nan')", ""])
def test_a_number_that_is_none_in_one_process_stops_both(folder, launch, what):
    """The batch is named by both, whichever had it, and neither waits for the other."""
    done = launch("two", patch=(NAN if what else SENT_NAN).format(steps=STEPS_PER_EPOCH, what=what))
    assert done.returncode != 0
    messages = done.stderr.split("error: step 4: the loss is ")[1:]
    assert 1 <= len(messages) <= 2  # the launcher ends the other as soon as one has ended
    assert messages[0].count(".jpg") == (1 if "loss" in what else 4)
    assert find_checkpoint(Path("two/blip2-finetuned/checkpoints")).name == "checkpoint-3"


def test_processes_with_other_weights_are_refused(folder, launch):
    done = launch("two", patch=OTHER_SEED)
    assert done.returncode != 0
    assert "error: the weights of process 1 are not those of process 0" in done.stderr


def test_frames_of_a_step_have_about_one_length_in_all_processes():
    """As accelerate deals out the micro-batches of LengthSampler's order to the processes."""
    lengths = [7 * n % 101 for n in range(1024)]
    processes, micro_batch, passes = 2, 4, 2
    sampler = LengthSampler(lengths, processes * micro_batch * passes, window=16, seed=3)
    batches = torch.utils.data.BatchSampler(sampler, micro_batch, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, place)) for place in range(processes)]
    order, spreads = list(sampler), []
    for step in range(0, len(shards[0]), passes):
        rows = [row for shard in shards for batch in shard[step : step + passes] for row in batch]
        start = step * processes * micro_batch
        assert sorted(rows) == sorted(order[start : start + len(rows)])
        spreads.append(max(lengths[row] for row in rows) - min(lengths[row] for row in rows))
    assert len(spreads) == 64 and max(spreads) < 20  # of 100


# --------------------------------------------------------------------------------------------------------------
# FSDP


@pytest.mark.parametrize("store", [0, 1])
def test_spread_weights_match_one_process(folder, settings, launch, store):
    """fsdp.yaml with gloo, the ViT in the model and taken out of it."""
    train_one(settings, load_in_4bit=False)
    flags = ("--no-load-in-4bit", None, "--fast-step", "auto", "--vision-store-gib", store)
    done = launch("two", *flags, patch=FSDP, how=BY_FSDP)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"(\d+) weights are spread", done.stdout)[1]) > 50
    check_same_run()


def test_a_stopped_run_of_spread_weights_goes_on_to_the_same_adapter(folder, launch):
    flags = ("--no-load-in-4bit", None, "--fast-step", "auto", "--lora-dropout", 0.1, "--length-window", 1)
    done = launch("undisturbed", *flags, patch=FSDP, how=BY_FSDP)
    assert done.returncode == 0, done.stderr[-3000:]
    stopped = launch("stopped", *flags, patch=FSDP + STOP, how=BY_FSDP)
    assert stopped.returncode != 0 and "saved after step 4 of 6" in stopped.stdout
    resumed = launch("stopped", *flags, patch=FSDP, how=BY_FSDP)
    assert resumed.returncode == 0 and "goes on after step 4 of 6" in resumed.stdout, resumed.stderr[-3000:]
    assert hash_adapter(Path("stopped")) == hash_adapter(Path("undisturbed"))


def test_a_loss_that_is_no_number_stops_processes_of_spread_weights(folder, launch):
    flags = ("--no-load-in-4bit", None, "--fast-step", "auto")
    done = launch("two", *flags, patch=FSDP + PLAIN_NAN, how=BY_FSDP)
    assert done.returncode != 0
    assert "error: step 4: the loss is nan and the gradient norm" in done.stderr
    assert find_checkpoint(Path("two/blip2-finetuned/checkpoints")).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "--no-load-in-4bit"), ({"load_in_4bit": False, "val_captions": 2}, "--val-captions 0")],
)
def test_what_does_not_go_with_spread_weights_is_refused(folder, settings, monkeypatch, changes, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        train(settings, **changes)


def test_fsdp_configuration_fits_the_model(tiny_checkpoint):
    """Accelerate reads it, and finds in BLIP-2 the layers that it is to wrap. Without a GPU it goes no further."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.config.config_args import load_config_from_file
    from transformers import Blip2ForConditionalGeneration

    config = load_config_from_file(str(ROOT / "fsdp.yaml"))
    assert config.distributed_type == "FSDP"
    settings = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    layers = settings["transformer_layer_cls_to_wrap"].split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["version"],
        auto_wrap_policy=settings["auto_wrap_policy"],
        transformer_cls_names_to_wrap=layers,
        state_dict_type=settings["state_dict_type"],
    )
    model = Blip2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    plugin.set_auto_wrap_policy(model)
    wrapped = [m for m in model.modules() if plugin.auto_wrap_policy(m, recurse=False, nonwrapped_numel=0)]
    assert {type(module).__name__ for module in wrapped} == set(layers)
    assert len(wrapped) == 6  # two layers of each
