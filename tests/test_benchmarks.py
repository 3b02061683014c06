"""What the benchmarks measure with, where no GPU is needed."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import psutil
import pytest
from conftest import ROOT

from benchmarks import count_lines, gpu, peaks
from benchmarks.notebook import NOTEBOOK, read_flags
from benchmarks.peaks import Peak, measure_folder, measure_processes
from config import EvalConfig, TrainConfig, parse_args

TAKE = "taken = bytearray(b'x') * (200 << 20); print('taken', flush=True); input()"
NEST = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKE!r}])"


@pytest.mark.parametrize("sources", [peaks.SOURCES[n:] for n in range(len(peaks.SOURCES))])
def test_memory_of_processes_is_seen_while_they_run(monkeypatch, sources):
    """200 MB, of a process that another one has started; each source of the system's by itself."""
    monkeypatch.setattr(peaks, "SOURCES", sources)
    monkeypatch.setattr(peaks, "PAUSE", 0.01)
    others = {process.pid for process in psutil.Process().children(recursive=True)}  # of other tests
    measure = peaks.measure_process
    monkeypatch.setattr(peaks, "measure_process", lambda pid: 0 if pid in others else measure(pid))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # a process that is being started has the memory of this one for a moment: Peak comes later
    with subprocess.Popen([sys.executable, "-c", NEST], **pipes) as process, Peak(measure_processes) as memory:
        assert process.stdout.readline() == "taken\n"
        time.sleep(0.1)
        process.communicate("\n")
    assert 200 << 20 < memory.most < 260 << 20
    most = memory.most
    time.sleep(0.05)
    assert memory.most == most and measure_processes() == 0


def test_disk_of_a_folder_is_seen_though_it_is_freed(tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "PAUSE", 0.01)
    folder = tmp_path / "output"
    with Peak(lambda: measure_folder(folder)) as disk:
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "a").write_bytes(bytes(3 << 20))
        (folder / "b").write_bytes(bytes(1 << 20))
        time.sleep(0.1)
        (folder / "checkpoints" / "a").unlink()
    assert disk.most >= 4 << 20 and 1 << 20 <= measure_folder(folder) < 2 << 20
    assert measure_folder(tmp_path / "nowhere") == 0


def test_a_folder_that_vanishes_while_it_is_measured_does_not_end_that(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    scandir = os.scandir

    def remove_and_scan(path):
        if str(path).endswith("checkpoint-1"):
            os.rmdir(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", remove_and_scan)
    assert measure_folder(tmp_path) >= 1 << 20 and not (tmp_path / "checkpoint-1").exists()


def test_flags_of_the_notebook_are_read_from_it(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        cell["source"] = [
            line.replace('TRAIN_FLAGS = ""', 'TRAIN_FLAGS = "--subset both"').replace(
                "{EVAL_FLAGS}", "--greedy {EVAL_FLAGS}"
            )
            for line in cell["source"]
        ]
    (tmp_path / "notebook.ipynb").write_text(json.dumps(notebook))
    assert read_flags("main.py", tmp_path / "notebook.ipynb") == ["--subset", "both"]
    assert read_flags("eval.py", tmp_path / "notebook.ipynb") == ["--greedy"]
    parse_args(TrainConfig, read_flags("main.py"))
    parse_args(EvalConfig, read_flags("eval.py"))


@pytest.mark.slow
def test_the_job_of_the_notebook_is_measured(tmp_path, monkeypatch):
    """The benchmark itself, with the demo's model on a CPU that no GPU's memory is taken of."""
    run = gpu.run
    monkeypatch.setattr(gpu, "T4_JOB_FRAMES", 24)
    monkeypatch.setattr(gpu, "run", lambda *flags, free_gib=None, as_t4=False: run(*flags))
    args = Namespace(folder=tmp_path, model=ROOT / "demo" / "base", frames=24)
    gpu.prepare(args)
    rows = {what.partition("frames: ")[2]: value for what, value, *_ in gpu.measure_t4_job(args)}
    assert all(value > 0 for value in rows.values()) and len(rows) == 9, rows
    assert rows["disk of the ViT's kept outputs"] == pytest.approx(24 * 197 * 192 * 4 / 1e9, rel=0.01)
    assert rows["disk of the output folder, at the most"] > rows["disk of the output folder, in the end"]


def test_code_is_counted_without_comments_and_docstrings(tmp_path):
    (tmp_path / "folder").mkdir()
    text = (
        '"""Doc."""\n\n# comment\nx = 1\n\n\nclass Thing:\n    def act(self):\n        """Doc."""\n        return 1\n'
    )
    for name in ("a.py", "folder/b.py"):
        (tmp_path / name).write_text(text)
    parts = ("a.py", "folder", ".", "a.py:Thing", "a.py:act")
    assert [count_lines.count_part(tmp_path, part) for part in parts] == [4, 4, 8, 3, 2]
