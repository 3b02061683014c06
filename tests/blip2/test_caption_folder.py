"""A run that captions a folder, stopped and gone on with; by a captioner without a model."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from captioner.blip2.caption_folder import caption_folder
from captioner.runtime.errors import UserError
from config import EvalConfig, make_config


class Stopped(Exception):
    pass


class FakeCaptioner:
    """Says of each image with which others it was captioned; stops after so many batches."""

    free = 4  # images that there is room for

    def __init__(self, config, count):
        self.batch_size = config.generation.batch_size or self.free
        self.batches: list[list[str]] = []
        self.stop_after = None

    def describe_way(self):
        return {"batch": str(self.batch_size), "by": "generate"}

    def caption(self, names, outputs):
        return [f"{name} with {len(names)}" for name in names]

    def map_batches(self, images, work, unreadable, finished):
        for start in range(0, len(images), self.batch_size):
            names = [name for name, _ in images[start : start + self.batch_size]]
            if all(name in finished for name in names):
                continue
            if len(self.batches) == self.stop_after:
                raise Stopped
            self.batches.append(names)
            yield list(zip(names, work(names, None), strict=True))


@pytest.fixture
def start(folder):
    """start(run name, stop_after=None, free=4, **settings) -> captions.jsonl, and the captioner."""
    Path("adapter").mkdir()
    Path("adapter/run.json").write_text(json.dumps({"config": {"model": "a"}}))
    Path("images").mkdir()
    for number in range(10):
        Path(f"images/{number}.jpg").touch()

    def caption(name, stop_after=None, free=4, **settings):
        config = make_config(EvalConfig, adapter=Path("adapter"), images=(Path("images"),), **settings)
        made = []

        def make(config, count):
            assert count == 10
            captioner = FakeCaptioner(config, count)
            captioner.stop_after = stop_after
            if config.generation.batch_size is None:
                captioner.batch_size = free
            made.append(captioner)
            return captioner

        with suppress(Stopped):
            caption_folder(config, Path(name), make)
        return (Path(name) / "captions.jsonl").read_text(), made[0] if made else None

    return caption


def test_a_stopped_run_goes_on_with_the_same_batches(start, capsys):
    """Also where another batch size would be chosen now, and where a batch or a line was half written."""
    whole, _ = start("whole")
    assert whole.count("\n") == 10
    first, _ = start("stopped", stop_after=2)
    assert whole.startswith(first) and first.count("\n") == 8
    path = Path("stopped/captions.jsonl")
    path.write_text("".join(first.splitlines(keepends=True)[:6]) + first.splitlines()[6][:9])
    again, captioner = start("stopped", free=7)
    assert again == whole
    assert captioner.batches == [["4.jpg", "5.jpg", "6.jpg", "7.jpg"], ["8.jpg", "9.jpg"]]
    said = capsys.readouterr().out
    assert "6 of 10 images were captioned before" in said and "note" not in said
    assert start("stopped") == (whole, None)  # nothing is left to do, no model is loaded


def test_another_batch_size_is_taken_and_told(start, capsys):
    start("run", stop_after=1)
    _, captioner = start("run", batch_size=5)
    assert captioner.batches == [[f"{n}.jpg" for n in range(5)], [f"{n}.jpg" for n in range(5, 10)]]
    assert "note: captions before were made with {'batch': '4'" in capsys.readouterr().out


def test_captions_that_training_wrote_are_not_overwritten(start):
    Path("run").mkdir()
    Path("run/captions.csv").write_text("name,raw_caption\na.jpg,A car.\n")
    with pytest.raises(UserError, match=r"run/captions\.csv: was written by another script; take another --run-name"):
        start("run")
    start("own")
    Path("own/captions.csv").write_text("name,prediction\n")
    start("own")  # its own is written again


@pytest.mark.parametrize("change", [{"greedy": True}, {"seed": 1}, {"base": True}, {"max_new_tokens": 3}])
def test_other_settings_are_refused(start, change):
    start("run", stop_after=1)
    with pytest.raises(UserError, match="other settings"):
        start("run", **change)


@pytest.mark.parametrize("way", [{"batch": "x"}, {"batch": "0"}, {"by": "generate"}, [], 3])
def test_a_damaged_record_is_named(start, way):
    start("run", stop_after=1)
    path = Path("run/settings.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"way": way}))
    if way == []:
        assert start("run")[0].count("\n") == 10
    else:
        with pytest.raises(UserError, match="earlier run that can't be read"):
            start("run")
