"""main.py --check: every stage once, nothing kept, and what the whole run will take."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import main
from captioner.runtime.errors import UserError
from captioner.training import check
from captioner.training.check import Estimate, Stopwatch, estimate_run, make_trial, report_estimate
from config import TrainConfig, make_config


def test_every_stage_is_gone_through_and_nothing_is_kept(folder, settings, capsys):
    main.main(make_config(TrainConfig, **settings, check=True))
    said = capsys.readouterr().out
    assert "1 validation captions, facts F1" in said  # a caption and its score
    assert "every stage works" in said and "12 train, 6 val, 2 test" in said
    assert "for 6 steps" in said and "next:" not in said  # two epochs of three
    assert list(folder.iterdir()) == []


def test_an_unfinished_run_is_left_alone(folder, settings):
    kept = folder / "blip2-finetuned" / "checkpoints" / "state.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    main.main(make_config(TrainConfig, **settings, check=True, resume=True))
    assert [path for path in folder.rglob("*") if path.is_file()] == [kept] and kept.read_text() == "{}"


def test_the_trial_publishes_nothing(tmp_path):
    asked = make_config(TrainConfig, merge=True, push_to_hub="some/one", push_captions="some/captions")
    run = make_trial(asked, tmp_path).run
    assert (run.merge, run.push_to_hub, run.push_captions) == (False, None, None)


def test_what_the_run_would_refuse_is_refused(folder, settings):
    with pytest.raises(UserError, match="nothing"):
        main.main(make_config(TrainConfig, **settings | {"images": Path("nothing")}, check=True))


def test_a_temporary_folder_without_room_is_told_from_the_output_folder():
    def train(trial, choose) -> None:
        raise UserError(f"{trial.run.output}: 0 MB free")

    with pytest.raises(UserError, match=r"adapter: 0 MB free .*TMPDIR"):
        check.check_run(TrainConfig(), train, None)


def test_a_launcher_is_refused(folder, settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without a launcher"):
        main.main(make_config(TrainConfig, **settings, check=True))


@pytest.fixture
def estimate(tmp_path):
    """estimate(features, **settings): of 10,000 frames, by a trial that took what is easy to reckon with."""

    def reckon(features: dict[Path, torch.Tensor] | None, **settings) -> Estimate:
        config = make_config(TrainConfig, **settings)
        trial = make_trial(config, tmp_path)
        (tmp_path / "logs").mkdir(), trial.run.output.mkdir()
        records = [{"samples_per_second": 1.0}, {"samples_per_second": 20.0}, {"eval_samples_per_second": 40.0}]
        (tmp_path / "logs" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (trial.run.output / "run.json").write_text(json.dumps({"results": {"peak_memory_gib": 9.0}}))
        watch = Stopwatch(lambda share: None, tmp_path)
        watch.seconds = Counter(check_images=2.0, encode_images=5.0)
        watch.frames, watch.share = {"train": 6000, "val": 2800, "test": 1200}, 0.01
        watch.features, watch.checkpoint_bytes = features, 10**6
        return estimate_run(config, trial, watch)

    return reckon


def test_the_trial_has_a_hundred_frames_of_all_splits_and_their_share_of_memory():
    shares, seen = [], {}

    class Way:
        def check_images(self, splits, processor):
            seen.update(splits)
            return splits

    def choose(share: float) -> Way:
        shares.append(share)
        return Way()

    splits = {"train": range(6000), "val": range(2800), "test": range(1200)}
    watch = Stopwatch(choose, Path())
    watch.check_images(splits, None)
    assert shares == [0.01]
    assert {split: len(frames) for split, frames in seen.items()} == {"train": 60, "val": 28, "test": 12}
    assert seen["val"][:2] == [0, 100] and seen["val"][-1] == 2700
    assert watch.frames == {"train": 6000, "val": 2800, "test": 1200}


def test_the_estimate_is_the_trial_scaled(estimate):
    known = estimate({Path("a.jpg"): torch.zeros(2, 3, dtype=torch.float16)})
    assert known.frames == {"train": 6000, "val": 2800, "test": 1200}
    assert known.steps == 5 * 375
    assert known.stages["training"] == pytest.approx(5 * 6000 / 20)
    assert known.stages["validation"] == pytest.approx(5 * 2800 / 40)
    assert known.stages["images decoded"] == pytest.approx(200)
    assert known.stages["images encoded"] == pytest.approx(500)
    assert known.stored_bytes == 10_000 * 2 * 3 * 2
    assert known.memory_bytes == 9 * 2**30
    assert 3 * 10**6 < known.disk_bytes < 3 * 10**6 + 100


def test_what_is_not_stored_takes_no_time_of_its_own(estimate):
    known = estimate(None, max_steps=100)
    assert known.stages["images encoded"] == known.stored_bytes == 0
    assert known.steps == 100
    assert known.stages["validation"] == pytest.approx(2800 / 40)  # in the first epoch, which is not all gone through


def test_a_disk_that_is_too_small_is_told(estimate, monkeypatch, capsys):
    known = estimate(None)
    monkeypatch.setattr(check, "measure_free", lambda folder: 10**6)
    report_estimate(make_config(TrainConfig), known)
    said = capsys.readouterr().out
    assert "only 1 MB are free" in said and "decoded and encoded in each epoch" in said


def test_outputs_are_kept_in_the_trial_where_the_run_has_room(folder, monkeypatch):
    disks = {folder: 4 * 2**30, folder / "trial": 8 * 2**30}
    (folder / "trial").mkdir()
    monkeypatch.setattr(check, "measure_free", disks.get)

    def limit(device: str, **settings):
        config = make_config(TrainConfig, **settings)
        fast = check.limit_features(config, folder / "trial", 0.01, torch.device(device))
        return fast.features, fast.features_disk_gib

    kept = folder / "trial" / "features"
    assert limit("cuda") == (kept, 0.04)  # the half of the larger disk, for as much of the images
    assert limit("cuda", features=Path("here")) == limit("cpu", features=Path("here")) == (kept, 0.02)
    assert limit("cuda", features_disk_gib=7.0) == (kept, 0.07)
    assert limit("cpu") == ("auto", None) and limit("cuda", features="off") == ("off", None)
