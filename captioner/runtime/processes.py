"""Several processes of one run: which one this is, what all of them have, how many cores each may use.

place, processes = find_place()
parts = gather(work)             # what work() returns in each
settings = ask_main(read)        # what read() returns in the main process
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from captioner.runtime.errors import UserError

NICE = 10  # of processes that read
WAITING = 6 * 3600  # seconds that processes wait for the first, which may have a data set to fetch

T = TypeVar("T")


def step_back(worker: int = 0) -> None:
    """In a process that reads: Ctrl-C is for the main process to answer, which comes first where cores are few."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(AttributeError, OSError):  # not on Windows
        os.nice(NICE)


def count_cores() -> int:
    """Cores for this process: its share, where a launcher has started several on this machine."""
    return max(1, _count_cores() // count_processes())


def count_processes() -> int:
    """That a launcher has started on this machine, and that read at the same time."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _count_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Windows and macOS
        return os.cpu_count() or 1


def is_sharded() -> bool:
    """Whether accelerate launch was told to spread the weights over the GPUs (see fsdp.yaml)."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return wanted and int(os.environ.get("WORLD_SIZE", 1)) > 1


def find_place() -> tuple[int, int]:
    """(index of this process, how many there are) under accelerate launch or torchrun; (0, 1) without a launcher.

    The first call joins the others: by NCCL on GPUs, else by gloo.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=WAITING))
    return state.process_index, state.num_processes


def gather(work: Callable[..., T], *args) -> list[T]:
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


def ask_main(work: Callable[..., T], *args) -> T:
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
