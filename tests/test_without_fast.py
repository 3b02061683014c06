"""The program without the folder of what exists for speed alone: it trains, captions and scores, only slower."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ROOMS = ["data", "publishing", "blip2/test_trust.py", "training/test_dashboard.py", "training/test_run_record.py"]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "fast", "demo-data", "logs", "blip2-finetuned*")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the program without captioner/fast."""
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("without") / "program", ignore=LEFT_OUT)
    assert not (copy / "captioner/fast").exists()
    return copy


def run(tree, *command) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tree, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_runs_without_what_makes_it_fast(tree):
    assert "adapter saved to blip2-finetuned-demo" in run(tree, "main.py", "--demo", "--max-steps", 10)
    said = run(tree, "eval.py", "--demo", "--num-samples", 40)
    assert "BLEU-4" in said and "by:generate" in said


@pytest.mark.slow
def test_other_rooms_pass_their_tests_without_it(tree):
    said = run(tree, "-m", "pytest", "-o", "addopts=", "-q", *(f"tests/{room}" for room in ROOMS))
    assert " passed" in said
