"""Weights & Biases, where the user has it: it never asks for a login, and never ends a run."""

import netrc
import os

from captioner.runtime.errors import UserError

MODES = {  # values of WANDB_MODE, and the mode that each stands for
    **{mode: mode for mode in ("online", "offline", "disabled")},
    **{"run": "online", "shared": "online", "dryrun": "offline"},
}


def choose_wandb_mode(wandb: str) -> str:
    """The mode that wandb is to run in; it is never left to ask for a login.

    Without a flag, the variables that wandb and transformers know decide.
    """
    said = f"--wandb {wandb}"
    if wandb == "auto":
        wanted = os.environ.get("WANDB_MODE", "").strip().lower()
        said = f"WANDB_MODE={wanted}"
        if wanted not in ("", *MODES):
            raise UserError(f"{said}: must be one of {', '.join(MODES)}; set it so, or give --wandb")
        if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "y", "on", "t"):
            wanted = "disabled"
        wandb = MODES.get(wanted) or ("online" if is_logged_in_to_wandb() else "disabled")
    if wandb == "online" and not is_logged_in_to_wandb():
        raise UserError(f"{said}: not logged in; run wandb login, set WANDB_API_KEY, or use --wandb offline")
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
