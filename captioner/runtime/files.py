"""Files and folders: written whole or not at all, held by one run, named by it.

with lock_folder(output, "--output"), atomic_write(output / "a.json") as file: ...
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from captioner.runtime.errors import UserError, get_or_none

LOCK_SECONDS = 0.2  # in which a lock is tried, every 0.05 s


@contextmanager
def atomic_write(path: Path, binary: bool = False) -> Iterator:
    """Open `path` for writing text, or bytes, under a temporary name; it gets its own only when all is written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists() and not is_replaceable(path):
            raise UserError(f"{path}: can't be written: it is no regular file; name another")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") if binary else open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: can't be written ({error.strerror}); see to the folder and its disk, then start again"
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def is_replaceable(path: Path) -> bool:
    """Whether what is at `path` is a regular file: no folder, no pipe, no device, not /dev/stdout wherever it leads."""
    return path.is_file() and not (path.is_symlink() and os.readlink(path).startswith("/proc/"))


def read_json(path: Path, remedy: str, kind: type = dict) -> Any:
    """What a JSON file holds, which must be of that kind. Raises UserError with the remedy where it isn't."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, kind):
            raise ValueError("no JSON object")
        return record
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read ({str(error)[:200]}); {remedy}") from None


def write_json(path: Path, content) -> None:
    """Write `content` as JSON. Raises ValueError for NaN, which JSON has no word for."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)


@contextmanager
def explain_writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a UserError that names it, the reason and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error}); {remedy}") from None


@contextmanager
def lock_folder(folder: Path, flag: str) -> Iterator[None]:
    """Hold `folder`, that `flag` names, for this run alone; of several processes of a run the main one holds it.

    The kernel frees it when the process ends, however it ends. A folder that the run made and left empty is removed.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    # tried for a moment, as a run that is just ending takes its file away from under a new one; and not as a soft lock,
    # a file that would outlive a run that is killed
    lock = FileLock(folder / ".lock", timeout=LOCK_SECONDS, fallback_to_soft=False)
    try:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{flag} {folder}: another run is writing there; wait for its end, or name another") from None
    except OSError as error:
        try:
            Path(lock.lock_file).touch()  # it can be written, but not locked: Lustre, NFS and FUSE may be without
        except OSError:
            raise UserError(f"{flag} {folder}: can't be written ({error.strerror}); name another folder") from None
        _tell_unlocked(folder, error.strerror)
    _locks.add(lock)
    try:
        yield
    finally:
        _locks.discard(lock)
        with suppress(OSError):  # it may be gone, the disk read-only, or this be Windows, whose lock removes it itself
            Path(lock.lock_file).unlink()
        lock.release()
        with suppress(OSError):
            for empty in made:
                empty.rmdir()
        while _named and not _locks:
            with suppress(OSError):
                _named.pop().rmdir()


@functools.cache  # once
def _tell_unlocked(folder: Path, reason: str) -> None:
    print(f"note: {folder} can't be locked ({reason}): see that no other run writes there")


_locks = set()
_named: list[Path] = []  # folders that name_run has made


def is_inside(path: Path, folder: Path) -> bool:
    """Whether `path` is in `folder` once all links are followed. In the hub's cache, links into its blobs are too."""
    real, root = path.resolve(), folder.resolve()
    if real.is_relative_to(root):
        return True
    snapshots = (parent for parent in (root, *root.parents) if parent.name == "snapshots")
    return any(real.is_relative_to(folder.parent / "blobs") for folder in snapshots)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: whose disk it will be on."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def measure_free(folder: Path) -> int | None:
    """Bytes that are free on the disk of `folder`; None where that can't be found out."""
    return get_or_none(lambda: shutil.disk_usage(folder).free)


def split_revision(model: str) -> tuple[str, str | None]:
    """(name, revision) of name@revision on the hub; a local folder is a name that has none."""
    if Path(model).exists():
        return model, None
    name, _, revision = model.partition("@")
    return name, revision or None


def name_run(run_name: str | None, suffix: str = "") -> Path:
    """The folder of a run in logs/: its `run_name`, else date, time and suffix, and a number if there is such a folder.

    There is one when two runs start within a second, and when the clock was set back, as it is each autumn. So the
    folder is made here, by the main process; lock_folder removes it if nothing is written there.
    """
    if run_name:
        return Path("logs") / run_name
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    names = itertools.chain([stamp + suffix], (f"{stamp}-{number}{suffix}" for number in itertools.count(2)))
    for folder in (Path("logs") / name for name in names):
        if os.environ.get("RANK", "0") != "0":
            return folder  # which the main process alone writes to
        made = [parent for parent in (folder.parent, folder) if not parent.exists()]
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.lexists(folder):
                continue  # not what is in the place of logs/
            raise UserError(f"{folder}: can't be written ({error.strerror}); start from a folder of your own") from None
        _named.extend(made)
        return folder
