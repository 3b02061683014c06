"""The most that is taken while a block runs: memory by the processes that it starts, or disk by a folder.

with Peak(measure_processes) as memory, Peak(lambda: measure_folder(folder)) as disk: ...
memory.most, disk.most       # bytes
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

PAUSE = 0.5  # seconds between two looks
SOURCES = (  # of a process's own memory in /proc, the page cache left out; the first that the system has
    ("smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")),  # what processes share counts once
    ("status", ("RssAnon:", "RssShmem:")),
    ("status", ("VmRSS:",)),
)


class Peak:
    """The most that measure() returns while the block runs, looked at twice a second by a thread."""

    def __init__(self, measure: Callable[[], int]):
        self.measure, self.most = measure, 0
        self.end = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        while True:
            self.most = max(self.most, self.measure())
            if self.end.wait(PAUSE):
                return

    def __enter__(self) -> "Peak":
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.end.set()
        self.thread.join()


def measure_processes() -> int:
    """Bytes that all processes below this one have in memory."""
    return sum(measure_process(process.pid) for process in psutil.Process().children(recursive=True))


def measure_process(pid: int) -> int:
    for file, fields in SOURCES:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
            if found := [int(line.split()[1]) * 1024 for line in lines if line.startswith(fields)]:
                return sum(found)
    return 0


def measure_folder(folder: Path) -> int:
    """Bytes of disk that the files below a folder take."""
    total = 0
    for parent, _, names in os.walk(folder):  # which passes over folders that have just been removed
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_blocks * 512
    return total
