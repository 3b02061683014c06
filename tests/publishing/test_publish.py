"""The model card, the merged model, the upload: with the real hub client, against a hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import ROOT, capture
from datasets import load_dataset
from huggingface_hub import ModelCard, close_session, constants
from loopback_push import Hub

from captioner.data.examples import Example
from captioner.data.splits import write_splits
from captioner.publishing import merge, model_card
from captioner.publishing.hub import push_to_hub, stage_files
from captioner.publishing.merge import merge_adapter
from captioner.publishing.model_card import write_model_card
from captioner.publishing.records import strip_paths
from captioner.runtime.cli import run_script
from captioner.runtime.errors import UserError
from captioner.runtime.files import write_json
from captioner.runtime.settings import flatten
from captioner.scoring.headlines import HEADLINES
from captioner.scoring.predictions import Prediction
from captioner.scoring.scores import score_predictions
from config import EvalConfig, TrainConfig, make_config

NOWHERE = "http://127.0.0.1:9"  # nobody answers there
FINGERPRINT = "5e" * 32
CAPTIONS = [
    "It is a night scene in clear weather on a highway road. There is one car.",
    "It is a daytime scene in rainy weather on a city street road. There are 2 cars. There is one truck.",
]


def make_scores() -> dict:
    """What eval.py writes of a model that says "one car" every time."""
    pairs = [(name, CAPTIONS[name % 2]) for name in range(12)]
    predictions = [Prediction(f"{name}.jpg", CAPTIONS[0], [caption]) for name, caption in pairs]
    scores = score_predictions(predictions, {"split": "test", "decoding": "greedy"}, resamples=50)
    scores |= {"left_out": {"unreadable images": 3}, "facts_from": "references"}
    evaluation = make_config(EvalConfig, adapter=Path("/home/alice/adapter"), greedy=True, num_samples="all")
    return scores | {"predictions": "/home/alice/logs/predictions.jsonl", "config": flatten(evaluation)}


def make_text_scores() -> dict:
    """The same of captions in words of their own, two of each image."""
    texts = ["A red car waits.", "Two people cross in the rain.", "The street is empty."]
    rows = [Prediction(f"{n}.jpg", texts[n % 2], [texts[n % 3], texts[(n + 1) % 3]]) for n in range(24)]
    scores = score_predictions(rows, {"split": "test", "decoding": "greedy"}, resamples=50)
    scores |= {"left_out": {}, "facts_from": None}
    return scores | {"config": flatten(make_config(EvalConfig, greedy=True, num_samples="all"))}


def make_run(**config) -> dict:
    """What main.py writes."""
    training = make_config(
        TrainConfig, labels=(Path("/home/alice/labels.json"),), images=Path("/home/alice/images"), **config
    )
    return {
        "run_name": "first",
        "config": flatten(training),
        "data": {"fingerprint": FINGERPRINT, "frames": {"train": 6001, "val": 2800, "test": 1199}},
        "run_dir": "/home/alice/logs/first",
        "results": {"train_loss": 0.25, "best_eval_loss": 0.123456},
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "python": "3.11.7",
        "git_commit": "c0ffee" * 6,
        "device": "NVIDIA H100",
        "finished": "2026-11-23T18:02:25+00:00",
    }


# --------------------------------------------------------------------------------------------------------------
# the model card


def test_card_of_own_captions_speaks_of_no_other_data(tmp_path):
    config = make_config(TrainConfig, captions=Path("/home/alice/mine.csv"), images=Path("/home/alice/images"))
    for demo in (False, True):
        run = make_run() | {"config": flatten(config) | {"demo": demo}}
        write_json(tmp_path / "run.json", run)
        write_json(tmp_path / "scores.json", make_scores())
        write_model_card(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "Captions that the trainer gave: `mine.csv`." in card.text and "captions of images" in card.text
        said = card.content.lower()
        assert "| lora_rank |" in said and not any(f"| {name} |" in said for name in ("lanes", "class_names", "style"))
        assert not any(word in said for word in ("bdd100k", "by ride", "driving scene", "drawn", "alice"))
        assert {result.dataset_type for result in card.data.eval_results} == {"own-captions"}
    old = make_run()
    old["config"] = {**old["config"], "captions": "bdd100k_captions.csv"}  # where those of labels were written
    del old["config"]["group_column"]
    write_json(tmp_path / "run.json", old)
    write_model_card(tmp_path)
    assert "BDD100K label files that the trainer gave" in (tmp_path / "README.md").read_text()


def test_card_of_free_captions_speaks_of_no_facts(tmp_path):
    config = make_config(TrainConfig, captions=Path("mine.csv"), images=Path("images"))
    scores = make_text_scores()
    write_json(tmp_path / "run.json", make_run() | {"config": flatten(config)})
    write_json(tmp_path / "scores.json", scores)
    write_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    named = {result.metric_name: result.metric_value for result in card.data.eval_results}
    figures = {group: scores["scores"][group] for group in ("cider_d", "corpus_bleu", "rouge_l")}
    wanted = {name: figures[group][name]["value"] for group, name in
              [("cider_d", "CIDEr-D"), ("corpus_bleu", "BLEU-4"), ("rouge_l", "ROUGE-L")]}  # fmt: skip
    assert wanted.items() <= named.items() and named.keys() - wanted.keys() <= {"METEOR (nltk)"}
    assert all(f"| {name} | {value:.3f} [" in card.text for name, value in wanted.items())
    assert "24 images of the test split; the likeliest token each time" in card.text
    for word in ("fact", "weather", "slices", "by class", "none", "traffic"):
        assert word not in card.content.lower(), word


def test_card_has_the_real_numbers(tmp_path):
    scores = make_scores()
    write_json(tmp_path / "run.json", make_run())
    write_json(tmp_path / "scores.json", scores)
    write_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "Salesforce/blip2-opt-2.7b"
    assert (card.data.library_name, card.data.pipeline_tag, card.data.language) == ("peft", "image-to-text", "en")
    assert card.data.datasets == ["bdd100k"] and {"lora", "qlora", "bdd100k"} <= set(card.data.tags)
    assert card.data.model_name == tmp_path.name
    figures = [headline.find(scores["scores"], name) for name, headline in HEADLINES.items()]
    stated = [figure for figure in figures if figure["value"] is not None]
    assert [result.metric_value for result in card.data.eval_results] == [figure["value"] for figure in stated]
    assert {(result.dataset_name, result.dataset_split) for result in card.data.eval_results} == {("BDD100K", "test")}
    rows = {line.split(" | ")[0].strip("| "): line for line in card.text.splitlines() if line.startswith("| ")}
    for name, headline in HEADLINES.items():
        row = rows[headline.words]
        for groups in (scores["scores"], *scores["floors"].values()):
            figure = headline.find(groups, name)
            assert f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" in row
    assert all(f"floor: {floor}" in card.text for floor in scores["floors"])
    assert "| learning_rate | 5e-05 |" in card.text and "| best_eval_loss | 0.123456 |" in card.text
    assert "12 images of the test split; the likeliest token each time" in card.text
    assert "6,001 train, 2,800 val, 1,199 test" in card.text and FINGERPRINT in card.text
    assert "`labels.json`" in card.text and model_card.BDD100K_LICENCE in card.text
    exact = scores["scores"]["classes"]["truck"]["exact"]
    assert f"{exact['value']:.3f} [{exact['low']:.3f}" in rows["truck"]
    for known in ("c0ffee" * 6, "NVIDIA H100", "2.13.0", "3.11.7", "left out, unreadable images: 3"):
        assert known in card.text
    assert "alice" not in card.content and "None" not in card.content
    assert str(card) == (tmp_path / "README.md").read_text()  # the metadata is in the form the hub writes


def test_card_says_nothing_that_is_not_known(tmp_path):
    """Of an old run, without scores, trained on drawn scenes from a local base."""
    write_json(tmp_path / "run.json", {"config": {"model": "/home/alice/base", "demo": True}})
    write_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and card.data.datasets is None and card.data.eval_results is None
    assert "qlora" not in card.data.tags and "bdd100k" not in card.data.tags
    headings = re.findall("^## (.*)", card.text, re.MULTILINE)
    assert headings == ["Use", "Results", "Data", "Limits"]
    assert "Not measured." in card.text and "Drawn scenes" in card.text
    for unknown in ("alice", "None", "BDD100K", "Fingerprint", "Frames", "NF4", "95 %"):
        assert unknown not in card.content


def test_lines_of_the_card_run(adapter, tiny_checkpoint, drawn, capsys):
    write_model_card(adapter)
    [lines] = re.findall("```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    image = next((drawn / "images").iterdir())
    for name, path in {tiny_checkpoint.name: tiny_checkpoint, adapter.name: adapter, "scene.jpg": image}.items():
        assert f'"{name}"' in lines
        lines = lines.replace(f'"{name}"', repr(str(path)))
    exec(lines, {})
    assert capsys.readouterr().out.strip()


def test_scores_of_another_version_are_left_out(tmp_path):
    write_json(tmp_path / "run.json", make_run())
    write_json(tmp_path / "scores.json", make_scores() | {"schema": 0})
    write_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None and "Not measured." in card.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"load_in_4bit": True}, "; the base model in NF4, as in training"),
        ({"load_in_4bit": False}, "time; facts held against"),
    ],
)
def test_card_says_how_captions_came_about(tmp_path, change, said):
    write_json(tmp_path / "run.json", make_run(**change))
    write_json(tmp_path / "scores.json", make_scores())
    write_model_card(tmp_path)
    assert said in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"config": {}}'])
def test_card_of_a_damaged_run_is_one_message(tmp_path, content):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json|no fine-tuned model in it"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_labels_of_scores_are_no_paths():
    """Only settings and absolute paths lose their folders: of "dawn/dusk" the first half stays."""
    record = {"confusion": {"labels": ["dawn/dusk"]}, "config": {"labels": ["../alice/a.json"], "style": "plain"}}
    stripped = strip_paths(record | {"run_dir": r"C:\alice\logs", "source": "a/b"})
    assert stripped["confusion"] == record["confusion"]
    assert stripped["config"] == {"labels": ["a.json"], "style": "plain"}
    assert (stripped["run_dir"], stripped["source"]) == ("logs", "a/b")


# --------------------------------------------------------------------------------------------------------------
# the merged model


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_checkpoint) -> Path:
    """A folder as main.py leaves it, of an adapter that changes what the model says."""
    from captioner.blip2.generation import make_generation_config
    from captioner.blip2.loading import load_processor, load_weights
    from captioner.blip2.lora import add_lora

    folder = tmp_path_factory.mktemp("work") / "blip2-finetuned"
    torch.manual_seed(1)
    model = add_lora(load_weights(tiny_checkpoint, None, dtype=torch.float32), "both", rank=4, alpha=8, dropout=0.0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    load_processor(tiny_checkpoint).save_pretrained(folder)
    make_generation_config(model.config, max_new_tokens=24).save_pretrained(folder)
    write_json(folder / "run.json", make_run(model=str(tiny_checkpoint)))
    (folder / "split.csv").write_text("name,split,image,raw_caption\na.jpg,test,/home/alice/a.jpg,There is one car.\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.json").write_text("{}")
    return folder


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    from captioner.blip2.batches import prefix_ids

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    tokens = torch.tensor([[*prefix_ids(model.config), 40, 41, 42]] * 2)
    return model.eval()(pixel_values=pixels, input_ids=tokens).logits  # (2, Q+4, V)


def test_merged_model_says_what_the_adapter_says(adapter, tiny_checkpoint, tmp_path):
    from peft import PeftModel
    from transformers import Blip2ForConditionalGeneration, GenerationConfig

    from captioner.blip2.loading import load_model, load_processor, load_weights

    output = tmp_path / "merged"
    output.mkdir()  # an empty folder is taken
    merge_adapter(adapter, output)
    base = load_weights(tiny_checkpoint, None, dtype=torch.float32)
    plain = compute_logits(base)
    adapted = compute_logits(PeftModel.from_pretrained(base, adapter))
    merged = Blip2ForConditionalGeneration.from_pretrained(output)
    assert merged.dtype == torch.float32
    assert (compute_logits(merged) - adapted).abs().max() < 1e-5
    assert (plain - adapted).abs().max() > 1e-2
    assert GenerationConfig.from_pretrained(output).max_new_tokens == 24
    assert load_processor(output).tokenizer("car") == load_processor(adapter).tokenizer("car")
    assert list(output.glob("*.safetensors")) and not list(output.glob("adapter*"))
    assert not list(tmp_path.glob(".*"))

    # Merged into the NF4 weights, the adapter is rounded with them: why the unquantised base is fetched.
    quantised = PeftModel.from_pretrained(load_model(tiny_checkpoint, True, torch.device("cpu")), adapter)
    before = compute_logits(quantised)
    with pytest.warns(UserWarning, match="rounding errors"):
        after = compute_logits(quantised.merge_and_unload())
    assert (after - before).abs().max() > 1e-2

    merge_adapter(adapter, output)  # anew, in place of an earlier one
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        merge_adapter(adapter, output)
    assert (output / "notes.txt").is_file() and (output / "config.json").is_file()


def test_a_merged_folder_serves_a_pipeline(adapter, drawn, tmp_path):
    """As docs/serving.md shows it: transformers' pipeline gives the caption of the model's own generate().

    A caption begins after the image's tokens and OPT's first token. OPT's tokenizer writes that one for an empty text,
    the tests' small one does not.
    """
    from PIL import Image
    from transformers import Blip2ForConditionalGeneration, pipeline

    from captioner.blip2.loading import load_processor

    merge_adapter(adapter, tmp_path / "merged")
    image = sorted((drawn / "images").iterdir())[0]
    captioner = pipeline("image-text-to-text", model=str(tmp_path / "merged"), device="cpu")
    text = "" if captioner.tokenizer("")["input_ids"] else captioner.tokenizer.bos_token
    [told] = captioner(images=[str(image)], text=text, max_new_tokens=24)
    model, processor = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "merged"), load_processor(adapter)
    inputs = processor(images=Image.open(image).convert("RGB"), return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    expected = processor.decode(tokens[0], skip_special_tokens=True)
    assert expected.strip() and told["generated_text"].removeprefix(text) == expected


def test_merging_touches_no_folder_of_others(adapter, tiny_checkpoint):
    for folder in (tiny_checkpoint, adapter):
        before = sorted(folder.iterdir())
        with pytest.raises(UserError, match="move it away"):
            merge_adapter(adapter, folder)
        assert sorted(folder.iterdir()) == before


def test_merging_without_room_is_one_message(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "measure_memory", lambda: 10**8)
    with pytest.raises(UserError, match=r"0\.1 GB of memory free, merging in float32 needs 1\.0 GB"):
        merge_adapter(adapter, tmp_path / "merged")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2 * 10**8))
    with pytest.raises(UserError, match=r"0\.2 GB free, the merged model needs 1\.0 GB"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_merge_that_fails_leaves_nothing(adapter, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("a fault")

    monkeypatch.setattr(merge, "write_merged", fail)
    with pytest.raises(UserError, match=r"can't be merged .*a fault"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", [b"no weights", None])
def test_damaged_adapter_is_one_message(adapter, tmp_path, weights):
    damaged = tmp_path / "damaged"
    shutil.copytree(adapter, damaged)
    (damaged / "adapter_model.safetensors").unlink()
    if weights:
        (damaged / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="damaged"):
        merge_adapter(damaged, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


# --------------------------------------------------------------------------------------------------------------
# the upload


PUSH = """
import sys
from pathlib import Path
from captioner.runtime.cli import run_script
from captioner.publishing.hub import push_to_hub
run_script(lambda folder: print(push_to_hub(Path(folder), sys.argv[2])), sys.argv[1])
"""


def push(adapter: Path, repo: str, tmp_path: Path, code: str = PUSH, **environment) -> subprocess.CompletedProcess:
    """push_to_hub in a process of its own, which knows no token but what `environment` gives."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    known |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-c", code, str(adapter), repo]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=known)


def test_upload_is_what_a_user_needs_and_no_more(adapter, tmp_path):
    folder = tmp_path / "scored"
    shutil.copytree(adapter, folder)
    write_json(folder / "scores.json", make_scores())
    write_model_card(folder)
    with Hub() as hub:
        for repo in ("me/driving", "driving"):  # into a new repository, and into the same again
            pushed = push(folder, repo, tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=Hub.TOKEN)
            assert pushed.returncode == 0, pushed.stderr
            assert pushed.stdout.strip() == f"{hub.url}/me/driving"
    assert hub.visibility == {"me/driving": "private"}
    files = hub.files["me/driving"]
    same = {"adapter_model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    same |= {"generation_config.json"}
    assert set(files) == same | {"adapter_config.json", "run.json", "README.md", "scores.json"}
    assert all(files[name] == (folder / name).read_bytes() for name in same)
    assert "PUT large file" in hub.calls
    mine = json.loads((folder / "adapter_config.json").read_text())
    assert json.loads(files["adapter_config.json"]) == mine | {"base_model_name_or_path": None}
    run, scores = json.loads(files["run.json"]), json.loads(files["scores.json"])
    assert run["config"]["learning_rate"] == 5e-5 and run["data"]["fingerprint"] == FINGERPRINT
    assert scores["scores"] == make_scores()["scores"]
    card = ModelCard(files["README.md"].decode())
    assert 'PeftModel.from_pretrained(base, "me/driving")' in card.text and card.data.model_name == "driving"
    assert len(card.data.eval_results) == len(HEADLINES)
    for name, content in files.items():
        assert b"alice" not in content and str(adapter.parent).encode() not in content, name


def test_captions_are_uploaded_without_images_and_load_as_a_data_set(tmp_path):
    splits = {
        "train": [Example("a b.jpg", tmp_path / "a b.jpg", 'A "car",\nred', "g1", ("Ein Auto.",))],
        "val": [Example("猫.png", tmp_path / "猫.png", "Ä cat", "g2")],
        "test": [Example("c.jpg", tmp_path / "c.jpg", "c", "g3")],
    }
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_splits(folder / "split.csv", splits)
    write_json(folder / "run.json", {"config": {"model": "m"}, "images_root": str(tmp_path)})
    with Hub() as hub:
        code = PUSH.replace("push_to_hub", "push_captions")
        pushed = push(folder, "me/captions", tmp_path, code, HF_ENDPOINT=hub.url, HF_TOKEN=Hub.TOKEN)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.strip() == f"{hub.url}/datasets/me/captions"
        refused = push(folder, "me/captions", tmp_path, code, HF_ENDPOINT=hub.url, HF_TOKEN=Hub.READER)
        assert refused.returncode == 2 and "--push-captions me/captions: can't be uploaded" in refused.stderr
    assert hub.visibility == {"me/captions": "private"}
    (tmp_path / "copy").mkdir()
    for name, content in hub.files["me/captions"].items():
        assert str(tmp_path).encode() not in content
        (tmp_path / "copy" / name).write_bytes(content)
    assert sorted(hub.files["me/captions"]) == ["README.md", "test.csv", "train.csv", "validation.csv"]
    loaded = load_dataset(str(tmp_path / "copy"), cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["train", "validation", "test"]
    assert loaded["train"].to_list() == [
        {"name": "a b.jpg", "caption": 'A "car",\nred', "group": "g1"},
        {"name": "a b.jpg", "caption": "Ein Auto.", "group": "g1"},
    ]


def test_hub_name_of_the_base_is_kept(adapter, tmp_path):
    folder = tmp_path / "of-the-hub"
    shutil.copytree(adapter, folder)
    write_json(folder / "run.json", make_run())
    staging = tmp_path / "staging"
    staging.mkdir()
    stage_files(folder, staging, "me/driving")
    config = json.loads((staging / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "Salesforce/blip2-opt-2.7b"
    assert not (staging / "scores.json").exists()


@pytest.fixture
def push_here(adapter, tmp_path, monkeypatch):
    """push_here(repo, ...) does what `push` does, in this process: with settings that the hub's client reads once."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    def push_here(repo: str, token: str = "", endpoint: str = NOWHERE, offline: bool = False):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        return capture(lambda: run_script(lambda folder: push_to_hub(folder, repo), adapter), HF_TOKEN=token)

    yield push_here
    close_session()  # made anew, with today's settings, when it is next asked for


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "not logged in"),
        ({"token": "hf_unknown"}, "Invalid username or password"),
        ({"token": Hub.READER}, "You don't have the rights"),
        ({"token": Hub.TOKEN, "endpoint": NOWHERE}, "refused"),
        ({"token": Hub.TOKEN, "offline": True}, "offline"),
    ],
)
def test_failed_upload_is_one_message(push_here, settings, reason):
    with Hub() as hub:
        failed = push_here("me/driving", **{"endpoint": hub.url, **settings})
    assert failed.returncode == 2
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "me/driving" in line and reason in line and "hf auth login" in line
    assert "hf_" not in line  # no token
    assert not hub.files


def test_impossible_name_is_one_message(push_here):
    failed = push_here("a/b/c", token=Hub.TOKEN)
    assert failed.returncode == 2 and "a/b/c" in failed.stderr


def test_nothing_to_upload_is_one_message(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        push_to_hub(tmp_path, "me/driving")
