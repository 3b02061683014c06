"""Training in two processes, joined by gloo on the CPU: the same losses and weights as in one."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import ROOT
from ranks import BY_DDP, BY_FSDP, Ended, launch, start_ranks, start_server
from safetensors.torch import load_file
from training_runs import hash_adapter, read_log, train

from captioner.runtime.errors import UserError
from captioner.training.checkpoints import find_checkpoint
from captioner.training.order import LengthSampler

STEPS_PER_EPOCH = 3
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

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
from captioner.fast import speed
real = speed.FastStep.__call__
calls = iter(range(1000))  # two a step
def fail(self, *args):
    loss = real(self, *args)
    if rank == 1 and next(calls) == 2 * {steps} + 1:
        {what}
    return loss
speed.FastStep.__call__ = fail
"""
SENT_NAN = """
from captioner.fast.trainer import FastTrainer
real = FastTrainer.clip_gradients
calls = iter(range(1000))  # one a step
def clip_gradients(self, model):
    if rank == 1 and next(calls) == {steps}:
        self.fast_step.whole.grad[0] = float("nan")
    return real(self, model)
FastTrainer.clip_gradients = clip_gradients
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
OUT_OF_MEMORY = """
real = training.Trainer.training_step
def training_step(self, model, inputs, *args):
    if len(inputs["labels"]) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return real(self, model, inputs, *args)
training.Trainer.training_step = training_step
"""
ONE_LOOKS = """
from captioner.training import run, train
def refuse(*args):
    raise AssertionError("the first process looks for all")
if rank == 1:
    run.find_unfinished = run.is_finished = train.find_checkpoint = train.write_state = refuse
main.publish = lambda config: open(f"published-by-{rank}", "w").close()
"""
FSDP = """
import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from captioner.training import run
real_arguments, real_gather = run.make_arguments, run.gather_trainable
def make_arguments(*args):
    arguments = real_arguments(*args)
    arguments.device  # joins the processes; accelerate leaves FSDP out where it sees no GPUs
    accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments
def gather_trainable(model):
    print(f"{sum(isinstance(weight, DTensor) for weight in model.parameters())} weights are spread")
    return real_gather(model)
run.make_arguments, run.gather_trainable = make_arguments, gather_trainable
"""


@pytest.fixture(scope="module", autouse=True)
def server():
    start_server()


@pytest.fixture
def train_two(settings, tmp_path):
    """train_two(folder, *flags, patch=source): main.py in two processes, there; what it printed and its exit codes.

    With `other` the second has that folder, as on another machine.
    """

    def train_two(folder: str, *flags, patch: str = "", how=BY_DDP, start=start_ranks, other: str = "") -> Ended:
        folders = [Path(folder), Path(other or folder)]
        for path in folders:
            path.mkdir(exist_ok=True)
        script = tmp_path / "patched.py"
        script.write_text(
            "import os, signal, torch, main\nfrom captioner.training import checkpoints as training\n"
            "from config import TrainConfig, parse_args\nfrom captioner.runtime.cli import run_script\n"
            f"rank = int(os.environ['RANK'])\n{patch}\nrun_script(main.main, parse_args(TrainConfig))\n"
        )
        given = {"--labels": settings["labels"][0], "--images": settings["images"], "--model": settings["model"]}
        given |= {"--num-train-epochs": 2, "--train-batch-size": 4, "--per-device-train-batch-size": 1}
        given |= {"--dataloader-workers": 0, "--warmup-ratio": 0, "--learning-rate": 1e-3, "--logging-steps": 1}
        given |= {"--val-captions": 0, "--wandb": "disabled", "--run-name": "run", "--lora-dropout": 0}
        given |= {"--fast": "on", **dict(zip(flags[::2], flags[1::2], strict=True))}
        words = [word for pair in given.items() for word in pair if word is not None]
        with start(script, *words, cwd=folders if other else folders[0], how=how) as ended:
            pass
        return ended

    return train_two


@pytest.fixture(scope="module")
def train_one(settings, tmp_path_factory):
    """train_one(**changes): the folder where this process has trained as train_two does, but for `changes`."""

    @functools.cache
    def train_one(**changes) -> Path:
        folder = tmp_path_factory.mktemp("one")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            train(settings, lora_dropout=0.0, dataloader_workers=0, learning_rate=1e-3, **changes)
        return folder

    return train_one


def list_differences(one: Path, other: Path) -> torch.Tensor:
    """Of each weight of two adapters."""
    a, b = (load_file(folder / "blip2-finetuned" / "adapter_model.safetensors") for folder in (one, other))
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a])


def read_figures(folder: Path, *keys: str) -> list[float]:
    return [record[key] for record in read_log(folder) for key in keys if key in record]


def check_same_run(one: Path, two: Path) -> None:
    """The runs of two folders have the same losses to 1e-4 of them, and the same weights to 1e-6, steps being of 1e-3.

    One in 1,000 may differ by 1e-4: AdamW divides a gradient near 0, which is the rounding of a sum, by its own size.
    """
    differences = list_differences(one, two)
    assert differences.max() < 1e-4 and (differences > 1e-6).float().mean() < 1e-3
    losses = [read_figures(folder, "loss", "eval_loss", "grad_norm") for folder in (one, two)]
    assert len(losses[0]) == 2 * (2 * STEPS_PER_EPOCH + 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("target", "micro_batch"),
    [("both", 2), slow("both", 1), slow("lm", 2)],  # test_training.py has the run without the fast step
)
def test_two_processes_match_one(folder, train_one, train_two, target, micro_batch):
    """The losses of one process, and its weights; only the main process writes."""
    one = train_one(fast="on", lora_target=target)
    flags = ("--lora-target", target, "--per-device-train-batch-size", micro_batch)
    done = train_two("two", *flags, "--features", "off" if micro_batch == 2 else "features", patch=NO_DDP)
    assert done.returncode == 0, done.err[-3000:]
    assert done.out.count("adapter saved to") == 1
    runs = [json.loads((run / "blip2-finetuned/run.json").read_text()) for run in (one, Path("two"))]
    assert [run["world"]["processes"] for run in runs] == [1, 2]
    check_same_run(one, Path("two"))


def test_two_stopped_processes_go_on_to_the_same_adapter(folder, train_two):
    """With dropout; the signal reaches one of them, and both stop. What goes on and what is published, one decides."""
    flags = ("--lora-dropout", 0.1, "--learning-rate", 1e-2, "--length-window", 1)
    done = train_two("undisturbed", *flags)
    assert done.returncode == 0, done.err[-3000:]
    stopped = train_two("stopped", *flags, patch=STOP)
    assert stopped.returncode != 0 and "saved after step 4 of 6" in stopped.out
    assert find_checkpoint(Path("stopped/blip2-finetuned/checkpoints")).name == "checkpoint-4"
    resumed = train_two("stopped", *flags, patch=ONE_LOOKS)
    assert resumed.returncode == 0 and "goes on after step 4 of 6" in resumed.out, resumed.err[-3000:]
    assert hash_adapter(Path("stopped")) == hash_adapter(Path("undisturbed"))
    Path("stopped/published-by-0").unlink()
    finished = train_two("stopped", *flags, "--resume", None, patch=ONE_LOOKS)
    assert finished.codes == [0, 0] and "nothing is left to train" in finished.out, finished.err[-3000:]
    assert [path.name for path in Path("stopped").glob("published-*")] == ["published-by-0"]


@pytest.mark.slow
def test_machines_without_a_common_folder_train_are_stopped_go_on_and_caption(folder, train_two, settings):
    """The first has the checkpoints, the adapter and the logs; the second is sent what it needs, and keeps nothing."""
    flags = ("--lora-dropout", 0.1, "--learning-rate", 1e-2, "--model", "base", "--images", "images")
    for name in ("together", "first", "second"):
        shutil.copytree(settings["model"], Path(name, "base"))
        shutil.copytree(settings["images"], Path(name, "images"))
    done = train_two("together", *flags)
    assert done.returncode == 0, done.err[-3000:]
    stopped = train_two("first", *flags, patch=STOP, other="second")
    assert stopped.returncode != 0 and "saved after step 4 of 6" in stopped.out, stopped.err[-3000:]
    resumed = train_two("first", *flags, other="second")
    assert resumed.codes == [0, 0] and "goes on after step 4 of 6" in resumed.out, resumed.err[-3000:]
    assert hash_adapter(Path("first")) == hash_adapter(Path("together"))
    finished = train_two("first", *flags, "--resume", None, other="second")
    assert finished.codes == [0, 0] and "nothing is left to train" in finished.out, finished.err[-3000:]
    captions = ROOT / "eval.py", "--num-samples", "all", "--batch-size", 1, "--greedy", "--run-name", "scored"
    for cwd in ([Path("first"), Path("second")], Path("together")):
        with start_ranks(*captions, cwd=cwd) as scored:
            pass
        assert scored.codes == [0, 0] and "captioning in 2 processes" in scored.out, scored.err[-3000:]
    first, together = (Path(name, "logs/scored/predictions.jsonl").read_text() for name in ("first", "together"))
    assert first == together
    assert sorted(path.name for path in Path("second").iterdir()) == ["base", "images"]


@pytest.mark.parametrize("what", ["loss = loss * float('nan')", slow("self.whole.grad[0] = float('nan')"), slow("")])
def test_nan_in_one_process_stops_both(folder, train_two, what):
    """The batch is named by both, whichever had it, and neither waits for the other."""
    done = train_two("two", patch=(NAN if what else SENT_NAN).format(steps=STEPS_PER_EPOCH, what=what))
    assert done.codes == [2, 2]
    for err in done.errs:
        [message] = err.split("error: step 4: the loss is ")[1:]
        assert message.count(".jpg") == (1 if "loss" in what else 4)
    assert find_checkpoint(Path("two/blip2-finetuned/checkpoints")).name == "checkpoint-3"


@pytest.mark.slow
def test_two_processes_out_of_memory_end_with_the_remedy(folder, train_two):
    """One alone would go on with fewer frames a pass, and could not agree with the other about it."""
    flags = ("--fast", "off", "--per-device-train-batch-size", 2)
    done = train_two("two", *flags, patch=OUT_OF_MEMORY)
    assert done.codes == [2, 2]
    assert all("out of GPU memory with 2 frames" in err and "--gradient-checkpointing" in err for err in done.errs)


def test_processes_with_other_weights_are_refused(folder, train_two):
    done = train_two("two", patch=OTHER_SEED)
    assert done.codes == [2, 2]
    assert all("error: the weights of process 1 are not those of process 0" in err for err in done.errs)


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


@pytest.mark.slow
@pytest.mark.parametrize(("features", "start"), [("off", start_ranks), ("features", launch)])
def test_spread_weights_match_one_process(folder, train_one, train_two, features, start):
    """fsdp.yaml with gloo, the ViT in the model and taken out of it; the latter by the real launcher."""
    one = train_one(load_in_4bit=False)
    flags = ("--no-load-in-4bit", None, "--fast", "auto", "--features", features)
    done = train_two("two", *flags, patch=FSDP, how=BY_FSDP, start=start)
    assert done.returncode == 0, done.err[-3000:]
    assert int(re.search(r"(\d+) weights are spread", done.out)[1]) > 50
    check_same_run(one, Path("two"))


@pytest.mark.slow
def test_a_stopped_run_of_spread_weights_goes_on_to_the_same_adapter(folder, train_two):
    flags = ("--no-load-in-4bit", None, "--fast", "auto", "--lora-dropout", 0.1, "--length-window", 1)
    done = train_two("undisturbed", *flags, patch=FSDP, how=BY_FSDP)
    assert done.returncode == 0, done.err[-3000:]
    stopped = train_two("stopped", *flags, patch=FSDP + STOP, how=BY_FSDP)
    assert stopped.returncode != 0 and "saved after step 4 of 6" in stopped.out
    resumed = train_two("stopped", *flags, patch=FSDP, how=BY_FSDP)
    assert resumed.returncode == 0 and "goes on after step 4 of 6" in resumed.out, resumed.err[-3000:]
    assert hash_adapter(Path("stopped")) == hash_adapter(Path("undisturbed"))


@pytest.mark.slow
def test_nan_stops_processes_of_spread_weights(folder, train_two):
    flags = ("--no-load-in-4bit", None, "--fast", "auto")
    done = train_two("two", *flags, patch=FSDP + PLAIN_NAN, how=BY_FSDP)
    assert done.codes == [2, 2]
    assert all("error: step 4: the loss is nan and the gradient norm" in err for err in done.errs)
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

    config = load_config_from_file(str(ROOT / "captioner" / "training" / "fsdp.yaml"))
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
