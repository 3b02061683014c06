"""Files that people take for BDD100K's labels, or get instead of them: read, or named for what they are."""

import gzip
import io
import itertools
import json
import lzma
import pickle
import sys
import tarfile
import time
import zipfile
from types import ModuleType

import pytest

from captioner.bdd100k import frames, label_files
from captioner.bdd100k.frames import decode_frames
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.runtime.errors import UserError

SCENE = {"timeofday": "night", "weather": "clear", "scene": "highway"}


def list_frames(count, first=0):
    names = (f"{number:08x}-{number:08x}.jpg" for number in range(first, first + count))
    return [{"name": name, "attributes": SCENE, "labels": [{"category": "car"}] * 3} for name in names]


FRAMES = list_frames(40)
TEXT = json.dumps(FRAMES)
LINES = "\n".join(map(json.dumps, FRAMES)) + "\n"
REORDERED = json.dumps([dict(reversed(frame.items())) for frame in FRAMES])
WRAPPED = json.dumps({"frames": FRAMES, "groups": None, "config": {"categories": [{"name": "car"}]}})


def read(*paths):
    report = LabelReport()
    return [frame.name for frame in read_labels(paths, report)], report


def pack(name, content):
    """A zip archive of one member, in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def pack_tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("labels.json"))
    return file.getvalue()


@pytest.mark.parametrize("piece", [2**9, 2**11, 2**22])
@pytest.mark.parametrize("text", [TEXT, LINES, LINES.replace("\n", "\r\n\r\n"), REORDERED, WRAPPED, "\ufeff" + LINES])
@pytest.mark.parametrize("packed", ["labels.json", "labels.jsonl", "labels.json.gz", "gzip.json", "labels.ZIP"])
def test_each_layout_is_read_whole_in_pieces_and_packed(tmp_path, monkeypatch, packed, text, piece):
    monkeypatch.setattr(label_files, "PIECE", piece)
    monkeypatch.setattr(label_files, "_run_jobs", map)
    data = text.encode()
    if packed == "labels.ZIP":
        data = pack("a/labels.json", data)
    elif packed in ("labels.json.gz", "gzip.json"):
        data = gzip.compress(data)
    (tmp_path / packed).write_bytes(data)
    names, report = read(tmp_path / packed)
    assert names == [frame["name"] for frame in FRAMES]
    assert (report.frames, report.skipped.total()) == (40, 0)


def test_large_members_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(label_files, "PIECE", 2**9)
    sizes = []
    real = label_files.decode_frames
    monkeypatch.setattr(label_files, "decode_frames", lambda data: sizes.append(len(data)) or real(data))
    (tmp_path / "labels.zip").write_bytes(pack("labels.json", TEXT))
    assert len(read(tmp_path / "labels.zip")[0]) == 40
    assert max(sizes) < 4 * 2**9 < len(TEXT)


def test_a_member_that_is_too_large_is_named_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(label_files, "GZIP_LIMIT", 1000)
    (tmp_path / "labels.zip").write_bytes(pack("labels.json", TEXT))
    with pytest.raises(UserError, match=rf"labels\.json \(it has {len(TEXT):,} bytes.*unpack it and give the folder"):
        read(tmp_path / "labels.zip")


NAMED = {
    "UTF-16": [TEXT.encode("utf-16"), TEXT.encode("utf-16-le"), TEXT.encode("utf-16-be"), b"\xff\xfe"],
    "UTF-32": [TEXT.encode("utf-32"), TEXT.encode("utf-32-le"), TEXT.encode("utf-32-be")],
    "Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1450000000\n"],
    "git-annex pointer": [b"/annex/objects/MD5E-s1--0.json\n", b"../.git/annex/objects/a/b/MD5E-s1--0.json"],
    "empty": [b"", b" \n"],
    "zero bytes": [bytes(5000)],
    "AppleDouble": [b"\0\5\x16\7\0\2\0\0Mac OS X        "],
    "zip archive": [pack("a.json", TEXT)],
    "tar archive": [pack_tar()],
    "7z archive": [b"7z\xbc\xaf\x27\x1c\0\4"],
    "RAR archive": [b"Rar!\x1a\x07\1\0"],
    "zstd": [b"\x28\xb5\x2f\xfd\4\0"],
    "bzip2": [b"BZh91AY&SY"],
    "packed by xz": [lzma.compress(b"[]")],
    "JPEG": [b"\xff\xd8\xff\xe0\0\x10JFIF"],
    "PNG": [b"\x89PNG\r\n\x1a\n"],
    "GIF": [b"GIF89a"],
    "BMP": [b"BM\x36\0\0\0\0\0\0\0\x36"],
    "TIFF": [b"II*\0\x08\0\0\0"],
    "WebP": [b"RIFF\x10\0\0\0WEBPVP8 "],
    "HEIC": [b"\0\0\0\x18ftypheic"],
    "video": [b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3"],
    "Parquet": [b"PAR1\x15\4\x15"],
    "Arrow": [b"ARROW1\0\0"],
    "HDF5": [b"\x89HDF\r\n\x1a\n"],
    "NumPy": [b"\x93NUMPY\1\0"],
    "pickle": [pickle.dumps(FRAMES, protocol) for protocol in (2, 4, 5)],
    "SQLite": [b"SQLite format 3\0"],
    "web page": [b"<!DOCTYPE html>\n<title>Log in</title>", b"\n<html><head>", b"<!-- x --><HTML>"],
    "Pascal VOC's": [b"<annotation>\n<folder>", b'<?xml version="1.0"?>\n<annotation>'],
    "XML": [b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', b"<svg>"],
    "YOLO's": [b"0 0.5 0.5 0.1 0.1\n", b"2 .5 .5 .25 1\r\n11 0 1 1e-3 .2\r\n"],
    "CSV": [b"name,raw_caption\na.jpg,x\n", b"a;b;c\n1;2;3\n", b"name\tlabel\nx\ty\n"],
    "YAML": [b"name: a.jpg\nlabels:\n", b"# note\n---\na: 1\n", b"- name: a\n"],
    "TOML": [b"[labels]\nname = 1\n", b"name = 'a'\n"],
    "Python's notation": [b"[{'name': 'a.jpg'}]", b"{'name': 1}"],
    "COCO's format": [b'{"info": {}, "images": [], "annotations": [], "categories": [{"name": "car"}]}'],
    "COCO's results": [b'[{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}]'],
    "LabelMe": [b'{"version": "5", "shapes": [], "imagePath": "a.jpg"}'],
    "metadata file of the hub": [b'{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b.jpg", "text": "y"}\n'],
    "server's message": [b'{"code": 401, "message": "Unauthenticated"}'],
}


@pytest.mark.parametrize("name", ["labels.json", "labels.json.gz", "labels.zip"])
@pytest.mark.parametrize(
    ("what", "data"), [pytest.param(what, data, id=what) for what, samples in NAMED.items() for data in samples]
)
def test_what_is_no_label_file_is_named_for_what_it_is(tmp_path, what, data, name):
    data = pack("a/b.json", data) if name == "labels.zip" else gzip.compress(data) if name.endswith("gz") else data
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as raised:
        read(tmp_path / name)
    assert what in str(raised.value) and name in str(raised.value)
    assert "complete" not in str(raised.value)
    if name == "labels.zip":
        assert "b.json" in str(raised.value)


@pytest.mark.parametrize("text", [TEXT, LINES, WRAPPED])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["labels.json", "labels.json.gz", "labels.zip"])
@pytest.mark.parametrize("piece", [2**9, 2**22])
def test_damage_is_told_with_its_byte_and_only_a_short_file_is_called_incomplete(
    tmp_path, monkeypatch, piece, name, mark, text
):
    monkeypatch.setattr(label_files, "PIECE", piece)
    monkeypatch.setattr(label_files, "_run_jobs", map)
    data = mark + text.encode()
    at = data.index(b'"category"', len(data) // 2)

    def fail(data):
        packed = {"labels.json": bytes, "labels.json.gz": gzip.compress, "labels.zip": lambda x: pack("m.json", x)}
        (tmp_path / name).write_bytes(packed[name](data))
        with pytest.raises(UserError) as raised:
            read(tmp_path / name)
        return str(raised.value)

    for odd in (b"?", b'"\xff'):
        damaged = data[:at] + odd + data[at + len(odd) :]
        error = fail(damaged)
        assert f"at byte {at + len(odd) - 1:,} of {len(data):,}" in error and "complete" not in error
        assert ("m.json" in error) == (name == "labels.zip")
    error = fail(data[:at])
    assert f"at byte {at:,} of {at:,}" in error and "is the download complete?" in error


def test_hidden_files_and_those_of_macos_are_passed_over(tmp_path):
    (tmp_path / "labels").mkdir()
    copies = {"labels.json": TEXT, "._labels.json": "\0\5\x16\7", "__MACOSX/labels.json": "x", ".old/labels.json": "x"}
    with zipfile.ZipFile(tmp_path / "labels.zip", "w") as archive:
        for name, text in copies.items():
            archive.writestr(name, text)
            (tmp_path / "labels" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "labels" / name).write_text(text)
    for name in ("labels", "labels.zip"):
        names, report = read(tmp_path / name)
        assert (len(names), report.skipped.total()) == (40, 0)


@pytest.mark.parametrize(
    ("file", "data", "what"),
    [
        ("a.txt", b"0 0.5 0.5 0.1 0.1\n", "YOLO's"),
        ("a.xml", b"<annotation>", "VOC's"),
        ("a.parquet", b"PAR1", "Parquet"),
    ],
)
def test_a_folder_of_other_labels_is_named(tmp_path, file, data, what):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=rf"no \.json file in this folder.*{file} .*{what}"):
        read(tmp_path)


def test_a_foreign_file_beside_labels_is_left_out_and_named(tmp_path):
    (tmp_path / "labels.json").write_text(TEXT)
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    names, report = read(tmp_path)
    assert len(names) == 40
    [(reason, listed)] = report.listed.items()
    assert "COCO's format" in reason and listed == ["in coco.json"]


@pytest.mark.parametrize("piece", [2**9, 2**22])
def test_a_frame_whose_name_repeats_is_counted_once(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(label_files, "PIECE", piece)
    monkeypatch.setattr(label_files, "_run_jobs", map)
    (tmp_path / "a.json").write_text(TEXT)
    twice = [{**frame, "attributes": {**SCENE, "weather": "snowy"}} for frame in FRAMES[:7]]
    (tmp_path / "b.json").write_text(json.dumps(twice + list_frames(5, 100) + list_frames(2, 100)))
    names, report = read(tmp_path)
    assert len(names) == len(set(names)) == report.frames == 45
    assert report.skipped == {"its name came before, the first frame of a name is used": 9}
    assert report.attributes["weather"] == {"clear": 45}
    assert report.objects.total() == 3 * 45
    assert report.boxes_a_frame == {3: 45}


# --------------------------------------------------------------------------------------------------------------
# large files, and folders of many


def note_sizes(monkeypatch):
    sizes, real = [], label_files.decode_frames
    monkeypatch.setattr(label_files, "decode_frames", lambda data: sizes.append(len(data)) or real(data))
    return sizes


@pytest.mark.parametrize("name", ["labels.json", "labels.json.gz", "labels.zip"])
@pytest.mark.parametrize("opening", ['{"frames": [', '\ufeff {\n "frames" : ['])
def test_a_wrapper_is_read_in_pieces(tmp_path, monkeypatch, name, opening):
    monkeypatch.setattr(label_files, "PIECE", 2**9)
    monkeypatch.setattr(label_files, "_run_jobs", map)
    sizes = note_sizes(monkeypatch)
    data = WRAPPED.replace('{"frames": [', opening, 1).encode()
    data = {"labels.zip": lambda: pack("m.json", data), "labels.json.gz": lambda: gzip.compress(data)}.get(
        name, lambda: data
    )()
    (tmp_path / name).write_bytes(data)
    names, report = read(tmp_path / name)
    assert names == [frame["name"] for frame in FRAMES]
    assert report.variants == {"Scalabel wrapper": 40} and not report.skipped
    assert max(sizes) < 4 * 2**9 < len(WRAPPED)


@pytest.mark.parametrize("rest", ['"categories": [{}]}}', '"config": {{"categories": [{}]}}}}'])
def test_what_follows_the_frames_of_a_wrapper_is_taken_for_no_frame(tmp_path, monkeypatch, rest):
    """However much it looks like frames: a cut within it is noticed, and the file then read as a whole."""
    monkeypatch.setattr(label_files, "PIECE", 2**9)
    monkeypatch.setattr(label_files, "_run_jobs", map)
    others = ", ".join(json.dumps(frame) for frame in list_frames(30, 100))
    (tmp_path / "labels.json").write_text(f'{{"frames": {TEXT}, ' + rest.format(others))
    names, report = read(tmp_path / "labels.json")
    assert names == [frame["name"] for frame in FRAMES]
    assert (report.frames, report.skipped.total()) == (40, 0)


@pytest.mark.parametrize(
    ("name", "size", "is_large"), [("a.json", 10, True), ("a.json", 8, False), ("a.json.gz", 1, True)]
)
def test_a_file_that_is_read_whole_is_large_by_what_it_takes(monkeypatch, name, size, is_large):
    monkeypatch.setattr(label_files, "PIECE", 4)
    assert label_files._is_large(label_files._Job(label_files.Path(name), size)) == is_large
    assert not label_files._is_large(label_files._Job(label_files.Path(name), size, 0, size))  # a stretch


def test_an_archive_is_large_by_its_largest_member(monkeypatch):
    monkeypatch.setattr(label_files, "PIECE", 4)
    members = [label_files._Member("a.json", 0, 1, size, 0, 0, 0) for size in (1, 9, 1)]
    job = label_files._Job(label_files.Path("a.zip"), 3, members=tuple(members))
    assert label_files._is_large(job) and not label_files._is_large(job._replace(members=tuple(members[:1])))


def wait_where_it_is_large(job):
    """Tells when it began and ended."""
    began = time.monotonic()
    time.sleep(0.1)
    return label_files._Result([(str(job.path), (began, time.monotonic()))], 1, LabelReport())


def test_of_large_files_that_cannot_be_cut_one_is_read_at_a_time(monkeypatch):
    monkeypatch.setattr(label_files.os, "sched_getaffinity", lambda _: range(4), raising=False)
    for size, at_once in ((3 * label_files.PIECE, False), (label_files.PIECE, True)):
        jobs = [label_files._Job(label_files.Path(f"{number}.json"), size) for number in range(4)]
        times = [result.frames[0][1] for result in label_files._run_jobs(wait_where_it_is_large, jobs)]
        times.sort()
        assert all(end <= began for (_, end), (began, _) in itertools.pairwise(times)) != at_once


def fail_at_the_third(job):
    if job.path.name == "2.json":
        raise ZeroDivisionError("by a frame")
    return label_files._Result([], 0, LabelReport())


def test_what_went_wrong_in_a_process_is_said():
    jobs = [label_files._Job(label_files.Path(f"{number}.json"), label_files.PIECE) for number in range(4)]
    with pytest.raises(UserError, match=r"failed at 2\.json.*\(ZeroDivisionError: by a frame\)") as raised:
        list(label_files._run_jobs(fail_at_the_third, jobs))
    assert "killed" not in str(raised.value)


def test_labels_are_read_by_processes_that_were_not_forked(tmp_path, monkeypatch):
    """And that don't import the script, as spawned processes do by themselves: it has torch to import."""
    monkeypatch.setattr(label_files, "pick_start", lambda: "spawn")
    monkeypatch.setattr(label_files, "PIECE", 2**11)
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    (tmp_path / "script.py").write_text("raise SystemExit('imported')")
    monkeypatch.setitem(sys.modules, "__main__", script)
    (tmp_path / "a.json").write_text(TEXT)
    assert len(read(tmp_path / "a.json")[0]) == 40
    assert sys.modules["__main__"] is script


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch):
    (tmp_path / "labels.json").write_text(TEXT)
    (tmp_path / "more").mkdir()
    real = label_files.os.scandir

    def scandir(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(label_files.os, "scandir", scandir)
    with pytest.raises(UserError, match=r"more: can't be read \(Permission denied\)"):
        read(tmp_path)


def test_a_folder_of_files_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(label_files, "_read_head", refuse)
    with pytest.raises(UserError, match=r"no \.json file in this folder but 1 others, as a\.txt; "):
        read(tmp_path)


def test_a_hidden_folder_is_not_entered(tmp_path, monkeypatch):
    (tmp_path / "labels.json").write_text(TEXT)
    (tmp_path / ".git").mkdir()
    entered, real = [], label_files.os.scandir
    monkeypatch.setattr(label_files.os, "scandir", lambda path: entered.append(str(path)) or real(path))
    read(tmp_path)
    assert entered == [str(tmp_path)]


def test_bytes_are_decoded_where_they_lie(monkeypatch):
    data, seen = bytearray(b"\xef\xbb\xbf" + TEXT.encode()), []
    real = frames._Decoders.decode
    monkeypatch.setattr(frames._Decoders, "decode", lambda self, part: seen.append(part) or real(self, part))
    assert len(decode_frames(data)[0]) == 40
    assert all(part.obj is data for part in seen)


@pytest.mark.parametrize("size", [2**9, 2**10, 2**11])
def test_a_file_that_was_cut_within_a_frame_is_read_on_without_losing_or_repeating_one(tmp_path, monkeypatch, size):
    monkeypatch.setattr(label_files, "PIECE", size)
    monkeypatch.setattr(label_files, "_run_jobs", map)
    odd = list_frames(40)
    odd[25]["visits"] = [{"at": 7}, {"name": "looks like a frame"}] * 60  # more than a stretch of them
    (tmp_path / "labels.json").write_text(json.dumps(odd))
    names, report = read(tmp_path / "labels.json")
    assert names == [frame["name"] for frame in odd]
    assert (report.frames, report.skipped.total()) == (40, 0)
