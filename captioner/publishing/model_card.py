"""What is made of a fine-tuned folder for others: its model card, the merged model, a copy on the Hugging Face hub.

    write_model_card(Path("blip2-finetuned"))                                # README.md in it
    merge_adapter(Path("blip2-finetuned"), Path("blip2-finetuned-merged"))   # needs no peft to load
    push_to_hub(Path("blip2-finetuned"), "name/of-repository")               # a private repository

The card says only what run.json (of main.py) and scores.json (of eval.py) say. No torch but for merging.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import EvalResult, HfApi, ModelCardData, get_token

from captioner.bdd100k.facts import Facts, ObjectKind, describe
from captioner.data.captions import atomic_write
from captioner.scoring.scores import HEADLINES, SCHEMA_VERSION
from config import EvalConfig, TrainConfig, UserError, split_revision

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

PATH_FIELDS = {
    field.name
    for config in (TrainConfig, EvalConfig)
    for field in dataclasses.fields(config)
    if "Path" in str(field.type)
}
UNLISTED = PATH_FIELDS | {  # settings that are said elsewhere in the card, or don't change what is learnt
    *("model", "demo", "kaggle_dataset", "subset", "held_out", "strict", "run_name", "wandb", "logging_steps"),
    *("dataloader_workers", "vision_store_gib", "resume", "overwrite", "save_minutes", "merge", "push_to_hub"),
    *("val_captions", "vision_store_disk_gib"),
}

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
UPLOADED = (  # what a user of the adapter needs; with the card, run.json and scores.json
    *ADAPTER,
    *("processor_config.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)

MERGED = "merged.json"  # what tells a folder that merge_adapter wrote from any other
MERGING_MARGIN = 1_000_000_000  # bytes beside the weights; a model of 3.2 GB took 0.3 GB more than that in memory


# --------------------------------------------------------------------------------------------------------------
# what is known of an adapter


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


# --------------------------------------------------------------------------------------------------------------
# the model card


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
    """Headline scores with intervals, floors on the same pictures beside them."""
    if scores is None:
        return "Not measured."
    sets = {"this model": scores["scores"], **{f"floor: {name}": groups for name, groups in scores["floors"].items()}}
    rows = []
    for name, group in HEADLINES.items():
        title = SCORE_NAMES.get(name, (name, name))[0]
        rows.append([title, *(format_figure(groups.get(group, {}).get(name)) for groups in sets.values())])
    text = (
        f"{describe_scoring(run, scores)} In brackets 95 % bootstrap intervals. Floors are what captions score that "
        f"need no fine-tuning, on the same pictures.\n\n{make_table(['', *sets], rows)}"
    )
    lines = [f"- {note}" for note in scores.get("notes", [])]
    if left_out := scores.get("left_out"):
        lines.append("- left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    if signature := scores.get("signatures", {}).get("corpus_bleu"):
        lines.append(f"- signature of BLEU: `{signature}`")
    return "\n\n".join([text, "\n".join(lines)]).strip()


def describe_scoring(run: dict, scores: dict) -> str:
    """Which pictures were captioned, and how."""
    config = scores.get("config", {})
    said = f"{scores['n']:,} pictures"
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
        f"- Trained on {trained_on}. Pictures of other kinds were not measured.",
        "- It says what the labels hold and nothing else: no distances, no motion, no intentions.",
        "- It describes pictures. It was neither made nor tested to steer a vehicle or to warn anybody.",
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
            f"- Among the worst slices: {item['by']} {item['value']}, {item['n']:,} pictures, facts F1 {figure}."
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


# --------------------------------------------------------------------------------------------------------------
# the merged model


def merge_adapter(folder: Path, output: Path) -> None:
    """Write the base model with the adapter merged into it, unquantised in float32, with processor and settings.

    Merged into NF4 weights the adapter would be rounded with them, and other captions come out. The folder gets its
    name only when all is written. Raises UserError when `output` holds anything but an earlier merged model, when disk
    or memory are too small, or when base or adapter can't be read.
    """
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    from captioner.blip2.loading import LORA_TARGETS, load_processor
    from captioner.blip2.trust import check_adapter_folder

    check_adapter(folder)
    output = output.resolve()
    check_replaceable(output)
    run = read_run(folder)
    source = run["config"]["model"]
    check_adapter_folder(folder, LORA_TARGETS.values(), split_revision(source)[0])
    check_room(output, count_parameters(source) * torch.float32.itemsize)

    processor, model = load_processor(folder), load_unquantised(source)
    temporary = output.with_name(f".{output.name}.merging")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
        merged.generation_config = GenerationConfig.from_pretrained(folder)
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        write_merged(temporary, folder, run)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: can't be merged into {source} and written to {output} ({reason})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_adapter(folder: Path) -> None:
    missing = [name for name in (*ADAPTER, "run.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no fine-tuned model in it ({missing[0]} is missing); train one with python main.py --output "
            f"{folder}"
        )


def check_replaceable(output: Path) -> None:
    """Raise UserError unless `output` is not there, an empty folder, or all of it was written by merge_adapter."""
    if not output.exists():
        return
    found = {path.name for path in output.iterdir()} if output.is_dir() else {output.name}
    ours = set(read_json(output / MERGED).get("files", [])) | {MERGED} if MERGED in found and output.is_dir() else set()
    if strange := sorted(found - ours):
        raise UserError(
            f"{output}: is there, and is no merged model of an earlier run ({strange[0]} is none of its files); move "
            "it away, or name another folder"
        )


def write_merged(merged: Path, folder: Path, run: dict) -> None:
    """Say in a merged folder what it is made of, and list its files."""
    with open(folder / "adapter_model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    record = {
        "base": take_names(run["config"]["model"], only_absolute=True),
        "run_name": run.get("run_name"),
        "adapter_sha256": digest,
        "files": sorted(path.name for path in merged.iterdir()),
    }
    with atomic_write(merged / MERGED) as file:
        json.dump(record, file, indent=1)


def count_parameters(source: str) -> int:
    """Parameters of a BLIP-2 checkpoint, by its config.json."""
    import torch
    from transformers import AutoConfig, Blip2ForConditionalGeneration

    from captioner.blip2.loading import _load

    with torch.device("meta"):
        return sum(p.numel() for p in Blip2ForConditionalGeneration(_load(AutoConfig, source)).parameters())


def check_room(output: Path, size: int) -> None:
    """Raise UserError unless a model of `size` bytes can be written at `output`, and be held in memory."""
    parent = next(parent for parent in output.parents if parent.exists())
    disk, memory = shutil.disk_usage(parent).free, find_free_memory()
    need = size + MERGING_MARGIN
    if disk < need:
        raise UserError(
            f"{parent}: {disk / 1e9:.1f} GB free, the merged model needs {need / 1e9:.1f} GB; free some space, or "
            "merge into a folder elsewhere"
        )
    if memory is not None and memory < need:
        raise UserError(
            f"{memory / 1e9:.1f} GB of memory free, merging in float32 needs {need / 1e9:.1f} GB; close other "
            "programs, or merge on a larger machine"
        )


def find_free_memory() -> int | None:
    """Bytes of memory that programs can still have: on Linux what the kernel says, elsewhere all there is, or None."""
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if available:
            return int(available[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def load_unquantised(source: str):
    """The base model in float32 on the CPU."""
    import torch
    from transformers import Blip2ForConditionalGeneration

    from captioner.blip2.loading import _load

    model, loading = _load(Blip2ForConditionalGeneration, source, output_loading_info=True, dtype=torch.float32)
    wrong = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if wrong:
        raise UserError(f"{source}: {len(wrong)} weights are missing or of another shape, {wrong[0]} for one")
    return model


# --------------------------------------------------------------------------------------------------------------
# the hub


def push_to_hub(folder: Path, repo: str) -> str:
    """Upload what a user of the adapter needs to the repository `repo`, which is made private if it isn't there.

    The card is written for it anew; paths of this machine are taken out of the JSON files. Returns the repository's
    address. Raises UserError when there is nothing to upload, or when the hub doesn't take it.
    """
    check_adapter(folder)
    format_card(folder, repo)  # complains before anything is created
    try:
        if get_token() is None:
            raise PermissionError("not logged in")
        api = HfApi()
        url = api.create_repo(repo, private=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as staging:
            stage_files(folder, Path(staging), url.repo_id)
            api.upload_folder(repo_id=url.repo_id, folder_path=staging, commit_message="Upload the adapter")
    except Exception as error:  # of the hub, the network, the uploader's threads: they have no common type
        raise UserError(
            f"--push-to-hub {repo}: can't be uploaded ({describe_failure(error)}). The adapter is safe in {folder}. "
            "Log in with hf auth login and a token that may write there, check the name and the connection, then "
            "upload it with the same command and --resume"
        ) from None
    return str(url)


def describe_failure(error: Exception) -> str:
    """What the hub or the network said, on one line; of a failed transfer what made it fail."""
    said = f"{error} {error.__cause__}" if type(error) is RuntimeError else str(error)
    return " ".join(re.sub(r"For more information check: \S+", "", said).split())[:300]


def stage_files(folder: Path, staging: Path, repo: str) -> None:
    """Copy what is uploaded to the folder `staging`; nothing in it names a folder of this machine."""
    for name in UPLOADED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, staging / name)
    run, scores, adapter = read_run(folder), read_scores(folder), read_json(folder / "adapter_config.json")
    records = {
        "run.json": strip_paths(run),
        "scores.json": scores and strip_paths(scores),
        "adapter_config.json": {**strip_paths(adapter), "base_model_name_or_path": name_base(run)},
    }
    for name, record in records.items():
        if record is not None:
            (staging / name).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (staging / "README.md").write_text(format_card(folder, repo), encoding="utf-8")
