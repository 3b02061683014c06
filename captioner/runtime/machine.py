"""What this machine has, and what follows from it.

print(describe_machine(Path("blip2-finetuned"), pick_workers(4, batch=64)))
"""

from pathlib import Path

import psutil

from captioner.runtime.containers import measure_room
from captioner.runtime.files import find_existing, measure_free
from captioner.runtime.processes import count_cores, count_processes

SHARED_MEMORY = Path("/dev/shm")  # where decoded images wait to be asked for
IMAGE_BYTES = 2**22  # of it for an image of a batch, two of which wait: 364 pixels a side, in fp32, and some room


def measure_memory() -> int:
    """Bytes of memory that are free to this process: on the machine, and within its container's limit."""
    return int(min(psutil.virtual_memory().available, measure_room()))


def pick_workers(wanted: int, batch: int) -> int:
    """Processes that decode `batch` images at a time: as wanted, but no more than cores or than shared memory holds.

    Where it has none, torch would wait for ever for what a process could not hand over.
    """
    free = measure_free(SHARED_MEMORY)
    room = wanted if free is None else free // count_processes() // (batch * IMAGE_BYTES)
    return min(wanted, count_cores(), room)


def describe_machine(output: Path, workers: int) -> str:
    """One line: cores, free memory and free disk of the output folder, and how many processes decode images."""
    folder = find_existing(output.absolute())
    disk = measure_free(folder)
    told = "unknown disk" if disk is None else f"{disk / 2**30:.1f} GiB of disk free in {folder}"
    cores = count_cores()
    decode = {0: "the main process decodes", 1: "1 process decodes"}.get(workers, f"{workers} processes decode")
    return (
        f"{cores} core{'s' * (cores > 1)}, {measure_memory() / 2**30:.1f} GiB of memory free, {told}: {decode} images"
    )
