"""Several processes of one run: which one this is, what all of them have, how many cores each may use.

place, processes = find_place()
parts = gather(work)             # what work() returns in each
settings = ask_main(read)        # what read() returns in the main process
with share_folder(folder) as here: ...   # the main process's folder, wherever this one runs
"""

import hashlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from operator import methodcaller
from pathlib import Path
from typing import TypeVar

from captioner.runtime.containers import limit_cores
from captioner.runtime.errors import UserError

NICE = 10  # of processes that read
WAITING = 6 * 3600  # seconds that processes wait for the first, which may have a data set to fetch
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")  # variables of a launcher, for each process
OTHER_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # of launchers whose ranks are not read
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # and where they meet

T = TypeVar("T")


def step_back(worker: int = 0) -> None:
    """Called in a process that reads: it leaves Ctrl-C, and the cores where they are few, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(AttributeError, OSError):  # not on Windows
        os.nice(NICE)


def check_launcher() -> None:
    """See that the variables of a launcher are all there, or none: some images and clusters leave a few of them set.

    A process that is alone works alone, and its stray variables are dropped. Raises UserError where others are meant to
    be there and can't be found.
    """
    given = {name: os.environ[name] for name in (*PLACE, *MEETING) if os.environ.get(name)}
    for name in PLACE:
        if not given.get(name, "0").removeprefix("-").isdecimal():
            raise UserError(f"{name}={given[name]}: must be a number; unset it, or use accelerate launch")
    if int(given.get("WORLD_SIZE", 1)) > 1:
        if missing := [name for name in ("RANK", "LOCAL_RANK", *MEETING) if name not in given]:
            raise UserError(
                f"WORLD_SIZE={given['WORLD_SIZE']} is set, but not {', '.join(missing)}, as a launcher does: unset it, "
                "or use accelerate launch"
            )
        if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
            raise UserError(
                f"RANK={given['RANK']} WORLD_SIZE={given['WORLD_SIZE']}: a rank is less than their number; unset both, "
                "or use accelerate launch"
            )
        return
    for name in OTHER_SIZES:
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise UserError(f"{name}={os.environ[name]}: of mpirun or srun; unset it, or use accelerate launch")
    for name in PLACE:
        os.environ.pop(name, None)


def pick_start() -> str:
    """How processes are to be started: by fork, but not once a GPU is in use, since its driver survives no fork."""
    torch = sys.modules.get("torch")
    uses_gpu = torch is not None and torch.cuda.is_initialized()
    return "fork" if "fork" in multiprocessing.get_all_start_methods() and not uses_gpu else "spawn"


@contextmanager
def leave_out_script() -> Iterator[None]:
    """Processes that are spawned meanwhile don't import the script first, and with it torch, which takes seconds."""
    script, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def count_cores() -> int:
    """Cores for this process: its share, where a launcher has started several on this machine."""
    return max(1, count_all_cores() // count_processes())


def count_processes() -> int:
    """How many processes a launcher has started on this machine; they read at the same time."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def count_all_cores() -> int:
    """Cores for a process that works while the others of its run wait or have ended."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on Windows and macOS
        cores = os.cpu_count() or 1
    return math.ceil(min(cores, limit_cores()))


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


@contextmanager
def share_folder(folder: Path) -> Iterator[Path]:
    """The files of the main process's `folder`, for each process: in its own folder of that name, if they are the same.

    Else in a copy, removed afterwards, since machines may have no folder in common, and the first alone is to keep
    anything. Called in all processes; folders within are left out.
    """
    if find_place()[1] == 1:
        yield folder
        return
    wanted = ask_main(_hash_files, folder)
    has_all = gather(lambda: _hash_files(folder) == wanted)
    contents = None if all(has_all) else _send(_read_files, folder)
    if has_all[find_place()[0]]:
        yield folder
        return
    with tempfile.TemporaryDirectory() as copy:
        here = Path(copy, folder.name)
        here.mkdir()
        for name, content in contents.items():
            (here / name).write_bytes(content)
        yield here


def _hash_files(folder: Path) -> dict[str, str]:
    return _read_files(folder, lambda file: hashlib.file_digest(file, "sha256").hexdigest())


def _read_files(folder: Path, read: Callable[..., T] = methodcaller("read")) -> dict[str, T]:
    """{name: read(open file)}; nothing where there is no such folder."""
    found = {}
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                with open(path, "rb") as file:
                    found[path.name] = read(file)
    return found


def _send(work: Callable[..., T], *args) -> T:
    """What work(*args) returns in the main process, too large to be gathered from each."""
    from accelerate.utils import broadcast_object_list

    sent = [work(*args) if find_place()[0] == 0 else None]
    broadcast_object_list(sent)
    return sent[0]


def go_on_alone(index: int = 0) -> None:
    """Part the processes: the one of that index goes on, the others end here, as if all were done.

    Those that have not joined yet do not join for it: one that ends early would break off another's joining.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState().destroy_process_group()
    if int(os.environ["RANK"]) != index:
        sys.exit()
