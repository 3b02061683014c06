"""Splits by ride, the captions CSV and the index of images."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.data.examples import Example
from captioner.data.image_decoding import open_image
from captioner.data.image_files import find_images, index_images, locate_images, match_images, name_images, tell_once
from captioner.data.label_captions import write_captions
from captioner.data.splits import (
    choose_examples,
    find_images_root,
    is_frame_name,
    prepare_splits,
    read_split,
    ride_of,
    split_by_ride,
    write_splits,
)
from captioner.runtime.errors import UserError
from captioner.scoring.predictions import Prediction, find_ride
from config import EvalConfig, TrainConfig, make_config

SHARES = {"train": 0.6, "val": 0.28, "test": 0.12}
rides = st.dictionaries(st.integers(0, 2**32 - 1), st.integers(1, 9), min_size=3, max_size=60)


def save_split(folder, examples):
    """As main.py does: the root of the images is in the run's record."""
    splits = {"test": examples}
    write_splits(folder / "split.csv", splits)
    (folder / "run.json").write_text(
        json.dumps({"config": {"model": "m"}, "images_root": str(find_images_root(splits))})
    )


def names_of(rides):
    return [f"{ride:08x}-{frame:08x}.jpg" for ride, frames in rides.items() for frame in range(frames)]


@given(rides, st.integers(0, 3), st.randoms())
def test_no_ride_is_in_two_splits(rides, seed, rng):
    names = names_of(rides)
    splits = split_by_ride(names, SHARES, seed)
    assert sorted(name for split in SHARES for name in splits[split]) == sorted(names)
    assert all(splits[split] for split in SHARES)
    of_split = [{ride_of(name) for name in splits[split]} for split in SHARES]
    assert sum(map(len, of_split)) == len(rides)
    rng.shuffle(names)
    assert split_by_ride(names, SHARES, seed) == splits  # whatever the order of the labels


def test_shares_are_those_of_the_reference():
    names = names_of(dict.fromkeys(range(10_000), 1))
    splits = split_by_ride(names, SHARES, seed=42)
    assert [len(splits[split]) for split in SHARES] == [6000, 2800, 1200]
    assert split_by_ride(names, SHARES, seed=43) != splits


def test_two_rides_cannot_be_split():
    with pytest.raises(UserError, match=r"2 rides.*the part of its name before the first \"-\" \(a, b\)"):
        split_by_ride(["a-1.jpg", "a-2.jpg", "b-1.jpg"], SHARES, 42)


@pytest.mark.parametrize("name", ["video{0}_frame_{1:04d}.jpg", "2021-05-{0:02d}_12-00-{1}.jpg", "{0}{1}-0.png"])
def test_names_that_tell_no_ride_are_said_to_leak(name, capsys):
    names = [name.format(video, frame) for video in range(4) for frame in range(9)]
    try:
        split_by_ride(names, SHARES, 42)
        assert "note: 36 of 36 names" in capsys.readouterr().out
    except UserError as error:
        assert "the part of its name before the first" in str(error)


def test_names_of_bdd100k_need_no_warning(capsys):
    split_by_ride([f"0000000{ride}-00001ef{frame}.jpg" for ride in range(4) for frame in range(9)], SHARES, 42)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "is_frame"),
    [
        ("b1c66a40-6f7d68ca.jpg", True),
        ("b1c66a40-6f7d68ca-0000001.jpg", True),  # of a tracking set
        ("b1c66a40-6f7d68ca/b1c66a40-6f7d68ca-0000001.jpg", True),
        ("B1C66A40-6F7D68CA_flipped.png", True),
        ("b1c66a40-6f7d-68ca-9a0b-0123456789ab.jpg", False),
        ("b1c66a40-6f7d68ca0.jpg", False),
    ],
)
def test_names_of_bdd100k_tell_their_ride(name, is_frame):
    assert is_frame_name(name) is is_frame
    assert ride_of(name) == "b1c66a40"
    assert find_ride(Prediction(name, "", [])) == ("b1c66a40" if is_frame else name)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def rows():
        yield "a.jpg", "There is one car."
        raise RuntimeError

    file = tmp_path / "captions.csv"
    file.write_text("old")
    with pytest.raises(RuntimeError):
        write_captions(file, rows())
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_images_are_found_at_any_depth(tmp_path):
    for name in ("train/trainB/b.jpg", "train/trainA/a.jpg", "z/c.JPG", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = {"a.jpg": tmp_path / "train/trainA/a.jpg", "b": tmp_path / "train/trainB/b.jpg"}
    assert locate_images(["a.jpg", "b", "d.jpg"], tmp_path) == wanted
    paths = ["train/trainA/a.jpg", "train/b.jpg", "b.jpg"]
    assert locate_images(paths, tmp_path) == {paths[0]: wanted["a.jpg"]}  # where a name has a folder, all are paths


def test_names_that_several_images_have_are_listed(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"1 names .*\n  1\.jpg: {tmp_path}/a/1\.jpg, {tmp_path}/b/1\.jpg$"):
        locate_images(["1.jpg", "2.jpg"], tmp_path)
    with pytest.raises(UserError, match=r"\n  2: .*2\.jpg, .*2\.png$"):
        locate_images(["2"], tmp_path)
    assert locate_images(["2.jpg"], tmp_path) == {"2.jpg": tmp_path / "b/2.jpg"}
    assert len(locate_images(["a/1.jpg", "b/1.jpg"], tmp_path)) == 2


def test_a_name_in_either_form_of_unicode_finds_its_image(tmp_path):
    (tmp_path / "Stra\u00dfe e\u0301t\u00e9").mkdir()
    image = tmp_path / "Stra\u00dfe e\u0301t\u00e9/a \u732b.jpg"
    image.touch()
    name = "Stra\u00dfe \u00e9te\u0301/a \u732b.jpg"
    assert locate_images([name], tmp_path) == {name: image}


def tabulate(captions):
    return pd.DataFrame(captions, columns=["name", "caption"]).assign(split="", group="")


def test_an_image_that_captions_name_twice_is_refused(tmp_path):
    """It might be trained on and tested on."""
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg: captions name it 'a\.jpg' and 'a'; give it one name"):
        match_images(tabulate([("a.jpg", "x"), ("a", "y")]), tmp_path)


def test_captions_that_another_script_wrote_are_not_overwritten(drawn, tmp_path):
    """As those of eval.py --images, under the --run-name that training is given."""
    (tmp_path / "captions.csv").write_text("name,prediction\na.jpg,A car.\n")
    config = make_config(TrainConfig, labels=(drawn / "labels.json",), images=drawn / "images")
    with pytest.raises(UserError, match=r"--run-name .*captions\.csv: is there, and is no file of captions made from"):
        prepare_splits(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


def test_an_image_is_named_by_its_path_and_its_file_name(tmp_path):
    paths = [tmp_path / name for name in ("1.jpg", "a/1.jpg", "a/2.jpg", "b/3.jpg", "c/3.jpg")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    named = {str(path.relative_to(tmp_path)): path for path in paths} | {"2.jpg": paths[2]}  # two are called 3.jpg
    assert name_images([tmp_path]) == name_images([tmp_path, paths[0]]) == named
    assert name_images([tmp_path / "b", tmp_path / "c"]) == {}


def test_an_image_that_is_given_twice_is_captioned_once(tmp_path):
    (tmp_path / "a").mkdir()
    for image in (tmp_path / "1.jpg", tmp_path / "a/1.jpg"):
        image.touch()
    assert find_images([tmp_path / "1.jpg", tmp_path / "1.jpg"]) == [("1.jpg", tmp_path / "1.jpg")]
    with pytest.raises(UserError, match=r"a/1\.jpg: 1\.jpg came before; give the folder above both"):
        find_images([tmp_path / "1.jpg", tmp_path / "a/1.jpg"])


def test_captions_without_an_image_are_counted(tmp_path, capsys):
    (tmp_path / "a.jpg").touch()
    captions = tabulate([("a.jpg", "x"), ("b.jpg", "y"), ("a.jpg", "z")])
    [example] = match_images(captions, tmp_path)
    assert (example.name, example.captions) == ("a.jpg", ("x", "z"))
    assert "1 of 2 captioned images are not in" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"1 of 2 captioned images .*more than 5%: .*The first: b\.jpg"):
        match_images(captions, tmp_path, 0.05)
    with pytest.raises(UserError, match=r"none of the 1 captioned images.*b\.jpg"):
        match_images(tabulate([("b.jpg", "y")]), tmp_path)
    with pytest.raises(UserError, match=r"a\.png, for one, is not .*; a\.jpg is: give both one suffix"):
        match_images(tabulate([("a.png", "y")]), tmp_path)
    with pytest.raises(UserError, match=rf"none of .*; give the folder .* with --images {tmp_path.parent}$"):
        match_images(tabulate([(f"{tmp_path.name}/a.jpg", "y")]), tmp_path)
    with pytest.raises(UserError, match=r"none of .*; give the folder that belongs to the captions with --images$"):
        match_images(tabulate([("elsewhere/a.jpg", "y")]), tmp_path)


def test_copies_that_programs_keep_are_no_images(tmp_path):
    for name in ("a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/b.jpg", "._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert index_images(tmp_path) == {"a.jpg": [tmp_path / "a.jpg"]}


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(UserError, match="no image"):
        index_images(tmp_path)
    with pytest.raises(UserError, match=r"^--images .*missing: no such folder; give the folder with the images$"):
        index_images(tmp_path / "missing")


@pytest.fixture
def told(capsys):
    """What was printed; what is printed once is printed again."""
    tell_once.cache_clear()
    return lambda: capsys.readouterr().out


LISTINGS = [index_images, lambda folder: dict(find_images([folder]))]


@pytest.mark.parametrize("listing", LISTINGS)
def test_links_that_lead_out_are_counted_and_named(tmp_path, told, listing):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/a.jpg").touch()
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset/a.jpg").symlink_to("../scenes/a.jpg")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to("../scenes")
    for folder, kind in (("subset", "images"), ("data", "folders")):
        message = rf"1 {kind} are links that lead out .*: give the folder that they lead to, {tmp_path / 'scenes'}$"
        with pytest.raises(UserError, match=message):
            listing(tmp_path / folder)
        (tmp_path / folder / "b.png").touch()
        assert list(listing(tmp_path / folder)) == ["b.png"]
        assert f"1 {kind} are links" in told()


@pytest.mark.parametrize("listing", LISTINGS)
def test_links_of_a_hub_snapshot_into_its_own_blobs_are_read(tmp_path, listing):
    for repository in ("datasets--a--b", "datasets--c--d"):
        images = tmp_path / repository / "snapshots/abc/data/images"
        images.mkdir(parents=True)
        (tmp_path / repository / "blobs").mkdir()
        (tmp_path / repository / "blobs/1").touch()
        (images / "own.jpg").symlink_to("../../../../blobs/1")
        (images / "foreign.jpg").symlink_to(tmp_path / "datasets--a--b/blobs/1")
    assert list(listing(images)) == ["own.jpg"]


def test_an_image_behind_a_link_is_in_the_split_by_its_own_name(tmp_path):
    (tmp_path / "1").touch()
    (tmp_path / "a.jpg").symlink_to("1")
    save_split(tmp_path, [Example("a.jpg", tmp_path / "a.jpg", "A car.")])
    assert [example.image for example in read_split(tmp_path, "test")] == [tmp_path / "a.jpg"]


@pytest.mark.parametrize("listing", LISTINGS)
def test_images_of_other_kinds_are_counted_and_named(tmp_path, told, listing):
    for name in ("b.webp", "c.bmp", "d.TIFF", "._e.jpg", "notes.txt"):
        (tmp_path / name).touch()
    message = r"3 images of other kinds \(.webp, .bmp, .tiff\) are passed over: convert them"
    with pytest.raises(UserError, match=message):
        listing(tmp_path)
    (tmp_path / "a.jfif").touch()
    assert list(listing(tmp_path)) == ["a.jfif"]
    assert "3 images of other kinds (.webp, .bmp, .tiff)" in told()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"RIFF....WEBPVP8 ", "WebP"),
        (b"....ftypheic", "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"RIFF....AVI ", "video"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"", "empty"),
    ],
)
def test_what_only_has_the_name_of_a_jpeg_is_named(tmp_path, content, kind):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jpg: not readable as an image \(it is .*{kind}"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "Truncated File Read"),  # what is wrong with a JPEG the decoder knows
        (b"\x02, \x01;\n", "cannot identify image file"),  # bytes that are no text are no table
    ],
)
def test_what_a_file_can_only_be_mistaken_for_is_not_told(tmp_path, content, said):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.jpg: not readable as an image \({said}"):
        open_image(tmp_path / "a.jpg")


def test_images_that_were_moved_are_found_in_their_new_folder(tmp_path, capsys):
    examples = [Example(f"{name}.jpg", tmp_path / f"old/{name}.jpg", name) for name in "abc"]
    save_split(tmp_path, examples)
    with pytest.raises(UserError, match=r"split\.csv: its images are gone, .*old/.*--images-root"):
        choose_examples(make_config(EvalConfig, adapter=tmp_path))
    (tmp_path / "new/deep").mkdir(parents=True)
    (tmp_path / "new/d.jpg").touch()
    config = make_config(EvalConfig, adapter=tmp_path, images_root=tmp_path / "new")
    with pytest.raises(UserError, match=r"--images-root .*new: none of the 3 images"):
        choose_examples(config)
    for name in "ab":
        (tmp_path / f"new/deep/{name}.jpg").touch()
    found, left_out = choose_examples(config)
    assert sorted(found) == [Example(f"{name}.jpg", tmp_path / f"new/deep/{name}.jpg", name) for name in "ab"]
    assert left_out == {"images not in --images-root": 1}
    assert "1 of 3 images are not in" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--images-root .*nope: no such folder; give the folder with the images$"):
        choose_examples(make_config(EvalConfig, adapter=tmp_path, images_root=tmp_path / "nope"))


def test_a_split_has_all_captions_and_the_group_and_its_images_by_folder(tmp_path):
    for name in ("x/1.jpg", "y/1.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).touch()
    examples = [
        Example("x/1.jpg", tmp_path / "images/x/1.jpg", "A cat,\u00df.", "g1", ('A "cat".', "Cat")),
        Example("y/1.jpg", tmp_path / "images/y/1.jpg", "A dog.", "g2"),
    ]
    (tmp_path / "adapter").mkdir()
    save_split(tmp_path / "adapter", examples)
    assert str(tmp_path) not in (tmp_path / "adapter/split.csv").read_text()
    assert read_split(tmp_path / "adapter", "test") == examples
    (tmp_path / "images").rename(tmp_path / "moved")
    moved, left_out = choose_examples(EvalConfig(adapter=tmp_path / "adapter", images_root=tmp_path / "moved"))
    assert sorted(moved) == read_split(tmp_path / "adapter", "test", tmp_path / "moved") and not left_out
    assert [example.image for example in sorted(moved)] == [tmp_path / "moved/x/1.jpg", tmp_path / "moved/y/1.jpg"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_split_of_absolute_paths_is_read(tmp_path, mark):
    """As it was written before it had a root; also as Excel saves it."""
    content = f"{mark}name,split,image,raw_caption\na.jpg,test,/images/a.jpg,A car.\n"
    (tmp_path / "split.csv").write_text(content, encoding="utf-8")
    assert read_split(tmp_path, "test") == [Example("a.jpg", Path("/images/a.jpg"), "A car.")]


def test_the_sample_is_the_same_where_moved_images_are_missing(tmp_path):
    names = [f"{number}.jpg" for number in range(20)]
    save_split(tmp_path, [Example(name, tmp_path / name, name) for name in names])
    (tmp_path / "all").mkdir()
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / "all" / name).touch()
    sample, _ = choose_examples(EvalConfig(adapter=tmp_path, num_samples=5))
    config = EvalConfig(adapter=tmp_path, num_samples=5, images_root=tmp_path / "all")
    moved, left_out = choose_examples(config)
    assert [example.name for example in moved] == [example.name for example in sample] and not left_out
    (tmp_path / "all" / sample[2].name).unlink()
    fewer, left_out = choose_examples(config)
    assert [example.name for example in fewer] == [sample[place].name for place in (0, 1, 3, 4)]
    assert left_out == {"images not in --images-root": 1}
