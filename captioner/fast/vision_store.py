"""The frozen ViT's outputs: computed once, kept in memory through training and on disk from run to run.

The ViT has neither LoRA nor dropout, so it gives the same for an image each time. main.py keeps the outputs of all
training and validation images in memory and takes the ViT out of the model. With a folder, both scripts also read
from disk what an earlier run has written there, instead of decoding the image and running the ViT.

A file on disk is found by the SHA-256 of its image's bytes, in a folder for each ViT, precision and way to prepare
images. It is used only if its header names both and holds the SHA-256 of what follows; else it is deleted, and the
output computed anew.

Shapes: N images, B of them at once, S image side in pixels (224), P positions of the ViT (257), D its width (1408).
"""

import bisect
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import PIL
import torch
from torch import Tensor
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from captioner.blip2.vision import hash_image, run_vision, start_reading
from captioner.data.reading import read_ahead
from captioner.fast.speed import has_room_to_unpack, record_graph, unpack_nf4
from captioner.runtime.errors import UserError
from captioner.runtime.files import atomic_write, measure_free
from captioner.runtime.machine import pick_store_gib
from captioner.runtime.processes import count_cores

MAGIC = b"blip2vit"
FORM = 1  # of the files, and of the way in which load_pixels() makes numbers of an image: a new one makes all new
HEADER = len(MAGIC) + 3 * 32  # bytes: MAGIC, and the SHA-256 of model and settings, of the image, of the output
VISION_SETTINGS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
WRITERS = 4  # threads that write
PART = 2048  # images whose outputs may be in memory beside those that are kept, until they are written: 1.5 GB
RECORDING_ROOM = 6 * 2**30  # bytes of GPU memory that must be free to record the ViT
SPARE_DISK = 0.1  # share of what is free on the disk that is left free
STALE = 3600  # seconds after which a file that was not written to its end is taken for one of a killed run


class RecordedVision(torch.nn.Module):
    """A ViT on a GPU whose passes of BATCH images are a CUDA graph: it waits for their launches else.

    It is recorded at the first pass. NF4 values are unpacked then, which changes no digit (see speed.unpack_nf4).
    """

    def __init__(self, vision: torch.nn.Module):
        super().__init__()
        self.vision, self.post_layernorm = vision, vision.post_layernorm
        self.recording: tuple | None = None  # graph, where it reads pixels, where it writes outputs

    def forward(self, pixel_values: Tensor, **kwargs) -> BaseModelOutputWithPooling:
        if self.recording is None:
            unpack_nf4(self.vision)
            pixels = pixel_values.clone()  # (BATCH, 3, S, S)
            graph, outputs = record_graph(lambda: self.vision(pixels).last_hidden_state)
            self.recording = graph, pixels, outputs
        graph, pixels, outputs = self.recording
        pixels.copy_(pixel_values)
        graph.replay()
        return BaseModelOutputWithPooling(last_hidden_state=outputs.clone())  # the next pass writes over them


def record_vision(vision: torch.nn.Module) -> torch.nn.Module:
    """The ViT as a RecordedVision if it is on a GPU with memory to spare, else as it is."""
    device = vision.post_layernorm.weight.device
    has_room = has_room_to_unpack(vision, device) and torch.cuda.mem_get_info(device)[0] > RECORDING_ROOM
    return RecordedVision(vision) if has_room else vision


# --------------------------------------------------------------------------------------------------------------
# in memory


def shape_outputs(vision_config) -> tuple[int, int]:
    """(P, D) of an image's output."""
    return (vision_config.image_size // vision_config.patch_size) ** 2 + 1, vision_config.hidden_size


def fits_memory(vision_config, dtype: torch.dtype, images: int, limit_gib: float | None, cuda: bool) -> bool:
    """Whether the outputs of so many images take no more than `limit_gib` GiB of memory; None: see pick_store_gib()."""
    limit_gib = pick_store_gib(limit_gib, cuda)
    return images * math.prod(shape_outputs(vision_config)) * dtype.itemsize <= limit_gib * 2**30


def pick_place(size: int, device: torch.device) -> torch.device:
    """Where outputs of `size` bytes are kept: the GPU if half of it is left free, else the CPU."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return device if free - size > total / 2 else torch.device("cpu")


def compute_outputs(
    vision,
    vision_config,
    processor,
    images: Sequence[Path],
    store: "VisionStore | None",
    kept: int | None = None,
    ahead: Iterator | None = None,
) -> tuple[Tensor, dict[Path, str]]:
    """(the ViT's outputs (N, P, D) of the images that can be read, in order; {path: why} of the others).

    What `store` has is read from there, the rest is computed, and written there by threads, which may take longer.
    `kept`: outputs of the first so many images; those of the others only go into the store. `ahead`: what
    start_reading() gave for the same images, when nothing was stored.
    """
    kept = len(images) if kept is None else kept
    shape, weight, side = shape_outputs(vision_config), vision.post_layernorm.weight, vision_config.image_size
    dtype, place = weight.dtype, pick_place(kept * math.prod(shape) * weight.dtype.itemsize, weight.device)
    outputs = torch.empty(kept, *shape, dtype=dtype, device=place)
    sums: list[str | None] = [None] * len(images)
    missing, unreadable, not_kept = list(range(len(images))), {}, 0
    with tqdm(total=len(images), desc="encoding images", unit="image") as progress:
        if store is not None and ahead is None:
            missing = []
            for row, (sums[row], found) in enumerate(read_ahead(store.look_up, images, at_once=8)):
                if found is None:
                    missing.append(row)
                else:
                    if row < kept:
                        outputs[row].copy_(found, non_blocking=True)
                    progress.update()
        if ahead is None:
            ahead = start_reading([images[row] for row in missing], processor, dtype, side, pin=weight.is_cuda)
        for rows, pixels, reasons, hashes in _sort_out(missing, images, ahead):
            unreadable |= reasons
            for row, sha256 in hashes.items():
                sums[row] = sha256
            if rows:
                computed, count = run_vision(vision, pixels), bisect.bisect_left(rows, kept)
                places = [outputs[row] for row in rows[:count]]
                if count:
                    torch._foreach_copy_(places, list(computed[:count].to(place)))
                if store is not None:
                    rest = computed[count:] if place.type == "cuda" else computed[count:].cpu()  # some 1.5 GB at most
                    store.save([sums[row] for row in rows], [*places, *rest])
                    not_kept += len(rows) - count
                    if not_kept >= PART:
                        store.wait()
                        not_kept = 0
            progress.update(len(rows) + len(reasons))
    if store is not None:
        store.count(len(images) - len(missing), len(images))
    if unreadable:
        if store is not None:
            store.wait()  # before outputs that it writes are moved
        outputs = _leave_out(outputs, [row for row, image in enumerate(images[:kept]) if image not in unreadable])
    return outputs, unreadable


def has_outputs(folder: Path) -> bool:
    """Whether a store's folder has any file of outputs."""
    return next(folder.glob("*/*.bin"), None) is not None


def _sort_out(
    places: Sequence[int], images: Sequence[Path], reading: Iterator
) -> Iterator[tuple[list[int], Tensor, dict[Path, str], dict[int, str]]]:
    """Of images at `places` in `images`, some at a time, as start_reading() gives them:

    (places of those that can be read, their pixels (B, 3, S, S), {path: why} of the others, {place: SHA-256}).
    """
    start = 0
    for pixels, reasons, hashes in reading:
        batch = places[start : start + len(reasons)]
        start += len(batch)
        readable = [place for place, reason in zip(batch, reasons, strict=True) if reason is None]
        unreadable = {images[place]: why for place, why in zip(batch, reasons, strict=True) if why is not None}
        known = {place: sha256 for place, sha256 in zip(batch, hashes, strict=True) if sha256 is not None}
        yield readable, pixels, unreadable, known


def _leave_out(outputs: Tensor, kept: list[int]) -> Tensor:
    """The rows `kept`, which are moved up in place: there may be no room for a second tensor."""
    for place, row in enumerate(kept):
        if place != row:
            outputs[place].copy_(outputs[row])
    return outputs[: len(kept)]


# --------------------------------------------------------------------------------------------------------------
# on disk


def hash_weights(module: torch.nn.Module) -> str:
    """SHA-256 over all weights as they compute: of NF4 layers the packed values with their scales."""
    with ThreadPoolExecutor(count_cores()) as pool:  # copies and sums let other threads run meanwhile
        return hashlib.sha256(b"".join(pool.map(_hash_tensor, sorted(module.state_dict().items())))).hexdigest()


def _hash_tensor(item: tuple[str, Tensor]) -> bytes:
    name, tensor = item
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(_view_bytes(tensor.detach().cpu()))
    return digest.digest()


def _view_bytes(tensor: Tensor):
    """A CPU tensor's bytes, as an array that shares its memory."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def describe_outputs(vision, vision_config, image_processor) -> dict:
    """What an image's output depends on, as JSON types."""
    weight = vision.post_layernorm.weight
    images = {name: value for name, value in image_processor.to_dict().items() if not name.endswith("_type")}
    return {
        "form": FORM,
        "weights": hash_weights(vision),
        "dtype": str(weight.dtype),
        "vision": {name: getattr(vision_config, name) for name in VISION_SETTINGS},
        "images": {name: value for name, value in images.items() if not name.endswith("processor_class")},
    }


def describe_machine(device: torch.device) -> dict:
    """What outputs may depend on in their last digits, which is written down but does not part them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"torch": torch.__version__, "Pillow": PIL.__version__, "device": name, "made": made}


def find_folder(config, device: torch.device) -> Path | None:
    """The folder of the store that --vision-store of main.py's or eval.py's `config` names; None if none is wanted."""
    if config.fast.vision_store == "off" or (config.fast.vision_store == "auto" and device.type != "cuda"):
        return None
    return Path("vision-store" if config.fast.vision_store == "auto" else config.fast.vision_store)


def open_store(config, vision, vision_config, processor, write: bool = True) -> "VisionStore | None":
    """The store that --vision-store of main.py's or eval.py's `config` names; None if none is wanted."""
    weight = vision.post_layernorm.weight
    folder = find_folder(config, weight.device)
    if folder is None:
        return None
    about = describe_outputs(vision, vision_config, processor.image_processor)
    return VisionStore(
        folder,
        about,
        shape_outputs(vision_config),
        weight.dtype,
        weight.device,
        config.fast.vision_store_disk_gib if write else 0,
    )


class VisionStore:
    """Outputs (P, D) of one ViT on disk. `look_up` may be called by many threads at once.

    Writes until the whole folder, with other ViTs' outputs, has `limit_gib` GiB or little is left free on the disk, and
    then says so once; nothing that goes wrong in writing stops a run. 0: only reads.
    """

    def __init__(
        self,
        folder: Path,
        about: dict,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        limit_gib: float,
    ):
        """`about` is what describe_outputs() gives, `device` the one that computes."""
        self.key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()
        self.root, self.folder = folder, folder / self.key.hex()[:32]
        self.shape, self.dtype, self.device = shape, dtype, device
        self.payload = math.prod(shape) * dtype.itemsize  # bytes
        self.known: set[str] = set()  # SHA-256 of the images whose outputs are there, or will be
        self.damaged: list[Path] = []
        self.found = self.asked = 0  # images whose output was there, and all
        self.room = -math.inf  # bytes that may be written; -inf: none, and that has been said
        self.trouble: str | None = None  # of a thread that wrote
        self.pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="vision-store")
        self.writing: list[Future] = []
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if limit_gib:
            try:
                self._prepare(about, limit_gib)
            except (OSError, UserError) as error:
                self._give_up(str(error))

    def _prepare(self, about: dict, limit_gib: float) -> None:
        """Make the folder, remove what killed runs left there, and see what room there is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").exists():
            with atomic_write(self.folder / "settings.json") as file:  # for who looks: it is not read
                json.dump(about | {"machine": describe_machine(self.device)}, file, indent=1)
        used = 0
        for folder in (entry for entry in os.scandir(self.root) if entry.is_dir(follow_symlinks=False)):
            for file in os.scandir(folder):
                about_file = file.stat(follow_symlinks=False)
                if file.name.endswith(".tmp") and time.time() - about_file.st_mtime > STALE:
                    Path(file).unlink(missing_ok=True)
                else:
                    used += about_file.st_size
        free = measure_free(self.folder)
        room = math.inf if free is None else free * (1 - SPARE_DISK)
        self.room = min(limit_gib * 2**30 - used, room)

    def _give_up(self, why: str) -> None:
        """Write no more, and say why."""
        self.room, self.trouble = -math.inf, None
        print(f"{self.root}: outputs of the frozen ViT are kept there no more ({why}); training and captions go on")

    def look_up(self, image: Path) -> tuple[str | None, Tensor | None]:
        """(SHA-256 of the image's bytes, its output (P, D) on the CPU), None for what is not there."""
        sha256 = hash_image(image)
        return sha256, None if sha256 is None else self.load(sha256)

    def has(self, sha256: str | None) -> bool:
        """Whether there is a file for the image of that SHA-256, intact or not."""
        return sha256 is not None and self._name(sha256).is_file()

    def load(self, sha256: str) -> Tensor | None:
        """The output (P, D) for the image of that SHA-256; None if it is not there, or not as it was written."""
        path = self._name(sha256)
        try:
            with open(path, "rb") as file:
                output = torch.empty(self.payload, dtype=torch.uint8)  # not pinned: that takes longer than to copy
                header, count = file.read(HEADER), file.readinto(output.numpy())
                intact = count == self.payload and not file.read(1)
        except OSError:
            return None
        if not intact or header != self._make_header(sha256, output.numpy()):
            self.damaged.append(path)
            with suppress(OSError):  # where nothing can be deleted it stays, and is found damaged again
                path.unlink()
            return None
        self.known.add(sha256)
        return output.view(self.dtype).view(self.shape)

    def save(self, sums: Sequence[str | None], outputs: Sequence[Tensor]) -> None:
        """Write each image's output (P, D), by threads, which read it where it is: it must not change before wait().

        An output on the GPU must have been made on the current stream, one in pinned memory be copied there.
        """
        if self.trouble is not None:
            self._give_up(self.trouble)
        ready = None
        if self.stream is not None:
            ready = torch.cuda.Event(blocking=True)
            ready.record(torch.cuda.current_stream(self.device))
        for sha256, output in zip(sums, outputs, strict=True):
            if sha256 is None or sha256 in self.known or self.room == -math.inf:
                continue
            self.room -= HEADER + self.payload
            if self.room < 0:
                self._give_up("no room is left: see --vision-store-disk-gib, or delete the folder")
                return
            self.known.add(sha256)
            self.writing.append(self.pool.submit(self._write, sha256, output, ready))

    def _write(self, sha256: str, output: Tensor, ready) -> None:
        if self.trouble is not None:
            return
        temporary = self.folder / f".{sha256}.{os.getpid()}.tmp"
        try:
            payload = _view_bytes(self._fetch(output, ready))
            with open(temporary, "wb") as file:
                file.write(self._make_header(sha256, payload))
                file.write(payload)
            os.replace(temporary, self._name(sha256))
        except OSError as error:
            self.trouble = f"{error.filename or temporary}: {error.strerror}"
            temporary.unlink(missing_ok=True)

    def _fetch(self, output: Tensor, ready) -> Tensor:
        """The output on the CPU, once `ready` has come to pass, by a stream that waits for nothing else."""
        if ready is not None:
            ready.synchronize()
        if not output.is_cuda:
            return output
        with torch.cuda.stream(self.stream):
            host = output.to("cpu", non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        copied.synchronize()
        return host

    def _name(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.bin"

    def _make_header(self, sha256: str, payload) -> bytes:
        return MAGIC + self.key + bytes.fromhex(sha256) + hashlib.sha256(payload).digest()

    def count(self, found: int, asked: int) -> None:
        """So many images were asked for, and of so many the output was there."""
        self.found, self.asked = self.found + found, self.asked + asked

    def describe(self) -> str:
        damaged = f"; {len(self.damaged):,} were damaged, and are computed anew" if self.damaged else ""
        return f"{self.root} had the frozen ViT's outputs of {self.found:,} of {self.asked:,} images{damaged}"

    def wait(self) -> None:
        """Until all that was to be saved is written."""
        wait(self.writing)
        self.writing.clear()

    def close(self, finish: bool = True) -> None:
        """Write what is to be saved; without `finish`, only what has been begun."""
        self.pool.shutdown(wait=True, cancel_futures=not finish)
        if self.trouble is not None:
            self._give_up(self.trouble)
