"""What is written down of a finished run, in run.json."""

import importlib.metadata
import platform
import subprocess
from datetime import datetime
from pathlib import Path

import torch

from captioner.runtime.errors import get_or_none

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")  # whose versions a run records
GIT_SECONDS = 10  # for git to answer


def describe_run(state: dict, run_name: str, device: torch.device, results: dict) -> dict:
    """What is needed to tell later how an adapter came about; None for what can't be found out."""
    return {
        "run_name": run_name,
        **state,
        "results": results,
        "versions": {package: get_or_none(importlib.metadata.version, package) for package in PACKAGES},
        "python": get_or_none(platform.python_version),
        "git_commit": get_or_none(read_commit),
        "device": get_or_none(name_device, device),
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def read_commit() -> str | None:
    """The commit of this program, if it lies in a git repository."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": GIT_SECONDS}
    return subprocess.check_output(command, cwd=Path(__file__).parent, text=True, **options).strip() or None


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
