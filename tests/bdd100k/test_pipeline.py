"""Label files to CSV: the reference's example to the letter, real samples, and input that is wrong."""

import functools
import gzip
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections import Counter

import pandas as pd
import pytest
from conftest import ROOT, SHARED, call_script, needs_real_samples
from hypothesis import given
from hypothesis import strategies as st

from captioner.bdd100k import census, label_files
from captioner.bdd100k.facts import MAX_COUNT, ObjectKind
from captioner.bdd100k.frames import (
    DEFAULT_OPTIONS,
    NEAR_DUPLICATE_IOU,
    BadFrame,
    LabelOptions,
    _Box,
    _find_near_duplicates,
    _Label,
    read_frame,
)
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.bdd100k.wording import STYLES, describe
from captioner.data.caption_files import read_captions
from captioner.runtime.errors import UserError

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
    run_name = () if "--run-name" in args else ("--run-name", args[args.index("--output") + 1].parent / "run")
    return call_script("bdd100k_data_pipeline.py", *args, *run_name)


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
    assert read_captions(output)[["name", "caption"]].values.tolist() == [["000123.jpg", EXAMPLE_ROW.split('"')[1]]]


@pytest.mark.parametrize("style", STYLES)
def test_the_command_writes_each_style(tmp_path, style):
    labels, output = tmp_path / "labels.json", tmp_path / "captions.csv"
    labels.write_text(json.dumps([EXAMPLE]))
    assert run_pipeline("--labels", labels, "--output", output, "--style", style).returncode == 0
    [only], _ = read_all(tmp_path, EXAMPLE)
    assert read_captions(output).set_index("name")["caption"]["000123.jpg"] == describe(only.facts, style)


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


def test_capitalised_keys_and_nulls_are_read(tmp_path):
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


def test_a_folder_without_labels_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no \.json file"):
        list(read_labels([tmp_path], LabelReport()))


def test_an_unwritable_output_is_named(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps([EXAMPLE]))
    (tmp_path / "file").touch()
    run = run_pipeline("--labels", tmp_path / "labels.json", "--output", tmp_path / "file" / "captions.csv")
    assert run.returncode == 2
    assert "can't be written" in run.stderr


@needs_real_samples
def test_real_samples_have_these_captions():
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
    assert report.skipped == {"its name came before, the first frame of a name is used": 1}


# --------------------------------------------------------------------------------------------------------------
# files and layouts


def drawn_frames(count):
    from demo.draw import draw_scene

    return [draw_scene(seed)[1] for seed in range(count)]


def read_paths(*paths, options=DEFAULT_OPTIONS):
    report = LabelReport()
    return list(read_labels(paths, report, options)), report


@pytest.mark.parametrize("piece", [2**9, 2**13, 2**22])
@pytest.mark.parametrize("indent", [None, 4])
def test_a_large_array_is_cut_without_loss(tmp_path, monkeypatch, piece, indent):
    frames = drawn_frames(40)
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(frames, indent=indent))
    whole, _ = read_paths(file)
    monkeypatch.setattr(label_files, "PIECE", piece)  # also makes two processes share the work
    cut, report = read_paths(file)
    assert cut == whole
    assert [frame.name for frame in cut] == [frame["name"] for frame in frames]
    assert report.variants.total() == report.frames == 40


def test_unusual_values_in_some_pieces_change_nothing_elsewhere(tmp_path, monkeypatch):
    """Pieces with categories or colours of no table, or wrong types, are decoded in other ways than the rest."""
    frames = drawn_frames(40)
    expected, _ = read_all(tmp_path, *frames)
    for number, odd in enumerate([{"category": "unicorn"}, light("purple"), light([1, "NA"]), light({}), light(["R"])]):
        frames[8 * number]["labels"].append(odd)
    frames[5]["labels"] = 3
    monkeypatch.setattr(label_files, "PIECE", 2**13)
    read, report = read_all(tmp_path, *frames)
    assert read[:5] + read[5:31] == expected[:5] + expected[6:32]
    assert read[31].facts.traffic_light == "red"
    assert read[32:] == expected[33:]
    assert report.skipped.total() == 1
    assert report.remarks == {
        "object of the unknown class 'unicorn', not counted": 1,
        "traffic light of the unknown colour 'purple', taken as none": 1,
        "traffic light of the unknown colour '{}', taken as none": 1,
    }


def test_a_killed_process_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(drawn_frames(40)))
    monkeypatch.setattr(label_files, "PIECE", 2**13)
    parent = os.getpid()

    def convert(facts):
        if os.getpid() != parent and facts.scene is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return facts

    with pytest.raises(UserError, match=r"a process that reads labels was killed \(exit code -9\)"):
        list(read_labels([file], LabelReport(), convert=convert))


def test_processes_end_when_nobody_asks_for_the_rest(tmp_path, monkeypatch):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(drawn_frames(40)))
    monkeypatch.setattr(label_files, "PIECE", 2**12)
    before = set(multiprocessing.active_children())
    reading = read_labels([file], LabelReport())
    next(reading)
    reading.close()
    assert set(multiprocessing.active_children()) <= before


def test_a_wrong_cut_is_noticed(tmp_path, monkeypatch):
    """Text that looks like the start of a frame, inside a frame."""
    frames = drawn_frames(20)
    for frame in frames[::3]:
        frame["labels"][0]["id"] = '},{"name": "no.jpg"'
        frame["nested"] = [{"a": 1}, {"name": "nested.jpg"}]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(frames))
    monkeypatch.setattr(label_files, "PIECE", 2**10)
    read, _ = read_paths(file)
    assert [frame.name for frame in read] == [frame["name"] for frame in frames]


def test_damage_is_told_with_its_byte(tmp_path, monkeypatch):
    text = json.dumps(drawn_frames(30), indent=1)
    at = text.index('"category"', 2 * len(text) // 3)
    file = tmp_path / "labels.json"
    file.write_text(text[:at] + "?" + text[at + 1 :])
    monkeypatch.setattr(label_files, "PIECE", 2**12)
    with pytest.raises(UserError, match=rf"labels\.json: .* at byte {at:,} of {len(text):,}"):
        read_paths(file)


def test_zip_gzip_and_folder_read_alike(tmp_path):
    frames = drawn_frames(25)
    (tmp_path / "single").mkdir()
    with zipfile.ZipFile(tmp_path / "single.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for frame in frames:
            text = json.dumps({**frame, "labels": None, "frames": [{"objects": frame["labels"]}]})
            archive.writestr(f"100k/val/{frame['name'][:-4]}.json", text)
            (tmp_path / "single" / f"{frame['name'][:-4]}.json").write_text(text)
    (tmp_path / "labels.json").write_text(json.dumps(frames))
    (tmp_path / "labels.json.gz").write_bytes(gzip.compress((tmp_path / "labels.json").read_bytes()))
    expected = sorted(read_paths(tmp_path / "labels.json")[0])
    for name in ("single.zip", "labels.json.gz", "single"):
        read, report = read_paths(tmp_path / name)
        assert sorted(read) == expected, name
        assert report.frames == 25
    assert report.variants == {"one file an image": 25}


@pytest.mark.parametrize("cut", [10, 400, -3])
@pytest.mark.parametrize("name", ["labels.zip", "labels.json.gz"])
def test_a_damaged_archive_is_named(tmp_path, name, cut):
    text = json.dumps(drawn_frames(3))
    file = tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("labels.json", text)
    else:
        file.write_bytes(gzip.compress(text.encode()))
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=name):
        read_paths(file)


def test_options_change_what_is_counted():
    def facts(label_list, **options):
        return read_frame(frame(labels=label_list), LabelReport(), LabelOptions(**options)).facts.objects

    def box(category, x1, y1, x2, y2):
        return {"category": category, "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}}

    people = [{"category": "person"}, {"category": "bicycle"}, {"category": "motor"}, {"category": "lane/road curb"}]
    assert {kind.name for kind in facts(people)} == {"person", "bicycle", "motor", "lane"}
    assert {kind.name for kind in facts(people, class_names="2018")} == {"person", "bike", "motor", "lane"}
    assert {kind.name for kind in facts(people, class_names="det20")} == {"pedestrian", "bicycle", "motorcycle", "lane"}
    assert {kind.name for kind in facts([*people, {"category": "area/drivable"}], lanes=False)} == {
        "person", "bicycle", "motor",
    }  # fmt: skip
    twice = [
        box("car", 0, 0, 100, 100),
        box("car", 1, 2, 101, 101),
        box("truck", 0, 0, 100, 100),
        box("car", 0, 0, 50, 9),
    ]
    assert facts(twice) == {ObjectKind("car"): 3, ObjectKind("truck"): 1}
    assert facts(twice, merge_duplicates=True) == {ObjectKind("car"): 2, ObjectKind("truck"): 1}
    assert facts(twice, min_box_size=10) == {ObjectKind("car"): 2, ObjectKind("truck"): 1}
    report = LabelReport()
    read_frame(frame(labels=twice), report)
    assert report.near_duplicates == 1


def test_a_frame_may_have_many_objects_but_not_of_one_kind():
    most = [{"category": "car"}] * MAX_COUNT
    many = read_frame(frame(labels=[*most, {"category": "bus"}]), LabelReport())
    assert many.facts.objects == {ObjectKind("car"): MAX_COUNT, ObjectKind("bus"): 1}
    with pytest.raises(BadFrame, match=f"more than {MAX_COUNT} objects of one kind"):
        read_frame(frame(labels=[*most, {"category": "car"}]), LabelReport())


def test_near_duplicates_agree_with_all_pairs():
    rng = random.Random(0)
    for _ in range(200):
        boxes = []
        for _ in range(8):
            x, y = rng.uniform(0, 20), rng.uniform(0, 20)
            boxes.append(_Label("car", None, _Box(x, y, x + rng.uniform(40, 50), y + rng.uniform(40, 50))))
        expected = set()
        for i, j in itertools.combinations(range(len(boxes)), 2):
            a, b = boxes[i].box2d, boxes[j].box2d
            common = max(0, min(a.x2, b.x2) - max(a.x1, b.x1)) * max(0, min(a.y2, b.y2) - max(a.y1, b.y1))
            union = (a.x2 - a.x1) * (a.y2 - a.y1) + (b.x2 - b.x1) * (b.y2 - b.y1) - common
            if common / union > NEAR_DUPLICATE_IOU:
                expected.add(j)
        assert _find_near_duplicates(boxes) == expected


def test_strict_and_frames_without_a_scene(tmp_path):
    file, output = tmp_path / "labels.json", tmp_path / "captions.csv"
    file.write_text(json.dumps([frame("a.jpg"), {"name": "b.jpg", "labels": [{"category": "car"}]}]))
    strict = run_pipeline("--labels", file, "--output", output, "--strict", "--run-name", tmp_path / "run")
    assert strict.returncode == 2
    assert "--strict: 1 frames can't be used" in strict.stderr
    assert not output.exists()
    told = run_pipeline(
        "--labels", file, "--output", output, "--without-scene", "caption", "--run-name", tmp_path / "run"
    )
    assert told.returncode == 0
    assert read_captions(output).set_index("name")["caption"]["b.jpg"] == "There is one car."


def test_census_counts_objects_by_class_and_look(capsys):
    def print_of(**objects) -> list[list[str]]:
        report = LabelReport(frames=10, boxes_a_frame=Counter({3: 10}), caption_words=Counter({4: 10}), **objects)
        census.print_census(report, Counter({5: 10}), "any")
        table = capsys.readouterr().out.partition("\n\n")[0]
        return [line.split() for line in table.strip().splitlines()]

    car, truck = (functools.partial(ObjectKind, name) for name in ("car", "truck"))
    counts = Counter({truck(): 3, car(): 1200, car(occluded=True): 400, car(occluded=True, truncated=True): 100})
    assert print_of(objects=counts) == [
        ["objects", "a", "frame", "occluded", "truncated"],
        ["car", "1,700", "170.00", "29.4%", "5.9%"],
        ["truck", "3", "0.30", "0.0%", "0.0%"],
    ]
    assert census.tabulate_classes(counts)["in full view"].to_dict() == {"car": 1200, "truck": 3}
    assert "car" not in str(print_of())


@given(st.sets(st.integers(0, 500), min_size=1))
def test_bins_of_the_census_hold_as_many_whole_numbers_each(values):
    edges = census.cut_bins(values)
    [width] = {after - before for before, after in itertools.pairwise(edges)}
    assert width == int(width) and edges[0] == min(values) - 0.5 and len(edges) <= census.MOST_BINS + 1
    assert edges[-2] < max(values) < edges[-1]


def test_census_is_printed_and_drawn(tmp_path, figures):
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(drawn_frames(30)))
    run_dir = tmp_path / "run"
    run = run_pipeline("--labels", file, "--output", tmp_path / "c.csv", "--census", "--run-name", run_dir)
    assert run.returncode == 0, run.stderr
    assert "tokens a caption (demo's tokenizer, 30 captions)" in run.stdout
    counted = json.loads((run_dir / "census.json").read_text())
    assert counted["frames"] == 30 == sum(counted["caption_words"].values()) == sum(counted["weather"].values())
    assert (run_dir / "census.png").read_bytes().startswith(b"\x89PNG")
    assert f"captions written to {tmp_path / 'c.csv'}" in run.stdout and str(run_dir / "census.json") in run.stdout
    [figure] = figures
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[4:] == ["objects", "objects a frame", "words a caption", "tokens a caption"]
    assert all(axis.patches for axis in figure.axes)  # each has bars
    for axis, name in zip(figure.axes, titles[:4], strict=False):
        counts = counted[name.replace(" ", "_")]
        assert sorted(bar.get_width() for bar in axis.patches) == sorted(counts.values()), name
    assert figure.get_suptitle().startswith("30 frames")


def test_kaggle_labels_end_to_end(tmp_path):
    """The real client against a loopback server: fetched, captioned; then again with the server gone; then no cache."""
    from loopback import KaggleServer, draw_dataset_files

    def run(name, environment):
        command = [sys.executable, ROOT / "bdd100k_data_pipeline.py", "--output", f"{name}.csv", "--run-name", "run"]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | environment
        )

    (tmp_path / "cache").mkdir()
    with KaggleServer(draw_dataset_files(), tmp_path / "cache") as server:
        first = run("first", server.environment)
        assert first.returncode == 0, first.stderr
        environment = server.environment
    again = run("again", environment)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "first.csv").read_text() == (tmp_path / "again.csv").read_text() != "name,raw_caption\n"
    nothing = run("nothing", environment | {"KAGGLEHUB_CACHE": str(tmp_path / "empty")})
    assert nothing.returncode == 2
    assert "Traceback" not in nothing.stderr
    assert all(word in nothing.stderr for word in ("solesensei/solesensei_bdd100k", "--labels", "--demo"))
    assert not (tmp_path / "nothing.csv").exists()


@pytest.mark.slow
def test_files_damaged_at_random_raise_no_other_error(monkeypatch, capsys, folder):
    """A short run of the fuzzer; the long one is tests/fuzz_labels.py --count 100000."""
    import fuzz_labels

    for name in ("_run_jobs", "tqdm"):  # which the fuzzer replaces
        monkeypatch.setattr(label_files, name, getattr(label_files, name))
    monkeypatch.setattr(sys, "argv", ["fuzz_labels.py", "--count", "1500", "--seed", "7"])
    fuzz_labels.main()
    assert "1,500 damaged files, no other exception" in capsys.readouterr().out
