"""Splits by ride, the captions CSV and the index of pictures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.data.captions import read_captions, write_captions
from captioner.data.images import index_images, match_images
from captioner.data.splits import ride_of, split_by_ride
from captioner.runtime.errors import UserError

SHARES = {"train": 0.6, "val": 0.28, "test": 0.12}
rides = st.dictionaries(st.integers(0, 2**32 - 1), st.integers(1, 9), min_size=3, max_size=60)


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
    with pytest.raises(UserError, match="2 rides"):
        split_by_ride(["a-1.jpg", "a-2.jpg", "b-1.jpg"], SHARES, 42)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name,caption\na.jpg,x\n",
        "name,raw_caption\na.jpg\n",
        "name,raw_caption\n../a.jpg,x\n",
        "name,raw_caption\na.jpg,x\na.jpg,y\n",
        'name,raw_caption\na.jpg,"' + "x" * 200_000 + '"\n',
    ],
)
def test_a_bad_captions_file_is_named(tmp_path, text):
    file = tmp_path / "captions.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=r"captions\.csv"):
        read_captions(file)


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


def test_pictures_are_found_at_any_depth(tmp_path):
    for name in ("train/trainB/b.jpg", "train/trainA/a.jpg", "z/a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    index = index_images(tmp_path)
    assert index == {"a.jpg": tmp_path / "train/trainA/a.jpg", "b.jpg": tmp_path / "train/trainB/b.jpg"}


def test_captions_without_a_picture_are_counted(tmp_path, capsys):
    (tmp_path / "a.jpg").touch()
    images = index_images(tmp_path)
    assert [example.name for example in match_images({"a.jpg": "x", "b.jpg": "y"}, images)] == ["a.jpg"]
    assert "1 of 2 captioned frames have no picture" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"none of the 1 captioned frames.*b\.jpg"):
        match_images({"b.jpg": "y"}, images)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match="no picture"):
        index_images(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        index_images(tmp_path / "missing")
