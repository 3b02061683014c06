"""BDD100K label files -> frames of facts. Knows the layouts of the files, and nothing of the wording of captions.

    report = LabelReport()
    for frame in read_labels([Path("bdd100k_labels_images_val.json")], report):
        print(frame.name, frame.facts)
    print(report)

Read are .json, .json.gz and .zip files and folders of them, in these layouts, which are told apart by what is in them:
2018 arrays, one file an image, det_20 arrays, Scalabel dumps bare or wrapped, tracking and segmentation sets. A frame
that can't be used is left out, counted with its reason and listed; a file that is damaged is an error.

A large array is cut where a frame ends, and decoded piece by piece by all cores: memory stays small whatever the size.
A wrong cut can't go unnoticed, since neither side of it would then be JSON.
"""

import functools
import gc
import gzip
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from captioner.bdd100k.facts import Facts, Frame
from captioner.bdd100k.frames import DEFAULT_OPTIONS, BadFile, BadFrame, LabelOptions, _Frame, decode_frames, read_frame
from captioner.bdd100k.label_report import LabelReport
from captioner.runtime.errors import UserError
from captioner.runtime.files import is_inside

LABEL_SUFFIXES = (".json", ".json.gz", ".zip")


PIECE = 4 * 2**20  # bytes of a large array that are decoded at once
LOOKAHEAD = 64 * 2**20  # bytes in which the next frame must begin for a file to be cut
WHOLE = 256 * 2**20  # bytes up to which a file that can't be cut is decoded as a whole
GZIP_LIMIT = 2 * 2**30  # bytes of a .json.gz when unpacked; BDD100K's largest label file has 1.4 GB

T = TypeVar("T")


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


class _Result(NamedTuple):
    frames: list  # or (name, what `convert` made of its facts)
    count: int  # of frames in, used or not
    report: LabelReport
    error: tuple[str, int | None] | None = None  # reason and byte


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
            if result.error is not None:
                result = _run_whole(job, result, consumed[job.path], options, convert)
                given_up.add(job.path)
            consumed[job.path] += result.count
            report.merge(result.report)
            names = {frame[0] for frame in result.frames}
            if len(names) == len(result.frames) and seen.isdisjoint(names):  # mostly: no need to look at each
                seen |= names
                yield from result.frames
                continue
            for frame in result.frames:
                name = frame[0]
                if name in seen:
                    report.frames -= 1
                    report.skip("its name came before", name)
                else:
                    seen.add(name)
                    yield frame
    if not seen:
        raise UserError(f"no usable frame in {', '.join(map(str, paths))}: {report}")


def find_label_files(paths: Sequence[Path]) -> list[Path]:
    """The files in `paths`, folders replaced by the label files below them in alphabetical order."""
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(LABEL_SUFFIXES) and file.is_file())
            found = [file for file in found if is_inside(file, path)]  # no link leads out of the folder
            if not found:
                raise UserError(f"{path}: no .json file in this folder; --labels takes BDD100K label files or folders")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give BDD100K labels with --labels, or try --demo")
    return files


def plan_jobs(files: Sequence[Path]) -> list[_Job]:
    """Cut the files into jobs of about PIECE bytes."""
    jobs = []
    for path in files:
        if path.suffix == ".zip":
            jobs += _plan_archive(path)
            continue
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: can't be read ({error.strerror}); see to the file") from None
        if path.suffix == ".gz" or size <= 2 * PIECE:
            jobs.append(_Job(path, size))
        else:
            jobs += [_Job(path, min(PIECE, size - at), at, min(at + PIECE, size)) for at in range(0, size, PIECE)]
    return jobs


def _plan_archive(path: Path) -> Iterator[_Job]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".json") and not info.is_dir()]
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise UserError(f"{path}: not readable as a zip archive ({error}); is the download complete?") from None
    if not members:
        raise UserError(f"{path}: no .json file in this archive")
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

    Processes take jobs themselves and answer through a pipe each, so that this one has little to do beside them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers, total = min(cores, len(jobs)), sum(job.size for job in jobs)
    if len(jobs) < 2 or total < PIECE:
        yield from map(run, jobs)
        return
    step = max(1, min(32, PIECE * len(jobs) // (total + 1)))  # many small files at once
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    taken, processes = context.Value("q", 0), {}
    try:
        for _ in range(workers):
            answer, send = context.Pipe(duplex=False)
            inherited = [*processes, answer] if context.get_start_method() == "fork" else []
            process = context.Process(target=_work, args=(run, jobs, step, taken, send, inherited), daemon=True)
            process.start()
            send.close()
            processes[answer] = process
        yield from _gather(dict(processes), len(jobs))
    finally:  # also when nobody asks for the rest
        for process in processes.values():
            process.kill()
            process.join()


def _work(run: Callable[[_Job], _Result], jobs: Sequence[_Job], step: int, taken, send, inherited: list) -> None:
    """What a process does: take the next `step` jobs and send (number of the first, results) until none are left."""
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
            send.send((first, [run(job) for job in jobs[first : first + step]]))
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """End this process when the one that started it does, also when that is killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _gather(processes: dict, count: int) -> Iterator[_Result]:
    """What {pipe: process} answer, in the order of the jobs. Raises UserError when one of them was killed."""
    early: dict[int, _Result] = {}
    for number in range(count):
        while number not in early:
            for pipe in multiprocessing.connection.wait(processes):
                try:
                    first, results = pipe.recv()
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


def _run_job(job: _Job, options: LabelOptions, convert: Callable[[Facts], T] | None) -> _Result:
    report, frames, count = LabelReport(), [], 0
    try:
        for data in _load_job(job):
            raw_frames, wrapped = decode_frames(data)
            if not raw_frames and job.stop is None:
                raise BadFile("no frames in it; a BDD100K label file is a JSON array of frames")
            frames += _read_frames(raw_frames, wrapped, options, report)
            count += len(raw_frames)
    except BadFile as error:
        return _Result([], 0, report, (str(error), error.position))
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        return _Result([], 0, report, (f"can't be read: {error}", None))
    return _finish(frames, count, report, convert)


def _finish(frames: list[Frame], count: int, report: LabelReport, convert) -> _Result:
    report.add(frames)
    return _Result([(name, convert(facts)) for name, facts in frames] if convert else frames, count, report)


def _read_frames(raw_frames: list, wrapped: bool, options: LabelOptions, report: LabelReport) -> list[Frame]:
    frames = []
    for raw in raw_frames:
        try:
            frames.append(read_frame(raw, report, options, wrapped))
        except BadFrame as error:
            name = raw.name if isinstance(raw, _Frame) else raw.get("name") if isinstance(raw, dict) else "?"
            report.skip(str(error), name)
    return frames


def _run_whole(job: _Job, result: _Result, consumed: int, options, convert) -> _Result:
    """Read a file again as a whole, from the frame `consumed` on, to know if only the cut was wrong."""
    reason, position = result.error
    try:
        size = job.path.stat().st_size
    except OSError as error:
        raise UserError(f"{job.path}: can't be read any more ({error.strerror}); see to the file") from None
    if job.stop is not None and size <= WHOLE:
        try:
            frames, wrapped = decode_frames(job.path.read_bytes())
            report = LabelReport()
            read = _read_frames(frames[consumed:], wrapped, options, report)
            return _finish(read, len(frames) - consumed, report, convert)
        except BadFile as error:
            reason, position = str(error), error.position
    elif position is not None:
        position += job.start
    at = f" at byte {position:,} of {size:,}" if position is not None else ""
    raise UserError(f"{job.path}: not readable as JSON{at} ({reason}); is the download complete?")


def _load_job(job: _Job) -> Iterator[bytes | memoryview]:
    """The bytes of each label file of a job; of a stretch, the whole frames that start in it, as an array."""
    if job.members:
        with open(job.path, "rb") as archive:
            for member in job.members:
                yield _load_member(archive, member)
    elif job.path.suffix == ".gz":
        with gzip.open(job.path) as file:
            data = file.read(GZIP_LIMIT + 1)
        if len(data) > GZIP_LIMIT:
            raise BadFile(f"unpacked it has more than {GZIP_LIMIT:,} bytes; unpack it first")
        yield data
    elif job.stop is None:
        yield job.path.read_bytes()
    else:
        yield _load_stretch(job)


def _load_member(archive, member: _Member) -> bytes:
    """One member of a zip archive, without opening the archive anew, which would read its whole directory again."""
    if member.size > WHOLE or member.flags & 1 or member.method not in _DECOMPRESS:
        raise BadFile(f"its member {member.name} is larger than {WHOLE:,} bytes, encrypted or packed unusually")
    archive.seek(member.offset)
    header = archive.read(zipfile.sizeFileHeader)
    if len(header) < zipfile.sizeFileHeader or header[:4] != zipfile.stringFileHeader:
        raise BadFile(f"its member {member.name} is damaged")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    archive.seek(name_length + extra_length, os.SEEK_CUR)
    data = _DECOMPRESS[member.method](archive.read(member.packed), member.size)
    if zlib.crc32(data) != member.crc:
        raise BadFile(f"its member {member.name} is damaged")
    return data


_DECOMPRESS = {
    zipfile.ZIP_STORED: lambda packed, size: packed,
    zipfile.ZIP_DEFLATED: lambda packed, size: zlib.decompressobj(-15).decompress(packed, size + 1),
}


# Where a frame of an array ends and the next begins, if frames begin with their name, as all we know of do.
_BOUNDARY = re.compile(rb'\}\s*,\s*(?=\{\s*"name"\s*:)')


def _load_stretch(job: _Job) -> memoryview:
    """The frames whose boundary lies in [start, stop) of the file, as a JSON array of their own.

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
        start = first.end() - 1
        data[start : start + 1] = b"["
    if end := _find_boundary(data, job.stop - base, job):
        stop = end.start() + 2
        data[stop - 1 : stop] = b"]"
    return memoryview(data)[start:stop]


def _find_boundary(data: mmap.mmap, at: int, job: _Job) -> re.Match | None:
    """The first boundary from `at` on; None at the end of the file."""
    found = _BOUNDARY.search(data, at)
    if found is None and job.stop + LOOKAHEAD < job.path.stat().st_size:
        raise BadFile(f"no frame begins in {LOOKAHEAD:,} bytes")
    return found
