"""Inputs of other people that failed once, which are not part of the project: these tests skip without them."""

import pytest
from conftest import ROOT, call_script

CASES = ROOT.parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
PERFECT = " 1.00" * 8  # facts F1, its parts and BLEU-4


def score(*args) -> str:
    run = call_script("eval.py", "--run-name", "run", *args)
    assert run.returncode == 0, run.stderr
    return " ".join(next(line for line in run.stdout.splitlines() if line.startswith("predictions   ")).split())


@pytest.mark.parametrize("file", ["right.csv", "preds.csv"])
def test_references_as_pandas_writes_a_column_of_lists(folder, file):
    assert score("--predictions", CASES / "csv_list_refs" / file).startswith(f"predictions{PERFECT}")


def test_results_and_captions_in_cocos_format(folder):
    case = CASES / "coco_results"
    flags = ("--predictions", case / "results.json", "--references", case / "captions_val.json")
    assert score(*flags) and score("--predictions", case / "array.json")
    run = call_script("eval.py", "--predictions", case / "results.json")
    assert run.returncode == 2 and "--references" in run.stderr


@pytest.mark.parametrize(("name", "code"), [("labels", 2), ("labels_other_case", 0)])
def test_frames_without_attributes_and_keys_in_other_cases(folder, name, code):
    run = call_script(
        "bdd100k_data_pipeline.py", "--labels", CASES / f"empty_attributes/{name}.json", "--output", "o.csv", "--strict"
    )
    assert run.returncode == code
    if code:
        assert "no scene attributes" in run.stderr and not (folder / "o.csv").exists()
    else:
        assert "undefined" not in (folder / "o.csv").read_text()


@pytest.mark.parametrize(
    ("file", "said"), [("utf16.json", "it is UTF-16 text"), ("lfs_pointer.json", "it is a Git LFS pointer")]
)
def test_files_that_are_no_labels(folder, file, said):
    run = call_script("bdd100k_data_pipeline.py", "--labels", CASES / "label_formats" / file, "--output", "o.csv")
    assert run.returncode == 2 and said in run.stderr and "complete" not in run.stderr


@pytest.mark.parametrize("file", ["label_formats/lines.json", "macos_files/labels.zip", "macos_files/labels"])
def test_labels_as_lines_and_beside_the_notes_of_macos(folder, file):
    run = call_script("bdd100k_data_pipeline.py", "--labels", CASES / file, "--output", "o.csv", "--strict")
    assert run.returncode == 0 and "6 frames used, 0 left out" in run.stdout, run.stderr
