"""The frozen ViT's outputs: computed once, kept in one file, read from it in training and by eval.py.

The ViT has neither LoRA nor dropout, so it gives the same for an image each time. A folder has one file,
vit-KEY.features, of the outputs of one ViT. KEY begins the SHA-256 of what they depend on: the ViT's weights and
settings, and how images are prepared. The file has a record for each image, whose sums are hexadecimal digits:

    image    SHA-256 of the image's file; zeros in a record that is not used
    sum      SHA-256 of the whole key, `image` and `row`
    row      the output (P, D) in the ViT's precision

The file is mapped into memory, so that the system keeps of it what there is room for. A row is written before its sums:
a killed run goes on with the rows that it wrote. A row whose sum is wrong is computed anew; with another ViT, all in a
new file. The old one is removed, but not written over, as another run may read it.

Shapes: N records, B images at once, P positions of the ViT (257), D its width (1408).
"""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from captioner.blip2.pixels import start_reading
from captioner.blip2.vit import run_vision
from captioner.data.parallel import read_ahead
from captioner.runtime.errors import get_or_none
from captioner.runtime.files import explain_writing, find_existing, hash_file, lock_folder, measure_free
from captioner.runtime.processes import ask_main, count_processes, find_place, gather

FILES = "vit-*.features"
SUM = 64  # digits of a SHA-256
WRITERS = 4  # threads
FORM = 3  # of the file, and of the way in which load_pixels() makes numbers of an image: a new one makes all new
VISION_SETTINGS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
REMEDY = "free some space, name another folder with --features, or do without: --features off"


# --------------------------------------------------------------------------------------------------------------
# where


def list_folders(setting: Literal["auto", "off"] | Path, output: Path, device: torch.device) -> list[Path]:
    """Where the features of a run into the folder `output` may be; with `auto` on a GPU alone, in one of two places."""
    if setting != "auto" or device.type != "cuda":
        return [] if setting in ("auto", "off") else [Path(setting)]
    output = output.resolve()
    mark = hashlib.sha256(os.fsencode(output)).hexdigest()[:8]
    return [Path(f"{output}-features"), Path(tempfile.gettempdir(), f"{output.name}-{mark}-features")]


def find_folder(setting: Literal["auto", "off"] | Path, output: Path, device: torch.device) -> Path | None:
    """The folder where an earlier run has kept features."""
    return next(filter(has_rows, list_folders(setting, output, device)), None)


def has_rows(folder: Path) -> bool:
    """Whether an earlier run has kept features there: an empty file is of one that had no room."""
    return any(file.stat().st_size for file in folder.glob(FILES))


def choose_place(config, need: int, device: torch.device) -> Path | None:
    """The folder where main.py is to keep `need` bytes of features; None, and a line that says why, if nowhere."""
    setting, gib = config.fast.features, config.fast.features_disk_gib
    limits = {folder: measure_limit(folder, gib) for folder in list_folders(setting, config.run.output, device)}
    best = max(limits, key=lambda folder: (has_rows(folder), limits[folder]), default=None)
    if best is None:
        reason = "--features off" if setting == "off" else "--features auto keeps them where there is a GPU"
    elif count_processes() < find_place()[1]:
        reason = "the processes run on several machines"
    elif need > limits[best]:
        reason = f"{best} may take {limits[best] / 1e9:.1f} GB (--features-disk-gib), they take {need / 1e9:.1f}"
    else:
        return best
    print(f"the frozen ViT's outputs are not kept, but computed in each pass ({reason})")
    return None


def measure_limit(folder: Path, limit_gib: float | None) -> float:
    """Bytes that features may take in the folder; by default half of what is free. What they take already is theirs."""
    free = (measure_free(find_existing(folder)) or 0) + sum(file.stat().st_size for file in folder.glob(FILES))
    return free / 2 if limit_gib is None else min(free, limit_gib * 2**30)


def measure_row(vision_config, dtype: torch.dtype) -> int:
    """Bytes of an image's output (P, D)."""
    positions = (vision_config.image_size // vision_config.patch_size) ** 2 + 1
    return positions * vision_config.hidden_size * dtype.itemsize


# --------------------------------------------------------------------------------------------------------------
# the file


class FeatureFile:
    """The outputs of a ViT in a folder."""

    def __init__(self, folder: Path, vision, vision_config, processor):
        self.folder, self.vision, self.processor = folder, vision, processor
        self.side, self.width = vision_config.image_size, vision_config.hidden_size
        self.dtype = vision.post_layernorm.weight.dtype
        row_bytes = measure_row(vision_config, self.dtype)
        self.record = np.dtype([("image", f"S{SUM}"), ("sum", f"S{SUM}"), ("row", np.uint8, row_bytes)])
        about = json.dumps(describe_outputs(vision, vision_config, processor.image_processor), sort_keys=True)
        self.key = hashlib.sha256(about.encode()).hexdigest()
        self.path = folder / FILES.replace("*", self.key[:16])

    def read(self, images: Sequence[Path]) -> dict[Path, Tensor]:
        """{image: its output (P, D)} of the images that have an intact one. All of each is read."""
        records = self.map_records()
        outputs, found = self.view_rows(records), self.look_up(images, records)[0]
        return {image: outputs[number] for image, number in found.items()}

    def map_records(self) -> np.ndarray:
        """The N records of the file: of each, what is used is read from the disk.

        Linux stops to read ahead in a map where places far from each other are looked at, as those of sums are; rows
        are to be read ahead, in another.
        """
        count = self.path.stat().st_size // self.record.itemsize if self.path.is_file() else 0
        return np.memmap(self.path, self.record, "r", shape=count) if count else np.empty(0, self.record)

    def view_rows(self, records: np.ndarray) -> Tensor:
        """Their rows (N, P, D), in the same memory."""
        with warnings.catch_warnings(action="ignore"):  # torch warns of what can't be written
            return torch.from_numpy(records["row"]).view(self.dtype).unflatten(1, (-1, self.width))

    def look_up(self, images: Sequence[Path], records: np.ndarray) -> tuple[dict[Path, int], set[int], set[int]]:
        """({image: number of its record} of images that have an intact one, numbers of damaged ones, of others in use).

        All images are read, and the records that they have.
        """
        there = self.map_records()["image"][: len(records)]  # of a map of its own: see map_records()
        used = {number: each for number, each in enumerate(there.tolist()) if each}
        numbers = {image_sum: number for number, image_sum in used.items()}
        sums = dict(zip(images, read_ahead(hash_image, images, at_once=8), strict=True)) if used else {}
        wanted = sorted({numbers[image_sum] for image_sum in sums.values() if image_sum in numbers})
        found = read_ahead(lambda number: self.sum_row(used[number], records["row"][number]), wanted, at_once=8)
        damaged = {number for number, row_sum in zip(wanted, found, strict=True) if row_sum != records["sum"][number]}
        kept = used.keys() - damaged
        return {image: numbers[each] for image, each in sums.items() if numbers.get(each) in kept}, damaged, kept

    def sum_row(self, image_sum: bytes, row: np.ndarray) -> bytes:
        """SHA-256 over what the row depends on, and the row."""
        digest = hashlib.sha256(self.key.encode() + image_sum)
        digest.update(row)
        return digest.hexdigest().encode()

    def prepare(self, images: Sequence[Path], limit_gib: float | None) -> tuple[dict[Path, int], list[Path], int]:
        """({image: number of its record}, the images whose rows are to be written, how many rows are damaged).

        The disk space is taken, of which there must be enough. Rows of other images stay unless the file takes more
        than it may with them.
        """
        records = self.map_records()
        found, damaged, kept = self.look_up(images, records)
        missing = [image for image in dict.fromkeys(images) if image not in found]
        count = max(len(records), len(kept) + len(missing))
        with explain_writing(self.folder, REMEDY):
            for other in {*self.folder.glob(FILES)} - {self.path}:
                other.unlink()
            if count > len(images) and count * self.record.itemsize > measure_limit(self.folder, limit_gib):
                self.path.unlink()
                return self.prepare(images, limit_gib)
            with open(self.path, "ab") as file:
                before = file.tell()
                try:
                    if hasattr(os, "posix_fallocate"):  # else the disk may turn out to be full later
                        os.posix_fallocate(file.fileno(), 0, count * self.record.itemsize)
                    file.truncate(count * self.record.itemsize)
                except OSError:
                    file.truncate(before)  # ext4, for one, has given all that it had
                    raise
        free = (number for number in range(count) if number not in kept)
        return found | dict(zip(missing, free, strict=False)), missing, len(damaged)

    def write(self, numbers: dict[Path, int], reading: Iterator) -> dict[Path, str]:
        """Compute the rows of {image: number of its record} and write them. `reading`: pixels, as of start_reading().

        Returns {path: why} of the images that can't be read, which get no row.
        """
        unreadable, waiting, written = {}, iter(numbers.items()), ()
        progress = tqdm(total=len(numbers), desc="encoding images", unit="image", disable=find_place()[0] > 0)
        with explain_writing(self.folder, REMEDY), ThreadPoolExecutor(WRITERS) as pool, progress:
            for pixels, reasons in reading:
                batch = list(zip(reasons, waiting, strict=False))
                unreadable |= {image: reason for reason, (image, _) in batch if reason is not None}
                readable = [place for reason, place in batch if reason is None]
                outputs, wait = copy_to_cpu(run_vision(self.vision, pixels)) if readable else ((), lambda: None)
                list(written)  # the batch before, while a GPU computes this one
                parts = [(readable[first::WRITERS], outputs[first::WRITERS], wait) for first in range(WRITERS)]
                written = pool.map(self.write_rows, *zip(*parts, strict=True))
                progress.update(len(reasons))
            list(written)
        return unreadable

    def write_rows(self, places: Sequence[tuple[Path, int]], outputs: Sequence[Tensor], wait: Callable) -> None:
        """Write the outputs (P, D) of images, which are there after wait(), to the records of those numbers."""
        wait()
        with open(self.path, "r+b") as file:
            for (image, number), output in zip(places, outputs, strict=True):
                row = view_bytes(output)
                file.seek(number * self.record.itemsize + 2 * SUM)
                file.write(row)
                image_sum = hash_image(image)
                file.seek(number * self.record.itemsize)  # after all of the row has left the buffer
                file.write(image_sum + self.sum_row(image_sum, row))


def keep_features(
    file: FeatureFile, limit_gib: float | None, images: Sequence[Path], reading: Iterator | None = None
) -> tuple[dict[Path, Tensor], dict[Path, str]]:
    """({image: the ViT's output (P, D)} of the images that can be read, {path: why} of the others), in all processes.

    What the file has is read from there; of the rest each process computes a share. `reading`: the pixels of this
    process's share of all images, if start_reading() was called before; it is of use when the file has none of them.
    """
    place, processes = find_place()
    with ExitStack() as lock:
        gather(lock.enter_context, lock_folder(file.folder, "--features"))
        numbers, missing, damaged = ask_main(file.prepare, images, limit_gib)
        outputs = file.view_rows(file.map_records())  # now: without the lock, another run may replace the file
        share = missing[place::processes]
        if reading is None or len(missing) < len(images):
            reading = start_reading(share, file.processor, file.dtype, file.side)
        parts = gather(file.write, {image: numbers[image] for image in share}, reading)
    unreadable = {image: reason for part in parts for image, reason in part.items()}
    had, note = len(images) - len(missing), f", and {damaged:,} damaged ones computed anew" if damaged else ""
    print(f"the frozen ViT's outputs are kept: {file.folder} had {had:,} of {len(images):,}{note}")
    return {image: outputs[numbers[image]] for image in images if image not in unreadable}, unreadable


def copy_to_cpu(outputs: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the CPU, and a function that waits until it is there: a GPU may have more to do meanwhile."""
    copy = outputs.to("cpu", non_blocking=True)
    if not outputs.is_cuda:
        return copy, lambda: None
    event = torch.cuda.current_stream(outputs.device).record_event(torch.cuda.Event(blocking=True))
    return copy, event.synchronize


# --------------------------------------------------------------------------------------------------------------
# what it is known by


def describe_outputs(vision, vision_config, image_processor) -> dict:
    """What an image's output depends on, as JSON types."""
    images, others = image_processor.to_dict(), ("_type", "processor_class")
    return {
        "form": FORM,
        "weights": hash_weights(vision),
        "vision": {name: getattr(vision_config, name) for name in VISION_SETTINGS},
        "images": {name: value for name, value in images.items() if not name.endswith(others)},
    }


def hash_weights(module: torch.nn.Module) -> str:
    """SHA-256 over the sums of all weights as they compute: of NF4 layers the packed values with their scales."""

    def hash_weight(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(view_bytes(tensor.cpu()))
        return digest.digest()

    return hashlib.sha256(b"".join(read_ahead(hash_weight, sorted(module.state_dict().items())))).hexdigest()


def view_bytes(tensor: Tensor) -> np.ndarray:
    """A CPU tensor's bytes, as an array that shares its memory."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def hash_image(image: Path) -> bytes:
    """SHA-256 of the file's bytes, in hexadecimal; empty if it can't be read: who decodes it says why."""
    return (get_or_none(hash_file, image) or "").encode()
