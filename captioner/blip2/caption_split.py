"""Captions of a split's images, and captions of the same images that need a model to be beaten by them."""

import time
from collections.abc import Sequence

import numpy as np

from captioner.blip2.captioner import Captioner
from captioner.data.examples import Example
from captioner.data.splits import read_split
from captioner.runtime.errors import UserError
from captioner.runtime.processes import ask_main, find_place

UNTUNED, NEAREST = "the untuned model", "nearest training image"  # floors that need a model

Row = tuple[str, dict[str, str]]  # an image's caption, and its floors by their origin


def caption_examples(
    captioner: Captioner, examples: Sequence[Example], with_floors: bool
) -> tuple[dict[str, Row], dict[str, str]]:
    """({name: row} of the images in order, {name: why not} of those that can't be read), in every process.

    Prints the pace. Raises UserError when none of the images can be read.
    """

    def work(names: list[str], outputs) -> list[Row]:
        captions = captioner.caption(names, outputs)
        if not with_floors:
            return [(caption, {}) for caption in captions]
        untuned = captioner.caption_untuned(names, outputs)
        return [(caption, {UNTUNED: text}) for caption, text in zip(captions, untuned, strict=True)]

    nearest = find_nearest(captioner, examples) if with_floors else {}
    rows, unreadable, ends = {}, {}, []
    start = time.perf_counter()
    for batch in captioner.map_batches([(e.name, e.image) for e in examples], work, unreadable):
        ends.append((time.perf_counter() - start, len(rows) + len(batch)))
        rows |= dict(batch)
    for name, (_, floors) in rows.items():
        if nearest:
            floors[NEAREST] = nearest[name]
    if not rows:
        raise UserError(f"none of the {len(examples)} images can be read: {next(iter(unreadable.values()))}")
    print(describe_pace(ends) + captioner.describe_memory())
    return rows, unreadable


def describe_pace(ends: Sequence[tuple[float, int]]) -> str:
    """`ends`: of each batch the seconds since the start at its end, and the captions by then."""
    (seconds, total), (_, processes) = ends[-1], find_place()
    pace = f"{total:,} captions in {seconds:.1f} s, {total / seconds:.1f} a second"
    if len(ends) > processes:  # the first batch of each process takes longer
        first, before = ends[processes - 1]
        pace += f" ({(total - before) / (seconds - first):.1f} after the first batch)"
    return pace


def find_nearest(captioner: Captioner, examples: Sequence[Example]) -> dict[str, str]:
    """{name: caption of the training image whose image features are most like its own} of those that can be read."""
    training = ask_main(read_split, captioner.config.adapter, "train", captioner.config.images_root)
    features = {}
    for part in (training, examples):
        images = [(example.name, example.image) for example in part]
        for rows in captioner.map_batches(images, lambda _, outputs: captioner.encode(outputs), {}):
            features |= rows
    known = [example for example in training if example.name in features]
    if not known:
        raise UserError(
            f"--model-floors: none of the {len(training):,} training images can be read; give --images-root"
        )
    table = np.stack([features[example.name] for example in known])  # (N, D)
    readable = [example for example in examples if example.name in features]
    return {e.name: known[int((table @ features[e.name]).argmax())].caption for e in readable}
