"""Caption test images with the fine-tuned model and score the captions; or caption any images.

    python eval.py                                   # 20 random test images, sampled at temperature 0.7
    python eval.py --num-samples all --greedy        # the whole test split
    python eval.py --demo                            # what main.py --demo trained
    python eval.py --predictions predictions.jsonl   # score captions from anywhere, no model needed
    python eval.py --compare a.jsonl b.jsonl         # do two models differ?
    python eval.py --compare a1.jsonl a2.jsonl --against b1.jsonl b2.jsonl    # over other seeds of training too?
    python eval.py --images my_images/               # caption images without references, by the likeliest tokens
    accelerate launch --num_processes 4 eval.py ...  # the same captions, by four GPUs

Predictions are written first, to logs/<run>/predictions.jsonl, and scored from there: scores.json and report.html.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where the package is, which PYTHONSAFEPATH leaves out

from captioner.runtime.cli import run_script, start_imports
from config import EvalConfig, parse_args

if __name__ == "__main__":
    config = parse_args(EvalConfig)  # before the heavy imports, so that --help answers at once
    start_imports()
    if not (config.predictions or config.compare):  # what captions; who only scores captions does without torch
        import captioner.blip2.caption_split  # noqa: F401

from collections import Counter
from dataclasses import asdict
from datetime import date
from importlib.util import find_spec
from typing import NamedTuple

from captioner.data.image_files import name_images
from captioner.data.run_record import hash_adapter
from captioner.data.splits import choose_examples
from captioner.runtime.errors import UserError
from captioner.runtime.files import lock_folder, name_run, write_json
from captioner.runtime.processes import ask_main, go_on_alone
from captioner.runtime.settings import flatten
from captioner.scoring.comparison import compare_files
from captioner.scoring.console import print_captions, print_comparison, print_left_out, print_scores
from captioner.scoring.origin import find_origin, is_bdd100k, read_origin_split
from captioner.scoring.predictions import Prediction, add_rides, read_predictions, read_references, write_predictions
from captioner.scoring.reference_facts import read_facts
from captioner.scoring.report import make_gallery, make_rows, write_report
from captioner.scoring.scores import count_things, score_predictions


class Found(NamedTuple):
    """Predictions that are to be scored."""

    file: Path
    title: str
    images: dict[str, Path]  # by name, for the report
    signature: dict[str, str]  # how the predictions came about
    left_out: Counter  # images without a prediction, by reason
    adapter: str | None = None  # what hash_adapter gave before it captioned them; None: of --predictions


def main(config: EvalConfig) -> None:
    run_dir = name_run(config.run_name, "-eval")
    with lock_folder(run_dir, "--run-name"):
        if config.compare:
            return compare(config, run_dir)
        if config.images and not config.predictions:
            return caption_own_images(config, run_dir)
        found = read_file(config) if config.predictions else caption_split(config, run_dir)
        go_on_alone()
        predictions, incomplete = read_predictions(found.file, config.references and read_references(config.references))
        names = [prediction.name for prediction in predictions]
        is_default = config.predictions and config.adapter == EvalConfig.adapter  # a folder that nobody has named
        origin = find_origin(config.adapter, config.predictions, names if is_default else None)
        predictions, facts, unlabelled = read_facts(predictions, config.labels, origin, asdict(config.reading))
        names = [prediction.name for prediction in predictions]
        training, groups = read_origin_split(origin, names)
        predictions, of_bdd100k = add_rides(predictions, groups), is_bdd100k(origin, names)
        held_against = {"facts": "labels" if config.labels else "references"} if facts else {}
        try:
            scores = score_predictions(predictions, found.signature | held_against, facts, training, of_bdd100k)
        except ValueError as error:
            raise UserError(f"{found.file}: {error}") from None
        scores.update(left_out=dict(incomplete + unlabelled + found.left_out), facts_from=held_against.get("facts"))
        scores.update(trained_with=origin and origin.to_json(), predictions=str(found.file), config=flatten(config))
        write_json(run_dir / "scores.json", scores)
        write_report(run_dir / "report.html", found.title, make_rows(predictions, facts), found.images, scores)
        print_captions(predictions, config.show)
        print_scores(scores)
        print(f"predictions in {found.file}; scores.json and report.html in {run_dir}")
        if not (config.predictions or config.base or config.blank) and config.split == "test":
            from captioner.publishing.adapter_scores import keep_scores  # here: the hub's library imports slowly

            keep_scores(config.adapter, scores, found.adapter)


def caption_split(config: EvalConfig, run_dir: Path) -> Found:
    """Caption a sample of a split, to predictions.jsonl."""
    from captioner.blip2.caption_split import caption_examples  # here: who only scores captions does without torch

    adapter = hash_adapter(config.adapter)
    examples, left_out = ask_main(choose_examples, config)
    captioner = make_captioner(config, len(examples))
    rows, unreadable = caption_examples(captioner, examples, config.model_floors)
    way = {"split": config.split, **captioner.describe_way()}
    way |= {"model": "base" if config.base else "fine-tuned"} | ({"images": "black"} if config.blank else {})
    model = "the base of " * config.base + config.adapter.resolve().name
    title = f"{model} on the {config.split} split, {way['decoding']}{', black images' * config.blank}, {date.today()}"
    captioned = [(example, *rows[example.name]) for example in examples if example.name in rows]
    predictions = [Prediction(e.name, text, list(e.captions), floors) for e, text, floors in captioned]
    predictions = add_rides(predictions, {example.name: example.group for example in examples})
    ask_main(write_predictions, file := run_dir / "predictions.jsonl", predictions)
    print_left_out(unreadable)
    left_out += Counter({"unreadable images": len(unreadable)})
    return Found(file, title, {example.name: example.image for example in examples}, way, left_out, adapter)


def read_file(config: EvalConfig) -> Found:
    """The predictions of --predictions, with the images of --images."""
    title, signature = f"{config.predictions.name}, {date.today()}", {"split": "unknown", "decoding": "unknown"}
    return Found(config.predictions, title, name_images(config.images), signature, Counter())


def make_captioner(config: EvalConfig, count: int):
    """The fine-tuned model, to caption `count` images: in the fast way where that is there and wanted."""
    if config.fast.fast != "off" and find_spec("captioner.fast"):
        from captioner.fast.captioning import FastCaptioner as Captioner
    else:
        from captioner.blip2.captioner import Captioner
    return Captioner(config, count)


def caption_own_images(config: EvalConfig, run_dir: Path) -> None:
    """Caption the images of --images, to captions.jsonl, captions.csv and a gallery."""
    from captioner.blip2.caption_folder import caption_folder, write_captions

    images, captions, unreadable = caption_folder(config, run_dir, make_captioner)
    go_on_alone()
    write_captions(run_dir / "captions.csv", captions)
    told = count_things(len(captions), "caption")
    write_report(run_dir / "report.html", told, make_gallery(captions), images, None)
    print_left_out(unreadable)
    print_captions([Prediction(name, text, []) for name, text in captions.items()], config.show)
    print(f"\n{told} in {run_dir}: captions.csv, captions.jsonl, report.html")
    if not captions:
        raise UserError(f"{count_things(len(images), 'image')} given, and none can be read")


def compare(config: EvalConfig, run_dir: Path) -> None:
    """Print how two predictions files differ, and whether by chance."""
    go_on_alone()
    one, other = (config.compare, config.against) if config.against else (config.compare[:1], config.compare[1:])
    write_json(run_dir / "comparison.json", compared := compare_files(one, other, config.references))
    print_comparison(compared)
    print(f"comparison.json in {run_dir}")


if __name__ == "__main__":
    run_script(main, config)
