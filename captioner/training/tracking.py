"""Weights & Biases, where the user has it: it never asks for a login, and never ends a run."""

import netrc
import os
from urllib.parse import urlsplit

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
    """Whether there is a key for wandb's own server, or the one that WANDB_BASE_URL names."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return netrc.netrc().authenticators(server or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start_wandb(mode: str, name: str, run_id: str, config: dict):
    """A wandb run, or None when it is not wanted or can't be had: that must not keep anybody from training.

    A run that goes on has the id that it had, and goes on there too.
    """
    if mode == "disabled":
        return None
    try:
        import wandb

        how = {"id": run_id, "resume": "allow" if mode == "online" else None}  # offline, wandb can't look what is there
        return wandb.init(project=os.environ["WANDB_PROJECT"], name=name, config=config, mode=mode, dir=".", **how)
    except Exception as error:  # its failures have no class in common
        print(f"wandb can't be used, training goes on without ({error})")
        return None
