"""Weights & Biases, where the user has it: it never asks for a login, and never ends a run."""

import netrc
import os

from captioner.runtime.errors import UserError


def choose_wandb_mode(wandb: str) -> str:
    """The mode that wandb is to run in; it is never left to ask for a login."""
    if wandb == "auto":
        wandb = os.environ.get("WANDB_MODE") or ("online" if is_logged_in_to_wandb() else "disabled")
    if wandb == "online" and not is_logged_in_to_wandb():
        raise UserError("--wandb online: not logged in; run wandb login, set WANDB_API_KEY, or use --wandb offline")
    os.environ["WANDB_MODE"] = wandb
    os.environ.setdefault("WANDB_PROJECT", "blip2-bdd100k")
    return wandb


def is_logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_wandb(mode: str, name: str, config: dict):
    """A wandb run, or None when it is not wanted or can't be had: that must not keep anybody from training."""
    if mode == "disabled":
        return None
    try:
        import wandb

        return wandb.init(project="blip2-bdd100k", name=name, config=config, mode=mode, dir=".")
    except Exception as error:  # its failures have no class in common
        print(f"wandb can't be used, training goes on without ({error})")
        return None
