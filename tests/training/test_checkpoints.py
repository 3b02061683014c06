"""Which checkpoints are kept, and which settings a run may go on with."""

import json

import pytest

from captioner.runtime.settings import flatten
from captioner.training.checkpoints import list_checkpoints, remove_old_checkpoints
from captioner.training.run_state import list_changes
from config import TrainConfig


@pytest.fixture
def checkpoints(tmp_path):
    """checkpoints(best, unsealed): a folder with checkpoints of steps 2 to 12, the best of which is named by each."""

    def make(best: int | None, unsealed: tuple[int, ...] = ()):
        for step in range(2, 13, 2):
            folder = tmp_path / f"checkpoint-{step}"
            folder.mkdir()
            named = best and str(tmp_path / f"checkpoint-{min(best, step)}")
            (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": named}))
            if step not in unsealed:
                (folder / "manifest.json").write_text("{}")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("best", "unsealed", "kept"),
    [
        (None, (), [12, 10]),
        (4, (), [12, 10, 4]),
        (10, (), [12, 10]),
        (4, (12,), [10, 8, 4]),  # what was not written to its end is no checkpoint to fall back to
    ],
)
def test_the_newest_the_one_before_and_the_best_are_kept(checkpoints, best, unsealed, kept):
    folder = checkpoints(best, unsealed)
    remove_old_checkpoints(folder)
    assert [int(path.name.split("-")[1]) for path in list_checkpoints(folder)] == kept


def test_settings_that_came_and_went_keep_no_run_from_going_on():
    """A run's record may be of a program that had other settings; those that both know must be the same."""
    now = flatten(TrainConfig())
    before = {name: value for name, value in now.items() if name != "fast"} | {"fast_step": "auto", "cuda_graphs": True}
    assert list_changes({"config": before}, {"config": now}) == []
    [change] = list_changes({"config": before | {"lora_rank": 8}}, {"config": now})
    assert change.strip() == "--lora-rank: was 8, is 16"
    [change] = list_changes({"config": before}, {"config": now | {"fast": "off"}})
    assert change.strip() == "--fast: was auto, is off"
