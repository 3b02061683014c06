"""The demo's scenes: repeatable, in BDD100K's layout, and with labels that the geometry of the boxes bears out."""

import json
import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, start_script
from PIL import Image

from captioner.runtime.errors import UserError
from demo import draw

ON_GROUND = {"car", "truck", "bus", "person", "bike"}
HANGING = {"traffic light", "traffic sign"}
WIDTH, HEIGHT = draw.SIZE


@pytest.fixture(scope="module")
def frames() -> list[dict]:
    """300 frames without their images."""
    scenes = [draw.sample_scene(seed) for seed in range(300)]
    keys = ("weather", "scene", "timeofday")
    return [
        {"attributes": dict(zip(keys, (s.weather, s.place, s.time), strict=True)), "labels": draw.list_labels(s)}
        for s in scenes
    ]


def list_boxes(frame: dict) -> list[tuple[dict, tuple[float, float, float, float]]]:
    boxed = [label for label in frame["labels"] if "box2d" in label]
    return [(label, tuple(label["box2d"][key] for key in ("x1", "y1", "x2", "y2"))) for label in boxed]


def measure_covered(box: tuple, nearer: list[tuple]) -> float:
    """The share of a box that others cover, counted in quarter pixels."""
    x1, y1, x2, y2 = (round(v * 4) for v in box)
    covered = np.zeros((y2 - y1, x2 - x1), bool)
    for a, b, c, d in nearer:
        left, top, right, bottom = (round(v * 4) for v in (a, b, c, d))
        covered[max(0, top - y1) : max(0, bottom - y1), max(0, left - x1) : max(0, right - x1)] = True
    return covered.mean()


def test_a_seed_always_gives_the_same_image_and_frame():
    for seed in (0, 7, 2**32 - 1):
        (image, frame), (again, frame_again) = draw.draw_scene(seed), draw.draw_scene(seed)
        assert image.size == draw.SIZE and image.mode == "RGB"
        assert image.tobytes() == again.tobytes()
        assert json.dumps(frame) == json.dumps(frame_again)
    assert draw.draw_scene(1)[0].tobytes() != draw.draw_scene(2)[0].tobytes()


def test_scenes_look_as_they_did_when_the_base_was_trained_on_them():
    """drawn_scenes.png has seeds 0 to 23, shrunk; another Pillow may round otherwise, but moves or drops nothing."""
    kept = np.asarray(Image.open(ROOT / "tests/drawn_scenes.png")).astype(int)  # (4 x 68, 6 x 120, 3)
    for seed in range(24):
        image, _ = draw.draw_scene(seed)
        small = np.asarray(image.resize((120, 68), Image.Resampling.BOX)).astype(int)
        row, column = divmod(seed, 6)
        difference = abs(small - kept[row * 68 : (row + 1) * 68, column * 120 : (column + 1) * 120])
        assert difference.mean() < 0.3 and (difference.max(-1) > 16).sum() <= 2, seed


def test_names_look_like_bdds_and_no_two_scenes_share_a_ride():
    seeds = [*range(20_000), *range(2**31, 2**31 + 1000), 2**32 - 1]
    names = [draw.name_image(seed) for seed in seeds]
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{8}\.jpg", name) for name in names)
    assert len({name[:8] for name in names}) == len(names)
    with pytest.raises(AssertionError, match="4294967296"):
        draw.name_image(2**32)


def test_frames_have_the_layout_of_the_2018_release(frames):
    frame = draw.draw_scene(3)[1]
    assert list(frame) == ["name", "attributes", "timestamp", "labels"] and frame["timestamp"] == 10000
    for frame in frames:
        categories = Counter(label["category"] for label in frame["labels"])
        assert categories["drivable area"] == 1 and 2 <= categories["lane"] <= 4
        assert [label["id"] for label in frame["labels"]] == list(range(len(frame["labels"])))
        for label in frame["labels"]:
            assert label["manualShape"] is True and label["manualAttributes"] is True
            check_label(label)


def check_label(label: dict) -> None:
    attributes = label["attributes"]
    if label["category"] in ON_GROUND | HANGING:
        assert set(attributes) == {"occluded", "truncated", "trafficLightColor"}
        assert (attributes["trafficLightColor"] != "none") == (label["category"] == "traffic light")
        assert set(label["box2d"]) == {"x1", "y1", "x2", "y2"}
        return
    keys = {"lane": {"laneDirection", "laneStyle", "laneType"}, "drivable area": {"areaType"}}
    assert set(attributes) == keys[label["category"]]
    (poly,) = label["poly2d"]
    assert set(poly) == {"vertices", "types", "closed"} and len(poly["types"]) == len(poly["vertices"])
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in poly["vertices"])


def test_boxes_lie_inside_and_can_be_seen_at_112_pixels(frames):
    smallest = {"person": (4, 10), "traffic sign": (6, 6), "traffic light": (6, 6)}
    for frame in frames:
        for label, (x1, y1, x2, y2) in list_boxes(frame):
            assert 0 <= x1 < x2 <= WIDTH and 0 <= y1 < y2 <= HEIGHT
            width, height = smallest.get(label["category"], (8, 8))
            shown = 0.4 if label["attributes"]["truncated"] else 1
            assert (x2 - x1) * 112 / WIDTH >= width * shown and (y2 - y1) * 112 / HEIGHT >= height


def test_occluded_objects_are_those_that_a_nearer_box_covers(frames):
    """What stands on the ground is nearer the lower its box reaches."""
    for frame in frames:
        boxes = list_boxes(frame)
        for label, box in boxes:
            others = [other for other_label, other in boxes if other_label is not label]
            hanging = label["category"] in HANGING
            covered = measure_covered(box, [other for other in others if hanging or other[3] > box[3]])
            if label["attributes"]["occluded"]:
                assert 0.2 <= covered <= 0.6 and not hanging, (label, covered)
            else:
                assert covered < 0.03, (label, covered)


def test_truncated_objects_are_those_that_the_border_cuts(frames):
    for frame in frames:
        for label, (x1, y1, x2, y2) in list_boxes(frame):
            assert y1 > 0 and y2 < HEIGHT
            if label["attributes"]["truncated"]:
                assert x1 == 0 or x2 == WIDTH
            else:
                assert x1 >= draw.MARGIN - 0.01 and x2 <= WIDTH - draw.MARGIN + 0.01
    for seed in range(300):
        for thing in draw.sample_scene(seed).things:
            x1, _, x2, _ = thing.box
            cut = max(-x1, x2 - WIDTH, 0) / (x2 - x1)
            assert 0.2 <= cut <= 0.6 if thing.truncated else cut == 0


def test_every_value_and_count_is_common(frames):
    for key, values in (("timeofday", draw.TIMES), ("weather", draw.WEATHERS), ("scene", draw.PLACES)):
        found = Counter(frame["attributes"][key] for frame in frames)
        assert set(found) == set(values) and min(found.values()) >= 0.04 * len(frames), found
    lights, largest = Counter(), {"car": 5, "truck": 1, "bus": 1, "person": 3, "bike": 1} | dict.fromkeys(HANGING, 2)
    counts = {category: Counter() for category in largest}
    for frame in frames:
        found = Counter(label["category"] for label in frame["labels"])
        lights.update({label["attributes"]["trafficLightColor"] for label, _ in list_boxes(frame)})
        for category, counter in counts.items():
            counter[found[category]] += 1
    assert set(lights) == {"red", "yellow", "green", "none"} and min(lights.values()) >= 0.04 * len(frames)
    for category, counter in counts.items():
        assert set(counter) == set(range(largest[category] + 1)), (category, counter)
        assert min(counter.values()) >= 0.03 * len(frames), (category, counter)


def read_images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def test_a_dataset_is_the_same_from_one_process_as_from_two_and_drawn_once(tmp_path, monkeypatch):
    seeds = [11, 5, 2**20]
    labels = draw.draw_dataset(tmp_path / "one", seeds, workers=1)
    assert labels == tmp_path / "one" / "labels.json"
    written = json.loads(labels.read_text())
    assert written == [draw.draw_scene(seed)[1] for seed in seeds]
    images = read_images(tmp_path / "one")
    assert set(images) == {frame["name"] for frame in written}

    other = draw.draw_dataset(tmp_path / "two", seeds, workers=2)
    assert other.read_bytes() == labels.read_bytes() and read_images(tmp_path / "two") == images

    drawn = []
    monkeypatch.setattr(draw, "paint_scene", lambda scene, paint=draw.paint_scene: drawn.append(1) or paint(scene))
    draw.draw_dataset(tmp_path / "one", seeds, workers=1)
    assert not drawn
    next((tmp_path / "one" / "images").iterdir()).unlink()  # a lost image, other seeds, a new version: drawn again
    draw.draw_dataset(tmp_path / "one", seeds, workers=1)
    draw.draw_dataset(tmp_path / "one", seeds[:2], workers=1)
    monkeypatch.setattr(draw, "VERSION", draw.VERSION + 1)
    draw.draw_dataset(tmp_path / "one", seeds[:2], workers=1)
    assert len(drawn) == 3 + 2 + 2
    assert not list(tmp_path.rglob("*.part"))


def kill_yourself(images: Path, seed: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_that_draws_is_noticed(tmp_path, monkeypatch):
    """As by a system that is short of memory; a multiprocessing.Pool would wait for its answer for ever."""
    monkeypatch.setattr(draw, "write_scene", kill_yourself)
    with pytest.raises(UserError, match="a process that draws scenes was killed"):
        draw.draw_dataset(tmp_path, range(4), workers=2)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_disk_fills_up_while_scenes_are_drawn(tmp_path, mount, workers):
    """What is there by then is not taken for the whole."""
    folder = mount(tmp_path / "disk", "64k")
    with pytest.raises(UserError, match=r"disk: can't be written \(No space left .*free some space"):
        draw.draw_dataset(folder, range(4), workers)
    assert not (folder / "labels.json").exists()
    subprocess.run(["mount", "-o", "remount,size=4m", folder], check=True)
    assert len(json.loads(draw.draw_dataset(folder, range(4), workers).read_text())) == 4


def test_disk_fills_up_while_the_demo_is_drawn(folder, mount):
    """By a process of its own, whose one line is above that of the script."""
    mount(folder / "demo-data", "64k")
    done = start_script("bdd100k_data_pipeline.py", "--demo")
    _, error = done.communicate(timeout=300)
    assert done.returncode == 2 and "Traceback" not in error
    assert re.search(r"error: .*No space left[^\n]*\nerror: demo-data: no scenes were drawn \(see above\)", error), (
        error
    )


def test_a_contact_sheet_shows_every_scene(tmp_path):
    draw.write_contact_sheet(tmp_path / "sheet.png", range(3), columns=2)
    with draw.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * WIDTH, 2 * HEIGHT)
        assert sheet.crop((0, HEIGHT, WIDTH, 2 * HEIGHT)).tobytes() == draw.draw_scene(2)[0].tobytes()
