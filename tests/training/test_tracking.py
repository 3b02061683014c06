"""How Weights & Biases runs: as a flag says, else the variables that wandb and transformers know, else a login."""

import netrc
import os

import pytest

from captioner.runtime.errors import UserError
from captioner.training.tracking import choose_wandb_mode


@pytest.fixture
def variables(tmp_path, monkeypatch):
    """variables(NAME=value, ...): these are set, and nobody is logged in otherwise."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    monkeypatch.setattr(os, "environ", kept | {"HOME": str(tmp_path)})
    return lambda **given: os.environ.update(given)


@pytest.mark.parametrize(
    ("flag", "given", "mode"),
    [
        ("auto", {}, "disabled"),
        ("auto", {"WANDB_API_KEY": "x"}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": ""}, "online"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "Disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_DISABLED": "true"}, "disabled"),
        ("auto", {"WANDB_MODE": "online", "WANDB_DISABLED": "1"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_DISABLED": "false"}, "online"),
        ("offline", {"WANDB_MODE": "nonsense", "WANDB_DISABLED": "true"}, "offline"),
        ("online", {"WANDB_API_KEY": "x", "WANDB_MODE": "disabled"}, "online"),
    ],
)
def test_the_flag_decides_then_the_variables_then_the_login(variables, flag, given, mode):
    variables(**given)
    assert choose_wandb_mode(flag) == mode
    assert os.environ["WANDB_MODE"] == mode  # wandb reads it itself


@pytest.mark.parametrize(
    ("flag", "given", "blamed"),
    [
        ("online", {"WANDB_MODE": "offline"}, "--wandb online: not logged in"),
        ("auto", {"WANDB_MODE": "online"}, "WANDB_MODE=online: not logged in"),
        ("auto", {"WANDB_MODE": "nonsense"}, "WANDB_MODE=nonsense: must be one of online, offline, disabled"),
    ],
)
def test_what_was_set_is_blamed(variables, flag, given, blamed):
    variables(**given)
    with pytest.raises(UserError) as raised:
        choose_wandb_mode(flag)
    assert str(raised.value).startswith(blamed)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        ("machine api.wandb.ai login user password x\n", "online"),
        ("machine example.org login user password x\n", "disabled"),
        ("machine\n", "disabled"),
    ],
)
def test_a_login_is_one_at_wandb(variables, tmp_path, content, mode):
    (tmp_path / ".netrc").write_text(content)
    (tmp_path / ".netrc").chmod(0o600)
    assert choose_wandb_mode("auto") == mode


def test_no_home_is_no_login(variables, monkeypatch):
    def fail():
        raise FileNotFoundError("~/.netrc")

    monkeypatch.setattr(netrc, "netrc", fail)
    assert choose_wandb_mode("auto") == "disabled"
