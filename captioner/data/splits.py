"""Train, validation and test split: no ride is in two of them."""

import csv
import hashlib
import itertools
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from captioner.bdd100k.frames import NAME
from captioner.data.captions import Example, caption_labels, find_labels, read_captions
from captioner.data.images import IMAGE_SUFFIXES, find_image_folder, index_images, match_images
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write
from config import EvalConfig, TrainConfig

TRAINED_ON = ("train", "val")  # splits whose images training sees
MAX_UNREADABLE = 0.05  # share of the images that may be unreadable
LISTED = 10  # of them that are listed
FRAME_NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f]{8}(\.\w+)?")  # of BDD100K


SPLIT_COLUMNS = ["name", "split", "image", "raw_caption"]  # of split.csv, which main.py writes and eval.py reads


def ride_of(name: str) -> str:
    """The ride that a frame belongs to: the first half of `<8 hex>-<8 hex>.jpg`. Frames of a ride look alike."""
    return Path(name).stem.split("-")[0]


def split_by_ride(names: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Split names into the keys of `shares`, by its values in order, so that no ride is in two splits.

    Rides are ordered by a hash of seed and ride, so the order of `names` does not matter, and are dealt out until
    each split has its share of the frames, to within a ride. Each split gets one ride at least.
    """
    rides: dict[str, list[str]] = {}
    for name in sorted(names):
        rides.setdefault(ride_of(name), []).append(name)
    if len(rides) < len(shares):
        raise UserError(
            f"{len(names)} frames of {len(rides)} rides can't be split: {', '.join(shares)} need a ride each; the ride "
            f'of a frame is the part of its name before the first "-" ({", ".join(list(rides)[:3])})'
        )
    if others := [name for name in names if not FRAME_NAME.fullmatch(name)]:
        print(
            f"note: {len(others):,} of {len(names):,} names, {others[0]} for one, aren't <8 hex>-<8 hex> as BDD100K's: "
            'what is before the first "-" is taken for the ride, and a name without it for a ride of its own, so that '
            "frames of one ride may be in two splits"
        )
    order = sorted(rides, key=lambda ride: hashlib.sha256(f"{seed}:{ride}".encode()).digest())
    ends = list(itertools.accumulate(shares.values()))
    dealt: list[list[str]] = [[] for _ in shares]
    done, current, last = 0, 0, len(shares) - 1
    for position, ride in enumerate(order):
        left = len(order) - position  # rides, this one included
        middle = (done + len(rides[ride]) / 2) / len(names)
        while current < last and dealt[current] and (middle > ends[current] or left <= last - current):
            current += 1
        dealt[current] += rides[ride]
        done += len(rides[ride])
    return dict(zip(shares, dealt, strict=True))


def prepare_splits(config: TrainConfig, run_dir: Path) -> dict[str, list[Example]]:
    """Labels -> captions CSV -> examples with images -> {split: examples}."""
    labels = find_labels(config)
    images = index_images(find_image_folder(config))
    shares = {"train": config.data.train_share, "val": config.data.val_share}
    held_out: list[Example] = []
    if config.data.held_out == "val":
        held_out = caption_held_out(config, images, run_dir)
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    else:
        shares["test"] = 1 - sum(shares.values())
    caption_labels(config.source, labels, config.data.captions, run_dir)
    examples = match_images(read_captions(config.data.captions), images)
    rides = {ride_of(example.name) for example in held_out}
    by_name = {example.name: example for example in examples if ride_of(example.name) not in rides}
    if len(by_name) < len(examples):
        print(f"{len(examples) - len(by_name):,} frames are of rides that are held out, and are left out")
    names = split_by_ride(list(by_name)[: config.data.limit], shares, config.training.seed)
    splits = {split: [by_name[name] for name in names[split]] for split in names}
    splits.setdefault("test", held_out)
    return splits


def caption_held_out(config: TrainConfig, images: dict[str, Path], run_dir: Path) -> list[Example]:
    """The examples of Kaggle's val labels, all of them the test split."""
    from captioner.bdd100k.download import fetch_labels  # here: kagglehub takes a while to import

    captions = config.data.captions.with_stem(config.data.captions.stem + "_val")
    caption_labels(config.source, fetch_labels(config.source.kaggle_dataset, "val"), captions, run_dir / "held_out")
    return match_images(read_captions(captions), images)


def list_images(splits: dict[str, list[Example]], names: Iterable[str]) -> list[Path]:
    """The images of the splits of those names, in their order."""
    return [example.image for name in names for example in splits[name]]


def leave_out_unreadable(splits: dict[str, list[Example]], unreadable: dict[Path, str]) -> dict[str, list[Example]]:
    """The splits without the `unreadable` images {path: why}, which are counted and listed.

    Raises UserError when they are more than MAX_UNREADABLE of all.
    """
    everything = list(itertools.chain.from_iterable(splits.values()))
    if unreadable:
        listed = [unreadable[example.image] for example in everything if example.image in unreadable][:LISTED]
        reasons = "\n".join(f"  {reason}" for reason in listed)
        told = f"{len(unreadable):,} of {len(everything):,} images can't be read"
        if len(unreadable) > MAX_UNREADABLE * len(everything):
            first = reasons.splitlines()[0].strip()
            raise UserError(f"{told}, more than {MAX_UNREADABLE:.0%}: is the data set complete? The first: {first}")
        print(f"{told} and are left out:\n{reasons}")
    readable = {
        split: [example for example in examples if example.image not in unreadable]
        for split, examples in splits.items()
    }
    print(", ".join(f"{len(examples):,} {split}" for split, examples in readable.items()) + " frames, split by ride")
    return readable


def write_splits(path: Path, splits: dict[str, list[Example]]) -> None:
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(SPLIT_COLUMNS)
        for split, examples in splits.items():
            writer.writerows((e.name, split, e.image.absolute(), e.caption) for e in examples)


def read_split(folder: Path, split: str, images_root: Path | None = None) -> list[Example]:
    """The examples of a split that main.py wrote to `folder`; with the images below `images_root`, if given."""
    path = folder / "split.csv"
    if not path.is_file():
        raise UserError(f"{folder}: no fine-tuned model in it; train one with python main.py --output {folder}")
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
            examples = [Example(row["name"], Path(row["image"]), row["raw_caption"]) for row in rows]
            for example in examples:  # the folder may be somebody else's, and the report shows the image
                suffix = example.image.suffix.lower()
                if (
                    not NAME.fullmatch(example.name)
                    or example.image.name != example.name
                    or suffix not in IMAGE_SUFFIXES
                ):
                    raise UserError(
                        f"{path}: {example.name[:80]!r} with the image {str(example.image)[:200]!r} is no frame's; "
                        "the image must have the frame's name: train again with python main.py"
                    )
    except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a split with columns {', '.join(SPLIT_COLUMNS)} ({error!r})") from None
    if not examples:
        raise UserError(f"{path}: no frame of the {split} split in it")
    return examples if images_root is None else move_images(examples, images_root)


def move_images(examples: list[Example], root: Path) -> list[Example]:
    """The examples with the images of their names below `root`; those that have none there are left out, counted."""
    images = index_images(root)
    moved = [example._replace(image=images[example.name]) for example in examples if example.name in images]
    if not moved:
        raise UserError(f"--images-root {root}: none of the {len(examples):,} images of the split is in it")
    if len(moved) < len(examples):
        print(f"{len(examples) - len(moved):,} of {len(examples):,} images are not in {root} and are left out")
    return moved


def sample_examples(examples: list[Example], num_samples: int | str, seed: int) -> list[Example]:
    """`num_samples` random examples, or all of them."""
    if num_samples == "all":
        return examples
    if num_samples > len(examples):
        print(f"the split has {len(examples)} frames, not {num_samples}: all are taken")
    return random.Random(seed).sample(examples, min(num_samples, len(examples)))


def choose_examples(config: EvalConfig) -> list[Example]:
    split = read_split(config.adapter, config.split, config.images_root)
    examples = sample_examples(split, config.num_samples, config.generation.seed)
    if not any(os.path.exists(example.image) for example in examples):  # False too where it may not be looked
        raise UserError(
            f"{config.adapter / 'split.csv'}: its images are gone, {examples[0].image} for one; give the folder "
            "where they are now with --images-root"
        )
    return examples
