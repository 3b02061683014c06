"""What the tests share: a tiny BLIP-2 with random weights in the hub's layout, and drawn frames to train it on."""

import atexit
import contextlib
import gc
import importlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn
from unittest import mock

# before torch is imported; two processes test at once, and with two threads each they would wait for each other
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", OMP_NUM_THREADS="1")

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "bdd100k"  # real samples, which are not ours to ship: tests of them skip without

needs_real_samples = pytest.mark.skipif(not SHARED.is_dir(), reason="the real BDD100K samples are not here")


def pytest_configure(config) -> None:
    if config.option.markexpr != "gpu":  # those run on the CPU too, in Triton's interpreter
        os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays: each search for garbage, of which a training makes several, passes it over
    atexit.register(gc.unfreeze)  # else libraries complain of what is left


def skip_without(what: str, reason: str) -> NoReturn:
    """Skip the test or module that lacks `what`; fail it where TESTS_MUST_RUN, which .ci/run sets, names that."""
    if what in os.environ.get("TESTS_MUST_RUN", "").split():
        pytest.fail(f"{reason}: tests that need {what} must run on this machine", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def need_triton() -> None:
    """Skip the module or test where Triton's kernels can't be run, be it in its interpreter."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        skip_without("triton", f"Triton is not installed ({error})")


def capture(call: Callable[[], object], cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """What a call prints and the exit code it ends with, in a folder and an environment that end with it.

    Only sys.exit is caught: where a user would see a traceback, the test fails.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code = 0
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()}),
    ):
        try:
            call()
        except SystemExit as stopped:
            code = stopped.code or 0
    texts = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(sys.argv, code, *texts)


def call_script(script: str, *args, cwd: Path | None = None, **environment) -> subprocess.CompletedProcess:
    """What `python script args` does, in this process: without the seconds that its imports take."""
    import config
    from captioner.runtime import cli

    module = importlib.import_module(script.removesuffix(".py"))
    settings = {"main": config.TrainConfig, "eval": config.EvalConfig, "bdd100k_data_pipeline": config.PipelineConfig}

    def call() -> None:
        cli.run_script(module.main, config.parse_args(settings[module.__name__]))

    with mock.patch.object(sys, "argv", [str(ROOT / script), *map(str, args)]):
        return capture(call, cwd, **environment)


def start_script(script: str, *args, cwd: Path | None = None, **environment) -> subprocess.Popen:
    """The script in a process of its own, for what only a process shows: signals, kills, locks, the end."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    environment = os.environ | {name: str(value) for name, value in environment.items()}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def build_tiny_checkpoint(folder: Path) -> None:
    """Save a BLIP-2 that is small enough to train in seconds."""
    import torch

    from demo.pretrain import build_model, build_processor

    torch.manual_seed(0)
    processor = build_processor(side=32, queries=8)
    model = build_model(processor, side=32, width=64, layers=(2, 2, 2))
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.dim() > 1 and "embed_" not in name:
            # keeps the variance, so that the image reaches the text
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-blip2")
    build_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Folder with labels.json and images/ of a few drawn scenes."""
    from demo.draw import draw_dataset

    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, range(12), workers=1)
    return folder


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    from demo.draw import draw_dataset

    folder = tmp_path_factory.mktemp("scenes")
    draw_dataset(folder, range(20), workers=1)
    return folder


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, driven by selenium."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        skip_without("browser", "no chromium or no chromedriver on this machine")
    from demo.screenshots import open_browser

    driver = open_browser("--window-size=1200,900", **{"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}})
    yield driver
    driver.quit()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def figures(monkeypatch) -> list:
    """A list that gets each matplotlib figure that is saved."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def keep(figure, *args, **how):
        figures.append(figure)
        save(figure, *args, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


@pytest.fixture
def root() -> None:
    """For what only root can do: become somebody else, mount a file system."""
    if os.getuid() != 0:
        skip_without("root", "only root can do this")


@pytest.fixture
def mount(root) -> Iterator[Callable[[Path, str], Path]]:
    """mount(folder, size) makes the folder a file system of that size."""
    mounted = []

    def mount(folder: Path, size: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            skip_without("root", "needs the right to mount")
        mounted.append(folder.resolve())
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)  # the test may have done it


@pytest.fixture(scope="session")
def settings(scenes, tiny_checkpoint):
    """About 12 frames to train on: 3 steps an epoch, two epochs, dropout, NF4, a worker that decodes."""
    return {
        "labels": (scenes / "labels.json",),
        "images": scenes / "images",
        "model": str(tiny_checkpoint),
        "num_train_epochs": 2,
        "train_batch_size": 4,
        "per_device_train_batch_size": 2,
        "dataloader_workers": 1,
        "warmup_ratio": 0,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "val_captions": 0,
        "wandb": "disabled",
        "run_name": "run",
    }


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, settings):
    """SHA-256 of the adapter of a run that nobody disturbed, and its folder."""
    from training_runs import hash_adapter

    import main
    from config import TrainConfig, make_config

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main.main(make_config(TrainConfig, **settings))
    return hash_adapter(folder), folder
