"""What is free on a machine, and what a run makes of it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from captioner.runtime import machine
from captioner.runtime.machine import describe_machine, measure_memory, pick_workers


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A machine like Colab's: two cores, 12.7 GiB; small(limit) puts it into a container of so many bytes."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(12.7 * 2**30)))
    monkeypatch.setattr(machine, "count_cores", lambda: 2)
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)

    def limit(limit: str) -> None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(str(3 * 2**30))
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**30}\n")

    return limit


def test_memory_is_that_of_the_machine_or_its_container(small):
    assert measure_memory() == int(12.7 * 2**30)
    small("max\n")
    assert measure_memory() == int(12.7 * 2**30)
    small(f"{8 * 2**30}\n")
    assert measure_memory() == 6 * 2**30  # 3 GiB are used, one of which the kernel gives back
    small("1000\n")
    assert measure_memory() == 0


def test_this_machine_has_memory():
    assert 10**8 < measure_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_no_more_workers_than_cores(small):
    assert [pick_workers(wanted) for wanted in (0, 1, 4)] == [0, 1, 2]


def test_one_line_says_what_follows(small, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "measure_free", lambda folder: 20 * 2**30)
    said = describe_machine(tmp_path / "not" / "yet", workers=4)
    assert said == (f"2 cores, 12.7 GiB of memory free, 20.0 GiB of disk free in {tmp_path}: 2 processes decode images")
    monkeypatch.setattr(machine, "measure_free", lambda folder: None)
    assert "unknown disk" in describe_machine(Path("x"), workers=0)
