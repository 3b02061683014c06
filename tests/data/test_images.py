"""Images that are read ahead."""

import os
import shutil
import signal
import time
from collections import namedtuple

import pytest
import torch
from PIL import Image

from captioner.data import image_decoding, parallel
from captioner.data.parallel import BATCH, one_ahead, read_ahead, read_batches
from captioner.runtime.errors import UserError


def test_images_are_read_ahead_in_order_and_not_further():
    started = []

    def read(item):
        started.append(item)
        time.sleep(0.01 * (item % 3))
        return 10 * item

    reading = read_ahead(read, iter(range(100)), ahead=4)
    assert [next(reading) for _ in range(10)] == [10 * item for item in range(10)]
    assert len(started) <= 10 + 5
    reading.close()
    assert len(started) < 20
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda item: 1 / item, [1, 0, 1]))


def test_one_item_is_made_ahead():
    started = []

    def make():
        for item in range(4):
            started.append(item)
            yield item
        raise UserError("the fifth")

    items = one_ahead(make())
    assert next(items) == 0
    end = time.monotonic() + 10
    while len(started) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert started == [0, 1]
    assert [next(items) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="the fifth"):
        next(items)
    assert list(one_ahead(iter(()))) == []


def test_batches_by_processes_are_in_order():
    batches = list(read_batches(_tenfold, range(200), list))
    assert [len(batch) for batch in batches] == [32] * 6 + [8]
    assert [item for batch in batches for item in batch] == [10 * item for item in range(200)]


@pytest.mark.parametrize(
    ("cores", "room", "processes", "workers", "answers"),  # cores of a process; room in shared memory, in answers
    [
        *((4, 1000, 1, 4, 8), (16, 1000, 1, 16, 8), (32, 1000, 1, 32, 4), (128, 1000, 1, 128, 2)),
        *((16, 40, 1, 16, 2), (16, 10, 1, 4, 2), (16, 1000, 4, 16, 2), (4, 1000, 4, 4, 8), (4, 72, 4, 4, 2)),
    ],
)
def test_as_many_answers_wait_as_there_is_room_for(cores, room, processes, workers, answers, monkeypatch):
    loaders, item_bytes = [], 1000
    free = room * BATCH * item_bytes
    monkeypatch.setattr(parallel, "count_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *_, **options: loaders.append(options) or [])
    list(parallel.read_batches(_tenfold, range(10_000), list, item_bytes))
    assert (loaders[0]["num_workers"], loaders[0]["prefetch_factor"]) == (workers, answers)


def _tenfold(item):
    return 10 * item


def _die(item):
    if item == 70:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _complain(item):
    if item == 70:
        raise UserError("a.jpg: is no image")
    return item


def _end_early(item):
    if item == 70:
        raise EOFError("of an image")
    return item


def _lose_connection(item):
    if item == 70:
        raise ConnectionResetError("by a file server")
    return item


def _err(item):
    if item == 70:
        raise RuntimeError("DataLoader worker has nothing to do with it")
    return item


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (_die, "a process that reads images was killed"),
        (_complain, "a.jpg: is no image"),
        (_end_early, r"a process that reads images failed \(EOFError: of an image\)"),
        (_lose_connection, r"a process that reads images failed \(ConnectionResetError: by a file server\)"),
        (_err, r"a process that reads images failed \(RuntimeError: DataLoader worker has nothing to do with it\)"),
    ],
)
def test_a_process_that_fails_says_why(read, message):
    with pytest.raises(UserError, match=message):
        list(parallel.read_batches(read, range(200), list))


def test_an_image_that_is_not_there_is_not_to_be_removed(tmp_path):
    with pytest.raises(UserError, match=r"a\.jpg: not readable .*; check the path$"):
        image_decoding.open_image(tmp_path / "a.jpg")


def test_an_image_may_have_as_many_pixels_as_the_limit_says(tmp_path, monkeypatch):
    monkeypatch.setattr(image_decoding, "MAX_PIXELS", 64 * 36)
    Image.new("RGB", (64, 36)).save(tmp_path / "most.png")
    Image.new("RGB", (64, 37)).save(tmp_path / "more.png")
    assert image_decoding.open_image(tmp_path / "most.png").size == (64, 36)
    with pytest.raises(UserError, match=r"more\.png: .*64 x 37 pixels, more than 2,304"):
        image_decoding.open_image(tmp_path / "more.png")
