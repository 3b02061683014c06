"""benchmarks/RESULTS.md is written by the benchmarks: one section each; the section before moves to LOG.md."""

import json
import re
import sys

import pytest
from conftest import ROOT

from benchmarks import gpu, several_gpus
from benchmarks.results import record


def test_a_section_replaces_its_older_self_and_leaves_the_others(tmp_path):
    path = tmp_path / "RESULTS.md"
    for title, body in (("One", "old"), ("Two", "second"), ("One", "new \\1")):
        record(title, body, packages=["msgspec"], path=path)
    text = path.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## One", "## Two"]
    assert "old" not in text and "new \\1" in text and "second" in text
    assert "msgspec" in text and "commit" in text


def test_a_section_that_is_replaced_goes_to_the_top_of_the_log(tmp_path):
    for body in ("oldest", "older", "current"):
        record("One", body, packages=["msgspec"], path=tmp_path / "RESULTS.md")
    log = (tmp_path / "LOG.md").read_text()
    assert log.startswith("# Log") and "current" not in log
    assert log.index("older") < log.index("oldest") and log.count("\n## One\n") == 2


def test_the_page_of_results_is_short_and_says_where_each_table_comes_from():
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    assert len(text.splitlines()) <= 120
    for section in text.split("\n## ")[1:]:
        assert re.search(r"`python (-m benchmarks\.\w+|main\.py) .*`", section), section[:40]
        assert re.search(r"commit [0-9a-f]{7}", section) and re.search(r"20\d\d-\d\d-\d\d", section), section[:40]


@pytest.mark.slow
def test_several_gpus_are_measured_beside_one(tmp_path, capsys, monkeypatch):
    """The benchmark itself with the demo's model, its processes joined by gloo: the same losses."""
    flags = ["--folder", str(tmp_path), "--model", str(ROOT / "demo" / "base"), "--frames", "48", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["several_gpus", *flags, "--steps", "2", "--parts", "losses"])
    several_gpus.main()
    rows = [
        line.removeprefix("| ").removesuffix(" |").split(" | ")
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert [(row[1], row[5]) for row in rows[2:]] == [("1", ""), ("2", ""), ("2", "")]  # and no efficiency
    one, two, difference = (float(row[2]) for row in rows[2:])
    assert one == pytest.approx(two, rel=1e-4) and difference < 1e-3


def test_several_gpus_are_held_against_those_alone(capsys, monkeypatch):
    """Against the mean of as many as there are processes; the first GPU is measured last."""
    paces = {3: 90, 2: 100, 1: 110, 0: 130}
    alone = [several_gpus.Row(f"GPU {gpu}", 1, pace, "samples/s", beside="x") for gpu, pace in paces.items()]
    both = [several_gpus.Row("x", processes, pace, "samples/s", beside="x") for processes, pace in ((2, 180), (4, 387))]
    lines = several_gpus.make_table([*alone, *both, several_gpus.Row("loss", 2, 1.5, "nats")]).splitlines()[2:]
    efficiencies = [line.split("|")[-2].strip() for line in lines]
    assert efficiencies == ["0.837", "0.930", "1.023", "1.209", "0.750", "0.900", ""]
    monkeypatch.setattr(sys, "argv", ["several_gpus", "--folder", "x", "--processes", "1", "2"])
    with pytest.raises(SystemExit):
        several_gpus.main()
    assert "2 or more" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")
def test_the_configuration_of_the_reference_is_measured(tiny_checkpoint, drawn, tmp_path, capsys, monkeypatch):
    """On the CPU, where it trains in fp32 and no GPU memory is taken."""
    (tmp_path / "images").symlink_to(drawn / "images")
    (tmp_path / "labels.json").symlink_to(drawn / "labels.json")
    monkeypatch.setattr(gpu, "REFERENCE_STEPS", 2)
    monkeypatch.setattr(gpu, "REFERENCE_WARMUP", 1)
    monkeypatch.setattr(gpu, "REFERENCE_CAPTIONS", 1)
    flags = ["--as-reference", "--folder", str(tmp_path), "--model", str(tiny_checkpoint)]
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    gpu.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["samples"] > 0 and figures["captions"] > 0 and figures["peak"] == 0
