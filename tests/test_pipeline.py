"""Label files to CSV: the reference's example to the letter, real samples, and input that is wrong."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT, SHARED, needs_real_samples

from captions import STYLES, describe
from config import UserError
from data import read_captions
from labels import LabelReport, read_labels

EXAMPLE = {
    "name": "000123.jpg",
    "attributes": {"timeofday": "evening", "weather": "clear", "scene": "highway"},
    "labels": [
        {"category": "car"},
        {"category": "traffic light", "attributes": {"trafficLightColor": "red"}},
        {"category": "pedestrian", "attributes": {"truncated": True}},
    ],
}
EXAMPLE_ROW = (
    '000123.jpg,"It is a evening scene in clear weather on a highway road. The traffic light is red. '
    'There is one car. There is one truncated pedestrian."'
)


def frame(name="a.jpg", labels=(), **attributes):
    return {"name": name, "attributes": {"timeofday": "night", **attributes}, "labels": list(labels)}


def light(color):
    return {"category": "traffic light", "attributes": {"trafficLightColor": color}}


def run_pipeline(*args):
    command = [sys.executable, ROOT / "bdd100k_data_pipeline.py", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def read_all(tmp_path, *frames):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(list(frames)))
    report = LabelReport()
    return list(read_labels([file], report)), report


@pytest.mark.parametrize("wrap", [lambda frame: frame, lambda frame: [frame], lambda frame: {"frames": [frame]}])
def test_example_of_the_reference_to_the_letter(tmp_path, wrap):
    labels, output = tmp_path / "labels.json", tmp_path / "captions.csv"
    labels.write_text(json.dumps(wrap(EXAMPLE)))
    run = run_pipeline("--labels", labels, "--output", output)
    assert run.returncode == 0, run.stderr
    assert output.read_text() == f"name,raw_caption\n{EXAMPLE_ROW}\n"
    assert pd.read_csv(output).columns.tolist() == ["name", "raw_caption"]
    assert read_captions(output) == {"000123.jpg": EXAMPLE_ROW.split('"')[1]}


@pytest.mark.parametrize("style", STYLES)
def test_styles(tmp_path, style):
    labels, output = tmp_path / "labels.json", tmp_path / "captions.csv"
    labels.write_text(json.dumps([EXAMPLE]))
    assert run_pipeline("--labels", labels, "--output", output, "--style", style).returncode == 0
    [only], _ = read_all(tmp_path, EXAMPLE)
    assert read_captions(output)["000123.jpg"] == describe(only.facts, style)


@pytest.mark.parametrize(
    ("colors", "status"),
    [
        (["green", "red", "yellow"], "red"),
        (["red", "green"], "red"),  # the reference's code lets the last one win
        (["green", "yellow"], "yellow"),
        (["none", "green"], "green"),
        (["none"], None),
        ([], None),
        (["G", "NA"], "green"),
        ([[1, "R"], [0, "NA"]], "red"),
        ([None, "purple", 3, []], None),
        ([["x", {}], True], None),
    ],
)
def test_status_of_the_traffic_light(tmp_path, colors, status):
    [only], _ = read_all(tmp_path, frame(labels=map(light, colors)))
    assert only.facts.traffic_light == status
    assert only.facts.objects == {}


def test_capitalised_keys_and_nulls(tmp_path):
    labels = [
        {"category": "car", "attributes": {"Occluded": True, "Truncated": False, "Traffic Light Color": [0, "NA"]}},
        {"category": "car", "attributes": None, "box2d": None, "poly2d": None},
    ]
    [one, other], _ = read_all(tmp_path, frame(labels=labels), {**frame("b.jpg"), "labels": None})
    assert {kind.phrase: count for kind, count in one.facts.objects.items()} == {"partially occluded car": 1, "car": 1}
    assert other.facts.objects == {}


def test_what_is_left_out_is_counted(tmp_path):
    frames, report = read_all(
        tmp_path,
        frame("good.jpg", [{"category": "unicorn"}, {"category": None}], weather="frogs"),
        frame("number.jpg", [{"category": 3}]),
        frame("good.jpg"),
        frame("../../evil.jpg"),
        frame("=cmd().jpg"),
        frame("-1.jpg"),
        frame("https://example.org/a.jpg"),
        {"name": "tracking.jpg", "labels": []},
        {**frame(), "name": None},
        {**frame(), "labels": "none"},
        "no frame",
    )
    assert [frame.name for frame in frames] == ["good.jpg"]
    assert report.frames == 1
    assert report.skipped.total() == 10
    assert report.skipped["its name is not a plain file name"] == 4
    assert any("'frogs' is unknown" in remark for remark in report.remarks)
    assert any("unknown class 'unicorn'" in remark for remark in report.remarks)
    assert "10 left out" in str(report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        (b"", "not readable as JSON"),
        (b'[{"name": "a.jpg", "attributes"', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"[]", "no frames in it"),
        (b"3", "no frames in it"),
        (b'[{"labels": []}]', "no usable frame"),
    ],
)
def test_bad_files_end_with_one_message(tmp_path, content, message):
    labels, output = tmp_path / "labels.json", tmp_path / "captions.csv"
    if content is not None:
        labels.write_bytes(content)
    run = run_pipeline("--labels", labels, "--output", output)
    assert run.returncode == 2
    assert message in run.stderr
    assert str(labels) in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(tmp_path.glob("*.csv*"))
    assert not list(tmp_path.glob(".*"))


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"no \.json file"):
        list(read_labels([tmp_path], LabelReport()))


def test_unwritable_output(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps([EXAMPLE]))
    (tmp_path / "file").touch()
    run = run_pipeline("--labels", tmp_path / "labels.json", "--output", tmp_path / "file" / "captions.csv")
    assert run.returncode == 2
    assert "can't be written" in run.stderr


@needs_real_samples
def test_real_samples():
    report = LabelReport()
    frames = {frame.name: describe(frame.facts) for frame in read_labels([SHARED / "labels"], report)}
    assert frames["0000f77c-6257be58.jpg"] == (
        "It is a daytime scene in clear weather on a city street road. The traffic light is green. There are 2 cars. "
        "There is one drivable area. There are 3 lanes. There is one traffic sign. There are 2 truncated traffic signs."
    )
    assert frames["913b47b8-3cf1b886.jpg"] == (
        "It is a dawn/dusk scene in clear weather on a city street road. The traffic light is red. There are 2 cars. "
        "There are 2 partially occluded cars. There is one traffic sign."
    )
    assert len(frames) == 4
    assert report.skipped == {"its name came before": 1}
