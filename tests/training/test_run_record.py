"""What only decorates a run's record may be missing: the record holds null, and the adapter is saved."""

import importlib.metadata
import json
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from captioner.publishing import publish
from captioner.runtime.errors import UserError
from captioner.runtime.settings import flatten
from captioner.training import checkpoints, dashboard, provenance, run, run_state, tracking, train
from captioner.training.stopping import Pace
from config import DEMO, TrainConfig, make_config


def describe() -> dict:
    state: dict = {}
    provenance.note_versions(state, None)
    described = provenance.describe_run(state, "run", torch.device("cpu"), {})
    json.dumps(described, allow_nan=False)
    return described


@pytest.mark.parametrize(
    "git",
    [None, "exit 128", "echo fatal; exit 1", "exit 0", "printf '\\377'", "sleep 30"],
    ids=["absent", "no repository", "failing", "silent", "no text", "hanging"],
)
def test_a_record_is_written_without_a_commit(tmp_path, monkeypatch, git):
    if git is not None:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{git}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if git == "sleep 30" else str(tmp_path))
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.2)
    if git is None:
        with pytest.raises(FileNotFoundError):
            subprocess.run(["git"], check=False)
    assert describe()["git_commit"] is None


def test_the_commit_is_recorded_where_git_knows_it(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\necho 0123abc\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe()["git_commit"] == "0123abc"


def fail(*args):
    raise RuntimeError("not to be had")


def test_a_record_is_written_without_versions_and_device(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", fail)
    monkeypatch.setattr(platform, "python_version", fail)
    monkeypatch.setattr(platform, "processor", fail)
    described = describe()
    assert described["versions"] == dict.fromkeys(provenance.PACKAGES)
    assert described["python"] is None and described["device"] is None


def test_an_adapter_is_saved_without_its_model_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publish, "write_model_card", fail)
    config = make_config(TrainConfig, output=tmp_path)
    arguments = mock.Mock(process_index=0)
    finished = run.Run(config, torch.device("cpu"), arguments, "disabled", None, Path("run"), {"config": {}})
    trainer = mock.Mock(results={}, state=mock.Mock(best_metric=0.5))
    trainer.model.save_pretrained.side_effect = lambda folder, state_dict: folder.mkdir()
    run.save_run(finished, trainer, mock.Mock(), mock.Mock(), splits={})
    publish.publish(config)
    assert (tmp_path / "run.json").is_file()
    assert capsys.readouterr().out.endswith("\nnote: no model card (not to be had)\n")


def test_workers_are_ended_where_there_is_no_signal_for_it(monkeypatch):
    monkeypatch.delattr(signal, "SIGCHLD")
    train.end_workers()


def test_training_goes_on_where_curves_and_wandb_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "plot_dashboard", fail)
    log = dashboard.RunLog(tmp_path, wandb_run=mock.Mock(finish=fail))
    log.draw()
    log.on_train_end(None, mock.Mock(is_world_process_zero=True), None)
    assert capsys.readouterr().out.splitlines() == [
        *["note: no curves in dashboard.png (not to be had)"] * 2,
        "note: no end of the wandb run (not to be had)",
    ]


def test_training_goes_on_without_wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert tracking.start_wandb("offline", "run", "1", {}) is None


def test_a_checkpoint_is_written_where_free_space_is_not_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", fail)
    checkpoints.check_disk(tmp_path, 10**18)


@pytest.mark.parametrize(("url", "logged_in"), [("", False), ("https://wandb.example.org:8080/api", True)])
def test_a_login_counts_for_the_server_that_it_is_for(tmp_path, monkeypatch, url, logged_in):
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    assert tracking.is_logged_in_to_wandb() == logged_in


# --------------------------------------------------------------------------------------------------------------
# a run that goes on


def test_versions_that_changed_are_said_in_a_line_and_recorded(monkeypatch, capsys):
    versions = {"torch": "2.12.0", "peft": "0.21.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda package: versions.get(package, "1"))
    before = {"model_commit": "59a1ef6"}
    provenance.note_versions(before, None)
    versions["torch"] = "2.13.0"
    state = {"model_commit": "0000000"}
    provenance.note_versions(state, json.loads(json.dumps(before)))
    assert capsys.readouterr().out == (
        "note: the run goes on with other versions, and may end otherwise: model 0000000 (was 59a1ef6), "
        "torch 2.13.0 (was 2.12.0)\n"
    )
    again = {"model_commit": "0000000"}
    provenance.note_versions(again, state)
    assert capsys.readouterr().out == ""
    described = provenance.describe_run(again, "run", torch.device("cpu"), {})
    assert described["changed_versions"] == ["model 0000000 (was 59a1ef6)", "torch 2.13.0 (was 2.12.0)"]
    assert described["versions"]["torch"] == "2.13.0"


def test_a_run_of_before_versions_were_noted_goes_on(capsys):
    state = {}
    provenance.note_versions(state, {"config": {}})
    assert state["changed_versions"] == [] and capsys.readouterr().out == ""


def test_other_versions_are_no_reason_to_refuse_a_run():
    before = {"config": {"seed": 1}, "versions": {"torch": "2.12.0"}}
    run_state.refuse_changes(Path("output"), before, {"config": {"seed": 1}, "versions": {"torch": "2.13.0"}})


def test_a_run_goes_on_in_its_own_folder(folder):
    assert run.choose_folder("other", {"run_dir": "logs/2026-11-27"}) == Path("logs/2026-11-27")


@pytest.mark.parametrize("named", ["../elsewhere", "/etc", "logs", "logs/../src", "captioner", "", None, "logs/link"])
def test_a_folder_outside_of_logs_is_not_believed(folder, named):
    (folder / "logs").mkdir()
    (folder / "logs" / "link").symlink_to(folder)
    before = {} if named is None else {"run_dir": named}
    assert run.choose_folder("mine", before) == Path("logs/mine")


@pytest.mark.parametrize(
    "content", ['{"run_dir": 3}', '{"micro_batch": "4"}', '{"versions": []}', '{"changed_versions": "x"}', "3"]
)
def test_a_state_of_another_form_is_named(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"state\.json: not readable .*--overwrite"):
        run_state.read_state(tmp_path)


def test_a_finished_run_that_is_resumed_keeps_its_card_as_it_is(tmp_path):
    (tmp_path / "README.md").write_text("edited by hand")
    publish.publish(make_config(TrainConfig, output=tmp_path))
    assert (tmp_path / "README.md").read_text() == "edited by hand"


def test_a_finished_run_is_known_by_its_folder_alone(folder):
    """As for `main.py --output out --resume --merge`; what else is given must be what it was trained with."""
    trained = make_config(TrainConfig, output=Path("out"), seed=3, lora_rank=8, max_steps=5)
    Path("out").mkdir()
    Path("out/run.json").write_text(json.dumps({"config": flatten(trained)}))
    for settings in ({}, {"merge": True}, {"seed": 3}):
        assert run.is_finished(make_config(TrainConfig, output=Path("out"), **settings))
    with pytest.raises(
        UserError, match=r"out is finished, with other settings:\n  --seed: was 3, is 4\n.* another --out"
    ):
        run.is_finished(make_config(TrainConfig, output=Path("out"), seed=4, lora_rank=8))
    assert not run.is_finished(make_config(TrainConfig, output=Path("elsewhere"), seed=4))


def test_a_finished_demo_is_known_whatever_it_was_trained_with(folder):
    demo = {**DEMO[TrainConfig], "demo": True, "output": Path("out")}
    Path("out").mkdir()
    trained = make_config(TrainConfig, **demo | {"learning_rate": 1e-3})
    Path("out/run.json").write_text(json.dumps({"config": flatten(trained)}))
    assert run.is_finished(make_config(TrainConfig, **demo))


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_will_replace_an_adapter_says_so(folder, capsys, finished):
    if finished:
        Path("out").mkdir()
        Path("out/run.json").write_text("{}")
    run.open_run(make_config(TrainConfig, output=Path("out"), wandb="disabled"), torch.device("cpu"))
    assert ("out has a finished adapter, which this run replaces" in capsys.readouterr().out) == finished


# --------------------------------------------------------------------------------------------------------------
# signals


def test_a_signal_is_answered_though_nothing_can_be_printed(monkeypatch, capfd):
    """It may come in the midst of a print(), which can't be entered a second time."""
    stream = mock.Mock(**{"write.side_effect": RuntimeError("reentrant call"), "flush.side_effect": RuntimeError})
    monkeypatch.setattr(sys, "stdout", stream)
    with Pace(10, 10, 1) as pace:
        signal.raise_signal(signal.SIGTERM)
        assert pace.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.undo()
    assert "SIGTERM: stops as soon as the state is saved; again: at once" in capfd.readouterr().err
