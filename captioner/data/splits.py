"""Train, validation and test split: no ride is in two of them."""

import csv
import hashlib
import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from unicodedata import normalize

from captioner.data.examples import Example
from captioner.data.image_files import (
    IMAGE_SUFFIXES,
    LEADS_OUT,
    find_image_folder,
    index_images,
    locate_images,
    match_images,
)
from captioner.data.label_captions import caption_labels, check_replaceable, find_labels
from captioner.data.run_record import explain_adapter, read_run
from captioner.runtime.errors import UserError, escape_controls
from captioner.runtime.files import atomic_write
from config import EvalConfig, TrainConfig

if TYPE_CHECKING:
    import pandas as pd

TRAINED_ON = ("train", "val")  # splits whose images training sees
MAX_UNREADABLE = 0.05  # share of the images that may be unreadable
LISTED = 10  # of them that are listed
FRAME_NAME = re.compile(r"[0-9a-f]{8}-[0-9a-f]{8}([\W_].*)?", re.IGNORECASE)  # of BDD100K; -0000001 in tracking sets
SPLIT_COLUMNS = ["name", "split", "image", "raw_caption", "group"]  # of split.csv


def is_frame_name(name: str) -> bool:
    """Whether a name is one of BDD100K's, which tells the ride, whatever folder and suffix it has."""
    return FRAME_NAME.fullmatch(Path(name).name) is not None


def ride_of(name: str) -> str:
    """The ride that a frame belongs to: the start of `<8 hex>-<8 hex>.jpg`. Frames of a ride look alike."""
    return Path(name).stem.split("-")[0].lower()


def split_by_ride(names: Sequence[str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Split names into the keys of `shares` so that no ride is in two splits; see split_by_group."""
    groups = {name: ride_of(name) for name in names}
    if len(set(groups.values())) < len(shares):
        rides = ", ".join(sorted(set(groups.values()))[:3])
        raise UserError(
            f"{len(names)} frames of {len(set(groups.values()))} rides can't be split: {', '.join(shares)} need a ride "
            f'each; the ride of a frame is the part of its name before the first "-" ({rides})'
        )
    if others := [name for name in names if not is_frame_name(name)]:
        print(
            f"note: {len(others):,} of {len(names):,} names, {others[0]} for one, aren't <8 hex>-<8 hex> as BDD100K's: "
            'what is before the first "-" is taken for the ride, and a name without it for a ride of its own, so that '
            "frames of one ride may be in two splits"
        )
    return split_by_group(groups, shares, seed)


def split_by_group(groups: Mapping[str, str], shares: Mapping[str, float], seed: int) -> dict[str, list[str]]:
    """Split the names that have these groups into the keys of `shares`, by its values in order, whole groups only.

    Groups are ordered by a hash of seed and group, so the order of `groups` does not matter, and are dealt out until
    each split has its share of the names, to within a group. Each split gets one group at least.
    """
    members: dict[str, list[str]] = {}
    for name in sorted(groups):
        members.setdefault(groups[name], []).append(name)
    if len(members) < len(shares):
        raise UserError(
            f"{len(groups)} images of {len(members)} groups can't be split: {', '.join(shares)} need a group each "
            f"({', '.join(list(members)[:3])})"
        )
    order = sorted(members, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    ends = list(itertools.accumulate(shares.values()))
    dealt: list[list[str]] = [[] for _ in shares]
    done, current, last = 0, 0, len(shares) - 1
    for position, group in enumerate(order):
        left = len(order) - position  # groups, this one included
        middle = (done + len(members[group]) / 2) / len(groups)
        while current < last and dealt[current] and (middle > ends[current] or left <= last - current):
            current += 1
        dealt[current] += members[group]
        done += len(members[group])
    return dict(zip(shares, dealt, strict=True))


def prepare_splits(config: TrainConfig, run_dir: Path) -> dict[str, list[Example]]:
    """Captions, own ones or those of labels, and images -> {split: examples}."""
    if config.data.captions is not None:
        return split_own_captions(config, run_dir)
    labels = find_labels(config)
    images = find_image_folder(config)
    shares = {"train": config.data.train_share, "val": config.data.val_share}
    held_out: list[Example] = []
    if config.data.held_out == "val":
        from captioner.bdd100k.download import fetch_labels  # here: kagglehub takes a while to import

        held_out = caption_frames(
            config, fetch_labels(config.source.kaggle_dataset, "val"), images, run_dir / "held_out"
        )
        shares = {split: share / sum(shares.values()) for split, share in shares.items()}
    else:
        shares["test"] = 1 - sum(shares.values())
    examples = caption_frames(config, labels, images, run_dir)
    rides = {example.group for example in held_out}
    by_name = {example.name: example for example in examples if example.group not in rides}
    if len(by_name) < len(examples):
        print(f"{len(examples) - len(by_name):,} frames are of rides that are held out, and are left out")
    frames = list(by_name) if held_out else list(by_name)[: config.data.limit]
    names = split_by_ride(frames, shares, config.training.seed)
    splits = {split: [by_name[name] for name in names[split]] for split in names}
    splits.setdefault("test", held_out)
    return limit_splits(splits, config.data.limit)


def caption_frames(config: TrainConfig, labels: Sequence[Path], images: Path, run_dir: Path) -> list[Example]:
    """The examples of labels, by way of a captions file in the run folder."""
    from captioner.data.caption_files import read_captions  # here: who reads a split does without pandas

    index, path = index_images(images), run_dir / "captions.csv"  # before captions are written: a wrong folder is told
    check_replaceable(path, "--run-name")
    caption_labels(config.source, labels, path, run_dir)
    captions = read_captions(path)
    return match_images(captions.assign(group=captions["name"].map(ride_of)), images, index=index)


def read_own_captions(config: TrainConfig, run_dir: Path) -> tuple["pd.DataFrame", Path]:
    """The table of captions that were given, and the folder of their images."""
    from captioner.data.caption_files import read_captions
    from captioner.data.hub_captions import fetch_captions, is_data_set

    path, group_column = config.data.captions, config.data.group_column
    if config.data.images is None and is_data_set(path):
        return fetch_captions(str(path), run_dir, group_column)
    return read_captions(path, group_column), find_image_folder(config)


def split_own_captions(config: TrainConfig, run_dir: Path) -> dict[str, list[Example]]:
    """The examples of a captions file that was given, split as it says or by group."""
    captions, images = read_own_captions(config, run_dir)
    if not config.data.group_column:
        frames = captions["name"].map(is_frame_name)
        captions["group"] = captions["name"].where(~frames, captions["name"].map(ride_of))
        if not frames.all() and not captions["split"].any():
            print("note: each image counts as a group of its own; --group-column names the column that groups them")
    examples = {example.name: example for example in match_images(captions, images, MAX_UNREADABLE)}
    shares = {
        "train": config.data.train_share,
        "val": config.data.val_share,
        "test": 1 - config.data.train_share - config.data.val_share,
    }
    given = captions.drop_duplicates("name").set_index("name")["split"]
    names = {split: [name for name in examples if given[name] == split] for split in shares}
    if not any(names.values()):
        names["train"] = list(examples)
    names |= _fill_splits(names, examples, shares, config.training.seed)
    splits = {split: [examples[name] for name in names[split]] for split in shares}
    return limit_splits(splits, config.data.limit)


def limit_splits(splits: dict[str, list[Example]], limit: int | None) -> dict[str, list[Example]]:
    """The first examples of each split, `limit` in all: in proportion to the splits, and one of each at least."""
    total = sum(map(len, splits.values()))
    if limit is None or limit >= total:
        return splits
    counts = dict.fromkeys(splits, 1)
    while sum(counts.values()) < limit:
        counts[max(splits, key=lambda split: limit * len(splits[split]) / total - counts[split])] += 1
    return {split: examples[: counts[split]] for split, examples in splits.items()}


def _fill_splits(names, examples: Mapping[str, Example], shares, seed: int) -> dict[str, list[str]]:
    """Names for the splits that have none yet, taken from those of the split train, and what is left for that."""
    if not names["train"]:
        raise UserError(f"no image is in the split train: {', '.join(split for split in names if names[split])} alone")
    empty = ["train", *(split for split in names if not names[split])]
    if len(empty) > 1:
        part = {split: shares[split] / sum(shares[split] for split in empty) for split in empty}
        return split_by_group({name: examples[name].group for name in names["train"]}, part, seed)
    return {}


def list_split_images(splits: dict[str, list[Example]]) -> list[Path]:
    """The images of all splits, in their order."""
    return [example.image for examples in splits.values() for example in examples]


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
        print(escape_controls(f"{told} and are left out:\n{reasons}"))
    readable = {
        split: [example for example in examples if example.image not in unreadable]
        for split, examples in splits.items()
    }
    print(", ".join(f"{len(examples):,} {split}" for split, examples in readable.items()) + " images")
    return readable


def find_images_root(splits: Mapping[str, Sequence[Example]]) -> Path:
    """The deepest folder that all images of the splits are below."""
    folders = {example.image.absolute().parent for examples in splits.values() for example in examples}
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


def write_splits(path: Path, splits: Mapping[str, Sequence[Example]]) -> None:
    """Write a row for each caption, with the image's path below find_images_root, which the run's record has."""
    root = find_images_root(splits)
    with atomic_write(path) as file:
        writer = csv.writer(file)
        writer.writerow(SPLIT_COLUMNS)
        for split, examples in splits.items():
            for e in examples:
                image = e.image.absolute().relative_to(root).as_posix()
                writer.writerows((e.name, split, image, caption, e.group) for caption in e.captions)


def read_split(folder: Path, split: str, images_root: Path | None = None) -> list[Example]:
    """The examples of a split that main.py wrote to `folder`; with the images below `images_root`, if given."""
    return place_images(folder, _read_examples(folder / "split.csv", split), images_root)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a split.csv as they are. Raises what csv and the disk raise."""
    with open(path, encoding="utf-8-sig", newline="") as file:  # as Excel saves it
        yield from csv.DictReader(file)


def _read_examples(path: Path, split: str) -> list[Example]:
    """The examples of a split, their images as they are written: below the run's root, or absolute in older files."""
    if not path.is_file():
        raise explain_adapter(path.parent)
    examples: dict[str, Example] = {}
    try:
        for row in read_rows(path):
            if row["split"] != split:
                continue
            example = Example(row["name"], Path(row["image"]), row["raw_caption"], row.get("group") or "")
            _check_example(path, example)
            if first := examples.get(example.name):
                example = first._replace(more=(*first.more, example.caption))
            examples[example.name] = example
    except (OSError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a split with columns {', '.join(SPLIT_COLUMNS)} ({error!r})") from None
    if not examples:
        raise UserError(f"{path}: no frame of the {split} split in it")
    return list(examples.values())


def _check_example(path: Path, example: Example) -> None:
    """Raise UserError unless it names its own image: the folder may be somebody else's, and the report shows images."""
    name, image = (PurePosixPath(normalize("NFC", str(path))) for path in (example.name, example.image.as_posix()))
    both = min(len(image.parts), len(name.parts))  # the root may lie below the first folder of the name
    own = image.parts[-both:] == name.parts[-both:] or image.with_suffix("").name == name.name
    if LEADS_OUT.match(example.name) or ".." in image.parts or not own or image.suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(
            f"{path}: {example.name[:80]!r} with the image {str(example.image)[:200]!r} is no frame's; "
            "the image must have the frame's name: train again with python main.py"
        )


def place_images(folder: Path, examples: list[Example], images_root: Path | None) -> list[Example]:
    """The examples with their images below `images_root`, or where the adapter in `folder` was trained on them."""
    if images_root is not None:
        return move_images(examples, images_root)
    if all(example.image.is_absolute() for example in examples):
        return examples
    root = read_run(folder).get("images_root")
    if not isinstance(root, str):
        raise UserError(
            f"{folder / 'run.json'}: names no images_root; give the folder of the images with --images-root"
        )
    return [example._replace(image=Path(root, example.image)) for example in examples]


def move_images(examples: list[Example], root: Path) -> list[Example]:
    """The examples with their images below `root`, at the same path or by name.

    Those that have none there are left out, counted.
    """
    images = {e.name: root / e.image for e in examples if not e.image.is_absolute() and (root / e.image).is_file()}
    if len(images) < len(examples):
        index = index_images(root, "--images-root")
        images |= locate_images([example.name for example in examples if example.name not in images], root, index)
    moved = [example._replace(image=images[example.name]) for example in examples if example.name in images]
    if not moved:
        raise UserError(f"--images-root {root}: none of the {len(examples):,} images that are wanted is in it")
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


def choose_examples(config: EvalConfig) -> tuple[list[Example], Counter]:
    """A sample of a split, and how many of it are left out by reason.

    The sample is drawn before images are looked for, so that it is the same where some of them are missing.
    """
    rows = _read_examples(config.adapter / "split.csv", config.split)
    sample = sample_examples(rows, config.num_samples, config.generation.seed)
    examples = place_images(config.adapter, sample, config.images_root)
    if config.images_root is not None:
        return examples, +Counter({"images not in --images-root": len(sample) - len(examples)})
    if not any(os.path.exists(example.image) for example in examples):  # False too where it may not be looked
        raise UserError(
            f"{config.adapter / 'split.csv'}: its images are gone, {examples[0].image} for one; give the folder "
            "where they are now with --images-root"
        )
    return examples, Counter()
