"""Captions files of all kinds, good and bad ones."""

import json
from pathlib import Path

import pytest

from captioner.data import caption_files
from captioner.data.caption_files import read_captions
from captioner.runtime.errors import UserError

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 7, "file_name": "COCO_7.jpg"}, {"id": 9, "file_name": "COCO_9.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A cat sleeps. "},
        {"id": 2, "image_id": 9, "caption": "A dog runs."},
        {"id": 3, "image_id": 7, "caption": "The cat\nis grey."},
    ],
}
# what is in the file, and the (name, caption) rows that it holds
GOOD = {
    "comma.csv": ("name,raw_caption\na.jpg,One.\nb.jpg,Two\n", [("a.jpg", "One."), ("b.jpg", "Two")]),
    "bytes mark and semicolons.csv": (
        "\ufeffImage; Caption \r\n\"ü b.jpg\";\"One, two;\r\nthree\"\r\n\r\na.jpg;Ω\r\n",
        [("ü b.jpg", "One, two; three"), ("a.jpg", "Ω")],
    ),
    "tabs.tsv": ("id\tfile_name\ttext\t\t\n1\tsub/a.jpg\tA, b\t\t\n", [("sub/a.jpg", "A, b")]),
    "windows.csv": ("image_id,caption\nsub\\a.jpg,One\n.\\b.jpg,Two\n", [("sub/a.jpg", "One"), ("b.jpg", "Two")]),
    "several.csv": ("name,caption\na.jpg,One\na.jpg,Two\n", [("a.jpg", "One"), ("a.jpg", "Two")]),
    "lines.jsonl": (
        '{"file_name": "a.jpg", "text": "One"}\n\n{"file_name": 12, "text": ["Two", "Three"]}\n',
        [("a.jpg", "One"), ("12", "Two"), ("12", "Three")],
    ),
    "rows.json": ('[{"image": "a.jpg", "caption": "One"}]', [("a.jpg", "One")]),
    "captions_val2014.json": (
        json.dumps(COCO),
        [("COCO_7.jpg", "A cat sleeps."), ("COCO_9.jpg", "A dog runs."), ("COCO_7.jpg", "The cat is grey.")],
    ),
    "Flickr8k.token.txt": (
        '1_a.jpg#0\tA "cat sleeps .\n1_a.jpg#1\tThe cat is grey .\n2_b.jpg#0\tA dog runs .\n',
        [("1_a.jpg", 'A "cat sleeps .'), ("1_a.jpg", "The cat is grey ."), ("2_b.jpg", "A dog runs .")],
    ),
}  # fmt: skip


def write(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


@pytest.mark.parametrize("name", GOOD)
def test_each_kind_of_captions_file_is_read(tmp_path, name):
    text, rows = GOOD[name]
    table = read_captions(write(tmp_path, name, text))
    assert list(zip(table["name"], table["caption"], strict=True)) == rows
    assert (tmp_path / name).read_bytes() == text.encode()
    assert not table["split"].any() and not table["group"].any()


def test_splits_and_groups_are_read(tmp_path):
    text = "name,caption,Split,video\na.jpg,One,Train,1\nb.jpg,Two,dev,2\nc.jpg,Three,test,2\na.jpg,Four,training,1\n"
    table = read_captions(write(tmp_path, "c.csv", text), "Video")
    assert table["split"].tolist() == ["train", "val", "test", "train"]
    assert table["group"].tolist() == ["1", "2", "2", "1"]
    with pytest.raises(UserError, match=r"c\.csv: has no column ride; its columns are name, caption, split, video"):
        read_captions(tmp_path / "c.csv", "ride")


def test_an_image_folder_is_read_with_its_splits(tmp_path):
    write(tmp_path, "metadata.csv", "file_name,text\ntrain/a.jpg,One\n")
    assert read_captions(tmp_path)["name"].tolist() == ["train/a.jpg"]
    (tmp_path / "metadata.csv").unlink()
    for split in ("train", "validation", "test"):
        write(tmp_path, f"{split}/metadata.jsonl", json.dumps({"file_name": "a.jpg", "text": split}))
    table = read_captions(tmp_path)
    assert dict(zip(table["name"], table["split"], strict=True)) == {
        "train/a.jpg": "train",
        "validation/a.jpg": "val",
        "test/a.jpg": "test",
    }
    write(tmp_path, "test/metadata.csv", "file_name,text\na.jpg,x\n")
    with pytest.raises(UserError, match=r"metadata\.csv: metadata\.jsonl lies beside it"):
        read_captions(tmp_path)
    with pytest.raises(UserError, match=r"a folder without metadata\.csv or metadata\.jsonl"):
        read_captions(write(tmp_path / "empty", "a.txt", "").parent)


def test_rows_without_a_caption_are_left_out_and_told(tmp_path, capsys):
    table = read_captions(write(tmp_path, "c.csv", 'name,caption\na.jpg," "\n"b.jpg","One\nline"\nc.jpg,\n\n'))
    assert table["name"].tolist() == ["b.jpg"]
    assert "c.csv: 2 rows have no caption and are left out (line 2, 5)" in capsys.readouterr().out


def test_rows_of_unknown_splits_are_left_out_and_told(tmp_path, capsys):
    rows = [("a.jpg", "train"), ("b.jpg", "restval"), ("c.jpg", None), ("d.jpg", "test"), ("e.jpg", "restval")]
    lines = [json.dumps({"name": name, "caption": "x", "split": split}) for name, split in rows]
    table = read_captions(write(tmp_path, "c.jsonl", "\n".join(lines)))
    assert list(zip(table["name"], table["split"], strict=True)) == [("a.jpg", "train"), ("d.jpg", "test")]
    told = "3 rows are of splits other than train, val and test ('restval', '') and are left out (line 2, 3, 5)"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(("key", "left"), [("name", None), ("caption", ["a.jpg"]), ("video", ["a.jpg", "b.jpg"])])
def test_null_among_texts_is_an_empty_text(tmp_path, key, left):
    row = {"name": "b.jpg", "caption": "x", "video": "1"}
    path = write(tmp_path, "c.jsonl", "\n".join(map(json.dumps, [row | {"name": "a.jpg"}, row | {key: None}])))
    if left is None:
        with pytest.raises(UserError, match="line 2: it has no image; found 'x'"):
            read_captions(path, "video")
    else:
        assert read_captions(path, "video")["name"].tolist() == left


LONG = "x" * 10_000_000
BAD = {
    "empty": ("", r"line 1: found nothing \(it is empty\); wanted the titles of an image column \(name, file_name"),
    "other titles": ("photo,words\na.jpg,x\n", "line 1: found photo, words; wanted .*raw_caption, caption, text"),
    "title twice": ("name,text,Text\na.jpg,x,y\n", "line 1: two columns are titled 'text'"),
    "no rows": ("name,caption\n", "no captions in it"),
    "no caption": ("name,raw_caption\na.jpg\n", "no captions in it"),
    "no image": ('name,caption\na.jpg,"x\ny"\n,z\n', "line 4: it has no image; found 'z'"),
    "parent": ("name,caption\n../a.jpg,x\n", r"line 2: an image is named by its path below .*'\.\./a\.jpg'"),
    "absolute": ("name,caption\na.jpg,x\n/b.jpg,x\n", "line 3: an image is named"),
    "drive": ("name,caption\nC:\\b.jpg,x\n", "line 2: an image is named"),
    "address": ("name,caption\nhttps://host/b.jpg,x\n", "line 2: an image is named"),
    "control": ("name,caption\na\x1b.jpg,x\n", r"line 2: an image is named .*x1b"),
    "bare comma": ('name,caption\nb.jpg,"q\nr"\na.jpg,red, green\n', "line 4: 3 fields, and the first line has 2"),
    "bare commas": ("name,caption\na.jpg,red, green\nb.jpg,x, y\n", "line 2: 3 fields, and the first line has 2"),
    "open quote": ('name,caption\na.jpg,x\nb.jpg,"x\nc.jpg,x\n', "line 3: a quote is opened there and never closed"),
    "open long quote": ('name,caption\nb.jpg,"' + LONG, "line 2: a quote is opened there"),
    "10 MB": (f"name,caption\na.jpg,x\nb.jpg,{LONG}\n", "line 3: a caption has at most 10,000 characters; found 'xx"),
    "other split": ("name,caption,split\na.jpg,x,restval\n", "line 2: a split is one of train, .*; found 'restval'"),
    "two splits": ("name,caption,split\na.jpg,x,test\na.jpg,y,dev\n", "line 3: its image has another split above"),
    "labels": ('[{"name": "a.jpg", "labels": []}]', "these are BDD100K's labels, no captions; give them with --labels"),
    "boxes of COCO": ('{"images": [], "annotations": [{"bbox": []}]}', "COCO's captions must have images with id"),
    "instances of COCO": (json.dumps(COCO | {"annotations": [{"image_id": 7}]}), "no caption: .* captions_"),
    "unknown image": (json.dumps(COCO | {"images": [{"id": 7, "file_name": "a"}]}), "annotation 2: no image .* id 9"),
    "broken line": ('{"name": "a.jpg", "text": "x"}\n{"name": "b', "line 2: wanted an object with an image and a text"),
    "list line": ('{"name": "a.jpg", "text": "x"}\n[1]\n', r"line 2: wanted an object .*found '\[1\]"),
    "other keys": ('{"path": "a.jpg", "text": "x"}\n', "no column one of name, file_name, .* path, text"),
    "object": ('{"name": "a.jpg", "text": {"a": 1}}\n', "row 1: its caption is no text; found"),
    "image bytes": ('{"image": {"bytes": ""}, "text": "x"}\n', "row 1: its name is no text; found"),
    "numbers": ("[1, 2]", "wanted rows of"),
    "UTF-16": ("name,caption\na.jpg,x\n".encode("utf-16"), "it is UTF-16 text; .* is wanted, in UTF-8"),
    "latin 1": ("name,caption\na.jpg,ü\n".encode("latin-1"), "captions are read in UTF-8"),
    "Excel": (b"PK\x03\x04" + bytes(range(256)), "it is a zip archive; a CSV, a tab-separated file or JSON lines"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_with_a_captions_file_is_told(tmp_path, what):
    content, message = BAD[what]
    path = write(tmp_path, "c.csv", content)
    with pytest.raises(UserError, match=rf"(?s)c\.csv.*{message}") as raised:
        read_captions(path)
    assert len(str(raised.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


def test_a_captions_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"c\.csv: no such captions file"):
        read_captions(tmp_path / "c.csv")


def test_labels_are_known_by_their_head(tmp_path, monkeypatch):
    """They may be 1.4 GB: no more of them is read."""
    monkeypatch.setattr(caption_files, "_read_json", None)
    with pytest.raises(UserError, match="BDD100K's labels"):
        read_captions(
            write(tmp_path, "labels.json", b'\xef\xbb\xbf[\n {"name": "a.jpg", "labels": [' + b"{}," * 99_999)
        )
