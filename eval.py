"""Caption test images with the fine-tuned model and score the captions; or caption any images.

    python eval.py                                   # 20 random test images, sampled at temperature 0.7
    python eval.py --num-samples all --greedy        # the whole test split
    python eval.py --demo                            # what main.py --demo trained
    python eval.py --predictions predictions.jsonl   # score captions from anywhere, no model needed
    python eval.py --compare a.jsonl b.jsonl         # do two models differ?
    python eval.py --images my_images/             # caption images without references
    accelerate launch --num_processes 4 eval.py ...  # the same captions, by four GPUs

Predictions are written first, to logs/<run>/predictions.jsonl, and scored from there: scores.json and report.html.
"""

from captioner.runtime.cli import run_script
from config import EvalConfig, parse_args

if __name__ == "__main__":
    config = parse_args(EvalConfig)  # before the heavy imports, so that --help answers at once

import csv
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioner.bdd100k.facts import Facts
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.parsing import mark_caption, parse_caption
from captioner.data.captions import Example
from captioner.data.images import find_images, index_images
from captioner.data.splits import choose_examples, read_split
from captioner.runtime.errors import UserError, escape_controls
from captioner.runtime.files import atomic_write, explain_writing, lock_folder, name_run
from captioner.runtime.processes import ask_main, find_place, go_on_alone
from captioner.runtime.settings import flatten
from captioner.scoring.console import print_captions, print_comparison, print_left_out, print_scores
from captioner.scoring.predictions import (
    Prediction,
    format_prediction,
    name_examples,
    parse_prediction,
    read_predictions,
    read_references,
    write_predictions,
)
from captioner.scoring.report import ReportRow, make_rows, start_thumbnails, write_report
from captioner.scoring.scores import compare_predictions, score_predictions

UNTUNED, NEAREST = "the untuned model", "nearest training image"  # floors that need a model
RESUMED = (
    *("adapter", "base", "blank", "greedy", "temperature", "top_p", "max_new_tokens", "seed", "batch_size"),
    "fast",
)


# --------------------------------------------------------------------------------------------------------------
# captioning


def load_captioner(config: EvalConfig, images: int):
    """The fine-tuned model, for so many images. Torch is imported here: who only scores captions does without."""
    from captioner.fast.captioning import FastCaptioner

    return FastCaptioner(config, images)


def caption_examples(config: EvalConfig, examples: list[Example]) -> tuple[list[Prediction], dict[str, str]]:
    """Predictions for the examples, and the images that can't be read with the reason. Other processes end here."""
    captioner, unreadable = load_captioner(config, len(examples)), {}
    references = {example.name: [example.caption] for example in examples}

    def work(index: int, outputs) -> list[tuple[str, dict[str, str]]]:
        captions = captioner.caption(index, outputs)
        if not config.model_floors:
            return [(caption, {}) for caption in captions]
        untuned = captioner.caption_untuned(index, outputs)
        return [(caption, {UNTUNED: text}) for caption, text in zip(captions, untuned, strict=True)]

    predictions, ends = [], []
    try:
        nearest = find_nearest(captioner, examples) if config.model_floors else {}
        start = time.perf_counter()
        for rows in captioner.map_batches([(e.name, e.image) for e in examples], work, unreadable):
            ends.append((time.perf_counter(), len(predictions) + len(rows)))
            for name, (caption, floors) in rows:
                floors |= {NEAREST: nearest[name]} if nearest else {}
                predictions.append(Prediction(name, caption, references[name], floors))
        seconds = time.perf_counter() - start
        _, processes = find_place()
    finally:
        captioner.finish()
    go_on_alone()
    pace = f"{len(predictions):,} captions in {seconds:.1f} s, {len(predictions) / seconds:.1f} a second"
    if len(ends) > processes:  # in the first batch of each process the GPU's launches are recorded
        (first, before), (last, total) = ends[processes - 1], ends[-1]
        pace += f" ({(total - before) / (last - first):.1f} after the first batch)"
    print(pace + captioner.describe_memory())
    if not predictions:
        raise UserError(f"none of the {len(examples)} images can be read: {next(iter(unreadable.values()))}")
    return predictions, unreadable


def find_nearest(captioner, examples: list[Example]) -> dict[str, str]:
    """{name: caption of the training image whose image features are most like its own}."""
    training = ask_main(read_split, captioner.config.adapter, "train", captioner.config.images_root)
    features = {}
    for part in (training, examples):
        images = [(example.name, example.image) for example in part]
        for rows in captioner.map_batches(images, lambda _, outputs: captioner.encode(outputs), {}):
            features |= rows
    known = [example for example in training if example.name in features]
    table = np.stack([features[example.name] for example in known])  # (N, D)
    readable = [example for example in examples if example.name in features]
    return {e.name: known[int((table @ features[e.name]).argmax())].caption for e in readable}


# --------------------------------------------------------------------------------------------------------------
# images without references


def read_finished(path: Path, config: EvalConfig) -> dict[str, str]:
    """{name: caption} of an earlier run under this name, which must have had the same settings."""
    from captioner.data.run_record import read_run

    settings = {name: value for name, value in flatten(config).items() if name in RESUMED}
    settings |= {"images": [str(image.resolve()) for image in config.images], "trained": read_run(config.adapter)}
    noted = path.with_name("settings.json")
    if not path.exists():
        with atomic_write(noted) as file:
            json.dump(settings, file, indent=1)
        return {}
    try:
        same = json.loads(noted.read_text()) == settings
        *lines, unfinished = path.read_bytes().split(b"\n")  # the run may have been stopped while it wrote a line
        texts = [line.decode("utf-8") for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.parent}: an earlier run that can't be read ({error}); take another --run-name"
        ) from None
    if not same:
        raise UserError(f"{path}: was written with other settings; take another --run-name, or those of {noted}")
    rows = [parse_prediction(text, f"{path}, line {n}") for n, text in enumerate(texts, start=1) if text.strip()]
    if unfinished:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - len(unfinished))
    return {row.name: row.prediction for row in rows}


def start_images(config: EvalConfig, run_dir: Path) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """The images of --images as (name, file), and {name: caption} of those that an earlier run did."""
    images = find_images(config.images)
    run_dir.mkdir(parents=True, exist_ok=True)
    finished = read_finished(run_dir / "captions.jsonl", config)
    if finished:
        done = sum(name in finished for name, _ in images)
        print(f"{done:,} of {len(images):,} images were captioned before")
    return images, finished


def caption_images(config: EvalConfig, run_dir: Path) -> None:
    """Caption the images of --images, to captions.jsonl as it goes, then captions.csv and the gallery.

    A run that goes on has the batches of one that was never stopped, and so the same captions, as long as the same
    images are there and can be read. Of a batch that was half written, all is generated again and the rest written.
    """
    images, finished = ask_main(start_images, config, run_dir)
    unreadable: dict[str, str] = {}
    if any(name not in finished for name, _ in images):
        captioner, before = load_captioner(config, len(images)), frozenset(finished)
        path = run_dir / "captions.jsonl" if find_place()[0] == 0 else Path(os.devnull)
        remedy = "the captions before are kept: see to the disk, then give the same command and --run-name again"
        try:
            with explain_writing(path, remedy), open(path, "a", encoding="utf-8") as file:
                for rows in captioner.map_batches(images, captioner.caption, unreadable, before):
                    for name, caption in rows:
                        if name not in before:
                            file.write(format_prediction(Prediction(name, caption, [])))
                            finished[name] = caption
                    file.flush()
        finally:
            captioner.finish()
    go_on_alone()
    captions = {name: finished[name] for name, _ in images if name in finished}
    with atomic_write(run_dir / "captions.csv") as file:
        rows = [("name", "prediction"), *captions.items()]
        csv.writer(file).writerows([text.encode(errors="backslashreplace").decode() for text in row] for row in rows)
    rows = [ReportRow(name, mark_caption(text, Facts(), ""), [], {}, None) for name, text in captions.items()]
    write_report(run_dir / "report.html", f"{len(rows):,} captions", rows, dict(images), None)
    print_left_out(unreadable)
    for name, caption in list(captions.items())[: config.show]:
        print(escape_controls(f"\n{name}\n  {caption}"))
    print(f"\n{len(captions):,} captions in {run_dir}: captions.csv, captions.jsonl, report.html")
    if not captions:
        raise UserError(f"none of the {len(images)} images can be read")


# --------------------------------------------------------------------------------------------------------------
# scoring


def read_facts(config: EvalConfig, predictions: Sequence[Prediction]) -> tuple[list[Prediction], list[Facts], Counter]:
    """The predictions that are scored, the facts they are held against, and how many are left out by reason."""
    if not config.labels:
        return list(predictions), [parse_caption(prediction.references[0]) for prediction in predictions], Counter()
    report = LabelReport()
    labelled = {frame.name: frame.facts for frame in read_labels(config.labels, report)}
    scored = [prediction for prediction in predictions if prediction.name in labelled]
    if not scored:
        names = name_examples([prediction.name for prediction in predictions])
        raise UserError(f"--labels {config.labels[0]}: none of the captioned images is in it ({names})")
    left_out = Counter({"predictions without labels": len(predictions) - len(scored)})
    return scored, [labelled[prediction.name] for prediction in scored], +left_out


def evaluate(config: EvalConfig, run_dir: Path) -> None:
    """Caption the test split unless predictions are given, and score: scores.json and report.html."""
    unreadable, images, references, thumbnails = {}, {}, None, None
    if config.predictions is None:
        examples = ask_main(choose_examples, config)
        images = {example.name: example.image for example in examples}
        predictions_file = run_dir / "predictions.jsonl"
        if find_place()[0] == 0:
            thumbnails = start_thumbnails(list(images.values()))
        predictions, unreadable = caption_examples(config, examples)
        write_predictions(predictions_file, predictions)
        signature = {"split": config.split, "decoding": describe_decoding(config)}
        signature |= {"model": "base" if config.base else "fine-tuned"} | ({"images": "black"} if config.blank else {})
    else:
        predictions_file, signature = config.predictions, {"split": "unknown", "decoding": "unknown"}
        for path in config.images:
            images |= dict(find_images([path]))
            if path.is_dir():
                images |= index_images(path)  # by the bare file name too
        references = read_references(config.references) if config.references else None
    read, left_out = read_predictions(predictions_file, references)
    predictions, facts, unlabelled = read_facts(config, read)
    left_out += unlabelled + Counter({"unreadable images": len(unreadable)})
    signature["facts"] = "labels" if config.labels else "references"
    try:
        scores = score_predictions(predictions, signature, facts)
    except ValueError as error:
        raise UserError(f"{predictions_file}: {error}") from None
    scores |= {"left_out": dict(+left_out), "facts_from": "labels" if config.labels else "references"}
    scores |= {"predictions": str(predictions_file), "config": flatten(config)}
    with atomic_write(run_dir / "scores.json") as file:
        json.dump(scores, file, indent=1, allow_nan=False)
    origin = ", ".join(signature.values()) if config.predictions is None else config.predictions.name
    title = f"{len(predictions):,} images, {origin}"
    write_report(run_dir / "report.html", title, make_rows(predictions, facts), images, scores, thumbnails)
    print_captions(predictions, config.show)
    print_left_out(unreadable)
    print_scores(scores)
    for reason, count in scores["left_out"].items():
        print(f"left out: {count:,} {reason}")
    print(f"predictions in {predictions_file}; scores.json and report.html in {run_dir}")
    if config.predictions is None and config.split == "test" and not config.base and not config.blank:
        add_to_adapter(config.adapter, scores)


def add_to_adapter(adapter: Path, scores: dict) -> None:
    """Keep the scores beside the adapter and in its model card, unless some of more images are there."""
    from captioner.publishing.model_card import read_scores, write_model_card

    try:
        before = read_scores(adapter)
        if before is not None and before["n"] > scores["n"]:
            print(f"{adapter / 'README.md'} keeps its scores, of {before['n']:,} images")
            return
        with atomic_write(adapter / "scores.json") as file:
            json.dump(scores, file, indent=1, allow_nan=False)
        write_model_card(adapter)
        print(f"{adapter / 'README.md'}, the model card, has these scores now")
    except UserError as error:  # a shared adapter may be read-only; the scores are in logs/ already
        print(f"note: not kept beside the adapter: {error}")


def describe_decoding(config: EvalConfig) -> str:
    if config.generation.greedy:
        return "greedy"
    way = config.generation
    return f"T{way.temperature:g}-p{way.top_p:g}-seed{way.seed}-batch{way.batch_size or 'auto'}"


def compare(config: EvalConfig, run_dir: Path) -> None:
    """Print how two predictions files differ, and whether by chance."""
    references = read_references(config.references) if config.references else None
    one, other = (read_predictions(path, references)[0] for path in config.compare)
    try:
        compared = compare_predictions(one, other)
    except ValueError as error:
        raise UserError(f"--compare {config.compare[0]} {config.compare[1]}: {error}") from None
    compared |= {"files": [str(path) for path in config.compare]}
    with atomic_write(run_dir / "comparison.json") as file:
        json.dump(compared, file, indent=1, allow_nan=False)
    print_comparison(compared, *config.compare)
    print(f"comparison.json in {run_dir}")


def main(config: EvalConfig) -> None:
    run_dir = name_run(config.run_name, "-eval")
    if (config.compare or config.predictions) and int(os.environ.get("RANK", 0)) > 0:
        return  # there is nothing to share out
    with lock_folder(run_dir, "--run-name"):
        if config.compare is not None:
            compare(config, run_dir)
        elif config.images and config.predictions is None:
            caption_images(config, run_dir)
        else:
            evaluate(config, run_dir)


if __name__ == "__main__":
    run_script(main, config)
