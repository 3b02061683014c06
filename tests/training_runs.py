"""What tests of whole training runs share."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import main
from captioner.runtime.errors import UserError
from captioner.runtime.files import hash_file, lock_folder
from captioner.training import stopping
from config import TrainConfig, make_config


def hash_adapter(folder: Path) -> str:
    return hash_file(folder / "blip2-finetuned" / "adapter_model.safetensors")


def train(settings, **changes) -> str:
    """Train in the current folder; the adapter's SHA-256."""
    main.main(make_config(TrainConfig, **(settings | changes)))
    return hash_adapter(Path())


def read_log(folder: Path = Path()) -> list[dict]:
    """What a run in `folder` has logged: a record for each step and each epoch."""
    return [json.loads(line) for line in (folder / "logs/run/metrics.jsonl").read_text().splitlines()]


def train_until(settings, step: int, **changes) -> None:
    """Train in the current folder, and stop the run by SIGTERM after `step`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        stop_at(patch, step)
        train(settings, **changes)
    assert stopped.value.code == 128 + signal.SIGTERM


def stop_at(patch, step: int) -> None:
    """Send SIGTERM to this process after `step`."""
    real = stopping.Pace.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    patch.setattr(stopping.Pace, "on_step_end", on_step_end)


def wait_for_lock(folder: Path, seconds: float = 10) -> None:
    """Wait for the lock: a worker that was forked a moment ago may still hold a copy of it."""
    end = time.monotonic() + seconds
    while True:
        try:
            with lock_folder(folder, "--output"):
                return
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
