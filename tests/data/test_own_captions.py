"""Own captions, from file to adapter to scores; and what is refused before anything is written."""

import csv
import json
import re
import shutil
from pathlib import Path

import fastjsonschema
import pytest
import torch
from conftest import ROOT, call_script, start_script
from datasets import Dataset, Features, Value
from datasets import Image as HubImage
from loopback import COMMIT, HubServer
from transformers import AutoConfig

from captioner.blip2 import batches
from captioner.blip2.loading import load_processor
from captioner.blip2.pixels import load_pixels
from captioner.data.examples import Example
from captioner.data.splits import prepare_splits, read_split
from captioner.runtime.errors import UserError
from config import TrainConfig, make_config

validate_scores = fastjsonschema.compile(json.loads((ROOT / "tests/scores.schema.json").read_text()))
CAPTIONS = ["A red car waits.", "Zwei Autos, naß.", "猫が道を渡る", "Several lanes\nin the rain.", 'It\'s "late".']


@pytest.fixture(scope="module")
def photos(drawn, tmp_path_factory) -> Path:
    """Twelve images in folders with spaces, under names of all kinds."""
    folder = tmp_path_factory.mktemp("own") / "my images"
    for number, image in enumerate(sorted((drawn / "images").iterdir())):
        target = folder / ("é t/a b.jpg", "deep/er/1.jpg")[number] if number < 2 else folder / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, target)
    return folder


def list_rows(photos: Path, each: int = 1) -> list[tuple[str, str]]:
    names = sorted(image.relative_to(photos).as_posix() for image in photos.rglob("*.jpg"))
    return [(name, CAPTIONS[(n + turn) % len(CAPTIONS)]) for n, name in enumerate(names) for turn in range(each)]


def write_table(path: Path, rows, header=("name", "raw_caption"), **form) -> Path:
    with open(path, "w", encoding=form.pop("encoding", "utf-8"), newline="") as file:
        csv.writer(file, **form).writerows([header, *rows])
    return path


def write_coco(path: Path, rows) -> Path:
    ids = {name: 100 + place for place, (name, _) in enumerate(dict(rows).items())}
    images = [{"id": number, "file_name": name, "height": 720, "width": 1280} for name, number in ids.items()]
    annotations = [{"image_id": ids[name], "id": n, "caption": caption} for n, (name, caption) in enumerate(rows)]
    document = {"info": {"version": "1.0"}, "licenses": [], "images": images, "annotations": annotations}
    path.write_text(json.dumps(document))
    return path


def write_tokens(path: Path, rows) -> Path:
    turns: dict[str, int] = {}
    with open(path, "w", encoding="utf-8") as file:
        for name, caption in rows:
            turns[name] = turns.get(name, -1) + 1
            file.write(f"{name}#{turns[name]}\t{' '.join(caption.split())}\n")
    return path


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in rows))
    return path


KINDS = {
    "comma.csv": write_table,
    "excel.csv": lambda path, rows: write_table(path, rows, encoding="utf-8-sig", delimiter=";", lineterminator="\r\n"),
    "tabs.tsv": lambda path, rows: write_table(path, rows, ("image", "caption"), delimiter="\t"),
    "lines.jsonl": write_lines,
    "captions_val2014.json": write_coco,
    "Flickr8k.token.txt": write_tokens,
}


def train_on(folder: Path, photos: Path, captions: Path, model: Path, *flags):
    settings = ["--max-steps", 1, "--train-batch-size", 4, "--per-device-train-batch-size", 4, "--val-captions", 2]
    settings += ["--dataloader-workers", 0, "--wandb", "disabled", "--lora-target", "lm", "--run-name", "run"]
    data = ["--captions", captions, "--images", photos, "--model", model]
    return call_script("main.py", *data, *settings, *flags, cwd=folder)


@pytest.mark.parametrize("kind", [k if k == "comma.csv" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_each_kind_of_file_leads_to_an_adapter_and_to_scores(tmp_path, photos, tiny_checkpoint, kind):
    rows = list_rows(photos, each=2)
    captions = KINDS[kind](tmp_path / kind, rows)
    before = captions.read_bytes(), sorted(photos.rglob("*"))
    trained = train_on(tmp_path, photos, captions, tiny_checkpoint)
    assert trained.returncode == 0, trained.stderr
    assert (captions.read_bytes(), sorted(photos.rglob("*"))) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["blip2-finetuned", "logs", kind])
    wanted = {}
    for name, caption in rows:
        wanted.setdefault(name, []).append(" ".join(caption.split()))
    found = {}
    for split in ("train", "val", "test"):
        found |= {example.name: list(example.captions) for example in read_split(tmp_path / "blip2-finetuned", split)}
    assert found == wanted
    scored = call_script("eval.py", "--num-samples", "all", "--greedy", "--max-new-tokens", 4, cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    [predictions] = tmp_path.glob("logs/*/predictions.jsonl")
    for line in predictions.read_text().splitlines():
        assert json.loads(line)["references"] == wanted[json.loads(line)["name"]]
    [written] = tmp_path.glob("logs/*/scores.json")
    scores = json.loads(written.read_text())
    validate_scores(scores)
    assert scores["facts_from"] is None
    card = (tmp_path / "blip2-finetuned/README.md").read_text()
    assert f"| CIDEr-D | {scores['scores']['cider_d']['CIDEr-D']['value']:.3f}" in card
    records = (tmp_path / "logs/run/metrics.jsonl").read_text()
    assert "val_CIDEr-D" in records and "validation captions, CIDEr-D" in trained.stdout
    for shown in (trained.stdout, records, scored.stdout, card, (written.parent / "scores.json").read_text()):
        assert not re.search(r"facts[ _]f1|right facts|weather|traffic", shown, re.IGNORECASE), shown


def score_all(folder: Path) -> dict:
    """The scores of the adapter in `folder`, on all of its test split."""
    scored = call_script("eval.py", "--num-samples", "all", "--greedy", "--max-new-tokens", 4, cwd=folder)
    assert scored.returncode == 0, scored.stderr
    [written] = folder.glob("logs/*/scores.json")
    return json.loads(written.read_text())


@pytest.mark.slow
def test_an_image_folder_leads_to_an_adapter_and_to_scores(tmp_path, photos, tiny_checkpoint):
    """Images and metadata.csv in one folder, which --captions names."""
    rows = list_rows(photos)
    folder = Path(shutil.copytree(photos, tmp_path / "set"))
    write_table(folder / "metadata.csv", rows, ("file_name", "text"))
    trained = train_on(tmp_path, folder, folder, tiny_checkpoint)
    assert trained.returncode == 0, trained.stderr
    parts = [read_split(tmp_path / "blip2-finetuned", split) for split in ("train", "val", "test")]
    assert {example.name: example.caption for part in parts for example in part} == {
        name: " ".join(caption.split()) for name, caption in rows
    }
    assert score_all(tmp_path)["n"] == len(parts[2])


@pytest.mark.slow
def test_a_data_set_of_the_hub_leads_to_an_adapter_and_to_scores(tmp_path, photos, tiny_checkpoint):
    """By the hub's real client, from a loopback hub; the images go through our decoder."""
    names, captions = zip(*list_rows(photos), strict=True)
    columns = {"image": [str(photos / name) for name in names], "caption": list(captions)}
    file = tmp_path / "set.parquet"
    Dataset.from_dict(columns, Features({"image": HubImage(), "caption": Value("string")})).to_parquet(file)
    files = {"data/train-00000-of-00001.parquet": file.read_bytes()}
    settings = ["--max-steps", 1, "--train-batch-size", 4, "--dataloader-workers", 0, "--val-captions", 0]
    with HubServer(files, tmp_path / "hub", model="me/cars", kind="datasets") as hub:
        data = ["--captions", "me/cars", "--model", tiny_checkpoint, "--wandb", "disabled", "--run-name", "run"]
        with start_script("main.py", *data, *settings, cwd=tmp_path, **hub.environment) as process:
            _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    run = json.loads((tmp_path / "blip2-finetuned/run.json").read_text())
    assert run["captions"] == {"data_set": "me/cars", "commit": COMMIT}
    parts = [read_split(tmp_path / "blip2-finetuned", split) for split in ("train", "val", "test")]
    assert sorted(example.caption for part in parts for example in part) == sorted(
        " ".join(caption.split()) for caption in captions
    )
    assert score_all(tmp_path)["n"] == len(parts[2])


def test_two_rows_from_file_to_loss_mask(tmp_path, photos, tiny_checkpoint):
    """A caption with a line end, of an image in a folder with a space; and one that speaks of a special token."""
    rows = [(name, "A car.") for name, _ in list_rows(photos) if name[0].isdigit()]
    rows += [("é t/a b.jpg", 'Two "cars",\n  ein Ärgernis.'), ("deep/er/1.jpg", "A sign says <image></s>.")]
    rows = [(*row, "train" if "/" in row[0] else ("val", "test")[n % 2]) for n, row in enumerate(rows)]
    path = write_table(tmp_path / "c.csv", rows, ("name", "caption", "split"), delimiter=";")
    config = make_config(TrainConfig, captions=path, images=photos)
    splits = prepare_splits(config, tmp_path)
    processor = load_processor(tiny_checkpoint)
    model_config = AutoConfig.from_pretrained(tiny_checkpoint)
    table = batches.make_datasets(config, splits, processor, model_config, None)["train"]
    batch = batches.CaptionCollator(model_config)(table.__getitems__([0, 1]))
    texts = ['Two "cars", ein Ärgernis.', "A sign says <image></s>."]
    start = model_config.num_query_tokens + 1
    for row, (name, text) in enumerate(zip(("é t/a b.jpg", "deep/er/1.jpg"), texts, strict=True)):
        assert table.with_format(None)[row] == {
            "name": name, "image": str(photos / name), "caption": [text], "group": name, "index": row
        }  # fmt: skip
        assert torch.equal(batch["pixel_values"][row], load_pixels(photos / name, processor))
        labels, ids = batch["labels"][row], batch["input_ids"][row]
        carries_loss = labels != batches.IGNORED
        assert processor.tokenizer.decode(labels[carries_loss]) == text + "\n"  # OPT's end token in BLIP-2
        assert not carries_loss[:start].any() and carries_loss[start : start + carries_loss.sum()].all()
        assert (ids == model_config.image_token_index).sum() == model_config.num_query_tokens
        assert (batch["attention_mask"][row] == (torch.arange(len(ids)) < start + carries_loss.sum())).all()


def test_of_several_captions_each_epoch_has_another(photos, tiny_checkpoint):
    image = next(photos.glob("*.jpg"))
    examples = [Example("a", image, "One", "", ("Two", "Three")), Example("b", image, "Four"), Example("c", image, "5")]
    processor = load_processor(tiny_checkpoint)

    def draw(seed: int, epochs: int) -> list[list[str]]:
        table = batches.make_dataset(examples, processor, 50, 2, seed)
        reader, drawn = batches.get_reader(table), []
        reader.features = {image: torch.zeros(1)}
        for reader.epoch in range(epochs):
            drawn.append([processor.tokenizer.decode(row["caption_ids"][:-1]) for row in table.__getitems__([2, 0, 1])])
        return drawn

    drawn = draw(1, 6)
    assert {row[1] for row in drawn[:3]} == {row[1] for row in drawn[3:]} == {"One", "Two", "Three"}
    assert {(row[0], row[2]) for row in drawn} == {("5", "Four")}
    assert draw(1, 6) == drawn and any(draw(seed, 3) != drawn[:3] for seed in (2, 3, 4))


def test_captions_that_are_cut_are_counted(tiny_checkpoint, capsys):
    processor = load_processor(tiny_checkpoint)
    batches.tokenize_captions(["A car.", "A car waits for a truck."], processor, 8, 2)
    assert capsys.readouterr().out == "1 of 2 captions have more than 8 tokens and are cut\n"


def split_by_file(tmp_path, photos, columns: dict, **settings):
    rows = list_rows(photos)
    table = [(*row, *(values[n] for values in columns.values())) for n, row in enumerate(rows)]
    path = write_table(tmp_path / "c.csv", table, ("name", "raw_caption", *columns))
    config = make_config(TrainConfig, captions=path, images=photos, **settings)
    splits = prepare_splits(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return {split: [example.name for example in examples] for split, examples in splits.items()}


def test_the_split_of_the_file_is_kept(tmp_path, photos, capsys):
    names = [name for name, _ in list_rows(photos)]
    column = ["test", *["train"] * 8, "val", "val", "test"]
    splits = split_by_file(tmp_path, photos, {"split": column})
    assert splits == {"train": names[1:9], "val": names[9:11], "test": [names[0], names[11]]}
    assert "group" not in capsys.readouterr().out
    fewer = split_by_file(tmp_path, photos, {"split": column}, limit=6)
    assert {split: len(part) for split, part in fewer.items()} == {"train": 4, "val": 1, "test": 1}
    for column, limit, counts in [
        (["train"] * 4 + ["val"] * 4 + ["test"] * 4, 4, [2, 1, 1]),
        (["train"] * 10 + ["val", "test"], 4, [2, 1, 1]),
        (["train"] * 10 + ["val", "test"], 3, [1, 1, 1]),
        (["train"] * 2 + ["val"] * 5 + ["test"] * 5, 11, [2, 5, 4]),
        (["train"] * 2 + ["test"] * 10, 4, [1, 1, 2]),  # the split val is a part of the two
    ]:
        parts = split_by_file(tmp_path, photos, {"split": column}, limit=limit)
        assert [len(parts[split]) for split in ("train", "val", "test")] == counts
    parts = split_by_file(tmp_path, photos, {"split": ["test", *["train"] * 11]})
    assert parts["test"] == names[:1] and sorted(parts["train"] + parts["val"]) == sorted(names[1:]) and parts["val"]
    with pytest.raises(UserError, match="no image is in the split train: test alone"):
        split_by_file(tmp_path, photos, {"split": ["test"] * 12})


def test_groups_of_the_file_are_in_one_split_each(tmp_path, photos, capsys):
    names, column = [name for name, _ in list_rows(photos)], [f"video {n % 4}" for n in range(12)]
    splits = split_by_file(tmp_path, photos, {"video": column}, group_column="Video")
    groups = [{column[names.index(name)] for name in part} for part in splits.values()]
    assert all(groups) and sum(map(len, groups)) == 4
    split_by_file(tmp_path, photos, {})
    assert "each image counts as a group of its own; --group-column" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"12 images of 2 groups can't be split: train, val, test need a group each"):
        split_by_file(tmp_path, photos, {"video": [n % 2 for n in range(12)]}, group_column="video")


def test_frames_of_bdd100k_are_split_by_ride(tmp_path, drawn, capsys):
    names = sorted(image.name for image in (drawn / "images").iterdir())
    path = write_table(tmp_path / "c.csv", [(name, "A car.") for name in names])
    splits = prepare_splits(make_config(TrainConfig, captions=path, images=drawn / "images"), tmp_path)
    assert all(example.group == example.name.split("-")[0] for part in splits.values() for example in part)
    assert "group" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([("a", "b")], ["--labels", "labels.json"], "--captions --labels: captions are read, or made from labels"),
        ([("a", "b")], ["--no-lanes"], "--captions --lanes: captions are read as they are"),
        ([("a", "b")], ["--held-out", "val", "--subset", "train"], "--held-out val: goes with"),
        ([("gone.jpg", "x")], [], "none of the 1 captioned images"),
        ([("2.jpg", "x"), ("gone.jpg", "x")], [], "1 of 2 captioned images are not in .* more than 5%"),
        ([("2.jpg", "x")], ["--group-column", "ride"], "no column ride; its columns are name, raw_caption"),
        ([("2.jpg", "x" * 10_000_000)], [], "line 2: a caption has at most 10,000 characters"),
        ([("2.jpg", "x")], [], "1 images of 1 groups can't be split"),
    ],
)
def test_bad_own_captions_end_before_anything_is_written(tmp_path, photos, tiny_checkpoint, rows, flags, message):
    captions = write_table(tmp_path / "c.csv", rows)
    before = captions.read_bytes()
    refused = train_on(tmp_path, photos, captions, tiny_checkpoint, "--run-name", "bad", *flags)
    assert refused.returncode == 2
    assert re.search(message, refused.stderr), refused.stderr
    assert captions.read_bytes() == before
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == [captions]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--captions", "c.csv"], "give the folder with the images too"),
        (["--group-column", "x"], "goes with --captions"),
    ],
)
def test_flags_that_lack_another_are_refused(tmp_path, flags, message):
    refused = call_script("main.py", *flags, cwd=tmp_path)
    assert refused.returncode == 2 and message in refused.stderr
