"""README.md of an adapter's folder.

    write_model_card(Path("blip2-finetuned"))

The card, whose text is in model_card.md, says only what run.json (of main.py) and scores.json (of eval.py) say.
No torch.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from captioner.bdd100k.facts import Facts, ObjectKind
from captioner.bdd100k.wording import describe
from captioner.data.run_record import read_run
from captioner.publishing.records import PATH_FIELDS, name_base, read_scores, strip_paths
from captioner.runtime.files import atomic_write
from captioner.runtime.settings import name_fields
from captioner.scoring.headlines import RANKED_BY, choose_headlines
from captioner.scoring.scores import count_things
from config import SourceSettings, TrainConfig

TEMPLATE = Path(__file__).with_suffix(".md")
CLASS_SCORES = {  # columns of the table of object classes
    "presence_f1": "named or not, F1",
    "exact": "exact count",
    "occluded_exact": "exact count of occluded",
    "truncated_exact": "exact count of truncated",
}
WORST_SLICES = 3  # that the card names
BDD100K_LICENCE = "https://doc.bdd100k.com/license.html"
UNLISTED = PATH_FIELDS | name_fields(TrainConfig, "unlisted")
OF_LABELS = {field.name for field in fields(SourceSettings)}
EXAMPLE = Facts("night", "rainy", "city street", "red", {ObjectKind("truck"): 1, ObjectKind("car", occluded=True): 2})


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
    config = run["config"]
    unlisted = UNLISTED | OF_LABELS if name_kind(config) == "own" else UNLISTED
    settings = {name: value for name, value in config.items() if name not in unlisted}
    tables = [list_values("setting", settings), list_values("result", run.get("results", {}))]
    card = ModelCard.from_template(
        make_metadata(run, base, scores, adapter),
        template_path=str(TEMPLATE),
        name=adapter.rpartition("/")[2],
        adapter=json.dumps(adapter),
        base_source=json.dumps(base or config["model"]),
        base_link=f"[{base}](https://huggingface.co/{base})"
        if base
        else f"a BLIP-2 in the local folder `{config['model']}`",
        example=describe(EXAMPLE, config.get("style", "plain")),
        config=config,
        kind=name_kind(config),
        data=run.get("data", {}),
        training="\n\n".join(table for table in tables if table),
        source=describe_source(config),
        licence=BDD100K_LICENCE,
        origin=describe_origin(run),
        scores=scores,
        **(tell_scores(run, scores) if scores else {}),
    )
    return str(card) + "\n"


def name_kind(config: dict) -> str:
    """What was trained on: own captions, drawn scenes, or bdd100k."""
    if config.get("captions") and "group_column" in config:  # once captions was where those of labels were written
        return "own"
    return "drawn" if config.get("demo") else "bdd100k"


def tell_scores(run: dict, scores: dict) -> dict:
    """The card's sections on scores."""
    invented = scores["scores"].get("hallucination", {}).get("CHAIRs")
    stating = [item for item in scores.get("slices", []) if item["scores"][RANKED_BY]["value"] is not None]
    classes = scores["scores"].get("classes", {})
    rows = [[name, *(format_figure(groups.get(key)) for key in CLASS_SCORES)] for name, groups in classes.items()]
    return {
        "scored": count_things(scores["n"], "image") + describe_scoring(run, scores),
        "results": list_figures(scores),
        "invented": format_figure(invented) if invented and invented["value"] is not None else None,
        "worst": [item | {"figure": format_figure(item["scores"][RANKED_BY])} for item in stating[:WORST_SLICES]],
        "slices": len(stating),
        "classes": make_table(["class", *CLASS_SCORES.values()], rows),
    }


def list_figures(scores: dict) -> str:
    """A table of headline scores with intervals, floors on the same images beside them."""
    sets = {"this model": scores["scores"], **{f"floor: {name}": groups for name, groups in scores["floors"].items()}}
    rows = []
    for name, headline in choose_headlines(scores["scores"]).items():
        rows.append([headline.words, *(format_figure(headline.find(groups, name)) for groups in sets.values())])
    return make_table(["", *sets], rows)


def make_metadata(run: dict, base: str | None, scores: dict | None, adapter: str) -> ModelCardData:
    """What the hub reads: the block at the head of the card."""
    config, is_bdd100k = run["config"], name_kind(run["config"]) == "bdd100k"
    tags = ["blip-2", "image-captioning", "lora", *(["qlora"] if config.get("load_in_4bit") else [])]
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="image-to-text",
        language=None if name_kind(config) == "own" else "en",
        tags=[*tags, "bdd100k"] if is_bdd100k else tags,
        datasets=["bdd100k"] if is_bdd100k else None,
        model_name=adapter.rpartition("/")[2] if scores else None,
        eval_results=list_results(run, scores) if scores else None,
    )


def list_results(run: dict, scores: dict) -> list[EvalResult]:
    """The headline scores for the hub's model index; a score without a value is left out."""
    data_set = {"own": "own captions", "drawn": "drawn scenes", "bdd100k": "BDD100K"}[name_kind(run["config"])]
    results = []
    for name, headline in choose_headlines(scores["scores"]).items():
        figure = headline.find(scores["scores"], name)
        if figure and figure["value"] is not None:
            results.append(
                EvalResult(
                    task_type="image-to-text",
                    dataset_type=data_set.lower().replace(" ", "-"),
                    dataset_name=data_set,
                    dataset_split=scores.get("config", {}).get("split"),
                    metric_type=headline.metric,
                    metric_name=headline.words,
                    metric_value=figure["value"],
                )
            )
    return results


def list_values(title: str, values: dict) -> str:
    """A table of names and values; values that aren't set are left out."""
    rows = [(name, format_setting(value)) for name, value in values.items() if value is not None and value != []]
    return make_table([title, "value"], rows)


def format_setting(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def describe_scoring(run: dict, scores: dict) -> str:
    """Which images were captioned, and how."""
    config = scores.get("config", {})
    said = ""
    if "split" in config:
        said += f" of the {config['split']} split"
    if config.get("greedy"):
        said += "; the likeliest token each time"
    elif "temperature" in config and "top_p" in config:
        said += f"; sampled at temperature {config['temperature']:g} and top-p {config['top_p']:g}"
    if run["config"].get("load_in_4bit"):
        said += "; the base model in NF4, as in training"
    if scores.get("facts_from"):
        said += f"; facts held against those of the {scores['facts_from']}"
    return said


def format_figure(figure: dict | None) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    interval = "" if figure["low"] is None else f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"{figure['value']:.3f}{interval}"


def describe_source(config: dict) -> str:
    """Where the labels come from: a line, or "" where that is not known."""
    if name_kind(config) == "own":
        return f"Captions that the trainer gave: `{config['captions']}`.\n"
    if config.get("demo"):
        return "Drawn scenes, made by this project's renderer: no photographs.\n"
    if config.get("labels"):
        return f"BDD100K label files that the trainer gave: {', '.join(f'`{name}`' for name in config['labels'])}.\n"
    if "kaggle_dataset" not in config:
        return ""
    handle = "/".join(config["kaggle_dataset"].split("/")[:2])
    subset = {"both": "train and val labels"}.get(config.get("subset"), f"{config.get('subset')} labels")
    link = f"[{config['kaggle_dataset']}](https://www.kaggle.com/datasets/{handle})"
    return f"{link} on Kaggle, a copy of BDD100K; {subset}.\n"


def describe_origin(run: dict) -> str:
    """A table of where and with what the run was made."""
    rows = [
        ("run", run.get("run_name")),
        ("finished", run.get("finished")),
        ("device", run.get("device")),
        ("processes", run.get("world", {}).get("processes")),
        ("frames a forward pass", run.get("micro_batch")),
        ("git commit", run.get("git_commit")),
        ("Python", run.get("python")),
        *run.get("versions", {}).items(),
    ]
    return make_table(["", ""], [(name, str(value)) for name, value in rows if value is not None])


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "" without rows."""
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines]) if lines else ""
