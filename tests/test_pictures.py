"""Pictures that are read ahead."""

import time

import pytest

import pictures


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
