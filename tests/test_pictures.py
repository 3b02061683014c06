"""Pictures that are read ahead."""

import os
import signal
import time

import pytest

import pictures
from config import UserError


def test_pictures_are_read_ahead_in_order_and_not_further():
    started = []

    def read(item):
        started.append(item)
        time.sleep(0.01 * (item % 3))
        return 10 * item

    reading = pictures.read_ahead(read, iter(range(100)), ahead=4)
    assert [next(reading) for _ in range(10)] == [10 * item for item in range(10)]
    assert len(started) <= 10 + 5
    reading.close()
    assert len(started) < 20
    with pytest.raises(ZeroDivisionError):
        list(pictures.read_ahead(lambda item: 1 / item, [1, 0, 1]))


def test_batches_by_processes_are_in_order():
    batches = list(pictures.read_batches(_tenfold, range(200), list))
    assert [len(batch) for batch in batches] == [32] * 6 + [8]
    assert [item for batch in batches for item in batch] == [10 * item for item in range(200)]


def _tenfold(item):
    return 10 * item


def _die(item):
    if item == 70:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _complain(item):
    if item == 70:
        raise UserError("a.jpg: is no picture")
    return item


@pytest.mark.parametrize(
    ("read", "message"), [(_die, "a process that reads pictures was killed"), (_complain, "a.jpg: is no picture")]
)
def test_a_process_that_fails_says_why(read, message):
    with pytest.raises(UserError, match=message):
        list(pictures.read_batches(read, range(200), list))
