"""README.md of an adapter's folder.

    write_model_card(Path("blip2-finetuned"))

The card says only what run.json (of main.py) and scores.json (of eval.py) say. No torch.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import EvalResult, ModelCardData

from captioner.bdd100k.facts import Facts, ObjectKind
from captioner.bdd100k.wording import describe
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, split_revision
from captioner.runtime.settings import name_fields, name_paths
from captioner.scoring.scores import HEADLINES, SCHEMA_VERSION
from config import EvalConfig, TrainConfig

CARD = """---
{metadata}
---

# {title}

{sections}
"""
LOADING = """```python
from peft import PeftModel
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor, GenerationConfig

base = Blip2ForConditionalGeneration.from_pretrained({base})
model = PeftModel.from_pretrained(base, {adapter})
processor = Blip2Processor.from_pretrained({adapter}, backend="pil")
inputs = processor(images=Image.open("scene.jpg").convert("RGB"), return_tensors="pt")
tokens = model.generate(**inputs, generation_config=GenerationConfig.from_pretrained({adapter}))
print(processor.decode(tokens[0], skip_special_tokens=True))
```"""
SCORE_NAMES = {  # of HEADLINES: in words, and the hub's name of the metric
    "facts_f1": ("all facts, F1", "f1"),
    "time_of_day": ("time of day, accuracy", "accuracy"),
    "weather": ("weather, accuracy", "accuracy"),
    "scene": ("scene, accuracy", "accuracy"),
    "traffic_light": ("traffic light, accuracy", "accuracy"),
    "objects_f1": ("objects (kind and count), F1", "f1"),
    "whole_caption": ("whole captions, accuracy", "accuracy"),
    "BLEU-4": ("BLEU-4", "bleu"),
    "CIDEr-D": ("CIDEr-D", "cider"),
}
CLASS_SCORES = {  # columns of the table of object classes
    "presence_f1": "named or not, F1",
    "exact": "exact count",
    "occluded_exact": "exact count of occluded",
    "truncated_exact": "exact count of truncated",
}
WORST_SLICES = 3  # that the card names
BDD100K_LICENCE = "https://doc.bdd100k.com/license.html"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

PATH_FIELDS = name_paths(TrainConfig) | name_paths(EvalConfig)
UNLISTED = PATH_FIELDS | name_fields(TrainConfig, "unlisted")

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def read_json(path: Path) -> dict:
    """What main.py, eval.py, peft or merge_adapter wrote."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({error}); write it again with the script that it is of") from None
    return record


def read_run(folder: Path) -> dict:
    """run.json of the folder, which names the base model at least."""
    run = read_json(folder / "run.json")
    if not isinstance(run.get("config"), dict) or not isinstance(run["config"].get("model"), str):
        raise UserError(f"{folder / 'run.json'}: names no base model; train again with python main.py")
    return run


def read_scores(folder: Path) -> dict | None:
    """scores.json of the folder; None where there is none, or where it isn't of this adapter, or of another version."""
    if not (folder / "scores.json").is_file():
        return None
    scores = read_json(folder / "scores.json")
    config = scores.get("config", {})
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'scores.json'}: its config is no JSON object; write it again with python eval.py")
    foreign = config.get("base") or config.get("blank") or config.get("predictions")
    return None if foreign or scores.get("schema") != SCHEMA_VERSION else scores


def strip_paths(record: dict) -> dict:
    """A JSON object without the folders of this machine: of a path in it only the last part stays."""
    config = record.get("config", {})
    named = {name: take_names(value) for name, value in config.items() if name in PATH_FIELDS}
    return take_names({**record, "config": {**config, **named}} if config else record, only_absolute=True)


def take_names(value, only_absolute: bool = False):
    """JSON types with the last part of each path in place of the path."""
    if isinstance(value, dict):
        return {key: take_names(item, only_absolute) for key, item in value.items()}
    if isinstance(value, list):
        return [take_names(item, only_absolute) for item in value]
    if not isinstance(value, str):
        return value
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return PureWindowsPath(value).name if absolute or not only_absolute else value


def name_base(run: dict) -> str | None:
    """The base model's name on the hub; None for a local folder."""
    source, _ = split_revision(run["config"]["model"])
    return source if HUB_NAME.fullmatch(source) and not Path(source).is_dir() else None


def write_model_card(folder: Path) -> None:
    """Write README.md, the hub's model card, from run.json and, where there is one, scores.json.

    Raises UserError when one of them can't be read.
    """
    card = format_card(folder, folder.resolve().name)
    with atomic_write(folder / "README.md") as file:
        file.write(card)


def format_card(folder: Path, adapter: str) -> str:
    """The card's text; `adapter` is what a user loads: a folder, or a name on the hub."""
    run, scores = read_run(folder), read_scores(folder)
    base, run = name_base(run), strip_paths(run)
    sections = {
        "": describe_model(run, base),
        "Use": LOADING.format(base=json.dumps(base or run["config"]["model"]), adapter=json.dumps(adapter))
        + ("" if base else "\n\nThe base model is a local folder of whoever trained this: put yours in its place."),
        "Training": describe_training(run),
        "Results": describe_results(run, scores),
        "Data": describe_data(run),
        "Limits": describe_limits(run, scores),
        "Made with": describe_origin(run),
    }
    texts = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections.items() if text]
    metadata = make_metadata(run, base, scores, adapter).to_yaml()
    title = f"{adapter.rpartition('/')[2]}: captions of driving scenes"
    return CARD.format(metadata=metadata, title=title, sections="\n\n".join(texts))


def make_metadata(run: dict, base: str | None, scores: dict | None, adapter: str) -> ModelCardData:
    """What the hub reads: the block at the head of the card."""
    config = run["config"]
    tags = ["blip-2", "image-captioning", "lora", *(["qlora"] if config.get("load_in_4bit") else [])]
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="image-to-text",
        language="en",
        tags=tags if config.get("demo") else [*tags, "bdd100k"],
        datasets=None if config.get("demo") else ["bdd100k"],
        model_name=adapter.rpartition("/")[2] if scores else None,
        eval_results=list_results(run, scores) if scores else None,
    )


def list_results(run: dict, scores: dict) -> list[EvalResult]:
    """The headline scores for the hub's model index; a score without a value is left out."""
    demo = run["config"].get("demo")
    results = []
    for name, group in HEADLINES.items():
        figure = scores["scores"].get(group, {}).get(name)
        if figure and figure["value"] is not None:
            title, metric = SCORE_NAMES.get(name, (name, name.lower()))
            results.append(
                EvalResult(
                    task_type="image-to-text",
                    dataset_type="drawn-scenes" if demo else "bdd100k",
                    dataset_name="drawn scenes" if demo else "BDD100K",
                    dataset_split=scores.get("config", {}).get("split"),
                    metric_type=metric,
                    metric_name=title,
                    metric_value=figure["value"],
                )
            )
    return results


def describe_model(run: dict, base: str | None) -> str:
    config = run["config"]
    of = f"[{base}](https://huggingface.co/{base})" if base else f"a BLIP-2 in the local folder `{config['model']}`"
    facts = Facts("night", "rainy", "city street", "red", {ObjectKind("truck"): 1, ObjectKind("car", occluded=True): 2})
    return (
        f"A LoRA adapter of {of}. It describes a driving scene: time of day, weather, kind of road, the traffic light, "
        "and how many objects of each class there are, occluded or truncated. A caption of its form:\n\n"
        f"```text\n{describe(facts, config.get('style', 'plain'))}\n```"
    )


def describe_training(run: dict) -> str:
    settings = {name: value for name, value in run["config"].items() if name not in UNLISTED}
    tables = [list_values("setting", settings), list_values("result", run.get("results", {}))]
    return "\n\n".join(table for table in tables if table)


def list_values(title: str, values: dict) -> str:
    """A table of names and values, those left out that aren't set."""
    rows = [(name, format_setting(value)) for name, value in values.items() if value is not None and value != []]
    return make_table([title, "value"], rows)


def format_setting(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def describe_results(run: dict, scores: dict | None) -> str:
    """Headline scores with intervals, floors on the same images beside them."""
    if scores is None:
        return "Not measured."
    sets = {"this model": scores["scores"], **{f"floor: {name}": groups for name, groups in scores["floors"].items()}}
    rows = []
    for name, group in HEADLINES.items():
        title = SCORE_NAMES.get(name, (name, name))[0]
        rows.append([title, *(format_figure(groups.get(group, {}).get(name)) for groups in sets.values())])
    text = (
        f"{describe_scoring(run, scores)} In brackets 95 % bootstrap intervals. Floors are what captions score that "
        f"need no fine-tuning, on the same images.\n\n{make_table(['', *sets], rows)}"
    )
    lines = [f"- {note}" for note in scores.get("notes", [])]
    if left_out := scores.get("left_out"):
        lines.append("- left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    if signature := scores.get("signatures", {}).get("corpus_bleu"):
        lines.append(f"- signature of BLEU: `{signature}`")
    return "\n\n".join([text, "\n".join(lines)]).strip()


def describe_scoring(run: dict, scores: dict) -> str:
    """Which images were captioned, and how."""
    config = scores.get("config", {})
    said = f"{scores['n']:,} images"
    if "split" in config:
        said += f" of the {config['split']} split"
    if config.get("split") == "train":
        said += ", which it was trained on"
    if config.get("greedy"):
        said += "; the likeliest token each time"
    elif "temperature" in config and "top_p" in config:
        said += f"; sampled at temperature {config['temperature']:g} and top-p {config['top_p']:g}"
    if run["config"].get("load_in_4bit"):
        said += "; the base model in NF4, as in training"
    if "facts_from" in scores:
        said += f"; facts held against those of the {scores['facts_from']}"
    return said + "."


def format_figure(figure: dict | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    interval = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['value']:.3f}{interval}"


def describe_data(run: dict) -> str:
    config, data = run["config"], run.get("data", {})
    if config.get("demo"):
        source = "Drawn scenes, made by this project's renderer: no photographs."
    elif config.get("labels"):
        source = f"BDD100K label files that the trainer gave: {', '.join(f'`{name}`' for name in config['labels'])}."
    elif "kaggle_dataset" in config:
        handle = "/".join(config["kaggle_dataset"].split("/")[:2])
        source = (
            f"[{config['kaggle_dataset']}](https://www.kaggle.com/datasets/{handle}) on Kaggle, a copy of BDD100K; "
        )
        source += {"both": "train and val labels."}.get(config.get("subset"), f"{config.get('subset')} labels.")
    else:
        source = ""
    lines = [source, "Train, validation and test are split by ride: no ride is in two of them."]
    if config.get("held_out") == "val":
        lines[1] += " The test split is BDD100K's val set."
    if "frames" in data:
        lines.append("Frames: " + ", ".join(f"{count:,} {split}" for split, count in data["frames"].items()) + ".")
    if "fingerprint" in data:
        lines.append(f"Fingerprint of the splits (SHA-256): `{data['fingerprint']}`.")
    return "\n".join(line for line in lines if line)


def describe_limits(run: dict, scores: dict | None) -> str:
    """What the model can't do, measured where there are scores."""
    demo = run["config"].get("demo")
    trained_on = "drawn scenes: of photographs nothing it says can be relied on" if demo else "BDD100K's frames"
    lines = [
        f"- Trained on {trained_on}. Images of other kinds were not measured.",
        "- It says what the labels hold and nothing else: no distances, no motion, no intentions.",
        "- It describes images. It was neither made nor tested to steer a vehicle or to warn anybody.",
    ]
    if not demo:
        lines.append(
            f"- BDD100K has a [licence of its own]({BDD100K_LICENCE}): see whether it allows what you mean to do with "
            "a model that was trained on it. The base model's licence holds too."
        )
    if scores is None:
        return "\n".join(lines)
    invented = scores["scores"].get("hallucination", {}).get("CHAIRs")
    if invented and invented["value"] is not None:
        lines.append(f"- Captions that name an object of a class that is not there: {format_figure(invented)}.")
    stating = [item for item in scores.get("slices", []) if item["scores"]["facts_f1"]["value"] is not None]
    for item in stating[:WORST_SLICES]:
        figure = format_figure(item["scores"]["facts_f1"])
        lines.append(
            f"- Among the worst slices: {item['by']} {item['value']}, {item['n']:,} images, facts F1 {figure}."
        )
    if classes := scores["scores"].get("classes"):
        rows = [[name, *(format_figure(groups.get(key)) for key in CLASS_SCORES)] for name, groups in classes.items()]
        table = make_table(["class", *CLASS_SCORES.values()], rows)
        lines += [
            "",
            "Objects by class; counts in captions of which prediction or reference counts some:",
            "",
            table,
        ]
    return "\n".join(lines)


def describe_origin(run: dict) -> str:
    versions = dict(run.get("versions", {}))
    rows = [
        ("run", run.get("run_name")),
        ("finished", run.get("finished")),
        ("device", run.get("device")),
        ("processes", run.get("world", {}).get("processes")),
        ("frames a forward pass", run.get("micro_batch")),
        ("git commit", run.get("git_commit")),
        ("Python", run.get("python")),
        *versions.items(),
    ]
    return make_table(["", ""], [(name, str(value)) for name, value in rows if value is not None])


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" without rows."""
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines]) if lines else ""
