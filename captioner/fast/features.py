"""The frozen ViT's outputs: computed once, kept in one file, read from it in training and by eval.py.

The ViT has neither LoRA nor dropout, so it gives the same for an image each time. A folder has the outputs of one ViT:

    about.json      what they depend on: the ViT's weights and settings, and how images are prepared
    features.bin    rows (P, D) in the ViT's precision, one for each image
    index.bin       a record for each row: SHA-256 of the image's file, and SHA-256 of about.json, that and the row

The file is mapped into memory, so that the system keeps of it what there is room for. A record is written after its
row: a killed run goes on with the rows that it wrote. A row whose sum is wrong is computed anew; with another ViT, all.

Shapes: N rows, B images at once, P positions of the ViT (257), D its width (1408).
"""

import hashlib
import itertools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captioner.blip2.pixels import start_reading
from captioner.blip2.vit import run_vision
from captioner.data.parallel import read_ahead
from captioner.runtime.files import atomic_write, explain_writing, find_existing, lock_folder, measure_free
from captioner.runtime.processes import ask_main, count_cores, count_processes, find_place, gather

ABOUT, ROWS, INDEX = "about.json", "features.bin", "index.bin"
RECORD = 64  # bytes
WRITERS = 4  # threads
FORM = 2  # of the files, and of the way in which load_pixels() makes numbers of an image: a new one makes all new
VISION_SETTINGS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
REMEDY = "free some space, name another folder with --features, or do without: --features off"


class Place(NamedTuple):
    """Where features may be kept, and how many bytes they may take there."""

    folder: Path
    limit: float


class Row(NamedTuple):
    """An image's row: its number, None if there is none, and whether it is as it was written."""

    number: int | None
    intact: bool


# --------------------------------------------------------------------------------------------------------------
# where


def list_folders(setting: Literal["auto", "off"] | Path, output: Path, device: torch.device) -> list[Path]:
    """Where the features of a run into the folder `output` may be; with `auto` on a GPU alone, in one of two places."""
    if setting == "off" or (setting == "auto" and device.type != "cuda"):
        return []
    if setting != "auto":
        return [Path(setting)]
    output = output.resolve()
    mark = hashlib.sha256(os.fsencode(output)).hexdigest()[:8]
    return [Path(f"{output}-features"), Path(tempfile.gettempdir(), f"{output.name}-{mark}-features")]


def find_folder(setting: Literal["auto", "off"] | Path, output: Path, device: torch.device) -> Path | None:
    """The folder where an earlier run has kept features."""
    return next(filter(has_rows, list_folders(setting, output, device)), None)


def has_rows(folder: Path) -> bool:
    """Whether an earlier run has kept features there."""
    return (folder / INDEX).exists()


def choose_place(config, need: int, device: torch.device) -> Place | None:
    """Where main.py is to keep `need` bytes of features; None, and a line that says why, if nowhere."""
    fast = config.fast
    folders = list_folders(fast.features, config.run.output, device)
    places = [measure_place(folder, fast.features_disk_gib) for folder in folders]
    place = max(places, key=lambda place: (has_rows(place.folder), place.limit), default=None)
    if place is None:
        reason = "--features off" if fast.features == "off" else "--features auto keeps them where there is a GPU"
    elif count_processes() < find_place()[1]:
        reason = "the processes run on several machines"
    elif need > place.limit:
        reason = f"{place.folder} may take {place.limit / 1e9:.1f} GB (--features-disk-gib), they take {need / 1e9:.1f}"
    else:
        return place
    print(f"the frozen ViT's outputs are not kept, but computed in each pass ({reason})")
    return None


def measure_place(folder: Path, limit_gib: float | None) -> Place:
    """None stands for half of what is free there. What features take there already is theirs to use."""
    parent = find_existing(folder)
    rows = folder / ROWS
    free = (measure_free(parent) or 0) + (rows.stat().st_size if rows.exists() else 0)
    return Place(folder, free / 2 if limit_gib is None else min(free, limit_gib * 2**30))


def shape_outputs(vision_config) -> tuple[int, int]:
    """(P, D) of an image's output."""
    return (vision_config.image_size // vision_config.patch_size) ** 2 + 1, vision_config.hidden_size


def measure_row(vision_config, dtype: torch.dtype) -> int:
    """Bytes of an image's output."""
    return math.prod(shape_outputs(vision_config)) * dtype.itemsize


# --------------------------------------------------------------------------------------------------------------
# the file


class FeatureFile:
    """The outputs of a ViT in a folder."""

    def __init__(self, folder: Path, vision, vision_config, processor):
        self.folder, self.vision, self.processor = folder, vision, processor
        self.side, self.shape = vision_config.image_size, shape_outputs(vision_config)
        self.dtype = vision.post_layernorm.weight.dtype
        self.row_bytes = measure_row(vision_config, self.dtype)
        self.about = json.dumps(
            describe_outputs(vision, vision_config, processor.image_processor), indent=1, sort_keys=True
        )
        self.key = hashlib.sha256(self.about.encode()).digest()

    def read(self, images: Sequence[Path]) -> dict[Path, Tensor]:
        """{image: its output (P, D)} of the images that have an intact one. All of each is read."""
        outputs = self.map_rows()
        found = self.look_up(images)
        return {image: outputs[row.number] for image, row in zip(images, found, strict=True) if row.intact}

    def look_up(self, images: Sequence[Path]) -> list[Row]:
        """Each image's row. All images are read, and the rows that they have."""
        written, outputs = self.read_index(), self.map_rows()

        def check(image: Path) -> Row:
            image_sum = hash_image(image)
            number, expected = written.get(image_sum, (None, b""))
            there = number is not None and number < len(outputs)
            return Row(number, there and self.sum_row(image_sum, outputs[number]) == expected)

        return list(read_ahead(check, images, at_once=8)) if written else [Row(None, False)] * len(images)

    def read_index(self) -> dict[bytes, tuple[int, bytes]]:
        """{SHA-256 of an image's file: (number of its row, the row's sum)} of the rows that were written."""
        try:
            if (self.folder / ABOUT).read_bytes() != self.about.encode():
                return {}
            index = (self.folder / INDEX).read_bytes()
        except OSError:
            return {}
        records = [index[start : start + RECORD] for start in range(0, len(index), RECORD)]
        return {record[:32]: (number, record[32:]) for number, record in enumerate(records) if any(record)}

    def map_rows(self) -> Tensor:
        """(N, P, D) of the whole file: a row is read from the disk when it is used."""
        path = self.folder / ROWS
        count = path.stat().st_size // self.row_bytes if path.is_file() else 0
        if not count:
            return torch.empty(0, *self.shape, dtype=self.dtype)
        content = np.memmap(path, np.uint8, "r", shape=count * self.row_bytes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what can't be written
            return torch.from_numpy(content).view(self.dtype).view(count, *self.shape)

    def sum_row(self, image_sum: bytes, output: Tensor) -> bytes:
        """SHA-256 over what the row depends on, and the row."""
        digest = hashlib.sha256(self.key + image_sum)
        digest.update(view_bytes(output))
        return digest.digest()

    def prepare(self, images: Sequence[Path], limit: float) -> tuple[list[Row], int]:
        """Each image's row, of which those that are not intact are to be written; and how many are damaged.

        The disk space is taken, of which there must be enough. Rows of other images stay unless these pass the `limit`
        in bytes with them.
        """
        found, used = self.look_up(images), {number for number, _ in self.read_index().values()}
        damaged = {row.number for row in found if row.number is not None and not row.intact}
        intact = used - damaged
        free = (number for number in itertools.count() if number not in intact)
        rows = [row if row.intact else row._replace(number=next(free)) for row in found]
        count = 1 + max([*used, *(row.number for row in rows)], default=-1)
        with explain_writing(self.folder, REMEDY):
            if count > len(images) and count * self.row_bytes > limit:
                self.remove()
                return self.prepare(images, limit)
            if not used:
                self.remove()  # not written over: another run may read it
            with atomic_write(self.folder / ABOUT) as file:
                file.write(self.about)
            with open(self.folder / ROWS, "ab") as file:
                reserve(file, count * self.row_bytes)
            with open(self.folder / INDEX, "ab") as file:
                file.truncate(count * RECORD)
        return rows, len(damaged)

    def remove(self) -> None:
        for name in (INDEX, ROWS, ABOUT):
            (self.folder / name).unlink(missing_ok=True)

    def write(self, images: Sequence[Path], numbers: Sequence[int], reading: Iterator) -> dict[Path, str]:
        """Compute and write the images' rows of those numbers. `reading` gives pixels, as start_reading does.

        Returns {path: why} of the images that can't be read, which get no row.
        """
        unreadable, waiting, written, is_main = {}, zip(images, numbers, strict=True), [], find_place()[0] == 0
        with (
            explain_writing(self.folder, REMEDY),
            ThreadPoolExecutor(WRITERS) as pool,
            tqdm(total=len(images), desc="encoding images", unit="image", disable=not is_main) as progress,
        ):
            for pixels, reasons in reading:
                batch = list(zip(reasons, waiting, strict=False))
                unreadable |= {image: reason for reason, (image, _) in batch if reason is not None}
                readable = [place for reason, place in batch if reason is None]
                outputs, wait = copy_to_cpu(run_vision(self.vision, pixels)) if readable else ((), lambda: None)
                for future in written:  # the batch before, while a GPU computes this one
                    future.result()
                parts = [(readable[first::WRITERS], outputs[first::WRITERS]) for first in range(WRITERS)]
                written = [pool.submit(self.write_rows, *part, wait) for part in parts]
                progress.update(len(reasons))
            for future in written:
                future.result()
        return unreadable

    def write_rows(self, places: Sequence[tuple[Path, int]], outputs: Iterable[Tensor], wait: Callable) -> None:
        """Write the outputs (P, D) of images, which are there after wait(), to the rows of those numbers."""
        wait()
        with (
            open(self.folder / ROWS, "r+b", buffering=0) as file,
            open(self.folder / INDEX, "r+b", buffering=0) as index,
        ):
            for (image, number), output in zip(places, outputs, strict=True):
                file.seek(number * self.row_bytes)
                file.write(view_bytes(output))
                image_sum = hash_image(image)
                index.seek(number * RECORD)
                index.write(image_sum + self.sum_row(image_sum, output))


def keep_features(
    file: FeatureFile, limit: float, images: Sequence[Path], reading: Iterator | None = None
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """({image: the ViT's output (P, D)} of the images that can be read, {path: why} of the others), in all processes.

    What the file has is read from there; of the rest each process computes a share. `reading`: the pixels of this
    process's share of all images, if start_reading() was called before; it is of use when the file has none of them.
    """
    place, processes = find_place()
    with ExitStack() as lock:
        gather(lock.enter_context, lock_folder(file.folder, "--features"))
        rows, damaged = ask_main(file.prepare, images, limit)
        missing = [(image, row) for image, row in zip(images, rows, strict=True) if not row.intact]
        share = missing[place::processes]
        wanted = [image for image, _ in share]
        if reading is None or len(missing) < len(images):
            reading = start_reading(wanted, file.processor, file.dtype, file.side)
        unreadable: dict[Path, str] = {}
        for reasons in gather(file.write, wanted, [row.number for _, row in share], reading):
            unreadable |= reasons
    note = f", and {damaged:,} damaged ones computed anew" if damaged else ""
    print(
        f"the frozen ViT's outputs are kept: {file.folder} had {len(images) - len(missing):,} of {len(images):,}{note}"
    )
    outputs = file.map_rows()
    return {i: outputs[row.number] for i, row in zip(images, rows, strict=True) if i not in unreadable}, unreadable


def copy_to_cpu(outputs: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the CPU, and a function that waits until it is there: a GPU may have more to do meanwhile."""
    copy = outputs.to("cpu", non_blocking=True)
    if not outputs.is_cuda:
        return copy, lambda: None
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(outputs.device))
    return copy, event.synchronize


def reserve(file, size: int) -> None:
    """Make a file of at least `size` bytes, whose space on the disk is taken. Raises OSError if there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif os.fstat(file.fileno()).st_size < size:
        file.truncate(size)


# --------------------------------------------------------------------------------------------------------------
# what it is known by


def describe_outputs(vision, vision_config, image_processor) -> dict:
    """What an image's output depends on, as JSON types."""
    images = {name: value for name, value in image_processor.to_dict().items() if not name.endswith("_type")}
    return {
        "form": FORM,
        "weights": hash_weights(vision),
        "dtype": str(vision.post_layernorm.weight.dtype),
        "vision": {name: getattr(vision_config, name) for name in VISION_SETTINGS},
        "images": {name: value for name, value in images.items() if not name.endswith("processor_class")},
    }


def hash_weights(module: torch.nn.Module) -> str:
    """SHA-256 over all weights as they compute: of NF4 layers the packed values with their scales."""
    with ThreadPoolExecutor(count_cores()) as pool:  # copies and sums let other threads run meanwhile
        return hashlib.sha256(b"".join(pool.map(_hash_tensor, sorted(module.state_dict().items())))).hexdigest()


def _hash_tensor(item: tuple[str, Tensor]) -> bytes:
    name, tensor = item
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(view_bytes(tensor.detach().cpu()))
    return digest.digest()


def view_bytes(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's bytes, as an array that shares its memory."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def hash_image(image: Path) -> bytes:
    """SHA-256 of the file's bytes; empty if it can't be read: who decodes it says why."""
    try:
        return hashlib.sha256(image.read_bytes()).digest()
    except OSError:
        return b""
