"""The command lines: train, evaluate, score a file; what they leave on disk; and what they say to bad input."""

import csv
import json
import shutil

import pytest
from conftest import ROOT, call_script, start_script
from tokenizers import Tokenizer

import eval
from captioner.blip2.captioner import Captioner
from captioner.data.splits import ride_of


def data_flags(drawn, checkpoint):
    return ["--labels", drawn / "labels.json", "--images", drawn / "images", "--model", checkpoint]


@pytest.fixture(scope="module")
def training_flags(drawn, tiny_checkpoint):
    flags = ["--num-train-epochs", 2, "--dataloader-workers", 1, "--wandb", "offline"]
    flags += ["--train-batch-size", 4, "--warmup-ratio", 0, "--learning-rate", 1e-2]
    return [*data_flags(drawn, tiny_checkpoint), *flags, "--run-name", "run"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, training_flags):
    """A folder in which main.py has run, with wandb offline."""
    cwd = tmp_path_factory.mktemp("trained")
    finished = call_script("main.py", *training_flags, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return cwd


def test_training_leaves_all_that_is_needed(trained, drawn):
    output = trained / "blip2-finetuned"
    for name in ("adapter_model.safetensors", "adapter_config.json", "processor_config.json", "tokenizer.json"):
        assert (output / name).stat().st_size > 0
    settings = json.loads((output / "generation_config.json").read_text())
    record = json.loads((output / "run.json").read_text())
    assert record["config"]["lora_target"] == "both"
    assert record["results"]["best_eval_loss"] > 0
    assert record["versions"]["transformers"]
    lines = [json.loads(line) for line in (trained / "logs/run/metrics.jsonl").read_text().splitlines()]
    assert sum("eval_loss" in line for line in lines) == 2
    assert (trained / "logs/run/dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert list(trained.glob("wandb/offline-run-*"))
    assert not list(output.glob(".*"))
    with open(output / "split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(json.loads((drawn / "labels.json").read_text()))
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    captions = [row["raw_caption"] for row in rows if row["split"] == "train"]
    longest = max(len(tokenizer.encode(caption, add_special_tokens=False)) + 1 for caption in captions)  # and the end
    assert settings["max_new_tokens"] == longest + 16
    rides = [{ride_of(row["name"]) for row in rows if row["split"] == split} for split in ("train", "val", "test")]
    assert all(rides)
    assert not (rides[0] & rides[1] or rides[0] & rides[2] or rides[1] & rides[2])


def test_a_finished_run_that_is_resumed_gets_its_model_card(trained, training_flags):
    """As after a run that was killed between saving the adapter and writing its card."""
    card = trained / "blip2-finetuned/README.md"
    before = card.read_text()
    card.unlink()
    resumed = call_script("main.py", *training_flags, "--resume", cwd=trained)
    assert resumed.returncode == 0, resumed.stderr
    assert "nothing is left to train" in resumed.stdout
    assert card.read_text() == before


def test_evaluation_writes_predictions_and_scores(trained):
    finished = call_script("eval.py", "--num-samples", 2, "--split", "train", "--run-name", "scored", cwd=trained)
    assert finished.returncode == 0, finished.stderr
    predictions = (trained / "logs/scored/predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 2
    scores = json.loads((trained / "logs/scored/scores.json").read_text())
    assert scores["n"] == 2
    for group in ("corpus_bleu", "reference_bleu"):
        assert set(scores["scores"][group]) == {f"BLEU-{n}" for n in range(1, 5)}
    assert set(scores["floors"]) == {"most frequent caption", "best constant caption", "another image's caption"}
    assert "split:train|decoding:T0.7-p0.9-seed42" in scores["signatures"]["corpus_bleu"]
    assert not (trained / "blip2-finetuned/scores.json").exists()  # they are of images that it was trained on
    for text in ("BLEU-1", "BLEU-4", "prediction:", "reference:", "facts F1"):
        assert text in finished.stdout
    flags = ["--predictions", "logs/scored/predictions.jsonl", "--run-name", "again"]
    rescored = call_script("eval.py", *flags, cwd=trained)
    assert rescored.returncode == 0, rescored.stderr
    again = json.loads((trained / "logs/again/scores.json").read_text())
    assert again["scores"] == scores["scores"]
    assert again["floors"] == scores["floors"]


def test_the_same_seed_gives_the_same_captions(trained):
    for name in ("one", "two"):
        assert call_script("eval.py", "--num-samples", 2, "--run-name", name, cwd=trained).returncode == 0
    one, two = ((trained / f"logs/{name}/predictions.jsonl").read_text() for name in ("one", "two"))
    assert one == two


def test_captions_do_not_depend_on_the_batch(trained):
    """Drawn by the image's seed; the signature tells the batch and the way of generating all the same."""
    said = []
    for size, fast in ((1, "off"), (3, "off"), (5, "on")):
        flags = ["--num-samples", "all", "--split", "train", "--max-new-tokens", 8, "--batch-size", size]
        done = call_script("eval.py", *flags, "--fast", fast, "--run-name", "batch", cwd=trained)
        assert done.returncode == 0, done.stderr
        said.append((trained / "logs/batch/predictions.jsonl").read_bytes())
        signature = json.loads((trained / "logs/batch/scores.json").read_text())["signatures"]["corpus_bleu"]
        by = "generate" if fast == "off" else "FastGenerator"
        assert f"|decoding:T0.7-p0.9-seed42|batch:{size}|by:{by}|model:fine-tuned|" in signature
    assert said[0] == said[1] == said[2] and len(said[0].splitlines()) > 5


def test_the_plain_captioner_gives_the_same_captions(trained, monkeypatch):
    """That of blip2/, in whose place fast/ has one of its own; sampled, with what hides an image and without."""
    for flags in ([], ["--blank"]):
        flags = ["--num-samples", 3, "--split", "train", "--batch-size", 2, "--max-new-tokens", 8, *flags]
        assert call_script("eval.py", *flags, "--run-name", "fast-room", cwd=trained).returncode == 0
        with monkeypatch.context() as patch:
            patch.setattr(eval, "make_captioner", Captioner)
            assert call_script("eval.py", *flags, "--run-name", "plain-room", cwd=trained).returncode == 0
        fast, plain = ((trained / f"logs/{name}-room/predictions.jsonl").read_bytes() for name in ("fast", "plain"))
        assert fast == plain


def test_fast_generation_gives_the_same_captions(trained):
    for name, flags in {"slow": ["off"], "fast": ["on", "--batch-size", 3]}.items():
        flags = ["--num-samples", "all", "--greedy", "--run-name", name, "--fast", *flags]
        finished = call_script("eval.py", *flags, cwd=trained)
        assert finished.returncode == 0, finished.stderr
        assert " a second" in finished.stdout
    slow, fast = ((trained / f"logs/{name}/predictions.jsonl").read_text() for name in ("slow", "fast"))
    assert slow == fast


def test_model_card_has_the_scores_of_most_images(trained):
    from captioner.publishing.model_card import write_model_card

    adapter = trained / "blip2-finetuned"
    (adapter / "scores.json").unlink(missing_ok=True)
    write_model_card(adapter)  # other tests score it too
    for flags in (["--blank"], []):  # black images say nothing of the adapter
        finished = call_script("eval.py", "--num-samples", 1, *flags, "--run-name", "card", cwd=trained)
        assert finished.returncode == 0, finished.stderr
        assert ("1 image of the test split" in (adapter / "README.md").read_text()) == (not flags)
    scores = json.loads((adapter / "scores.json").read_text())
    (adapter / "scores.json").write_text(json.dumps(scores | {"n": 100}))
    assert "keeps its scores" in call_script("eval.py", "--num-samples", 1, "--run-name", "card", cwd=trained).stdout
    assert json.loads((adapter / "scores.json").read_text())["n"] == 100


def test_floors_that_need_a_model(trained):
    flags = ["--num-samples", 2, "--split", "train", "--greedy", "--model-floors"]
    finished = call_script("eval.py", *flags, "--run-name", "floors", cwd=trained)
    assert finished.returncode == 0, finished.stderr
    rows = [json.loads(line) for line in (trained / "logs/floors/predictions.jsonl").read_text().splitlines()]
    for row in rows:  # a training image is nearest to itself
        assert row["floors"]["nearest training image"] == row["references"][0]
        assert row["floors"]["the untuned model"] != row["prediction"]
    floors = json.loads((trained / "logs/floors/scores.json").read_text())["floors"]
    assert floors["nearest training image"]["facts"]["whole_caption"]["value"] == 1
    assert "the untuned model" in floors


def test_own_images_are_captioned(trained, drawn, tmp_path):
    """Captioned to CSV, JSON lines and gallery; what can't be read is listed; a run that was stopped goes on."""
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for number, image in enumerate(sorted((drawn / "images").iterdir())[:4]):
        shutil.copy(image, folder / "deeper" / f"{number}.jpg" if number % 2 else folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"no image")
    flags = ["--images", folder, "--greedy", "--run-name", "own", "--batch-size", 1]
    finished = call_script("eval.py", *flags, cwd=trained)
    assert finished.returncode == 0, finished.stderr
    assert "1 image can't be read" in finished.stdout and "broken.jpg" in finished.stdout
    lines = (trained / "logs/own/captions.jsonl").read_text().splitlines()
    captions = {json.loads(line)["name"]: json.loads(line)["prediction"] for line in lines}
    assert set(captions) == {"0.jpg", "2.jpg", "deeper/1.jpg", "deeper/3.jpg"}
    with open(trained / "logs/own/captions.csv", newline="") as file:
        assert {row["name"]: row["prediction"] for row in csv.DictReader(file)} == captions
    assert (trained / "logs/own/report.html").is_file()

    (trained / "logs/own/captions.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # killed as it wrote
    again = call_script("eval.py", *flags, cwd=trained)
    assert again.returncode == 0, again.stderr
    assert "2 of 5 images were captioned before" in again.stdout
    assert (trained / "logs/own/captions.jsonl").read_text().splitlines() == lines
    for content in ("", "{"):
        (trained / "logs/own/settings.json").write_text(content)
        damaged = call_script("eval.py", *flags, cwd=trained)
        assert damaged.returncode == 2 and "earlier run" in damaged.stderr
    (trained / "logs/own/settings.json").write_text("{}")
    other = call_script("eval.py", "--images", folder, "--run-name", "own", cwd=trained)
    assert other.returncode == 2 and "other settings" in other.stderr


def test_adapter_loads_with_plain_peft(trained, tiny_checkpoint, drawn):
    """The lines of the README, and that they give what eval.py gives."""
    from peft import PeftModel
    from PIL import Image
    from transformers import Blip2ForConditionalGeneration, Blip2Processor, GenerationConfig

    from captioner.blip2.generation import generate_captions
    from captioner.blip2.loading import load_finetuned

    folder = trained / "blip2-finetuned"
    image = Image.open(next((drawn / "images").iterdir()))
    model = PeftModel.from_pretrained(Blip2ForConditionalGeneration.from_pretrained(tiny_checkpoint), folder)
    processor = Blip2Processor.from_pretrained(folder, backend="pil")
    settings = GenerationConfig.from_pretrained(folder)
    tokens = model.generate(**processor(images=image, return_tensors="pt"), generation_config=settings)
    caption = processor.decode(tokens[0], skip_special_tokens=True).strip()
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    assert " ".join(caption.split()) == generate_captions(model, processor, pixels, settings)[0]
    with model.disable_adapter():
        assert generate_captions(model, processor, pixels, settings)[0] != " ".join(caption.split())
    quantised, _, _ = load_finetuned(folder, model.device)  # as eval.py has it
    adapter = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    assert adapter
    assert all((quantised.state_dict()[name] == weight).all() for name, weight in adapter.items())


def test_stored_vision_trains_to_the_same_adapter(tmp_path, drawn, tiny_checkpoint):
    """The ViT is frozen and has no dropout: what it gave once is what it gives always."""
    from safetensors.torch import load_file

    flags = ["--num-train-epochs", 2, "--dataloader-workers", 0, "--wandb", "disabled"]
    flags += ["--train-batch-size", 4, "--warmup-ratio", 0, "--learning-rate", 1e-3]
    weights = []
    for features in ("off", "features"):
        output = tmp_path / f"output-{features}"
        finished = call_script("main.py", *data_flags(drawn, tiny_checkpoint), *flags, "--features", features,
                       "--output", output, cwd=tmp_path)  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        assert ("outputs are kept" in finished.stdout) == (features != "off")
        assert ("not kept, but computed in each pass (--features off)" in finished.stdout) == (features == "off")
        weights.append(load_file(output / "adapter_model.safetensors"))
    assert min(weight.abs().max() for name, weight in weights[0].items() if "lora_B" in name) > 1e-3
    assert max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]) < 1e-5


def bad_inputs(drawn, checkpoint, empty):
    labels, images, model = data_flags(drawn, checkpoint)[1::2]
    return {
        "labels missing": (["--labels", "nothing.json", "--images", images, "--model", model], "nothing.json"),
        "images missing": (["--labels", labels, "--images", "nothing", "--model", model], "nothing"),
        "images not given": (["--labels", labels, "--model", model], "--images"),
        "no image": (["--labels", labels, "--images", empty, "--model", model], "no image"),
        "model missing": (["--labels", labels, "--images", images, "--model", "./nothing"], "./nothing"),
        "model not on disk": (["--labels", labels, "--images", images], "Salesforce/blip2-opt-2.7b"),
        "wandb not logged in": (["--demo", "--wandb", "online"], "wandb login"),
    }


@pytest.mark.parametrize("case", bad_inputs(ROOT, ROOT, ROOT))
def test_bad_input_is_one_message(tmp_path, drawn, tiny_checkpoint, case):
    (tmp_path / "empty").mkdir()
    flags, message = bad_inputs(drawn, tiny_checkpoint, tmp_path / "empty")[case]
    failed = call_script("main.py", *flags, cwd=tmp_path, HOME=tmp_path, WANDB_API_KEY="")
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert {path.name for path in tmp_path.iterdir()} <= {"empty"}  # nothing written


def test_unreadable_image_is_one_message(tmp_path, drawn, tiny_checkpoint):
    """When too many are: before anything is trained."""
    shutil.copytree(drawn / "images", tmp_path / "images")
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(image.read_bytes()[:500])
    flags = ["--labels", drawn / "labels.json", "--images", tmp_path / "images", "--model", tiny_checkpoint]
    failed = call_script("main.py", *flags, "--dataloader-workers", 1, cwd=tmp_path)
    assert failed.returncode == 2
    [line] = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "not readable as an image" in line
    assert "Traceback" not in failed.stderr


PREDICTION = '{"name": "a.jpg", "prediction": "There is one car.", "references": ["There are 2 cars."]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no predictions"),
        ("not json\n", "line 1"),
        (PREDICTION + '{"name": "b.jpg"}\n', "line 2"),
        (PREDICTION + PREDICTION, "a.jpg came before"),
        ('{"name": "a.jpg", "prediction": "x", "references": []}\n', "has a reference"),
        ('{"name": "a.jpg", "prediction": 3, "references": ["x"]}\n', "line 1"),
        ("[" * 100_000 + "\n", "line 1"),
    ],
)
def test_bad_predictions_are_one_message(tmp_path, content, message):
    (tmp_path / "predictions.jsonl").write_text(content)
    failed = call_script("eval.py", "--predictions", "predictions.jsonl", cwd=tmp_path)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "logs").exists()


def test_scoring_a_file_needs_no_torch(tmp_path):
    """--predictions answers where no deep-learning library is installed."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not needed here')")
    shutil.copy(tmp_path / "torch.py", tmp_path / "transformers.py")
    (tmp_path / "predictions.jsonl").write_text(PREDICTION)
    with start_script("eval.py", "--predictions", "predictions.jsonl", cwd=tmp_path, PYTHONPATH=tmp_path) as scoring:
        out, err = scoring.communicate()
    assert scoring.returncode == 0, err
    assert "BLEU-4" in out


def test_evaluation_without_a_model_says_how_to_train_one(tmp_path):
    failed = call_script("eval.py", cwd=tmp_path)
    assert failed.returncode == 2
    assert "python main.py" in failed.stderr


def test_official_val_is_held_out(tmp_path, monkeypatch):
    """With --subset train --held-out val the val labels are the test split, and none of their rides is trained on."""
    from captioner.data.splits import prepare_splits
    from config import TrainConfig, make_config
    from demo.draw import draw_scene

    images, frames = zip(*(draw_scene(seed) for seed in range(12)), strict=True)
    same_ride = {**frames[5], "name": frames[11]["name"].split("-")[0] + "-00000000.jpg"}
    (tmp_path / "images").mkdir()
    for frame in [*frames, same_ride]:
        images[0].save(tmp_path / "images" / frame["name"])
    (tmp_path / "train.json").write_text(json.dumps([*frames[:8], same_ride]))
    (tmp_path / "val.json").write_text(json.dumps(frames[8:]))
    monkeypatch.setattr(
        "captioner.bdd100k.download.fetch_labels", lambda dataset, subset: [tmp_path / f"{subset}.json"]
    )
    monkeypatch.setattr("captioner.bdd100k.download.fetch_images", lambda dataset: tmp_path / "images")
    config = make_config(TrainConfig, subset="train", held_out="val")
    splits = prepare_splits(config, tmp_path / "run")
    names = {split: {example.name for example in examples} for split, examples in splits.items()}
    assert names["test"] == {frame["name"] for frame in frames[8:]}
    assert names["train"] | names["val"] == {frame["name"] for frame in frames[:8]}
    assert names["train"] and names["val"] and not names["train"] & names["val"]
    config = make_config(TrainConfig, subset="train", held_out="val", limit=6)
    fewer = prepare_splits(config, tmp_path / "fewer")
    assert sum(map(len, fewer.values())) == 6 and len(fewer["test"]) == 2
