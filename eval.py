"""Caption test pictures with the fine-tuned model and score the captions.

    python eval.py                                   # 20 random test pictures, sampled at temperature 0.7
    python eval.py --num-samples all --greedy        # the whole test split
    python eval.py --demo                            # what main.py --demo trained
    python eval.py --predictions predictions.jsonl   # score captions from anywhere, no model needed

Predictions are written first, to logs/<run>/predictions.jsonl, and scored from there.
"""

from config import EvalConfig, parse_args, run_script

if __name__ == "__main__":
    config = parse_args(EvalConfig)  # before the heavy imports, so that --help answers at once

import csv
import json
import random
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from captions import parse_caption
from config import UserError, config_to_json, name_run
from data import SPLIT_COLUMNS, Example, atomic_write
from metrics import make_floors, make_signature, score_bleu, score_facts, score_reference_bleu


class Prediction(NamedTuple):
    """A generated caption and what it is scored against."""

    name: str
    prediction: str
    references: list[str]


# --------------------------------------------------------------------------------------------------------------
# predictions


def sample_examples(folder: Path, split: str, num_samples: int | str, seed: int) -> list[Example]:
    """`num_samples` random examples of the split that main.py wrote to `folder`, or all of them."""
    path = folder / "split.csv"
    if not path.is_file():
        raise UserError(f"{folder}: no fine-tuned model in it; train one with python main.py --output {folder}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
            examples = [Example(row["name"], Path(row["image"]), row["raw_caption"]) for row in rows]
    except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a split with columns {', '.join(SPLIT_COLUMNS)} ({error!r})") from None
    if not examples:
        raise UserError(f"{path}: no frame of the {split} split in it")
    if num_samples == "all":
        return examples
    if num_samples > len(examples):
        print(f"the {split} split has {len(examples)} frames, not {num_samples}: all are taken")
    return random.Random(seed).sample(examples, min(num_samples, len(examples)))


def caption_examples(config: EvalConfig, examples: list[Example]) -> list[Prediction]:
    """Caption the examples' pictures in batches."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging

    from model import generate_captions, load_finetuned, load_pixels, pick_device

    logging.set_verbosity_error()
    model, processor, generation = load_finetuned(config.adapter, pick_device(), config.base)
    options = {} if config.greedy else {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    options |= {"do_sample": not config.greedy}
    if config.max_new_tokens is not None:
        options |= {"max_new_tokens": config.max_new_tokens}
    set_seed(config.seed)
    predictions = []
    with tqdm(total=len(examples), desc="captioning", unit="picture") as progress:
        for start in range(0, len(examples), config.batch_size):
            batch = examples[start : start + config.batch_size]
            pixels = torch.stack([load_pixels(e.image, processor, config.blank) for e in batch])  # (B, 3, S, S)
            try:
                captions = generate_captions(model, processor, pixels, generation, **options)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"--batch-size {config.batch_size}: too large for the GPU ({reason})") from None
            for example, caption in zip(batch, captions, strict=True):
                predictions.append(Prediction(example.name, caption, [example.caption]))
            progress.update(len(batch))
    return predictions


def write_predictions(path: Path, predictions: list[Prediction]) -> None:
    with atomic_write(path) as file:
        for prediction in predictions:
            file.write(json.dumps(prediction._asdict(), ensure_ascii=False) + "\n")


def read_predictions(path: Path) -> list[Prediction]:
    """Read JSON lines of name, prediction and references. Raises UserError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON strings may hold
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); --predictions takes a JSON lines file") from None
    predictions, names = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prediction = parse_prediction(line, f"{path}, line {number}")
        if prediction.name in names:
            raise UserError(f"{path}, line {number}: {prediction.name} came before; each picture is scored once")
        names.add(prediction.name)
        predictions.append(prediction)
    if not predictions:
        raise UserError(f"{path}: no predictions in it")
    return predictions


def parse_prediction(line: str, place: str) -> Prediction:
    wanted = 'must be {"name": TEXT, "prediction": TEXT, "references": [TEXT, ...]}'
    try:
        row = json.loads(line)
        prediction = Prediction(row["name"], row["prediction"], row["references"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{place}: {wanted} ({error!r})") from None
    texts = [prediction.name, prediction.prediction]
    if not isinstance(prediction.references, list) or not prediction.references:
        raise UserError(f"{place}: {wanted}, with one reference at least")
    if not all(isinstance(text, str) for text in texts + prediction.references):
        raise UserError(f"{place}: {wanted}")
    return prediction


# --------------------------------------------------------------------------------------------------------------
# scores


def score_predictions(predictions: list[Prediction], decoding: str, seed: int) -> dict:
    """All scores of the predictions, with the signatures that say how they came about, and the floors beside them."""
    texts = [prediction.prediction for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    n = len(predictions)
    coco = {"level": "corpus", "tok": "coco", "case": "lower", "smooth": "none"}
    spaces = {"level": "sentence-mean", "tok": "space", "case": "lower", "smooth": "method4"}
    return {
        "n": n,
        **score_texts(texts, references),
        "floors": {name: score_texts(floor, references) for name, floor in make_floors(references, seed).items()},
        "signatures": {
            "corpus_bleu": make_signature(**coco, n=n, decoding=decoding),
            "reference_bleu": make_signature(**spaces, n=n, decoding=decoding),
        },
    }


def score_texts(texts: list[str], references: list[list[str]]) -> dict[str, dict[str, float]]:
    """Corpus BLEU, the reference code's BLEU, and the facts, which are read in the first reference of each row."""
    return {
        "corpus_bleu": score_bleu(texts, references),
        "reference_bleu": score_reference_bleu(texts, references),
        "facts": score_facts([parse_caption(text) for text in texts], [parse_caption(row[0]) for row in references]),
    }


COLUMNS = {  # of the printed table: (group, score) by its title
    "BLEU-1": ("corpus_bleu", "BLEU-1"),
    "BLEU-2": ("corpus_bleu", "BLEU-2"),
    "BLEU-3": ("corpus_bleu", "BLEU-3"),
    "BLEU-4": ("corpus_bleu", "BLEU-4"),
    "time": ("facts", "time_of_day"),
    "weather": ("facts", "weather"),
    "scene": ("facts", "scene"),
    "light": ("facts", "traffic_light"),
    "objects": ("facts", "objects_f1"),
    "all": ("facts", "whole_caption"),
}


def print_scores(scores: dict) -> None:
    print(f"\n{scores['n']} pictures; corpus BLEU on COCO tokens; shares of facts that are right, F1 for the objects")
    print(f"{'':<27}" + "".join(f"{title:>9}" for title in COLUMNS))
    for name, row in {"predictions": scores, **scores["floors"]}.items():
        print(f"{name:<27}" + "".join(format_score(row[group][key]) for group, key in COLUMNS.values()))
    bleus = "  ".join(f"{name} {value:.3f}" for name, value in scores["reference_bleu"].items())
    print(f"by the reference code's own protocol: {bleus}")
    print("\n".join(f"{name}: {signature}" for name, signature in scores["signatures"].items()))


def format_score(score: float | None) -> str:
    return f"{'–':>9}" if score is None else f"{score:>9.3f}"


def print_captions(predictions: list[Prediction], count: int) -> None:
    for prediction in predictions[:count]:
        print(f"\n{prediction.name}\n  prediction: {prediction.prediction}")
        for reference in prediction.references:
            print(f"  reference:  {reference}")


def main(config: EvalConfig) -> None:
    run_dir = name_run(config, "-eval")
    if config.predictions is None:
        examples = sample_examples(config.adapter, config.split, config.num_samples, config.seed)
        predictions_file = run_dir / "predictions.jsonl"
        write_predictions(predictions_file, caption_examples(config, examples))
        decoding = (
            "greedy"
            if config.greedy
            else f"T{config.temperature:g}-p{config.top_p:g}-seed{config.seed}-batch{config.batch_size}"
        )
    else:
        predictions_file, decoding = config.predictions, "unknown"
    predictions = read_predictions(predictions_file)
    scores = score_predictions(predictions, decoding, config.seed)
    with atomic_write(run_dir / "scores.json") as file:
        json.dump({**scores, "predictions": str(predictions_file), "config": config_to_json(config)}, file, indent=2)
    print_captions(predictions, config.show)
    print_scores(scores)
    print(f"predictions in {predictions_file}, scores in {run_dir / 'scores.json'}")


if __name__ == "__main__":
    run_script(main, config)
