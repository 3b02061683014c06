"""Caption test pictures with the fine-tuned model and score the captions; or caption any pictures.

    python eval.py                                   # 20 random test pictures, sampled at temperature 0.7
    python eval.py --num-samples all --greedy        # the whole test split
    python eval.py --demo                            # what main.py --demo trained
    python eval.py --predictions predictions.jsonl   # score captions from anywhere, no model needed
    python eval.py --compare a.jsonl b.jsonl         # do two models differ?
    python eval.py --images my_pictures/             # caption pictures without references
    accelerate launch --num_processes 4 eval.py ...  # the same captions, by four GPUs

Predictions are written first, to logs/<run>/predictions.jsonl, and scored from there: scores.json and report.html.
"""

from config import EvalConfig, parse_args, run_script

if __name__ == "__main__":
    config = parse_args(EvalConfig)  # before the heavy imports, so that --help answers at once

import csv
import itertools
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from captioner.bdd100k.facts import Facts, mark_caption, parse_caption
from captioner.bdd100k.label_files import NAME, LabelReport, read_labels
from captioner.blip2.trust import is_inside
from captioner.data.captions import (
    IMAGE_SUFFIXES,
    SPLIT_COLUMNS,
    Example,
    atomic_write,
    explain_writing,
    index_images,
    lock_folder,
)
from captioner.data.images import one_ahead, read_ahead
from captioner.scoring.fact_metrics import list_statements
from captioner.scoring.predictions import (
    Prediction,
    format_prediction,
    name_examples,
    parse_prediction,
    read_predictions,
    read_references,
    write_predictions,
)
from captioner.scoring.report import ReportRow, start_thumbnails, write_report
from captioner.scoring.scores import HEADLINES, compare_predictions, score_predictions, slice_names
from config import UserError, config_to_json, import_bitsandbytes, name_run, without_collector

UNTUNED, NEAREST = "the untuned model", "nearest training picture"  # floors that need a model
RESUMED = (
    *("adapter", "base", "blank", "greedy", "temperature", "top_p", "max_new_tokens", "seed", "batch_size"),
    "fast_generation",
)
FAST_BATCH, SLOW_BATCH = 512, 16  # pictures captioned at once, unless --batch-size says how many


# --------------------------------------------------------------------------------------------------------------
# several processes


def find_place() -> tuple[int, int]:
    """(index of this process, how many there are) under accelerate launch or torchrun; (0, 1) without a launcher.

    The first call joins the others: by NCCL on GPUs, else by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def gather(work: Callable, *args) -> list:
    """What work(*args) returns in each process, in their order, in all of them; each must come to this call.

    A UserError in any of them ends them all: the first that has it raises it, the others leave without a word. On any
    other error the process ends, and the launcher ends the others.
    """
    if find_place()[1] == 1:
        return [work(*args)]
    from accelerate.utils import gather_object

    result, error = None, None
    try:
        result = work(*args)
    except UserError as caught:
        error = caught
    gathered = gather_object([(result, error is not None)])
    for index, (_, failed) in enumerate(gathered):
        if failed:
            go_on_alone(index)
            raise error
    return [result for result, _ in gathered]


def ask_main(work: Callable, *args):
    """What work(*args) returns in the main process, which alone calls it."""
    is_main = find_place()[0] == 0
    return gather(lambda: work(*args) if is_main else None)[0]


def go_on_alone(index: int = 0) -> None:
    """Part the processes: the one of that index goes on, the others end here, as if all were done."""
    place, processes = find_place()
    if processes == 1:
        return
    from accelerate import PartialState

    PartialState().destroy_process_group()
    if place != index:
        sys.exit()


# --------------------------------------------------------------------------------------------------------------
# captioning


def read_split(folder: Path, split: str) -> list[Example]:
    """The examples of a split that main.py wrote to `folder`."""
    path = folder / "split.csv"
    if not path.is_file():
        raise UserError(f"{folder}: no fine-tuned model in it; train one with python main.py --output {folder}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
            examples = [Example(row["name"], Path(row["image"]), row["raw_caption"]) for row in rows]
            for example in examples:  # the folder may be somebody else's, and the report shows the picture
                suffix = example.image.suffix.lower()
                if (
                    not NAME.fullmatch(example.name)
                    or example.image.name != example.name
                    or suffix not in IMAGE_SUFFIXES
                ):
                    raise UserError(
                        f"{path}: {example.name[:80]!r} with the picture {str(example.image)[:200]!r} is no frame's; "
                        "the picture must have the frame's name: train again with python main.py"
                    )
    except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a split with columns {', '.join(SPLIT_COLUMNS)} ({error!r})") from None
    if not examples:
        raise UserError(f"{path}: no frame of the {split} split in it")
    return examples


def sample_examples(examples: list[Example], num_samples: int | str, seed: int) -> list[Example]:
    """`num_samples` random examples, or all of them."""
    if num_samples == "all":
        return examples
    if num_samples > len(examples):
        print(f"the split has {len(examples)} frames, not {num_samples}: all are taken")
    return random.Random(seed).sample(examples, min(num_samples, len(examples)))


def choose_examples(config: EvalConfig) -> list[Example]:
    return sample_examples(read_split(config.adapter, config.split), config.num_samples, config.seed)


class Captioner:
    """The fine-tuned model with its processor and settings, in each process."""

    def __init__(self, config: EvalConfig, pictures: int):
        """`pictures` are to be captioned."""
        self.config = config
        sizes = gather(self._load)  # batches are of one size in all processes, which share them out
        gather(self._make_generator, *map(min, zip(*sizes, strict=True)), pictures)
        self.options = {"do_sample": not config.greedy}
        if not config.greedy:
            self.options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        if config.max_new_tokens is not None:
            self.options["max_new_tokens"] = config.max_new_tokens
        place, processes = find_place()
        if place == 0 and processes > 1:
            print(f"captioning in {processes} processes")

    def _load(self) -> tuple[int, int]:
        """Load the model; returns for how many pictures at once the fast way to generate has room, 0 if it can't be:
        with copies of the weights and without."""
        with without_collector():
            import_bitsandbytes()  # before transformers and peft do
            import torch
            from transformers.utils import logging

            from captioner.blip2.loading import load_finetuned, pick_device
            from captioner.fast.generation import CHUNK, max_batch, supports
            from captioner.fast.vision_store import open_store, take_vision_out

        logging.set_verbosity_error()
        config = self.config
        self.model, self.processor, self.generation = load_finetuned(config.adapter, pick_device(), config.base)
        self.store = None if config.blank else open_store(config, self.model, self.processor)  # of real pictures
        self.vision = take_vision_out(self.model)
        self.longest = config.max_new_tokens or self.generation.max_new_tokens
        if not supports(self.model):
            return 0, 0
        if self.model.device.type != "cuda":
            return FAST_BATCH, 0
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        with_copies, without = (max_batch(self.model, self.longest, free, copies) for copies in (True, False))
        return with_copies, min(without, CHUNK)

    def _make_generator(self, with_copies: int, without: int, pictures: int) -> None:
        """Choose the batch size, and the fast way to generate (generation.py) where that is wanted and possible."""
        from captioner.fast.generation import FastGenerator, round_up, supports

        self.batch_size, self.generator = self.config.batch_size or SLOW_BATCH, None
        wanted = self.config.fast_generation
        if wanted == "off" or (wanted == "auto" and self.model.device.type != "cuda"):
            return
        size = self.config.batch_size
        copies = with_copies >= min(size or SLOW_BATCH, without)
        fitting = with_copies if copies else without
        if size is None:
            most = FAST_BATCH if copies else SLOW_BATCH
            size = min(most, 1 << max(fitting, 1).bit_length() - 1)  # a power of 2
            size = min(size, round_up(math.ceil(pictures / math.ceil(pictures / size)), 8))  # the last one too
        if size <= fitting:
            self.batch_size, self.generator = size, FastGenerator(self.model, size, copies=copies)
        elif wanted == "on" and not supports(self.model):
            raise UserError("--fast-generation on: not made for this language model; use --fast-generation auto")
        elif wanted == "on":
            raise UserError(
                f"--fast-generation on: the GPU has room for {fitting} pictures at once in this way; take a "
                "--batch-size of no more, or --fast-generation auto"
            )

    def map_batches(
        self,
        pictures: Sequence[tuple[str, Path]],
        work: Callable,
        unreadable: dict[str, str],
        finished: Collection[str] = frozenset(),
    ) -> Iterator[list[tuple]]:
        """Rows (name, result) of batch after batch, the same in every process.

        A batch is `batch_size` pictures in a row. work(index of the batch, outputs of the ViT (B, P, D)) gives the B
        results of those that can be read; the others go into `unreadable` with why. Of N processes the r-th works on
        batches r, r + N, ...; after N batches the results are exchanged. Batches with no picture to do that is not in
        `finished` are passed over.
        """
        place, processes = find_place()
        size = self.batch_size
        batches = [(index, pictures[size * index : size * (index + 1)]) for index in range(-(-len(pictures) // size))]
        batches = [(index, batch) for index, batch in batches if any(name not in finished for name, _ in batch)]
        total = sum(len(batch) for _, batch in batches)
        mine = [batch for _, batch in batches[place::processes]]
        reading = one_ahead(self._read_batches(mine, self._read_all([image for batch in mine for _, image in batch])))
        with tqdm(total=total, desc="captioning", unit="picture", disable=place > 0) as progress:
            for first in range(0, len(batches), processes):
                now = batches[first : first + processes]
                index = now[place][0] if place < len(now) else None
                for rows, reasons in gather(self._do_batch, index, reading, work, finished):
                    unreadable.update(reasons)
                    yield rows
                progress.update(sum(len(batch) for _, batch in now))

    def _read_all(self, images: Sequence[Path]) -> Iterator[tuple | str]:
        """(SHA-256 of the file if there is a store, stored output of the ViT (P, D) or else pixel values (3, S, S)).

        For a picture that can't be read, why. Outputs are read ahead by threads, pictures decoded by processes, which
        start at the call.
        """
        from captioner.fast.vision_store import hash_picture, read_each

        store, settings = self.store, self.model.config.vision_config
        how = (self.processor, self.vision.post_layernorm.weight.dtype, settings.image_size, self.config.blank)
        sums = [None] * len(images) if store is None else list(read_ahead(hash_picture, images, at_once=32))
        is_stored = [store is not None and store.has(sha256) for sha256 in sums]
        stored = read_ahead(store.load, itertools.compress(sums, is_stored), 2 * self.batch_size) if store else iter(())
        decoded = read_each([image for image, there in zip(images, is_stored, strict=True) if not there], *how)

        def read(image: Path, sha256: str | None, is_there: bool) -> tuple | str:
            found = next(stored) if is_there else next(decoded)
            if found is None:  # damaged in the store
                found = next(read_each([image], *how))
            return found if isinstance(found, str) else (sha256, found)

        return itertools.starmap(read, zip(images, sums, is_stored, strict=True))

    def _read_batches(self, batches: Sequence[Sequence], reading: Iterator[tuple | str]) -> Iterator[tuple]:
        """Of each batch, as _read_all gave them: (names, SHA-256 of each, outputs or pixels of each, {name: why not}).

        Where all outputs are stored they are one tensor (B, P, D), in pinned memory if there is a GPU.
        """
        import torch

        for batch in batches:
            names, sums, outputs, unreadable = [], [], [], {}
            for (name, _), read in zip(batch, reading, strict=False):
                if isinstance(read, str):
                    unreadable[name] = read
                else:
                    names.append(name)
                    sums.append(read[0])
                    outputs.append(read[1])
            if outputs and all(output.dim() == 2 for output in outputs):
                pin, like = self.model.device.type == "cuda", outputs[0]
                room = torch.empty(len(outputs), *like.shape, dtype=like.dtype, pin_memory=pin)
                outputs = torch.stack(outputs, out=room)
            yield names, sums, outputs, unreadable

    def _do_batch(self, index: int | None, reading: Iterator[tuple], work: Callable, finished: Collection[str]):
        import torch

        if index is None:
            return [], {}
        names, sums, outputs, unreadable = next(reading)
        if all(name in finished for name in names):
            return [], unreadable
        try:
            return list(zip(names, work(index, self._run_vision(sums, outputs)), strict=True)), unreadable
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            size = self.batch_size
            raise UserError(f"--batch-size {size}: too large for the GPU ({reason}); take a smaller one") from None

    def _run_vision(self, sums: Sequence[str | None], outputs):
        """The ViT's outputs (B, P, D) for what _read_batches gave: those that it has not are computed, and saved."""
        import torch

        from captioner.fast.vision_store import run_vision

        missing = [row for row, output in enumerate(outputs) if output.dim() == 3]
        if self.store is not None:
            self.store.count(len(outputs) - len(missing), len(outputs))
        if not missing:
            return outputs.to(self.model.device, non_blocking=True)
        computed = run_vision(self.vision, torch.stack([outputs[row] for row in missing]))
        for row, output in zip(missing, computed, strict=True):
            outputs[row] = output
        if self.store is not None:
            kept = computed.to("cpu", non_blocking=True)  # pinned, so that a slow disk holds up no GPU memory
            self.store.save([sums[row] for row in missing], list(kept))
        return torch.stack([output.to(self.model.device, non_blocking=True) for output in outputs])

    def finish(self) -> None:
        """Say how many outputs were in the store, and wait for those that are being written."""
        if self.store is not None:
            print(self.store.describe())
            self.store.close()

    def caption(self, index: int, outputs) -> list[str]:
        """Captions for outputs (B, P, D) of the ViT. Sampling depends on seed and the batch's index, on no other batch.

        So whichever process has a batch, and whatever came before, its captions are the same; on a CPU only with as
        many threads, which decide in what order numbers are added up.
        """
        import torch

        from captioner.blip2.loading import decode_captions, generate_captions

        mixed = np.random.SeedSequence((self.config.seed, index)).generate_state(1)  # a CPU takes 32 bits of a seed
        seed = int(mixed[0])
        if self.generator is not None:
            options = {
                name: self.options[name] for name in ("do_sample", "temperature", "top_p") if name in self.options
            }
            tokens = self.generator.generate(outputs, self.longest, **options, seed=seed)
            return decode_captions(self.processor, tokens)
        torch.manual_seed(seed)
        return generate_captions(self.model, self.processor, outputs, self.generation, **self.options)

    def describe_memory(self) -> str:
        import torch

        used = torch.cuda.max_memory_allocated() / 2**30
        return f", {used:.2f} GiB of GPU memory at most" if used else ""

    def caption_untuned(self, index: int, outputs) -> list[str]:
        """The same without the adapter: what --base gives."""
        with self.model.disable_adapter():
            return self.caption(index, outputs)

    def encode(self, outputs) -> np.ndarray:
        """(B, D) image features of length 1: the frozen ViT's pooled output, from its outputs (B, P, D)."""
        import torch

        with torch.inference_mode():
            pooled = self.vision.post_layernorm(outputs[:, 0]).float()
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def caption_examples(config: EvalConfig, examples: list[Example]) -> tuple[list[Prediction], dict[str, str]]:
    """Predictions for the examples, and the pictures that can't be read with the reason. Other processes end here."""
    captioner, unreadable = Captioner(config, len(examples)), {}
    nearest = find_nearest(captioner, examples) if config.model_floors else {}
    references = {example.name: [example.caption] for example in examples}

    def work(index: int, outputs) -> list[tuple[str, dict[str, str]]]:
        captions = captioner.caption(index, outputs)
        if not config.model_floors:
            return [(caption, {}) for caption in captions]
        untuned = captioner.caption_untuned(index, outputs)
        return [(caption, {UNTUNED: text}) for caption, text in zip(captions, untuned, strict=True)]

    predictions, start, ends = [], time.perf_counter(), []
    for rows in captioner.map_batches([(e.name, e.image) for e in examples], work, unreadable):
        ends.append((time.perf_counter(), len(predictions) + len(rows)))
        for name, (caption, floors) in rows:
            floors |= {NEAREST: nearest[name]} if nearest else {}
            predictions.append(Prediction(name, caption, references[name], floors))
    seconds = time.perf_counter() - start
    _, processes = find_place()
    captioner.finish()
    go_on_alone()
    pace = f"{len(predictions):,} captions in {seconds:.1f} s, {len(predictions) / seconds:.1f} a second"
    if len(ends) > processes:  # in the first batch of each process the GPU's launches are recorded
        (first, before), (last, total) = ends[processes - 1], ends[-1]
        pace += f" ({(total - before) / (last - first):.1f} after the first batch)"
    print(pace + captioner.describe_memory())
    if not predictions:
        raise UserError(f"none of the {len(examples)} pictures can be read: {next(iter(unreadable.values()))}")
    return predictions, unreadable


def find_nearest(captioner: Captioner, examples: list[Example]) -> dict[str, str]:
    """{name: caption of the training picture whose image features are most like its own}."""
    training = ask_main(read_split, captioner.config.adapter, "train")
    features = {}
    for part in (training, examples):
        pictures = [(example.name, example.image) for example in part]
        for rows in captioner.map_batches(pictures, lambda _, outputs: captioner.encode(outputs), {}):
            features |= rows
    known = [example for example in training if example.name in features]
    table = np.stack([features[example.name] for example in known])  # (N, D)
    readable = [example for example in examples if example.name in features]
    return {e.name: known[int((table @ features[e.name]).argmax())].caption for e in readable}


# --------------------------------------------------------------------------------------------------------------
# pictures without references


def find_pictures(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name, file) of the pictures in `paths`, a name being the path below the folder that was given."""
    pictures: dict[str, Path] = {}
    for path in paths:
        if path.is_dir():
            below = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
            below = [file for file in below if is_inside(file, path)]  # no link leads out of the folder
            found = {str(file.relative_to(path)): file for file in sorted(below)}
            if not found:
                raise UserError(f"{path}: no picture in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif path.is_file():
            found = {path.name: path}
        else:
            raise UserError(f"{path}: no such picture or folder; --images takes pictures and folders of them")
        if twice := found.keys() & pictures.keys():
            raise UserError(f"{path}: {sorted(twice)[0]} came before; give the folder above both instead")
        pictures |= found
    return list(pictures.items())


def read_finished(path: Path, config: EvalConfig) -> dict[str, str]:
    """{name: caption} of an earlier run under this name, which must have had the same settings."""
    from captioner.blip2.loading import read_run

    settings = {name: value for name, value in config_to_json(config).items() if name in RESUMED}
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


def start_pictures(config: EvalConfig, run_dir: Path) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    """The pictures of --images as (name, file), and {name: caption} of those that an earlier run did."""
    pictures = find_pictures(config.images)
    run_dir.mkdir(parents=True, exist_ok=True)
    finished = read_finished(run_dir / "captions.jsonl", config)
    if finished:
        done = sum(name in finished for name, _ in pictures)
        print(f"{done:,} of {len(pictures):,} pictures were captioned before")
    return pictures, finished


def caption_pictures(config: EvalConfig, run_dir: Path) -> None:
    """Caption the pictures of --images, to captions.jsonl as it goes, then captions.csv and the gallery.

    A run that goes on has the batches of one that was never stopped, and so the same captions, as long as the same
    pictures are there and can be read. Of a batch that was half written, all is generated again and the rest written.
    """
    pictures, finished = ask_main(start_pictures, config, run_dir)
    unreadable: dict[str, str] = {}
    if any(name not in finished for name, _ in pictures):
        captioner, before = Captioner(config, len(pictures)), frozenset(finished)
        path = run_dir / "captions.jsonl" if find_place()[0] == 0 else Path(os.devnull)
        remedy = "the captions before are kept: see to the disk, then give the same command and --run-name again"
        with explain_writing(path, remedy), open(path, "a", encoding="utf-8") as file:
            for rows in captioner.map_batches(pictures, captioner.caption, unreadable, before):
                for name, caption in rows:
                    if name not in before:
                        file.write(format_prediction(Prediction(name, caption, [])))
                        finished[name] = caption
                file.flush()
        captioner.finish()
    go_on_alone()
    captions = {name: finished[name] for name, _ in pictures if name in finished}
    with atomic_write(run_dir / "captions.csv") as file:
        rows = [("name", "prediction"), *captions.items()]
        csv.writer(file).writerows([text.encode(errors="backslashreplace").decode() for text in row] for row in rows)
    rows = [ReportRow(name, mark_caption(text, Facts(), ""), [], {}, None) for name, text in captions.items()]
    write_report(run_dir / "report.html", f"{len(rows):,} captions", rows, dict(pictures), None)
    print_left_out(unreadable)
    for name, caption in list(captions.items())[: config.show]:
        print(f"\n{name}\n  {caption}")
    print(f"\n{len(captions):,} captions in {run_dir}: captions.csv, captions.jsonl, report.html")
    if not captions:
        raise UserError(f"none of the {len(pictures)} pictures can be read")


def print_left_out(unreadable: dict[str, str]) -> None:
    if unreadable:
        print(f"{len(unreadable):,} pictures can't be read and are left out:")
        print("\n".join(f"  {reason}" for reason in list(unreadable.values())[:10]))


# --------------------------------------------------------------------------------------------------------------
# what is shown


def make_rows(predictions: Sequence[Prediction], facts: Sequence[Facts]) -> list[ReportRow]:
    """The report's cards."""
    rows = []
    for prediction, expected in zip(predictions, facts, strict=True):
        said = parse_caption(prediction.prediction)
        marked = mark_caption(prediction.prediction, expected, "invented")
        references = [mark_caption(text, said, "missing") for text in prediction.references]
        mine, theirs = list_statements(said), list_statements(expected)
        score = 2 * len(mine & theirs) / (len(mine) + len(theirs)) if theirs else None
        rows.append(ReportRow(prediction.name, marked, references, slice_names(expected), score))
    return rows


TITLES = {  # of the printed table, in the order of HEADLINES
    "facts_f1": "facts F1",
    "time_of_day": "time",
    "weather": "weather",
    "scene": "scene",
    "traffic_light": "light",
    "objects_f1": "objects",
    "whole_caption": "whole",
    "BLEU-4": "BLEU-4",
    "CIDEr-D": "CIDEr-D",
}


def print_scores(scores: dict) -> None:
    """Headline scores with half the width of their intervals, and the floors beneath."""
    print(f"\n{scores['n']:,} pictures. Shares of right facts, F1 for facts and objects; ± half the 95 % interval")
    print(f"{'':<26}" + "".join(f"{title:>10}" for title in TITLES.values()))
    own = {name: scores["scores"][group][name] for name, group in HEADLINES.items()}
    digits = {name: choose_digits(figure) for name, figure in own.items()}
    for row, groups in {"predictions": scores["scores"], **scores["floors"]}.items():
        values = [format_value(groups[group][name]["value"], digits[name]) for name, group in HEADLINES.items()]
        print(f"{row:<26}" + "".join(f"{value:>10}" for value in values))
        if row == "predictions":
            halves = [format_half(own[name], digits[name]) for name in HEADLINES]
            print(f"{'':<26}" + "".join(f"{half:>10}" for half in halves))
    for group, title in {"corpus_bleu": "corpus BLEU", "reference_bleu": "reference protocol"}.items():
        figures = scores["scores"][group].items()
        print(f"{title:<26}" + "  ".join(f"{name} {figure['value']:.3f}" for name, figure in figures))
    stating = [item for item in scores["slices"] if item["scores"]["facts_f1"]["value"] is not None]
    worst = [f"{item['by']} {item['value']} {item['scores']['facts_f1']['value']:.2f}" for item in stating[:3]]
    if worst:
        print(f"{'worst slices, facts F1':<26}" + ", ".join(worst))
    print("\n".join(f"note: {note}" for note in scores["notes"]))
    print(f"signature: {scores['signatures']['corpus_bleu']}")


def choose_digits(figure: dict) -> int:
    """Decimals that the width of the interval supports."""
    if figure["low"] is None:
        return 2
    half = (figure["high"] - figure["low"]) / 2
    return 2 if half >= 0.05 else 3


def format_value(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def format_half(figure: dict, digits: int) -> str:
    return "" if figure["low"] is None else f"±{(figure['high'] - figure['low']) / 2:.{digits}f}"


def print_captions(predictions: Sequence[Prediction], count: int) -> None:
    for prediction in predictions[:count]:
        print(f"\n{prediction.name}\n  prediction: {prediction.prediction}")
        for reference in prediction.references:
            print(f"  reference:  {reference}")


def print_comparison(compared: dict, one: Path, other: Path) -> None:
    print(f"A {one}\nB {other}\n{compared['n']:,} pictures that both captioned")
    for name, count in (("A", compared["only_in_one"]), ("B", compared["only_in_other"])):
        if count:
            print(f"{count:,} pictures only {name} captioned are left out")
    print(f"{'':<18}{'A':>9}{'B':>9}{'B - A':>9}   {'95 % interval':<18}{'p':>7}")
    for name, row in compared["scores"].items():
        values = f"{row['one']:>9.3f}{row['other']:>9.3f}{row['difference']:>+9.3f}"
        interval = f"{row['low']:+.3f} to {row['high']:+.3f}"
        print(f"{name:<18}{values}   {interval:<18}{row['p']:>7.3f}")
    print("".join(f"note: {note}\n" for note in compared["notes"]), end="")
    print("paired bootstrap; many scores are compared at once, so one p below 0.05 alone says little")


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
        raise UserError(f"--labels {config.labels[0]}: none of the captioned pictures is in it ({names})")
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
        signature |= {"model": "base" if config.base else "fine-tuned"} | (
            {"pictures": "black"} if config.blank else {}
        )
    else:
        predictions_file, signature = config.predictions, {"split": "unknown", "decoding": "unknown"}
        for path in config.images:
            images |= dict(find_pictures([path]))
            if path.is_dir():
                images |= index_images(path)  # by the bare file name too
        references = read_references(config.references) if config.references else None
    read, left_out = read_predictions(predictions_file, references)
    predictions, facts, unlabelled = read_facts(config, read)
    left_out += unlabelled + Counter({"unreadable pictures": len(unreadable)})
    signature["facts"] = "labels" if config.labels else "references"
    try:
        scores = score_predictions(predictions, signature, facts)
    except ValueError as error:
        raise UserError(f"{predictions_file}: {error}") from None
    scores |= {"left_out": dict(+left_out), "facts_from": "labels" if config.labels else "references"}
    scores |= {"predictions": str(predictions_file), "config": config_to_json(config)}
    with atomic_write(run_dir / "scores.json") as file:
        json.dump(scores, file, indent=1, allow_nan=False)
    origin = ", ".join(signature.values()) if config.predictions is None else config.predictions.name
    title = f"{len(predictions):,} pictures, {origin}"
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
    """Keep the scores beside the adapter and in its model card, unless some of more pictures are there."""
    from captioner.publishing.model_card import read_scores, write_model_card

    try:
        before = read_scores(adapter)
        if before is not None and before["n"] > scores["n"]:
            print(f"{adapter / 'README.md'} keeps its scores, of {before['n']:,} pictures")
            return
        with atomic_write(adapter / "scores.json") as file:
            json.dump(scores, file, indent=1, allow_nan=False)
        write_model_card(adapter)
        print(f"{adapter / 'README.md'}, the model card, has these scores now")
    except UserError as error:  # a shared adapter may be read-only; the scores are in logs/ already
        print(f"note: not kept beside the adapter: {error}")


def describe_decoding(config: EvalConfig) -> str:
    if config.greedy:
        return "greedy"
    return f"T{config.temperature:g}-p{config.top_p:g}-seed{config.seed}-batch{config.batch_size or 'auto'}"


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
    run_dir = name_run(config, "-eval")
    if (config.compare or config.predictions) and int(os.environ.get("RANK", 0)) > 0:
        return  # there is nothing to share out
    with lock_folder(run_dir, "--run-name"):
        if config.compare is not None:
            compare(config, run_dir)
        elif config.images and config.predictions is None:
            caption_pictures(config, run_dir)
        else:
            evaluate(config, run_dir)


if __name__ == "__main__":
    run_script(main, config)
