"""BDD100K label files -> frames of facts. Knows the layouts of the files, and nothing of the wording of captions.

    report = LabelReport()
    for frame in read_labels([Path("bdd100k_labels_images_val.json")], report):
        print(frame.name, frame.facts)
    print(report)

Read are .json, .jsonl, .json.gz and .zip files and folders of them, in these layouts, which are told apart by what is
in them: 2018 arrays, one file an image, det_20 arrays, Scalabel dumps bare or wrapped, tracking and segmentation sets,
JSON lines. A frame that can't be used is left out, counted with its reason and listed; a file that is damaged or no
label file is an error.

A large array is cut where a frame ends, and decoded piece by piece by all cores: memory stays small whatever the size.
A wrong cut can't go unnoticed, since neither side of it would then be JSON: the file is then read as a whole.
"""

import functools
import gc
import gzip
import math
import mmap
import multiprocessing.connection
import os
import re
import signal
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from captioner.bdd100k.facts import Facts, Frame
from captioner.bdd100k.file_kinds import WANTED, is_hidden, name_kind
from captioner.bdd100k.frames import (
    DEFAULT_OPTIONS,
    BadFile,
    BadFrame,
    LabelOptions,
    _Frame,
    decode_frames,
    has_labels,
    read_frame,
)
from captioner.bdd100k.label_report import LabelReport
from captioner.runtime.errors import UserError, get_or_none
from captioner.runtime.files import is_inside
from captioner.runtime.processes import count_all_cores, leave_out_script, pick_start

LABEL_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".zip")

PIECE = 4 * 2**20  # bytes of a large array that are decoded at once
LOOKAHEAD = 64 * 2**20  # bytes in which the next frame must begin for a file to be cut
HEAD = 4096  # bytes that tell what a file is
GZIP_LIMIT = 2 * 2**30  # bytes of a .json.gz or a member when unpacked; BDD100K's largest label file has 1.4 GB

T = TypeVar("T")
_Bytes = bytes | bytearray | memoryview


class _Member(NamedTuple):
    """What is needed of a zipfile.ZipInfo, which is ten times as slow to hand to another process."""

    name: str
    offset: int  # of its header
    packed: int  # bytes
    size: int  # bytes
    method: int
    flags: int
    crc: int


class _Job(NamedTuple):
    """What one process reads at once: a stretch of a file, or some whole files or members of an archive."""

    path: Path
    size: int  # bytes, for the progress bar
    start: int = 0
    stop: int | None = None  # of a stretch; None: not a stretch
    members: tuple[_Member, ...] = ()  # of a .zip
    skip: int = 0  # frames at the start that were read before


class _Result(NamedTuple):
    frames: list  # or (name, what `convert` made of its facts)
    count: int  # of frames in, used or not
    report: LabelReport
    error: str | None = None  # what follows the file's name


def read_labels(
    paths: Sequence[Path],
    report: LabelReport,
    options: LabelOptions = DEFAULT_OPTIONS,
    convert: Callable[[Facts], T] | None = None,
) -> Iterator[Frame | tuple[str, T]]:
    """Frames of the label files in `paths` and in the folders of it; `report` is filled on the way.

    With `convert`, pairs of name and convert(facts), made by the process that read the frame. A name that comes twice
    is used once, the first time. Raises UserError for a path that is missing, a file that is damaged (with the byte
    where that shows), and when there is no usable frame at all.
    """
    jobs = plan_jobs(find_label_files(paths))
    seen: set[str] = set()
    consumed: Counter[Path] = Counter()  # frames of each file so far
    given_up = set()  # files that can't be cut and were read as a whole
    run = functools.partial(_run_job, options=options, convert=convert)
    with tqdm(total=sum(job.size for job in jobs), desc="reading labels", unit="B", unit_scale=True) as progress:
        for job, result in zip(jobs, _run_jobs(run, jobs), strict=True):
            progress.update(job.size)
            if job.path in given_up:
                continue
            if result.error and job.stop is not None:  # maybe only the cut was wrong
                given_up.add(job.path)
                result = run(job._replace(start=0, stop=None, skip=consumed[job.path]), used=seen)
            elif not seen.isdisjoint(name for name, _ in result.frames):
                result = run(job, used=seen)  # again without what came before, so that nothing of it is counted
            if result.error:
                raise UserError(f"{job.path}: {result.error}")
            consumed[job.path] += result.count
            report.merge(result.report)
            seen.update(name for name, _ in result.frames)
            yield from result.frames
    if not seen:
        raise UserError(f"no usable frame in {', '.join(map(str, paths))}: {report}")


def find_label_files(paths: Sequence[Path]) -> list[Path]:
    """The files in `paths`, folders replaced by the label files below them in alphabetical order."""
    files = []
    for path in paths:
        if path.is_dir():
            found, others = _list_folder(path)
            if not found:
                raise UserError(f"{path}: no .json file in this folder{_describe_others(others)}; {WANTED}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give BDD100K labels with --labels, or try --demo")
    return files


def _list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the label files, the other files) below a folder, in alphabetical order: no pipe, and no link that leads out."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be read ({error.strerror}); see to the folder") from None

    found, others = [], []
    for parent, folders, names in os.walk(folder, onerror=refuse):  # which enters no linked folder
        folders[:] = [name for name in folders if not is_hidden([name])]
        for name in names:
            path = Path(parent, name)
            if not is_hidden([name]) and path.is_file() and (not path.is_symlink() or is_inside(path, folder)):
                (found if _has_suffix(name, LABEL_SUFFIXES) else others).append(path)
    return sorted(found), sorted(others)


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    return name.lower().endswith(suffixes)


def _describe_others(files: Sequence[Path]) -> str:
    """What is there instead of label files: how many, and what the first one is."""
    if not files:
        return ""
    head = get_or_none(_read_head, files[0])
    kind = head and name_kind(head)
    return f" but {len(files):,} others, as {files[0].name}" + (f" ({kind[0]})" if kind else "")


def _read_head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def plan_jobs(files: Sequence[Path]) -> list[_Job]:
    """Cut the files into jobs of about PIECE bytes."""
    jobs = []
    for path in files:
        try:
            size = path.stat().st_size
            if _has_suffix(path.name, (".zip",)) and _read_head(path).startswith(b"PK"):
                jobs += _plan_archive(path)
                continue
            cut = size > 2 * PIECE and not _has_suffix(path.name, (".gz",)) and _can_be_cut(path)
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); see to the file") from None
        if cut:
            jobs += [_Job(path, min(PIECE, size - at), at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
        else:
            jobs.append(_Job(path, size))
    return jobs


def _can_be_cut(path: Path) -> bool:
    """Whether a large file is an array of frames that begin with their name, or JSON lines of them."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = _BOUNDARY.search(data, 0, LOOKAHEAD)
        is_object = data[:HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        return found is not None and (b"," in found[0]) != is_object


def _plan_archive(path: Path) -> Iterator[_Job]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not is_hidden(info.filename.split("/"))]
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise UserError(f"{path}: not readable as a zip archive ({error}); is the download complete?") from None
    members = [info for info in infos if _has_suffix(info.filename, (".json", ".jsonl"))]
    if not members:
        others = ", ".join(info.filename for info in infos[:3] if not info.is_dir())
        raise UserError(f"{path}: no .json file in this archive, but {others or 'nothing'}; {WANTED}")
    batch, size = [], 0
    for info in members:
        batch.append(
            _Member(
                info.filename,
                info.header_offset,
                info.compress_size,
                info.file_size,
                info.compress_type,
                info.flag_bits,
                info.CRC,
            )
        )
        size += info.compress_size
        if size >= PIECE // 4 or info is members[-1]:
            yield _Job(path, size, members=tuple(batch))
            batch, size = [], 0


def _run_jobs(run: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> Iterator[_Result]:
    """Results in the order of the jobs, from all cores if there is enough to do.

    Processes take jobs themselves and answer through a pipe each, so that this one has little to do beside them. Of
    the large files that can't be cut one is read at a time, which may need three times its size in memory.
    """
    workers, total = min(count_all_cores(), len(jobs)), sum(job.size for job in jobs)
    if len(jobs) < 2 or total < PIECE:
        yield from map(run, jobs)
        return
    step = max(1, min(32, PIECE * len(jobs) // (total + 1)))  # many small files at once
    context = multiprocessing.get_context(pick_start())
    taken, processes, run = context.Value("q", 0), {}, functools.partial(_run_in_turn, run, context.Lock())
    try:
        for _ in range(workers):
            answer, send = context.Pipe(duplex=False)
            inherited = [*processes, answer] if context.get_start_method() == "fork" else []
            process = context.Process(target=_work, args=(run, jobs, step, taken, send, inherited), daemon=True)
            with leave_out_script():
                process.start()
            send.close()
            processes[answer] = process
        yield from _gather(dict(processes), jobs)
    finally:  # also when nobody asks for the rest
        for process in processes.values():
            process.kill()
            process.join()


def _work(run: Callable[[_Job], _Result], jobs: Sequence[_Job], step: int, taken, send, inherited: list) -> None:
    """What a process does: take the next `step` jobs and send (number of the first, results) until none are left.

    What goes wrong, beyond what is wrong with a file, is sent too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for answer in inherited:  # else nobody would notice when the main process is killed
        answer.close()
    gc.disable()  # nothing here is a cycle, so looking for garbage again and again would find none
    while True:
        with taken.get_lock():
            first = taken.value
            taken.value = first + step
        if first >= len(jobs):
            return
        try:
            send.send((first, list(map(run, jobs[first : first + step]))))
        except BrokenPipeError:
            return
        except Exception as error:
            send.send((first, f"{type(error).__name__}: {error}".strip(": ")))
            return


def _run_in_turn(run: Callable[[_Job], _Result], memory, job: _Job) -> _Result:
    """run(job), for which a large job must have the lock `memory`."""
    with memory if _is_large(job) else nullcontext():
        return run(job)


def _is_large(job: _Job) -> bool:
    """Whether a job may take much memory: a large file or member that is not a stretch."""
    if job.members:
        return max(member.size for member in job.members) > 2 * PIECE
    packed = _has_suffix(job.path.name, (".gz",))  # to a twentieth, mostly
    return job.stop is None and job.size > (PIECE // 10 if packed else 2 * PIECE)


def _end_with_parent() -> None:
    """End this process when the one that started it does, also when that is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _gather(processes: dict, jobs: Sequence[_Job]) -> Iterator[_Result]:
    """What {pipe: process} answer, in the order of the jobs. Raises UserError when one of them failed or was killed."""
    early: dict[int, _Result] = {}
    for number in range(len(jobs)):
        while number not in early:
            for pipe in multiprocessing.connection.wait(processes):
                try:
                    first, results = pipe.recv()
                    if isinstance(results, str):
                        paths = f"{jobs[first].path}" + (" or a file after it" if len(jobs) > 1 else "")
                        raise UserError(f"a process that reads labels failed at {paths} ({results}); start again")
                    early.update(enumerate(results, start=first))
                except EOFError:
                    process = processes.pop(pipe)
                    process.join()
                    if process.exitcode:
                        raise UserError(
                            f"a process that reads labels was killed (exit code {process.exitcode}): mostly for want "
                            "of memory, or because a label file was cut while it was read; start again"
                        ) from None
        yield early.pop(number)


def _run_job(
    job: _Job, options: LabelOptions, convert: Callable[[Facts], T] | None, used: Collection[str] = ()
) -> _Result:
    """Read a job, without the frames whose names are in `used`."""
    report, frames, count, used = LabelReport(), [], 0, set(used)
    member = None
    try:
        with open(job.path, "rb") if job.members else nullcontext() as archive:
            for member in job.members or (None,):
                for raw_frames, wrapped in _decode(job, archive, member):
                    frames += _read_frames(raw_frames, wrapped, options, report, used, member or job.path)
                    count += len(raw_frames)
    except BadFile as error:
        return _Result([], 0, report, str(error))
    except OSError as error:
        return _Result([], 0, report, f"can't be read ({error.strerror or error}){_name(member)}; see to the file")
    except EOFError:
        return _Result([], 0, report, f"it ends too early{_name(member)}; is the download complete?")
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        return _Result([], 0, report, f"can't be unpacked ({error}){_name(member)}; fetch it again, or unpack it")
    report.add(frames)
    return _Result([(name, convert(facts)) for name, facts in frames] if convert else frames, count, report)


def _decode(job: _Job, archive, member: _Member | None) -> Iterator[tuple[list, bool]]:
    """The frames of a stretch, a file or a member; what can't be cut is read as a whole, from where the cut failed.

    Raises BadFile with all that is to be said, but of a stretch.
    """
    done = job.skip
    for cut in (False,) if job.skip else (True, False):
        data = None
        try:
            for data, in_wrapper in _load(job, archive, member, cut):
                raw_frames, wrapped = decode_frames(data)
                wrapped |= in_wrapper
                raw_frames = raw_frames if cut else raw_frames[done:]
                done += len(raw_frames)
                yield raw_frames, wrapped
            if done == 0 and job.stop is None:
                raise BadFile("no frames in it; a BDD100K label file is a JSON array of frames", None, WANTED)
            return
        except BadFile as error:
            if job.stop is not None:
                raise
            if not cut:
                raise BadFile(_explain(error, data, member)) from None


def _name(member: _Member | None) -> str:
    return f" in its member {member.name}" if member else ""


def _explain(error: BadFile, data, member: _Member | None) -> str:
    """What is wrong with the file or member that holds `data`, and what helps."""
    reason, at, remedy = str(error), "", error.remedy
    if remedy is None and data is not None:
        if error.position is not None:
            at = f" at byte {error.position:,} of {len(data):,}"
        remedy = "is the download complete?" if error.position == len(data) else "mend it there, or fetch it again"
        if kind := name_kind(bytes(data[:HEAD])):
            (reason, remedy), at = kind, ""
    return f"not readable as JSON{_name(member)}{at} ({reason}); {remedy}"


def _read_frames(
    raw_frames: list, wrapped: bool, options: LabelOptions, report: LabelReport, used: set[str], file: Path | _Member
) -> list[Frame]:
    frames = []
    for raw in raw_frames:
        try:
            frame = read_frame(raw, report, options, wrapped, used)
            used.add(frame.name)
            frames.append(frame)
        except BadFrame as error:
            name = raw.name if isinstance(raw, _Frame) else raw.get("name") if isinstance(raw, dict) else None
            report.skip(str(error), f"in {file.name}" if name is None else name)
    if frames and not any(map(has_labels, raw_frames)):
        report.remarks["frame without labels, as all of its file: captioned without objects"] += len(frames)
    return frames


def _load(job: _Job, archive, member: _Member | None, cut: bool) -> Iterator[tuple[_Bytes, bool]]:
    """The bytes of a label file or member, in pieces if it is large and to be cut; or of a stretch.

    With each, whether it is a part of a wrapper's frames without the wrapper.
    """
    if job.stop is not None:
        yield _load_stretch(job), False
    elif member is None:
        with open(job.path, "rb") as file:
            head = file.read(HEAD)
            file.seek(0)
            if head.startswith(b"\x1f\x8b"):
                with gzip.open(job.path) as stream:
                    yield from _cut(stream, cut, GZIP_LIMIT)
            elif os.fstat(file.fileno()).st_size <= 2 * PIECE:
                yield file.read(), False
            elif cut and b"{" in _OPENING.match(head)[0]:
                yield from _cut(file, cut, math.inf)
            else:
                yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), False
    elif member.flags & 1:
        raise BadFile("it is encrypted", None, _UNPACK)
    elif member.size > GZIP_LIMIT:
        raise BadFile(f"it has {member.size:,} bytes, of a member {GZIP_LIMIT:,} are read", None, _UNPACK)
    elif member.size <= 2 * PIECE and member.method in _DECOMPRESS:
        yield _load_member(archive, member), False
    else:
        with zipfile.ZipFile(job.path) as opened, opened.open(member.name) as stream:
            yield from _cut(stream, cut, GZIP_LIMIT)


_UNPACK = "unpack it and give the folder"
# What comes before the first frame: of an array, of a wrapper; nothing for JSON lines.
_OPENING = re.compile(rb'(?:(?:\xef\xbb\xbf)?\s*(?:\{\s*"frames"\s*:\s*)?\[)?')


def _cut(stream, cut: bool, limit: float) -> Iterator[tuple[bytearray, bool]]:
    """What a stream holds: as a whole, or cut where frames begin, each piece JSON of its own; see _load for the bool.

    The last piece has what comes after the frames. Raises BadFile for more than `limit` bytes.
    """
    data, size, searched = bytearray(), 0, PIECE
    while chunk := stream.read(PIECE):
        data += chunk
        size += len(chunk)
        if size > limit:
            raise BadFile(f"unpacked it has more than {limit:,} bytes", None, _UNPACK)
        if cut and len(data) >= 2 * PIECE:
            opening = _OPENING.match(data)[0]
            found = _BOUNDARY.search(data, searched)
            if found and (b"," in found[0]) == bool(opening):
                end, following = found.start() + 1, found.end()
                found = None  # it holds on to the data
                piece = bytearray(b"[") * bool(opening) + memoryview(data)[len(opening) : end] + b"]" * bool(opening)
                yield piece, b"{" in opening
                del data[len(opening) : following]
                searched = PIECE
            else:
                searched = max(PIECE, len(data) - HEAD)
    yield data, False


def _load_member(archive, member: _Member) -> bytes:
    """One member of a zip archive, without opening the archive anew, which would read its whole directory again."""
    archive.seek(member.offset)
    header = archive.read(zipfile.sizeFileHeader)
    if len(header) < zipfile.sizeFileHeader or header[:4] != zipfile.stringFileHeader:
        raise BadFile("it is damaged", None, "fetch the archive again")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    archive.seek(name_length + extra_length, os.SEEK_CUR)
    data = _DECOMPRESS[member.method](archive.read(member.packed), member.size)
    if zlib.crc32(data) != member.crc:
        raise BadFile("it is damaged", None, "fetch the archive again")
    return data


_DECOMPRESS = {
    zipfile.ZIP_STORED: lambda packed, size: packed,
    zipfile.ZIP_DEFLATED: lambda packed, size: zlib.decompressobj(-15).decompress(packed, size + 1),
}


# Where a frame of an array or of JSON lines ends and the next begins, if frames begin with their name, as mostly.
_BOUNDARY = re.compile(rb'\}(?:\s*,\s*|\s+)(?=\{\s*"name"\s*:)')


def _load_stretch(job: _Job) -> memoryview:
    """The frames whose boundary lies in [start, stop) of the file, as a JSON array of their own, or as JSON lines.

    The file is mapped, not copied. The brackets are written over the commas that stood there, in a copy of those pages.
    """
    base = job.start - job.start % mmap.ALLOCATIONGRANULARITY  # all in bytes; a map begins at a multiple of this
    with open(job.path, "rb") as file:
        length = min(job.stop + LOOKAHEAD, os.fstat(file.fileno()).st_size) - base
        if length <= 0:
            return memoryview(b"[]")  # the file has shrunk
        data = mmap.mmap(file.fileno(), length, offset=base, access=mmap.ACCESS_COPY)
    start, stop = 0, length
    if job.start:
        first = _find_boundary(data, job.start - base, job)
        if first is None or first.start() >= job.stop - base:
            return memoryview(b"[]")  # one long frame spans it all; a stretch before has it
        start = first.end()
        if b"," in first[0]:
            start -= 1
            data[start : start + 1] = b"["
    if end := _find_boundary(data, job.stop - base, job):
        stop = end.start() + 1
        if b"," in end[0]:
            stop += 1
            data[stop - 1 : stop] = b"]"
    return memoryview(data)[start:stop]


def _find_boundary(data: mmap.mmap, at: int, job: _Job) -> re.Match | None:
    """The first boundary from `at` on; None at the end of the file."""
    found = _BOUNDARY.search(data, at)
    if found is None and job.stop + LOOKAHEAD < job.path.stat().st_size:
        raise BadFile(f"no frame begins in {LOOKAHEAD:,} bytes")
    return found
