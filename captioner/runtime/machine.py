"""What this machine has, and what follows from it.

print(describe_machine(Path("blip2-finetuned"), workers=4))
"""

from contextlib import suppress
from pathlib import Path

import psutil

from captioner.runtime.files import find_existing, measure_free
from captioner.runtime.processes import count_cores

CONTAINER = Path("/sys/fs/cgroup")  # limits of this container, where there are any (Linux, cgroup v2)


def measure_memory() -> int:
    """Bytes of memory that are free to this process: on the machine, and within its container's limit."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (int((CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts.get("inactive_file", 0)))  # the kernel gives those pages back
    return max(0, free)


def pick_workers(wanted: int) -> int:
    """Processes that decode images: as wanted, but no more than cores."""
    return min(wanted, count_cores())


def describe_machine(output: Path, workers: int) -> str:
    """One line: cores, free memory and free disk of the output folder, and what a run does with them."""
    folder = find_existing(output.absolute())
    disk = measure_free(folder)
    told = "unknown disk" if disk is None else f"{disk / 2**30:.1f} GiB of disk free in {folder}"
    return (
        f"{count_cores()} cores, {measure_memory() / 2**30:.1f} GiB of memory free, {told}: "
        f"{pick_workers(workers)} processes decode images"
    )
