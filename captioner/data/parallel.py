"""Reading ahead: many items at once, by threads or by processes, in order; and why a process that reads has ended.

for image in read_ahead(open_image, paths): ...              # by threads
for images in read_batches(open_image, paths, list): ...     # by processes
"""

import functools
import itertools
import re
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from captioner.runtime.errors import UserError
from captioner.runtime.files import measure_free
from captioner.runtime.machine import SHARED_MEMORY
from captioner.runtime.processes import count_cores, count_processes, step_back

T, R, B = TypeVar("T"), TypeVar("R"), TypeVar("B")
AHEAD = 256  # items that are read before they are asked for
BATCH = 32  # items that a process reads for one answer
ANSWERS, MORE_ANSWERS = 2, 8  # that may wait for each process until they are asked for: the fewest, and the most
ALL_ANSWERS = 128  # that may wait on a machine (1.2 GB for BLIP-2), unless ANSWERS of each process are more
LOADER_ERRORS = (UserError, RuntimeError, EOFError, ConnectionError)  # that explain_dead_worker may know


def read_ahead(read: Callable[[T], R], items: Iterable[T], ahead: int = AHEAD, at_once: int = 1) -> Iterator[R]:
    """read(item) of each item, in order, by a thread on each core, which are at most `ahead` items ahead.

    Threads cost nothing to start, but get in the way of a thread that has much to launch on a GPU. `at_once` items are
    one task: for what takes less time than to hand over a task.
    """
    items, waiting = iter(items), deque()
    with ThreadPoolExecutor(count_cores()) as pool:
        try:
            while part := list(itertools.islice(items, at_once)):
                waiting.append(pool.submit(lambda part: [read(item) for item in part], part))
                if len(waiting) * at_once > ahead:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:  # also when nobody asks for the rest
            for future in waiting:
                future.cancel()


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each of them made by a thread while the one before is worked on."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def read_batches(
    read: Callable[[T], R],
    items: Sequence[T],
    collate: Callable[[list[R]], B],
    item_bytes: int = 0,
) -> Iterator[B]:
    """collate([read(item), ...]) of BATCH items each, in order, by a process on each core, which starts at the call.

    An answer with tensors waits in shared memory, `item_bytes` for each item: where that has no room for all
    processes, as in a container, fewer work. Raises UserError when one of the processes was killed.
    """
    import torch  # here: who only opens images does without

    workers, answers = min(count_cores(), len(items) // BATCH), ALL_ANSWERS // count_processes()
    if item_bytes and (free := measure_free(SHARED_MEMORY)) is not None:
        room = free // count_processes() // (BATCH * item_bytes)  # answers
        workers, answers = min(workers, room // ANSWERS - 1), min(answers, room // 2)
    workers = max(workers, 0)
    loader = torch.utils.data.DataLoader(
        items,
        BATCH,
        num_workers=workers,
        prefetch_factor=min(max(answers // workers, ANSWERS), MORE_ANSWERS) if workers else None,
        collate_fn=functools.partial(_read_part, read, collate),
        pin_memory=bool(item_bytes) and torch.cuda.is_available(),  # by a thread of its own
        worker_init_fn=step_back,
        generator=torch.Generator(),  # else it would draw from the one that draws LoRA's first weights
    )
    return _explain_deaths(iter(loader))


def _read_part(read: Callable[[T], R], collate: Callable[[list[R]], B], items: list[T]) -> B:
    return collate([read(item) for item in items])


def _explain_deaths(batches: Iterator[B]) -> Iterator[B]:
    try:
        yield from batches
    except LOADER_ERRORS as error:
        raise (explain_dead_worker(error) or error) from None


def explain_dead_worker(error: Exception) -> UserError | None:
    """For an error of a DataLoader: what its worker had to tell the user, or that it was killed; None for another."""
    try:
        return _explain_loader(error)
    except RuntimeError as later:  # torch raises where a signal finds us, and the first sign of a death comes sooner
        return _explain_loader(later)


def _explain_loader(error: Exception) -> UserError | None:
    text = str(error).strip()
    if caught := re.match(r"Caught (\w+) in (?:DataLoader worker|pin memory thread)", text):  # torch raises it anew
        what = text.splitlines()[-1]
        if caught[1] == UserError.__name__:
            return UserError(what.partition("UserError: ")[2])
        return UserError(f"a process that reads images failed ({what}); start again with --dataloader-workers 0")
    frames = traceback.extract_tb(error.__traceback__)
    # it may die between a message and the memory that the message speaks of: the answer then ends in its midst
    cut = isinstance(error, (EOFError, ConnectionError)) and any("torch/utils/data" in f.filename for f in frames)
    signs = ("DataLoader worker", "Pin memory thread")
    if cut or (isinstance(error, RuntimeError) and text.startswith(signs)):
        reason = (text or repr(error)).splitlines()[0]
        return UserError(
            f"a process that reads images was killed ({reason}): mostly for want of memory or of shared memory "
            f"({SHARED_MEMORY}); free some, or read with fewer (--dataloader-workers)"
        )
    return None
