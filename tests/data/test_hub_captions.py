"""Own captions of a data set on the hub: from a copy of one in the hub's layout, and by its name."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, Features, List, Value
from PIL import Image

from captioner.data import image_decoding
from captioner.data.hub_captions import fetch_captions, is_data_set
from captioner.data.splits import prepare_splits
from captioner.runtime.errors import UserError
from config import TrainConfig, make_config

COMMIT = "c0ffee" * 6 + "abcd"


def draw(colour: str, kind: str = "PNG") -> dict:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(content, kind)
    return {"bytes": content.getvalue(), "path": f"{colour}.{kind.lower()}"}


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A data set with Parquet files for two splits; `datasets` keeps what it makes of them elsewhere."""
    features = Features({"image": datasets.Image(), "caption": List(Value("string")), "video": Value("int64")})
    parts = {
        "train": [(draw("red"), ["Red.", "Rot."], 1), (draw("blue", "JPEG"), ["Blue."], 2), (draw("green"), ["G"], 3)],
        "test": [(draw("white"), ["White."], 4)],
    }
    folder = tmp_path / "copy"
    (folder / "data").mkdir(parents=True)
    for split, rows in parts.items():
        columns = dict(zip(features, map(list, zip(*rows, strict=True)), strict=True))
        Dataset.from_dict(columns, features).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def test_columns_are_known_in_any_case(tmp_path, copy):
    table = datasets.load_dataset(str(copy))["train"].rename_columns({"caption": "Caption", "video": "Video"})
    (tmp_path / "other").mkdir()
    table.to_parquet(tmp_path / "other/train.parquet")
    captions, _ = fetch_captions(str(tmp_path / "other"), tmp_path / "run", "video")
    assert list(captions["caption"]) and set(captions["group"]) == set(map(str, table["Video"]))


def test_a_copy_of_a_data_set_is_read(tmp_path, copy, monkeypatch):
    assert is_data_set(copy)
    splits = prepare_splits(make_config(TrainConfig, captions=copy, group_column="video"), tmp_path / "run")
    assert {split: len(part) for split, part in splits.items()} == {"train": 2, "val": 1, "test": 1}
    examples = {example.captions: example for part in splits.values() for example in part}
    red = examples["Red.", "Rot."]
    assert (red.name, red.group) == ("train/000000.png", "1")
    assert red.image.read_bytes() == draw("red")["bytes"]
    assert examples["Blue.",].image.name == "000001.jpeg"
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 47)
    with pytest.raises(UserError, match="8 x 6 pixels, more than 47"):  # our limits hold
        image_decoding.open_image(red.image)


def test_a_data_set_is_read_by_its_name_at_one_commit(tmp_path, copy, monkeypatch):
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        return load_dataset(str(copy))

    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda self, name, revision=None: SimpleNamespace(sha=COMMIT)
    )
    assert is_data_set(Path("me/cars"))
    for name in ("me/cars", "me/cars@main", f"me/cars@{COMMIT}"):
        assert len(fetch_captions(name, tmp_path / "run")[0]) == 5
        assert json.loads((tmp_path / "run/captions.json").read_text()) == {"data_set": "me/cars", "commit": COMMIT}
    assert asked == [("me/cars", COMMIT)] * 3


def rename_split(copy: Path, split: str, name: str) -> None:
    [file] = copy.glob(f"data/{split}-*")
    file.rename(file.with_name(file.name.replace(split, name)))


def test_splits_of_other_names_are_left_out_and_told(tmp_path, copy, capsys):
    """Before any image is written."""
    shutil.copy(next(copy.glob("data/test-*")), copy / "data/another-00000-of-00001.parquet")
    captions, folder = fetch_captions(str(copy), tmp_path / "run")
    assert set(captions["split"]) == {"train", "test"} and len(captions) == 5
    told = "copy: 1 rows are of splits other than train, val and test (another) and are left out"
    assert told in capsys.readouterr().out
    assert folder == tmp_path / "run/images" and {path.name for path in folder.iterdir()} == {"train", "test"}
    rename_split(copy, "train", "more")
    with pytest.raises(UserError, match="no image is in the split train: test alone"):
        prepare_splits(make_config(TrainConfig, captions=copy), tmp_path / "run")
    rename_split(copy, "test", "most")
    message = "its splits are another, more, most; one of train, training, val, .* is wanted"
    with pytest.raises(UserError, match=message):
        fetch_captions(str(copy), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_single_split_is_split_whatever_its_name_is(tmp_path, copy):
    rename_split(copy, "train", "whole")
    next(copy.glob("data/test-*")).unlink()
    splits = prepare_splits(make_config(TrainConfig, captions=copy), tmp_path / "run")
    assert {split: len(part) for split, part in splits.items()} == {"train": 1, "val": 1, "test": 1}


def test_images_of_a_commit_are_written_once(tmp_path, copy, monkeypatch, capfd):
    """Those of a folder always: it may have changed."""
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision=None: load_dataset(str(copy)))

    def fetch(name: str, run: str) -> dict[Path, int]:
        _, folder = fetch_captions(name, tmp_path / "logs" / run)
        assert "writing train images: 100%" in capfd.readouterr().err
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}

    written = fetch(f"me/cars@{COMMIT}", "run")
    assert {path.parent for path in written} == {
        tmp_path / f"logs/images/me--cars@{COMMIT}" / split for split in ("train", "test")
    }
    first = min(written)
    first.unlink()
    again = fetch(f"me/cars@{COMMIT}", "other")
    assert again.keys() == written.keys() and {path for path in written if again[path] != written[path]} == {first}
    copies = fetch(str(copy), "run")
    assert {path.relative_to(tmp_path / "logs/run/images").parts[0] for path in copies} == {"train", "test"}
    again = fetch(str(copy), "run")
    assert again.keys() == copies.keys() and not again.items() & copies.items()


def test_a_data_set_without_images_or_captions_is_refused(tmp_path, copy):
    with pytest.raises(UserError, match="lacks the column ride; its columns are image, caption, video"):
        fetch_captions(str(copy), tmp_path / "run", "ride")
    for file in (copy / "data").iterdir():
        Dataset.from_dict({"path": ["a"], "label": [1]}).to_parquet(file)
    message = r"lacks a text column \(raw_caption, caption, text\) and a column of images; its columns are path, label"
    with pytest.raises(UserError, match=message):
        fetch_captions(str(copy), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_cannot_be_had_is_refused(tmp_path):
    """Here no network is asked: HF_HUB_OFFLINE is set."""
    with pytest.raises(UserError, match=r"--captions me/cars: no such file, and no data set that can be had"):
        fetch_captions("me/cars", tmp_path / "run")
    assert not (tmp_path / "run").exists()
