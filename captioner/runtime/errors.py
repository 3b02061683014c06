"""Errors: what the user can mend, and what must not end a run.

raise UserError("--limit 1: must be 3 or more")
commit = get_or_none(read_commit)                  # None where it fails
with go_on_without("model card"): ...              # a note where it fails
lacks_memory(error)                                # whether memory was refused
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

CONTROLS = re.compile("[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]")
NO_MEMORY = re.compile(  # of the system, torch, Python, oneDNN and the loader of libraries
    "out of memory|can't allocate memory|Cannot allocate memory|can't start new thread|could not create a primitive$"
    "|failed to map segment from shared object$"
)
T = TypeVar("T")


class UserError(Exception):
    """Something that the user can mend. The message names the thing, its value and the remedy."""


def lacks_memory(error: Exception) -> bool:
    """Whether memory was refused to Python, to a call of the system, or to torch on the CPU or a GPU."""
    return isinstance(error, MemoryError) or NO_MEMORY.search(str(error)) is not None


def get_or_none(read: Callable[..., T], *args) -> T | None:
    """What read(*args) returns, or None where it fails: for what only decorates a record."""
    try:
        return read(*args)
    except Exception:  # whatever it is, a record without it is worth more than none
        return None


def escape_controls(text: str) -> str:
    r"""Text from anywhere, as it may go to a terminal: its control characters as \x1b, but for line ends and tabs."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@contextmanager
def go_on_without(what: str) -> Iterator[None]:
    """Where the block fails, which only makes `what`, print a note: nothing that decorates a run may end it."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"note: no {what} ({lines[0][:200]})")
