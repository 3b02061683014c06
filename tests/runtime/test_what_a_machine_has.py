"""What is free on a machine, and what a run makes of it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from captioner.runtime import containers, machine
from captioner.runtime.machine import describe_machine, measure_memory, pick_workers
from captioner.runtime.processes import count_cores

GIB = 2**30


@pytest.fixture
def small(monkeypatch):
    """A machine like Colab's: two cores, 12.7 GiB."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(12.7 * GIB)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(machine, "measure_free", lambda folder: None)


@pytest.fixture
def group(tmp_path, monkeypatch):
    """group(line of /proc/self/cgroup, {file: content}) puts this process into a container with these files."""
    monkeypatch.setattr(containers, "GROUPS", tmp_path)
    monkeypatch.setattr(containers, "OWN_GROUPS", tmp_path / "own")

    def group(line: str, files: dict[str, str | int]) -> None:
        (tmp_path / "own").write_text(f"3:cpuset:/\n{line}\n")
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{content}\n")

    return group


def limit_memory(folder: str, most: str | int, names=("memory.max", "memory.current", "inactive_file")) -> dict:
    """The files of a group that takes 3 GiB, one of which the kernel gives back."""
    limit, used, given_back = names
    return {
        f"{folder}{limit}": most,
        f"{folder}{used}": 3 * GIB,
        f"{folder}memory.stat": f"anon 5\n{given_back} {GIB}",
    }


def test_memory_is_that_of_the_machine_or_its_container(small, group):
    assert measure_memory() == int(12.7 * GIB)
    for limit, free in (("max", int(12.7 * GIB)), (8 * GIB, 6 * GIB), (1000, 0)):
        group("0::/", limit_memory("", limit))
        assert measure_memory() == free


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("4:memory:/docker/5f", "memory/"),  # of another system's folders, which the container has not
        ("4:cpu,memory:/jobs/7", "memory/jobs/7/"),
    ],
)
def test_memory_of_a_container_of_the_older_kind(small, group, line, folder):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(line, limit_memory(folder, 8 * GIB, names))
    assert measure_memory() == 6 * GIB


def test_the_lowest_limit_holds_of_groups_within_groups(small, group):
    group("0::/jobs/7", limit_memory("jobs/7/", 9 * GIB) | limit_memory("jobs/", 8 * GIB) | {"cpu.max": "max 100000"})
    assert measure_memory() == 6 * GIB and count_cores() == 2


@pytest.mark.parametrize(
    ("line", "files", "cores"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "20000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 2),
        ("0::/", {"cpu.max": "900000 100000"}, 2),  # more than the machine has
        ("1:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": 100000, "cpu/a/cpu.cfs_period_us": 100000}, 1),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 2),
    ],
)
def test_cores_are_those_of_the_machine_or_its_container(small, group, line, files, cores):
    group(line, files)
    assert count_cores() == cores and pick_workers(4, 16) == cores


def test_this_machine_has_memory():
    assert 10**8 < measure_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_no_more_workers_than_cores(small):
    assert [pick_workers(wanted, 16) for wanted in (0, 1, 4)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("free", "batch", "workers"),
    [(2**16, 16, 0), (2**26, 16, 1), (2**26, 17, 0), (2**27, 16, 2), (2**28, 64, 1), (2**30, 64, 2)],
)
def test_no_more_workers_than_shared_memory_has_room_for(small, monkeypatch, free, batch, workers):
    monkeypatch.setattr(machine, "measure_free", lambda folder: free)
    assert pick_workers(4, batch) == workers


def test_one_line_says_what_follows(small, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "measure_free", lambda folder: 20 * 2**30)
    said = describe_machine(tmp_path / "not" / "yet", workers=2)
    assert said == (f"2 cores, 12.7 GiB of memory free, 20.0 GiB of disk free in {tmp_path}: 2 processes decode images")
    monkeypatch.setattr(machine, "count_cores", lambda: 1)
    monkeypatch.setattr(machine, "measure_free", lambda folder: None)
    said = describe_machine(Path("x"), workers=1)
    assert said == "1 core, 12.7 GiB of memory free, unknown disk: 1 process decodes images"
    assert describe_machine(Path("x"), workers=0).endswith("the main process decodes images")
