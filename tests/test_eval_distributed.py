"""eval.py in two processes: the same captions, to the byte, as in one."""

import csv
import json
import re
import shutil

import pytest
from conftest import ROOT, call_script
from ranks import launch, start_ranks, start_server

SHARED = "captioning in 2 processes"
SHORT = ["--max-new-tokens", 20]  # enough to tell captions apart


@pytest.fixture(scope="module", autouse=True)
def server():
    start_server()


def evaluate(cwd, name, *flags, start=start_ranks):
    """Run eval.py in one process, to logs/one-NAME, and in two, to logs/two-NAME. Returns both, and what two print."""
    with start(ROOT / "eval.py", *flags, "--run-name", f"two-{name}", cwd=cwd) as two:
        one = call_script("eval.py", *flags, "--run-name", f"one-{name}", cwd=cwd)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.err
    assert two.out.count(SHARED) == 1
    return cwd / "logs" / f"one-{name}", cwd / "logs" / f"two-{name}", two.out


@pytest.fixture(scope="module")
def trained(tmp_path_factory, drawn, tiny_checkpoint):
    """A folder in which main.py has run; one training image can't be read any more."""
    cwd = tmp_path_factory.mktemp("trained")
    shutil.copytree(drawn / "images", cwd / "images")
    flags = ["--labels", drawn / "labels.json", "--images", cwd / "images", "--model", tiny_checkpoint]
    flags += ["--num-train-epochs", 1, "--train-batch-size", 2, "--warmup-ratio", 0, "--learning-rate", 1e-2]
    flags += ["--dataloader-workers", 0, "--val-captions", 0, "--wandb", "disabled"]
    done = call_script("main.py", *flags, cwd=cwd)
    assert done.returncode == 0, done.stderr
    with open(cwd / "blip2-finetuned/split.csv", newline="") as file:
        training = [cwd / "images" / row["image"] for row in csv.DictReader(file) if row["split"] == "train"]
    assert len(training) >= 6
    with open(training[1], "wb") as file:
        file.write(b"no image")
    return cwd


def test_sampled_captions_are_the_same(trained):
    """Three batches, the last one short, for two processes."""
    flags = ["--split", "train", "--num-samples", 5, "--batch-size", 2, "--seed", 7, *SHORT]
    one, two, output = evaluate(trained, "sampled", *flags)
    predictions = (one / "predictions.jsonl").read_bytes()
    assert len(predictions.splitlines()) >= 4
    assert (two / "predictions.jsonl").read_bytes() == predictions
    assert output.count("predictions in ") == 1
    assert re.search(r"captions in .* s, [\d.]+ a second \([\d.]+ after the first batch\)", output)
    assert json.loads((two / "scores.json").read_text())["n"] == len(predictions.splitlines())


@pytest.mark.slow
def test_greedy_captions_and_floors_are_the_same(trained):
    """By the real launcher. One batch for two processes; the image that can't be read is left out of both."""
    flags = ["--split", "train", "--num-samples", "all", "--batch-size", 16, "--greedy", "--model-floors", *SHORT]
    one, two, output = evaluate(trained, "greedy", *flags, start=launch)
    predictions = (one / "predictions.jsonl").read_bytes()
    assert (two / "predictions.jsonl").read_bytes() == predictions
    rows = [json.loads(line) for line in predictions.splitlines()]
    assert all(row["floors"]["nearest training image"] == row["references"][0] for row in rows)
    assert output.count("1 image can't be read and is left out") == 1
    assert json.loads((two / "scores.json").read_text())["left_out"] == {"unreadable images": 1}


def test_own_images_are_captioned_the_same(trained, drawn, tmp_path):
    """Seven images of which one can't be read, in batches of two; one process goes on with what two began."""
    for number, image in enumerate(sorted((drawn / "images").iterdir())[:6]):
        shutil.copy(image, tmp_path / f"{number}.jpg")
    (tmp_path / "1b.jpg").write_bytes(b"no image")
    flags = ["--images", tmp_path, "--batch-size", 2, *SHORT]
    one, two, output = evaluate(trained, "own", *flags)
    assert output.count("6 captions in ") == 1
    captions = (one / "captions.jsonl").read_bytes()
    assert (two / "captions.jsonl").read_bytes() == captions
    assert (two / "captions.csv").read_bytes() == (one / "captions.csv").read_bytes()

    lines = captions.splitlines(keepends=True)
    (two / "captions.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])  # stopped within the third batch
    again = call_script("eval.py", *flags, "--run-name", "two-own", cwd=trained)
    assert again.returncode == 0 and "4 of 7 images were captioned before" in again.stdout, again.stderr
    assert (two / "captions.jsonl").read_bytes() == captions


UNEQUAL = """
import config, eval
from captioner.fast import captioning
from captioner.runtime import cli, processes

captioning.measure_room = lambda model, longest: (4, 2)[processes.find_place()[0]]
captioning.has_room_to_unpack = lambda *args: processes.find_place()[0] == 0
cli.run_script(eval.main, config.parse_args(config.EvalConfig))
"""


def test_gpus_with_unequal_room_share_the_smaller_batches(trained):
    """And none unpacks weights that another can't. Room as the processes see it is made up: there is a CPU alone."""
    (trained / "unequal.py").write_text(UNEQUAL)
    flags = ["--num-samples", "all", "--split", "train", "--fast", "on", *SHORT]
    with start_ranks(trained / "unequal.py", *flags, "--run-name", "unequal", cwd=trained) as unequal:
        equal = call_script("eval.py", *flags, "--batch-size", 2, "--run-name", "equal", cwd=trained)
    assert equal.returncode == 0, equal.stderr
    assert unequal.returncode == 0, unequal.err
    predictions = (trained / "logs" / "equal" / "predictions.jsonl").read_bytes()
    assert len(predictions.splitlines()) > 4
    assert (trained / "logs" / "unequal" / "predictions.jsonl").read_bytes() == predictions
    for name in ("equal", "unequal"):
        scores = json.loads((trained / "logs" / name / "scores.json").read_text())
        assert "|batch:2|by:FastGenerator|" in scores["signatures"]["corpus_bleu"]


FAILING = """
import sys
from captioner.runtime import cli, processes
from captioner.runtime.errors import UserError

def work():
    place = processes.find_place()[0]
    if sys.argv[1] == "both":
        raise UserError(f"mend me, {place}")
    if place == 1:
        raise UserError("mend me, 1") if sys.argv[1] == "second" else RuntimeError("broken")

cli.run_script(lambda _: print("went on", processes.gather(work)), None)
"""


@pytest.mark.parametrize(("who", "codes"), [("both", [2, 0]), ("second", [0, 2])])
def test_no_process_waits_for_one_that_failed(tmp_path, who, codes):
    """And an error that the user can mend is printed once."""
    (tmp_path / "failing.py").write_text(FAILING)
    with start_ranks(tmp_path / "failing.py", who, cwd=tmp_path) as failed:
        pass
    assert failed.codes == codes
    assert "went on" not in failed.out
    message = {"both": "error: mend me, 0", "second": "error: mend me, 1"}[who]
    assert [line for line in failed.err.splitlines() if line.startswith("error: ")] == [message]


@pytest.mark.slow
def test_the_launcher_ends_a_process_that_waits_for_one_that_crashed(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    with launch(tmp_path / "failing.py", "crash", cwd=tmp_path) as failed:
        pass
    assert failed.returncode != 0
    assert "went on" not in failed.out
    assert "RuntimeError: broken" in failed.err


def test_files_are_scored_by_one_process(tmp_path):
    row = {"name": "a.jpg", "prediction": "There is one car.", "references": ["There are 2 cars."]}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--predictions", "predictions.jsonl", "--run-name", "scored"]
    with start_ranks(ROOT / "eval.py", *flags, cwd=tmp_path) as scored:
        pass
    assert scored.returncode == 0, scored.err
    assert scored.out.count("scores.json and report.html in ") == 1
