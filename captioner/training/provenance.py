"""Where an adapter comes from, as run.json tells it: versions, commit, device, results."""

import importlib.metadata
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from captioner.runtime.errors import get_or_none

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # whose versions a run records
GIT_SECONDS = 10  # for git to answer
OF_A_PART = ("train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def note_versions(state: dict, before: dict | None) -> None:
    """Put the versions of what computes into a run's state; say, and keep, what is another than in `before`.

    That is the state of a run that goes on. The model's commit, which is in both, counts as a version.
    """
    state["versions"] = {package: get_or_none(importlib.metadata.version, package) for package in PACKAGES}
    if before is None:
        return
    was, now = ({"model": found.get("model_commit"), **found.get("versions", {})} for found in (before, state))
    changes = [f"{name} {now[name]} (was {was[name]})" for name in now if name in was and now[name] != was[name]]
    if changes:
        print(f"note: the run goes on with other versions, and may end otherwise: {', '.join(changes)}")
    state["changed_versions"] = [*before.get("changed_versions", []), *changes]


def describe_run(state: dict, run_name: str, device: torch.device, results: dict) -> dict:
    """What is needed to tell later how an adapter came about; None for what can't be found out."""
    return {
        "run_name": run_name,
        **state,
        "results": results,
        "python": get_or_none(platform.python_version),
        "git_commit": get_or_none(read_commit),
        "device": get_or_none(name_device, device),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def drop_parts(metrics: dict, done: int) -> dict:
    """The Trainer's metrics; for a run that went on after `done` steps, without those that the Trainer gets wrong.

    It divides the loss and the time since the run went on by the steps of the whole run.
    """
    return {name: value for name, value in metrics.items() if not (done and name in OF_A_PART)}


def read_commit() -> str | None:
    """The commit of this program, if it lies in a git repository."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": GIT_SECONDS}
    return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, **options).strip() or None


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
