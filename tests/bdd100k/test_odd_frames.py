"""Frames that lack what a caption needs, or write it otherwise: read, or left out with the reason."""

import dataclasses
import json
from collections import Counter

import pytest
from conftest import call_script

from captioner.bdd100k.census import print_census
from captioner.bdd100k.facts import Facts, ObjectKind
from captioner.bdd100k.frames import LabelOptions, decode_frames
from captioner.bdd100k.label_files import read_labels
from captioner.bdd100k.label_report import LabelReport
from captioner.data.caption_files import read_captions
from captioner.runtime.errors import UserError

SCENE = {"timeofday": "night", "weather": "clear", "scene": "highway"}
CAR = {"category": "car"}


def read(folder, *frames, **options):
    file = folder / "labels.json"
    file.write_text(json.dumps(list(frames)))
    report = LabelReport()
    return {frame.name: frame.facts for frame in read_labels([file], report, LabelOptions(**options))}, report


def read_one(folder, labels, attributes=SCENE, **options):
    frames, report = read(folder, {"name": "a.jpg", "attributes": attributes, "labels": labels}, **options)
    return frames["a.jpg"], report


@pytest.mark.parametrize(
    "attributes",
    [{}, None, {"ego": "x"}, {"weather": None, "scene": None}, {"weather": "frogs", "scene": "", "timeofday": None}],
)
def test_a_frame_with_no_usable_scene_attribute_is_a_frame_without_scene(tmp_path, attributes):
    without = {"name": "b.jpg", "attributes": attributes, "labels": [CAR]}
    frames, report = read(tmp_path, {"name": "a.jpg", "attributes": SCENE, "labels": []}, without)
    assert frames.keys() == {"a.jpg"}
    [(reason, count)] = report.skipped.items()
    assert "no scene attributes" in reason and count == 1
    frames, _ = read(tmp_path, without, without_scene="caption")
    assert (frames["b.jpg"].scene, frames["b.jpg"].objects) == (None, {ObjectKind("car"): 1})
    with pytest.raises(UserError, match=r"(?s)no usable frame in .* no scene attributes"):
        read(tmp_path, without)


def test_one_scene_attribute_is_enough(tmp_path):
    facts, _ = read_one(tmp_path, [], {"weather": "rainy"})
    assert (facts.time_of_day, facts.weather, facts.scene) == ("undefined", "rainy", "undefined")


@pytest.mark.parametrize(
    ("labels", "variant"),
    [
        ([], "frames without a light attribute"),
        ([CAR | {"box2d": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}}], "frames without a light attribute"),
        ([CAR | {"attributes": {"occluded": True}}], "frames without a light attribute"),
        ([CAR | {"attributes": {"trafficLightColor": "none"}}], "2018 release"),
        ([CAR, CAR | {"attributes": {"trafficLightColor": "NA"}}], "det_20"),
    ],
)
def test_a_frame_is_counted_under_what_tells_its_release(tmp_path, labels, variant):
    _, report = read_one(tmp_path, labels)
    assert report.variants == {variant: 1}


@pytest.mark.parametrize("spell", [str.upper, str.title, lambda key: f"{key[0]}_{key[1:]}", lambda key: f" {key}"])
def test_keys_and_values_in_other_cases_are_read(tmp_path, spell):
    def respell(value):
        if isinstance(value, dict):
            return {spell(key): respell(item) for key, item in value.items()}
        return [respell(item) for item in value] if isinstance(value, list) else value

    light = {"category": "Traffic Light", "attributes": {"trafficLightColor": "Red"}}
    labels = [{"category": "CAR", "attributes": {"occluded": True}}, {"category": "traffic_sign"}, light]
    attributes = {"timeofday": "Night", "weather": "CLEAR", "scene": "City Street "}
    frames, report = read(tmp_path, respell({"name": "a.jpg", "attributes": attributes, "labels": labels}))
    facts = frames["a.jpg"]
    assert (facts.time_of_day, facts.weather, facts.scene) == ("night", "clear", "city street")
    assert facts.traffic_light == "red"
    assert facts.objects == {ObjectKind("car", occluded=True): 1, ObjectKind("traffic sign"): 1}
    assert not report.remarks


@pytest.mark.parametrize("labels", [[], None, [{"category": "van"}], [{"category": "traffic light"}]])
def test_a_frame_with_neither_scene_nor_object_has_no_caption(tmp_path, labels):
    bare = {"name": "b.jpg", "labels": labels}
    frames, report = read(tmp_path, {"name": "a.jpg", "labels": [CAR]}, bare, without_scene="caption")
    assert frames.keys() == {"a.jpg"}
    assert list(report.skipped) == ["neither scene attributes nor objects, of which a caption could tell"]


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_small_boxes_are_not_counted_and_their_lights_still_show(tmp_path, size):
    box = {"x1": 0, "y1": 0, "x2": 5, "y2": 5}
    red = {"category": "traffic light", "attributes": {"trafficLightColor": "red"}, "box2d": box}
    green = {"category": "traffic light", "attributes": {"trafficLightColor": "green"}, "box2d": {**box, "x2": 500}}
    facts, report = read_one(tmp_path, [red, green, {**CAR, "box2d": box}], min_box_size=size)
    assert facts.traffic_light == "red"
    assert facts.objects == ({} if size else {ObjectKind("car"): 1})
    assert not report.remarks


@pytest.mark.parametrize(
    ("label", "attributes", "named"),
    [
        ({"category": "van"}, {}, "2 x object of the unknown class 'van'"),
        ({"category": None}, {}, "2 x object without a category"),
        ({"category": "traffic light", "attributes": {"trafficLightColor": "mauve"}}, {}, "unknown colour 'mauve'"),
        (CAR, {"weather": "frogs"}, "weather 'frogs' is unknown"),
    ],
)
def test_strict_refuses_what_is_unknown_and_counts_it(tmp_path, label, attributes, named):
    labels, output = tmp_path / "labels.json", tmp_path / "o.csv"
    labels.write_text(json.dumps([{"name": "a.jpg", "attributes": {**SCENE, **attributes}, "labels": [label] * 2}]))
    args = ("--labels", labels, "--output", output, "--run-name", tmp_path / "run")
    run = call_script("bdd100k_data_pipeline.py", *args, "--strict")
    assert run.returncode == 2
    assert named in run.stderr
    assert not output.exists()
    assert call_script("bdd100k_data_pipeline.py", *args).returncode == 0


def test_strict_accepts_known_classes_in_other_cases_and_small_boxes(tmp_path):
    labels, output = tmp_path / "labels.json", tmp_path / "o.csv"
    small = {"category": "Car", "box2d": {"x1": 0, "y1": 0, "x2": 1, "y2": 1}}
    labels.write_text(json.dumps([{"name": "a.jpg", "attributes": SCENE, "labels": [{"category": "Car"}, small]}]))
    args = ("--labels", labels, "--output", output, "--run-name", tmp_path / "run", "--min-box-size", 5)
    run = call_script("bdd100k_data_pipeline.py", *args, "--strict")
    assert run.returncode == 0, run.stderr
    assert read_captions(output).set_index("name")["caption"]["a.jpg"].endswith("There is one car.")


@pytest.mark.parametrize("category", ["crosswalk", "single white", "lane/road curb", "direct", "area/alternative"])
def test_classes_of_lane_and_drivable_files_are_read(tmp_path, category):
    facts, report = read_one(tmp_path, [{"category": category}])
    assert set(facts.objects) <= {ObjectKind("lane"), ObjectKind("drivable area")} and facts.objects
    assert not report.remarks


def test_a_file_of_several_moments_says_that_the_first_is_used(tmp_path):
    moments = {"name": "a", "attributes": SCENE, "frames": [{"objects": [CAR]}, {"objects": [CAR, CAR]}]}
    frames, report = read(tmp_path, moments)
    assert frames["a.jpg"].objects == {ObjectKind("car"): 1}
    assert report.remarks == {"a file of several moments, of which the first is used": 1}


@pytest.mark.parametrize("value", [3, {}, [], ["clear"], True])
def test_a_scene_attribute_of_a_wrong_type_is_told(tmp_path, value):
    with pytest.raises(UserError, match=r"(?s)wrong type: .*attributes\.weather"):
        read(tmp_path, {"name": "a.jpg", "attributes": {**SCENE, "weather": value}, "labels": [CAR]})


def test_attributes_that_are_all_labelled_undefined_are_captioned_and_told(tmp_path):
    facts, report = read_one(tmp_path, [], dict.fromkeys(SCENE, "undefined"))
    assert (facts.time_of_day, facts.weather, facts.scene) == ("undefined",) * 3
    assert not report.remarks
    assert "1 x timeofday, weather and scene all labelled undefined" in str(report)


def test_a_frame_without_labels_leaves_the_fast_way_to_the_others():
    """Writers that leave out empty keys are common; plain JSON values take fifty times as long."""
    raw = [{"name": "a.jpg", "attributes": {"weather": "clear"}}, {"name": "b.jpg", "labels": [{"category": "car"}]}]
    frames, _ = decode_frames(json.dumps(raw).encode())
    assert [frame.name for frame in frames] == ["a.jpg", "b.jpg"] and not isinstance(frames[0], dict)


def test_a_wrapper_is_read_in_the_fast_way_too():
    frames, wrapped = decode_frames(json.dumps({"frames": [{"name": "a.jpg", "labels": [CAR]}], "groups": []}).encode())
    assert wrapped and [frame.name for frame in frames] == ["a.jpg"] and not isinstance(frames[0], dict)


def box(x1, y1, x2, y2):
    return {"category": "car", "box2d": {"x1": x1, "y1": y1, "x2": x2, "y2": y2}}


@pytest.mark.parametrize(
    ("one", "other", "duplicates"),
    [
        (box(0, 0, 100, 100), box(0, 0, 84.9, 100), 0),
        (box(0, 0, 100, 100), box(0, 0, 85, 100), 0),  # an IoU of 0.85, and not more
        (box(0, 0, 100, 100), box(0, 0, 85.1, 100), 1),
        (box(0, 0, 100, 100), box(0, 14.9, 100, 100), 1),
        (box(5, 5, 5.5, 90), box(5, 5, 5.5, 90), 1),  # as thin ones as there are
        (box(5, 5, 90, 5.5), box(5, 5, 90, 5.5), 1),
        (box(5, 5, 5, 5), box(5, 5, 5, 5), 0),  # nothing in it that they could share
        (box(0, 0, 10, 10), box(1, 50, 11, 60), 0),
        (box(0, 0, 100, 100), box(0, 0, 100, 100) | {"category": "truck"}, 0),
    ],
)
def test_boxes_of_one_class_that_share_more_than_85_percent_are_near_duplicates(tmp_path, one, other, duplicates):
    for labels in ([one, other], [other, one]):
        facts, report = read_one(tmp_path, labels, merge_duplicates=True)
        assert report.near_duplicates == duplicates
        assert sum(facts.objects.values()) == 2 - duplicates


def test_facts_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Facts().weather = "clear"


def test_a_census_tells_how_the_objects_of_each_class_are_seen(capsys):
    report = LabelReport(frames=2, boxes_a_frame=Counter([2, 3]), caption_words=Counter([9]))
    report.objects = Counter(
        {ObjectKind("car"): 2, ObjectKind("car", occluded=True): 1, ObjectKind("car", True, True): 1}
    )
    report.objects[ObjectKind("bus", truncated=True)] = 1
    print_census(report, Counter([20]), "demo's tokenizer")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["car"] == ["4", "2.00", "50.0%", "25.0%"]
    assert rows["bus"] == ["1", "0.50", "0.0%", "100.0%"]


@pytest.mark.parametrize(
    "content",
    [
        'name,raw_caption\na.jpg,"written by hand"\n',
        "image,caption\na.jpg,It is so.\n",
        "[]",
        "\0\xff",
        'name,raw_caption\n"a',
    ],
)
def test_a_file_that_is_no_captions_of_ours_is_not_written_over(folder, content):
    labels, output = folder / "labels.json", folder / "mine.csv"
    labels.write_text(json.dumps([{"name": "a.jpg", "attributes": SCENE, "labels": [CAR]}]))
    output.write_text(content)
    run = call_script("bdd100k_data_pipeline.py", "--labels", labels, "--output", output)
    assert run.returncode == 2 and f"--output {output}: is there" in run.stderr
    assert output.read_text() == content and not (folder / "logs").exists()


@pytest.mark.parametrize("style", ["plain", "natural", "markdown"])
def test_captions_of_ours_are_written_anew(folder, style):
    labels = folder / "labels.json"
    labels.write_text(json.dumps([{"name": "a.jpg", "attributes": SCENE, "labels": [CAR]}]))
    for _ in range(2):
        run = call_script("bdd100k_data_pipeline.py", "--labels", labels, "--output", "o.csv", "--style", style)
        assert run.returncode == 0, run.stderr
