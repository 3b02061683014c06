"""A run that goes on in another session, where everything lies under another path."""

import json
import shutil

import pytest
from training_runs import hash_adapter, train, train_until

from captioner.runtime.errors import UserError


@pytest.fixture
def next_session(tmp_path, settings, scenes, monkeypatch):
    """Settings of the next session after one that was stopped in its second epoch: all is copied, the rest is gone."""
    first, second = tmp_path / "first", tmp_path / "second"
    inputs = first / "input"
    shutil.copytree(scenes, inputs)
    monkeypatch.chdir(first)
    train_until(settings, 4, labels=(inputs / "labels.json",), images=inputs / "images")
    moved = second / "kaggle" / "input" / "bdd100k"
    shutil.copytree(inputs, moved)
    shutil.copytree(first / "blip2-finetuned", second / "blip2-finetuned")
    shutil.rmtree(first)
    monkeypatch.chdir(second)
    return settings | {"labels": (moved / "labels.json",), "images": moved / "images"}


def test_the_next_session_goes_on_to_the_same_adapter(next_session, undisturbed, capsys):
    assert train(next_session) == undisturbed[0]  # the same command, without a flag
    assert "goes on after step 4 of 6" in capsys.readouterr().out
    run = json.loads((next_session["images"].parents[3] / "blip2-finetuned" / "run.json").read_text())
    assert run["config"]["images"] == str(next_session["images"])


@pytest.mark.slow
def test_other_data_are_refused_wherever_they_lie(next_session, undisturbed):
    labels = next_session["labels"][0]
    frames = json.loads(labels.read_text())
    for frame in frames:
        frame["attributes"]["weather"] = "foggy"
    labels.write_text(json.dumps(frames))
    with pytest.raises(UserError, match=r"data fingerprint \(captions, images or their split\)"):
        train(next_session)
    assert hash_adapter(undisturbed[1]) == undisturbed[0]
