"""Draw driving scenes with labels in the layout of BDD100K's 2018 release, so that the demo needs no download.

    python -m demo.draw --count 1000 --out scenes              scenes/images/*.jpg and scenes/labels.json
    python -m demo.draw --count 24 --contact-sheet sheet.png   one image of many scenes, to look at

A seed decides everything about its scene. Placing comes first, in metres, and the labels are read off that geometry;
painting comes second and decides nothing that a label says. An object is either clear of all others or covered by
a nearer one to a share between COVERED's (occluded), and either wholly inside the image or cut by its left or right
border by a share between CUT's (truncated): a label never hangs on a few pixels.
"""

import argparse
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw
from tqdm import tqdm

from captioner.runtime.errors import UserError
from captioner.runtime.files import explain_writing
from captioner.runtime.processes import count_all_cores

Colour = tuple[int, int, int]
Pair = tuple[float, float]
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the saved image

VERSION = 1  # bump whenever a seed's image or labels change
SIZE = (480, 270)  # width and height of a saved image, in pixels
FINE = 2  # everything is painted FINE times larger and then reduced, which smooths the edges
WIDE, HIGH = SIZE[0] * FINE, SIZE[1] * FINE


def parse_colours(text: str) -> list[Colour]:
    return [ImageColor.getrgb("#" + word) for word in text.split()]


# fmt: off
# ---- what is drawn, and how often ----
TIMES = {"daytime": 0.50, "night": 0.31, "dawn/dusk": 0.19}
WEATHERS = {"clear": 0.40, "overcast": 0.15, "partly cloudy": 0.15, "rainy": 0.11, "snowy": 0.10, "foggy": 0.09}
PLACES = {"city street": 0.50, "highway": 0.26, "residential": 0.24}
LIGHTS = {"red": 0.42, "green": 0.38, "yellow": 0.20}
COUNTS = {  # place: category: weight of 0, 1, 2, ... objects; those that find room least easily come first
    "city street": {"traffic light": (4, 3, 4), "traffic sign": (5, 6, 4), "bus": (7, 3), "truck": (8, 2),
                    "bike": (3, 1), "car": (1, 3, 4, 4, 4, 5), "person": (3, 3, 3, 3)},
    "residential": {"traffic light": (5, 3, 2), "traffic sign": (4, 5, 3), "bus": (8, 1), "truck": (8, 2),
                    "bike": (2, 1), "car": (2, 4, 4, 3, 3, 4), "person": (4, 3, 2, 2)},
    "highway": {"traffic light": (9, 1, 0), "traffic sign": (4, 4, 3), "bus": (8, 1), "truck": (3, 2),
                "bike": (1,), "car": (1, 4, 5, 4, 4, 5), "person": (1,)},
}
HIDE, TRUNCATE = 0.45, 0.12  # chance to try an overlap, and (vehicles) to try a cut by the border
SOLO = {"bus": 0.6, "truck": 0.6, "bike": 0.6}  # chance to stay out of overlaps, which few of these would else
MIXED = 0.20  # chance of a second traffic light to differ from the first
COVERED, CUT = (0.24, 0.46), (0.24, 0.50)  # shares of a box that an overlap or the border may take away
GAP, MARGIN = 5, 5  # pixels between clear objects, and from the border

# ---- the world in metres: x to the right, h up, z ahead; objects are a third larger than life, so as to be seen ----
EYE, FOCAL = 2.3, 400  # height of the camera; pixels that a metre takes at one metre's distance
LANES, STRIPS = (-3.6, 0.0, 3.6), (-6.6, 6.6)  # where vehicles drive, and where they park: a highway's shoulders
EDGE, KERB, PATH, WALL = 5.4, 7.8, 10.2, 11.0  # half widths: the lanes, the road, road and pavement, all open space
NEAR, FAR = 8.0, 21.0  # objects stand between
OVERHEAD = 20.5  # where lights and motorway signs hang
MODELS = {"car": ("saloon", "hatchback", "offroader"), "truck": ("truck",), "bus": ("bus",), "bike": ("bike",),
          "person": ("person",), "traffic sign": ("stop", "warning", "speed", "parking")}
SIZES = {  # model: width, length, height
    "saloon": (2.35, 4.0, 1.85), "hatchback": (2.25, 3.2, 1.95), "offroader": (2.45, 3.7, 2.2),
    "truck": (3.0, 6.5, 4.0), "bus": (3.1, 8.0, 3.6), "person": (0.95, 0.0, 2.3), "bike": (2.5, 0.0, 1.55),
    "panel": (4.0, 0.0, 2.0), "light": (1.35, 0.0, 2.65), **dict.fromkeys(MODELS["traffic sign"], (1.5, 0.0, 1.5)),
}
CABINS = {  # model: height of the bonnet; where the cabin starts and ends, in shares of the length
    "saloon": (1.15, 0.15, 0.76), "hatchback": (1.15, 0.02, 0.70), "offroader": (1.35, 0.02, 0.74),
}

# ---- colours ----
SKIES = {  # weather: time: top, middle and foot of the sky
    "clear": {"daytime": "2b7bd4 74b7f0 d9f0fb", "night": "050a20 101b44 34467f", "dawn/dusk": "37418c c56f9c ffc076"},
    "partly cloudy": {"daytime": "3f88d3 86bdeb deeef7", "night": "080f2b 18244d 43527f",
                      "dawn/dusk": "464a90 bd789f ffb780"},
    "overcast": {"daytime": "8893a0 a5afb9 c9cfd4", "night": "171a22 2a2e39 444955",
                 "dawn/dusk": "635a73 93798a d3a489"},
    "rainy": {"daytime": "53606f 6d7b88 98a4ad", "night": "0f131b 1b222c 333c49", "dawn/dusk": "453f5a 6f5d76 b58a86"},
    "snowy": {"daytime": "a9b8c6 c8d3dc e9eef2", "night": "1f2639 343d56 5f6a86", "dawn/dusk": "736f93 b097b2 ecc1b4"},
    "foggy": {"daytime": "b7c1c5 c9d1d3 d9dede", "night": "3b424b 4d545d 69717a", "dawn/dusk": "9c8793 c4a5a2 e2bfa7"},
}
DAYLIGHT = {"daytime": (1.0, 1.0, 1.0), "night": (0.50, 0.54, 0.70), "dawn/dusk": (1.0, 0.82, 0.80)}
DIM = {"clear": 1.0, "partly cloudy": 0.98, "overcast": 0.88, "rainy": 0.78, "snowy": 0.95, "foggy": 0.92}
SIGHT = {"clear": 150, "partly cloudy": 140, "overcast": 110, "rainy": 75, "snowy": 75, "foggy": 24}  # metres
LIT_WINDOWS = {"daytime": 0.0, "night": 0.5, "dawn/dusk": 0.3}
SUNS = dict(zip(TIMES, parse_colours("fff4be f6f3dc ffe296"), strict=True))
CLOUDS = dict(zip(TIMES, parse_colours("ffffff 808aac ffd6c4"), strict=True))
LAMPS = dict(zip(("green", "yellow", "red"), parse_colours("35e87a ffd02e ff3b30"), strict=True))
COATS = parse_colours("e5484d 2f7fe0 f5b93a 8e4ec6 30a46c f2f2f2 e8710a")
PAINTS = {  # category: colours, no two objects of one scene alike
    "car": parse_colours("d8352f f4f1e8 2f6fd0 f2a32b 2f9c74 b9c2cc 7d4fb0 38b6c9 e86f9a 9bbf3f"),
    "bus": parse_colours("e0453a f5b82e 1f9d8f 3a62c4"), "truck": parse_colours("f3efe4 dfe6ee e8d9b8 c9d8c6"),
    "person": COATS, "bike": COATS,
}
FACADES = parse_colours("c9705a e3c7a0 8fa6b8 b98a8f d9b48a 9aa58f a7788e cfc4b4 7f92a8")
WALLS, ROOFS = parse_colours("f2e3c9 e8c9b2 cfdbe0 f0d9a8 d8e0c8"), parse_colours("a8483c 7a4a3e 5f6673 8c5a44 4f5d73")
LEAVES, PANES = parse_colours("4f8f47 6aa84f 3f7d52 7fb25a"), parse_colours("708ca6 8cacc6")
SKINS, HAIRS = parse_colours("f1c9a5 c98e62 8d5a3b"), parse_colours("2a211c 6b4426 c9a24a")
SNOW, WHITE, BLACK, STEEL, MAST, GLASS = parse_colours("f1f5fa ffffff 1d2027 9aa3ad 4a505a 35495c")
WARM, TAIL, BEAM, RED, AMBER, BLUE, GREEN = parse_colours("ffd98a e8302a fff6dc ce2626 fac428 2660c8 16764e")
# fmt: on

# ---- flat images: (colour, or share of the object's own colour; corners) ----
Art = list[tuple[Colour | float, list[Pair]]]


def rect(x: float, width: float, low: float, high: float) -> list[Pair]:
    return [(x - width / 2, low), (x - width / 2, high), (x + width / 2, high), (x + width / 2, low)]


def ring(x: float, h: float, r: float, corners: int = 16) -> list[Pair]:
    turns = [(i + 0.5) / corners * math.tau for i in range(corners)]
    return [(x + r * math.sin(turn), h + r * math.cos(turn)) for turn in turns]


# fmt: off
SIGNS: dict[str, Art] = {  # in metres around the middle
    "stop": [(WHITE, ring(0, 0, 0.81, 8)), (RED, ring(0, 0, 0.7, 8)), (WHITE, rect(0, 0.95, -0.15, 0.15))],
    "warning": [(BLACK, [(-0.75, 0), (0, 0.75), (0.75, 0), (0, -0.75)]),
                (AMBER, [(-0.65, 0), (0, 0.65), (0.65, 0), (0, -0.65)]),
                (BLACK, rect(0, 0.17, -0.05, 0.4)), (BLACK, ring(0, -0.26, 0.1))],
    "speed": [(BLACK, rect(0, 1.5, -0.75, 0.75)), (WHITE, rect(0, 1.36, -0.68, 0.68)),
              (BLACK, rect(0, 1.0, 0.25, 0.42)),
              (BLACK, rect(-0.29, 0.44, -0.55, 0.12)), (WHITE, rect(-0.29, 0.16, -0.4, -0.03)),
              (BLACK, rect(0.29, 0.44, -0.55, 0.12)), (WHITE, rect(0.29, 0.16, -0.4, -0.03))],
    "parking": [(WHITE, rect(0, 1.5, -0.75, 0.75)), (BLUE, rect(0, 1.36, -0.68, 0.68)),
                (WHITE, rect(-0.2, 0.22, -0.45, 0.5)), (WHITE, ring(0.08, 0.2, 0.32)), (BLUE, ring(0.08, 0.2, 0.13))],
    "panel": [(WHITE, rect(0, 4.0, -1.0, 1.0)), (GREEN, rect(0, 3.8, -0.9, 0.9)), (WHITE, rect(-0.4, 2.2, 0.25, 0.55)),
              (WHITE, rect(-0.7, 1.6, -0.4, -0.15)), (WHITE, [(0.95, -0.1), (1.35, 0.55), (1.75, -0.1)]),
              (WHITE, rect(1.35, 0.28, -0.6, 0.0))],
}
ENDS: dict[str, Art] = {  # the near end of a vehicle, in shares of its width and of a car's bonnet or of the height
    "car rear": [(0.62, rect(0, 0.98, 0.26, 0.43)), (WHITE, rect(0, 0.26, 0.5, 0.7))],
    "car front": [(0.62, rect(0, 0.98, 0.26, 0.4)), (BLACK, rect(0, 0.48, 0.5, 0.8))],
    "truck rear": [(0.86, rect(-0.24, 0.44, 0.28, 0.95)), (0.86, rect(0.24, 0.44, 0.28, 0.95)),
                   (0.6, rect(-0.05, 0.025, 0.32, 0.9)), (0.6, rect(0.05, 0.025, 0.32, 0.9)),
                   (WHITE, rect(0, 0.96, 0.15, 0.22))] + [(RED, rect(i / 6, 0.084, 0.15, 0.22)) for i in (-2, 0, 2)],
    "truck front": [(GLASS, [(-0.41, 0.43), (-0.39, 0.7), (0.39, 0.7), (0.41, 0.43)]),
                    (BLACK, rect(0, 0.5, 0.22, 0.35))],
    "bus rear": [(WHITE, rect(0, 1, 0.28, 0.375)), (BLACK, rect(0, 0.7, 0.86, 0.965)),
                 (AMBER, rect(0, 0.5, 0.885, 0.94)), (GLASS, rect(0, 0.84, 0.55, 0.82))],
    "bus front": [(WHITE, rect(0, 1, 0.28, 0.375)), (BLACK, rect(0, 0.7, 0.86, 0.965)),
                  (AMBER, rect(0, 0.5, 0.885, 0.94)), (GLASS, rect(0, 0.9, 0.43, 0.84))],
}
PERSON: Art = [  # in metres; hands, head and hair follow
    ((43, 53, 80), [(-0.24, 1.15), (-0.34, 0.02), (-0.12, 0.02), (0.0, 0.95)]),
    ((34, 42, 64), [(0.24, 1.15), (0.34, 0.1), (0.12, 0.1), (0.0, 0.95)]),
    (0.8, [(-0.26, 1.84), (-0.47, 1.15), (-0.33, 1.08), (-0.2, 1.52)]),
    (0.8, [(0.26, 1.84), (0.47, 1.15), (0.33, 1.08), (0.2, 1.52)]),
    (1.0, [(-0.27, 1.0), (-0.3, 1.8), (-0.18, 1.91), (0.18, 1.91), (0.3, 1.8), (0.27, 1.0)]),
]
BIKE = [  # the strokes of its frame, saddle and handlebar
    (1.0, [(-0.75, 0.5), (-0.3, 1.15), (0.5, 1.15), (-0.05, 0.5), (-0.75, 0.5)]), (1.0, [(-0.38, 1.3), (-0.05, 0.5)]),
    (1.0, [(0.75, 0.5), (0.45, 1.45)]), (0.4, [(-0.58, 1.34), (-0.2, 1.34)]), (0.4, [(0.25, 1.5), (0.62, 1.44)]),
]
# fmt: on


# ---- placing ----
@dataclass
class Thing:
    """One labelled object: where it stands or hangs, its unclipped box, and what its label says."""

    category: str
    model: str
    x: float  # metres to the right of the camera, of its middle
    h: float  # metres above the road, of its lower edge: 0 unless it hangs
    z: float  # metres ahead, of its near end
    box: Box
    colour: Colour = WHITE
    oncoming: bool = False
    light: str = "none"
    occluded: bool = False
    truncated: bool = False
    paired: bool = False  # it covers another or is covered, or is not to


@dataclass
class Scene:
    """What a seed has decided, before anything is painted."""

    rng: random.Random
    time: str
    weather: str
    place: str
    centre: float  # column and row of the vanishing point, in pixels
    horizon: float
    lines: list[tuple[float, str, str]]  # lane lines: x in metres, style, type
    things: list[Thing]

    def project(self, x: float, h: float, z: float) -> Pair:
        """The pixel of a point in the world."""
        return self.centre + x * FOCAL / z, self.horizon + (EYE - h) * FOCAL / z


def sample_scene(seed: int) -> Scene:
    """Draw the facts of a seed and place its objects."""
    rng = random.Random(seed)
    time, weather, place = (rng.choices(list(d), list(d.values()))[0] for d in (TIMES, WEATHERS, PLACES))
    centre, horizon = 240 + rng.uniform(-14, 14), 118 + rng.uniform(-5, 5)
    scene = Scene(rng, time, weather, place, centre, horizon, choose_lines(rng, place), [])
    counts = {c: rng.choices(range(len(w)), w)[0] for c, w in COUNTS[place].items()}
    place_lights(scene, counts.pop("traffic light"))
    place_signs(scene, counts.pop("traffic sign"))
    for category, count in counts.items():
        for colour in rng.sample(PAINTS[category], count):
            place_thing(scene, category, colour)
    return scene


def choose_lines(rng: random.Random, place: str) -> list[tuple[float, str, str]]:
    white = [(-1.8, "dashed", "single white"), (1.8, "dashed", "single white")]
    if place == "highway":
        return [(-EDGE, "solid", "single yellow"), *white, (EDGE, "solid", "single white")]
    if place == "residential":
        middle = rng.choice([[], [(-1.8, "dashed", "single yellow")]])
    else:
        middle = [(-1.8, "solid", "double yellow"), *white[1 : rng.choice((1, 2, 2))]]
    return [(-KERB, "solid", "road curb"), *middle, (KERB, "solid", "road curb")]


def place_lights(scene: Scene, count: int) -> None:
    """Traffic lights hang over different lanes, high enough that no bus reaches them."""
    rng = scene.rng
    first = rng.choices(list(LIGHTS), list(LIGHTS.values()))[0]
    for i, lane in enumerate(rng.sample(LANES, count)):
        others = [light for light in LIGHTS if light != first]
        light = rng.choice(others) if i and rng.random() < MIXED else first
        x = lane + rng.uniform(-0.4, 0.4)
        scene.things.append(make_thing(scene, "traffic light", "light", x, 4.95, OVERHEAD, light=light))


def place_signs(scene: Scene, count: int) -> None:
    """Signs stand on posts on either side; on a highway without lights they may hang from a gantry instead."""
    rng = scene.rng
    gantry = scene.place == "highway" and not scene.things and rng.random() < 0.6
    models = rng.sample(MODELS["traffic sign"], count)
    for model, side in zip(models, rng.sample((-1, 1), count), strict=True):
        if gantry:
            thing = make_thing(scene, "traffic sign", "panel", side * 2.7, 5.2, OVERHEAD)
        else:
            x, h, z = side * rng.uniform(8.2, 8.6), rng.uniform(2.8, 3.3), rng.uniform(17.5, 20.4)
            thing = make_thing(scene, "traffic sign", model, x, h, z)
        scene.things.append(thing)


def place_thing(scene: Scene, category: str, colour: Colour) -> None:
    """Try to place one more object, by chance in an overlap or cut; one that finds no room is left out."""
    rng, chance = scene.rng, scene.rng.random()
    cuttable = category in ("car", "truck", "bus")
    wish = "overlap" if chance < HIDE else "cut" if cuttable and chance > 1 - TRUNCATE else "clear"
    for wanted in [wish] * 60 + ["clear"] * 60:
        thing = propose_thing(scene, category, wanted == "cut")
        partner = check_room(scene.things, thing, wanted)
        if partner is None:
            continue
        if wanted == "overlap":
            thing.paired = partner.paired = True
            max(thing, partner, key=lambda t: t.z).occluded = True
        thing.paired |= rng.random() < SOLO.get(category, 0)
        thing.colour, thing.truncated = colour, wanted == "cut"
        scene.things.append(thing)
        return


def propose_thing(scene: Scene, category: str, cut: bool) -> Thing:
    """A random place and model: vehicles on the road, people and bikes on the pavement, some people crossing."""
    rng, side = scene.rng, scene.rng.choice((-1, 1))
    if category in ("person", "bike"):
        z = rng.uniform(16.5, FAR)
        x = side * rng.uniform(KERB + 0.5, min(PATH - 0.4, 0.5 * z))
        if category == "person" and rng.random() < 0.35:
            x, z = rng.uniform(-EDGE, EDGE), rng.uniform(13, FAR)
    elif cut:
        x, z = side * rng.uniform(3.6, 5.6), rng.uniform(7.2, 9.5)
    elif category == "car" and rng.random() < 0.35:
        x, z = rng.choice(STRIPS), rng.uniform(14.5, FAR)
    else:
        x, z = rng.choice(LANES) + rng.uniform(-0.3, 0.3), 1 / rng.uniform(1 / FAR, 1 / NEAR)  # even over the rows
        z = z if category == "car" else max(z, 11.5)
    oncoming = x < -1.8 and scene.place != "highway"
    return make_thing(scene, category, rng.choice(MODELS[category]), x, 0.0, z, oncoming=oncoming)


def make_thing(scene: Scene, category: str, model: str, x: float, h: float, z: float, **facts) -> Thing:
    """An object and its box: the hull of the projected corners of what will be painted."""
    width, length, height = SIZES[model]
    (ax, ay), (bx, by) = scene.project(x - width / 2, h, z), scene.project(x + width / 2, h + height, z)
    (cx, cy), (dx, dy) = (scene.project(x + s * width / 2, h + height, z + length) for s in (-1, 1))
    return Thing(category, model, x, h, z, (min(ax, cx), min(by, cy, dy), max(bx, dx), ay), **facts)


def check_room(things: list[Thing], thing: Thing, wanted: str) -> Thing | None:
    """The object that `thing` would share an overlap with, `thing` itself where none is wanted, or None: no room.

    Whatever is not meant to overlap keeps GAP pixels of distance, and no object is part of two overlaps.
    """
    x1, _, x2, y2 = thing.box
    cut = max(-x1, x2 - SIZE[0], 0) / (x2 - x1)
    inside = CUT[0] <= cut <= CUT[1] if wanted == "cut" else min(x1, SIZE[0] - x2) >= MARGIN
    if not inside or y2 > SIZE[1] - MARGIN:
        return None
    touching = [other for other in things if measure_overlap(thing.box, other.box, GAP) > 0]
    if wanted != "overlap":
        return None if touching else thing
    if len(touching) != 1 or touching[0].paired or touching[0].truncated or touching[0].h > 0:
        return None
    near, far = sorted((thing, touching[0]), key=lambda t: t.z)
    covered = measure_overlap(far.box, near.box)
    return touching[0] if COVERED[0] <= covered <= COVERED[1] and not collide(near, far) else None


def measure_overlap(box: Box, other: Box, gap: float = 0) -> float:
    """The share of `box` that `other`, grown by `gap` pixels, covers."""
    width = min(box[2], other[2] + gap) - max(box[0], other[0] - gap)
    height = min(box[3], other[3] + gap) - max(box[1], other[1] - gap)
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def collide(near: Thing, far: Thing) -> bool:
    """Whether two objects would stand in one another, as opposed to one before the other."""
    (w0, length, _), (w1, _, _) = SIZES[near.model], SIZES[far.model]
    return abs(near.x - far.x) < (w0 + w1) / 2 and far.z < near.z + length + 0.5


# ---- painting: tools ----
def mix(one: Colour, other: Colour, share: float) -> Colour:
    return tuple(int(a + (b - a) * share) for a, b in zip(one, other, strict=True))


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, int(part * factor)) for part in colour)


@functools.lru_cache(maxsize=18)
def make_sky(weather: str, time: str) -> Image.Image:
    """(WIDE, HIGH) image of the sky's gradient; below the horizon it goes on in the lowest colour."""
    rows = np.clip(np.arange(HIGH) / (HIGH * 0.45), 0, 1)
    stops = np.array(parse_colours(SKIES[weather][time]), float)
    column = np.stack([np.interp(rows, (0, 0.55, 1), stops[:, i]) for i in range(3)], axis=1)  # (HIGH, 3)
    return Image.fromarray(np.broadcast_to(column[:, None], (HIGH, WIDE, 3)).astype(np.uint8))


@functools.lru_cache(maxsize=128)
def make_glow(width: int, height: int, strength: int) -> Image.Image:
    """A soft elliptical mask, `strength` of 255 in its middle."""
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    near = np.clip(1 - np.hypot(x[None], y[:, None]), 0, 1)
    return Image.fromarray((near**1.7 * strength).astype(np.uint8))


@functools.lru_cache(maxsize=1)
def make_crescent() -> Image.Image:
    disc, bite = Image.new("L", (288, 288)), Image.new("L", (288, 288), 255)
    ImageDraw.Draw(disc).ellipse((8, 8, 280, 280), 255)
    ImageDraw.Draw(bite).ellipse((96, -32, 328, 200), 0)
    return ImageChops.multiply(disc, bite).reduce(4)


@functools.lru_cache(maxsize=8)
def make_drops(snowy: bool, variant: int) -> Image.Image:
    """Mask of SIZE: rain or snow in the air."""
    rng, mask = random.Random(variant), Image.new("L", (WIDE, HIGH))
    draw = ImageDraw.Draw(mask)
    for _ in range(250):
        x, y, near = rng.uniform(0, WIDE + 20), rng.uniform(-40, HIGH), rng.random()
        if snowy:
            r = 2.5 + 4.5 * near**3
            draw.ellipse((x - r, y - r, x + r, y + r), int(255 - 70 * near))
        else:
            draw.line((x, y, x - 8 - 10 * near, y + 30 + 40 * near), int(70 + 80 * near), 2)
    return mask.reduce(FINE)


class Canvas:
    """The fine image with its camera and its light; places and sizes are in metres."""

    def __init__(self, scene: Scene):
        self.scene, self.rng = scene, scene.rng
        self.night, self.snowy, self.rainy = scene.time == "night", scene.weather == "snowy", scene.weather == "rainy"
        self.sky = parse_colours(SKIES[scene.weather][scene.time])
        dim = DIM[scene.weather] ** (0.4 if self.night else 1)
        self.light = [part * dim for part in DAYLIGHT[scene.time]]
        self.image = make_sky(scene.weather, scene.time).copy()
        self.draw = ImageDraw.Draw(self.image)

    def at(self, x: float, h: float, z: float) -> Pair:
        k = FINE * FOCAL / z
        return FINE * self.scene.centre + x * k, FINE * self.scene.horizon + (EYE - h) * k

    def tint(self, colour: Colour, z: float, lit: bool = False) -> Colour:
        """`colour` as seen from z metres: under the scene's light unless it shines, and paled by the air between."""
        clear = math.exp(-z / SIGHT[self.scene.weather])
        (r, g, b), (hr, hg, hb) = colour, self.sky[2]
        lr, lg, lb = (1, 1, 1) if lit else self.light
        parts = hr + (r * lr - hr) * clear, hg + (g * lg - hg) * clear, hb + (b * lb - hb) * clear
        return min(255, int(parts[0])), min(255, int(parts[1])), min(255, int(parts[2]))

    def quad(self, colour: Colour, *points: tuple[float, float, float], lit: bool = False) -> None:
        """A polygon through points (x, h, z)."""
        self.draw.polygon([self.at(*point) for point in points], self.tint(colour, points[0][2], lit))

    def bar(self, colour: Colour, x: float, z: float, shape: list[Pair], lit: bool = False) -> None:
        """A polygon that faces the camera, through points (metres to the right of x, height)."""
        self.draw.polygon([self.at(x + dx, h, z) for dx, h in shape], self.tint(colour, z, lit))

    def disc(self, colour: Colour, x: float, h: float, z: float, r: float, lit: bool = False) -> None:
        (cx, cy), r = self.at(x, h, z), r * FINE * FOCAL / z
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), self.tint(colour, z, lit))

    def flank(self, colour: Colour, x: float, low: float, high: float, near: float, far: float, lit=False) -> None:
        """A rectangle along the road, in the plane x."""
        self.quad(colour, (x, low, near), (x, high, near), (x, high, far), (x, low, far), lit=lit)

    def floor(self, colour: Colour, x: float, width: float, near: float, far: float) -> None:
        """A rectangle on the ground, centred on x."""
        a, b = x - width / 2, x + width / 2
        self.quad(colour, (a, 0, near), (b, 0, near), (b, 0, far), (a, 0, far))

    def block(
        self, colour: Colour, x: float, z: float, length: float, low: Pair, high: Pair, lean=(0, 0), corner=0.0
    ) -> None:
        """A box or frustum. low and high are its (width, height) below and above; lean moves the near and far ends
        of the top inwards; corner cuts its long upper edges."""
        (w0, h0), (w1, h1) = low, high
        half = [(w0 / 2, h0), (w1 / 2, h1 - corner), (w1 / 2 - corner, h1)][: 3 if corner else 2]
        shape = [*half, *((-dx, h) for dx, h in reversed(half))]
        near = [self.at(x + dx, h, z + lean[0] * (h - h0) / (h1 - h0)) for dx, h in shape]
        far = [self.at(x + dx, h, z + length - lean[1] * (h - h0) / (h1 - h0)) for dx, h in shape]
        for i, ((ax, ay), (bx, by), (cx, cy)) in enumerate(zip(near, near[1:], far, strict=False)):
            if (bx - ax) * (cy - ay) > (by - ay) * (cx - ax):  # the camera sees this long side
                run, rise = shape[i][0] - shape[i + 1][0], abs(shape[i + 1][1] - shape[i][1])
                flat = run / (run + rise)
                side = SNOW if self.snowy and flat == 1 else shade(colour, 0.74 + 0.4 * flat)
                self.draw.polygon((near[i], near[i + 1], far[i + 1], far[i]), self.tint(side, z))
        self.draw.polygon(near, self.tint(colour, z))

    def art(self, art: Art, x: float, h: float, z: float, colour=WHITE, scale: Pair = (1, 1), lit=False) -> None:
        """A flat image with its origin at (x, h, z)."""
        for paint, shape in art:
            paint = shade(colour, paint) if isinstance(paint, float) else paint
            self.bar(paint, x, z, [(dx * scale[0], h + dh * scale[1]) for dx, dh in shape], lit)

    def glow(self, x: float, h: float, z: float, r: float, colour: Colour, strength: int = 150) -> None:
        """A halo of r metres, and on a wet road its long mirror image."""
        size = max(16, round(r * FOCAL / z / 4) * 8 * FINE)
        self.paste_glow(colour, *self.at(x, h, z), size, size, strength)
        if self.rainy and h < EYE:
            self.paste_glow(colour, *self.at(x, -h, z), size, 3 * size, strength // 2)

    def paste_glow(self, colour: Colour, x: float, y: float, width: int, height: int, strength: int) -> None:
        mask = make_glow(width, height, strength)
        self.image.paste(colour, (round(x - width / 2), round(y - height / 2)), mask)


# ---- painting: sky and land ----
def paint_sky(c: Canvas) -> None:
    weather, rng = c.scene.weather, c.rng
    if weather in ("clear", "partly cloudy"):
        if c.night:
            paint_stars(c, 110 if weather == "clear" else 25)
        paint_sun(c)
    if weather == "partly cloudy":
        for i in range(5):
            paint_cloud(c, 140 + 170 * i + rng.uniform(-40, 40), rng.uniform(60, 165), rng.uniform(60, 95))
    if weather in ("overcast", "rainy", "snowy"):
        paint_cloud_cover(c)


def paint_stars(c: Canvas, count: int) -> None:
    for _ in range(count):
        x, y, r = c.rng.uniform(0, WIDE), c.rng.uniform(0, 190), c.rng.choice((1, 1.5, 1.5, 2.5))
        c.draw.ellipse((x - r, y - r, x + r, y + r), mix(WHITE, c.sky[0], c.rng.uniform(0, 0.4)))


def paint_sun(c: Canvas) -> None:
    """Sun or moon, where traffic lights and signs leave the most room."""
    columns = (330, 630) if c.scene.place == "city street" else (100, 860)
    rows = (150, 190) if c.scene.time == "dawn/dusk" else (60, 110)
    spots = [(c.rng.randint(*columns), c.rng.randint(*rows)) for _ in range(6)]
    taken = [(t.box[0] + t.box[2], t.box[1] + t.box[3]) for t in c.scene.things if t.h > 0]  # middles, on the canvas
    x, y = max(spots, key=lambda spot: min((math.dist(spot, middle) for middle in taken), default=0))
    colour = SUNS[c.scene.time]
    for size, strength in ((400, 130), (180, 150)):
        c.paste_glow(colour, x, y, size, size, strength // 2 if c.night else strength)
    if c.night:
        c.image.paste(colour, (x - 36, y - 36), make_crescent())
    else:
        c.draw.ellipse((x - 34, y - 34, x + 34, y + 34), colour)


def paint_cloud(c: Canvas, x: float, y: float, width: float) -> None:
    """A fair-weather cloud: puffs on a flat base, brighter above than below."""
    bright = CLOUDS[c.scene.time]
    puffs = [(u, (1 - u * u) * c.rng.uniform(0.36, 0.5) + 0.14) for u in (-0.75, -0.38, 0, 0.36, 0.74)]
    for lift, colour in ((0.0, mix(bright, c.sky[1], 0.45)), (0.16, bright)):
        for u, r in puffs:
            cx, cy, r = x + u * width, y - (r * 0.6 + lift) * width, r * width * (1 - lift)
            c.draw.ellipse((cx - r, cy - r, cx + r, cy + r * 0.8), colour)


def paint_cloud_cover(c: Canvas) -> None:
    """A closed sky: rows of wide lobes, lighter towards the horizon."""
    for row in range(5):
        y, colour = 10 + row * 38, mix(shade(c.sky[0], 0.9), c.sky[2], 0.1 + row * 0.2)
        for i in range(6):
            x, r = -20 + i * 200 + c.rng.uniform(-50, 50), c.rng.uniform(110, 170)
            c.draw.ellipse((x - r, y - r * 0.24, x + r, y + r * 0.3), mix(colour, c.sky[1], c.rng.uniform(0, 0.5)))


def paint_ground(c: Canvas) -> None:
    """Land, pavement and road in strips, so that they pale with distance, then the lane lines."""
    land, path, road = parse_colours("f1f5fa dee4ec 80868e" if c.snowy else "7aa85c b0aca5 5c6069")
    if c.rainy:
        land, path, road = shade(land, 0.8), shade(path, 0.8), shade(road, 0.7)
    land = path if c.scene.place == "city street" else land
    path, edge = (shade(road, 1.12), KERB + 0.8) if c.scene.place == "highway" else (path, PATH)
    rows = [c.scene.horizon + (SIZE[1] - c.scene.horizon) * (i / 14) ** 1.6 for i in range(15)]
    for top, bottom in itertools.pairwise(rows):
        far, near = (EYE * FOCAL / max(1.5, y - c.scene.horizon) for y in (top, bottom))
        c.draw.rectangle((0, top * FINE, WIDE, bottom * FINE), c.tint(land, near))
        c.floor(path, 0, 2 * edge, near, far)
        c.floor(mix(road, c.sky[2], 0.35 * min(1, near / 40)) if c.rainy else road, 0, 2 * KERB, near, far)
    for line in c.scene.lines:
        paint_line(c, *line)
    if c.night:  # what the headlights of the camera's own car reach
        c.paste_glow(BEAM, FINE * c.scene.centre, 500, 760, 280, 60)


def paint_line(c: Canvas, x: float, style: str, kind: str) -> None:
    colour = (244, 196, 72) if "yellow" in kind else (206, 208, 210) if kind == "road curb" else (240, 240, 236)
    width, period, length = 0.4 if kind == "road curb" else 0.17, *((6, 3) if style == "dashed" else (5, 5))
    for offset in (-0.17, 0.17) if "double" in kind else (0.0,):
        for z in range(5, 90, period):
            c.floor(colour, x + offset, width, z, z + length)


def paint_hills(c: Canvas) -> None:
    """Two ranges before the sky, the farther one paler."""
    y = FINE * c.scene.horizon + 2
    for z, height in ((110, 44), (60, 24)):
        a, b = c.rng.uniform(0, 6), c.rng.uniform(0, 6)
        waves = [0.55 + 0.3 * math.sin(x / 131 + a) + 0.15 * math.sin(x / 53 + b) for x in range(0, WIDE + 1, 32)]
        ridge = [(i * 32, y - height * wave) for i, wave in enumerate(waves)]
        c.draw.polygon([(0, y), *ridge, (WIDE, y)], c.tint(SNOW if c.snowy else (96, 142, 104), z))


def paint_skyline(c: Canvas) -> None:
    x, y = 250.0, FINE * c.scene.horizon + 2
    while x < 710:
        width, height = c.rng.uniform(24, 52), c.rng.uniform(30, 110)
        c.draw.rectangle((x, y - height, x + width, y), c.tint(c.rng.choice(FACADES), 85))
        for _ in range(5 if c.night else 0):
            u, v = x + c.rng.uniform(4, width - 6), y - c.rng.uniform(6, height - 4)
            c.draw.rectangle((u, v, u + 3, v + 4), c.tint(WARM, 60, lit=True))
        x += width * c.rng.uniform(0.8, 1.1)


def paint_city(c: Canvas) -> None:
    """A row of buildings and of lamp posts along each pavement, from far to near."""
    paint_skyline(c)
    for side in (-1, 1):
        z, row = c.rng.uniform(13, 18), []
        while z < 75:
            row.append((z, c.rng.uniform(8, 13)))
            z += row[-1][1]
        for z, length in reversed(row):
            paint_building(c, side, z, length)
        for z in (56, 41, 29, 20):
            paint_lamp_post(c, side, z)


def paint_building(c: Canvas, side: int, z: float, length: float) -> None:
    """A shop with its awning, and floors of windows above."""
    rng, x, share = c.rng, side * WALL, LIT_WINDOWS[c.scene.time]
    height, colour = rng.choice((6.6, 8.2, 9.8, 11.4, 13.0)), rng.choice(FACADES)
    roof = SNOW if c.snowy else shade(colour, 0.6)
    c.block(colour, x + side * 6, z, length, (12, 0), (12, height))
    c.flank(roof, x, height - 0.35, height + 0.15, z, z + length)
    c.bar(roof, x + side * 6, z, rect(0, 12, height - 0.35, height + 0.15))
    lit = share > 0 and rng.random() < 0.7
    c.flank(WARM if lit else shade(GLASS, 1.1), x, 0.4, 2.5, z + 0.6, z + length - 0.6, lit)
    awning, edge, near, far = rng.choice(COATS[:5]), x - side * 0.9, z + 0.4, z + length - 0.4
    c.quad(awning, (x, 3.2, near), (x, 3.2, far), (edge, 2.5, far), (edge, 2.5, near))
    c.quad(shade(awning, 0.7), (x, 3.2, near), (edge, 2.5, near), (x, 2.5, near))
    c.flank(shade(awning, 0.8), edge, 2.3, 2.5, near, far)
    step = length / int(length / 2.4)
    for floor, column in itertools.product(range(int((height - 4.2) / 1.6) + 1), range(int(length / 2.4))):
        lit, low, near = rng.random() < share, 3.6 + floor * 1.6, z + (column + 0.22) * step
        c.flank(WARM if lit else rng.choice(PANES), x, low, low + 1.0, near, near + step * 0.56, lit)


def paint_lamp_post(c: Canvas, side: int, z: float) -> None:
    c.bar(MAST, side * 10.2, z, rect(0, 0.16, 0, 5.6))
    c.bar(MAST, side * 9.6, z, rect(0, 1.3, 5.5, 5.66))
    c.bar(BEAM if c.night else STEEL, side * 9.0, z, rect(0, 0.6, 5.3, 5.5), c.night)
    if c.night:
        c.glow(side * 9.0, 5.3, z, 1.7, BEAM)


def paint_suburb(c: Canvas) -> None:
    """Gabled houses, hedges and trees on both sides, from far to near."""
    paint_hills(c)
    for z, side in itertools.product((62, 50, 39, 29, 20), (-1, 1)):
        paint_tree(c, side * c.rng.uniform(10.8, 11.6), z + 7, c.rng.uniform(3.6, 5.2))
        paint_house(c, side * 15.5, z)
        c.block(shade(LEAVES[2], 0.9), side * 11.0, z - 3, 6, (0.9, 0), (0.9, 0.9))


def paint_house(c: Canvas, x: float, z: float) -> None:
    """A gable towards the camera, a door towards the road, a roof over both."""
    wall, roof, out = c.rng.choice(WALLS), c.rng.choice(ROOFS), math.copysign(1, x)
    tiles, share = SNOW if c.snowy else roof, LIT_WINDOWS[c.scene.time] * 2
    inner, eave = x - out * 3.2, (x - out * 3.6, 2.95)
    c.block(wall, x, z, 6, (6.4, 0), (6.4, 3.2))
    c.bar(wall, x, z, [(-3.2, 3.2), (0, 5.6), (3.2, 3.2)])
    c.quad(tiles, (*eave, z - 0.4), (x, 5.7, z - 0.4), (x, 5.7, z + 6), (*eave, z + 6))
    c.bar(shade(tiles, 0.85), x, z - 0.4, [(0, 5.7), (out * 3.6, 2.95), (out * 3.6, 2.6), (0, 5.3)])
    for dx in (-1.6, 1.6):
        lit = c.rng.random() < share
        c.bar(WHITE, x + dx, z, rect(0, 1.7, 1.0, 2.5))
        c.bar(WARM if lit else PANES[0], x + dx, z, rect(0, 1.4, 1.15, 2.35), lit)
    c.flank(shade(roof, 0.8), inner, 0, 2.1, z + 1, z + 2)
    c.flank(WARM if share else PANES[0], inner, 1.1, 2.4, z + 3.2, z + 4.8, share > 0)


def paint_tree(c: Canvas, x: float, z: float, height: float) -> None:
    leaf = mix(c.rng.choice(LEAVES), SNOW, 0.75 if c.snowy else 0)
    c.bar((110, 82, 60), x, z, rect(0, height * 0.09, 0, height * 0.5))
    for dx, up, light in ((0.14, 0.62, 0.82), (-0.13, 0.6, 0.92), (0, 0.78, 1.08)):
        c.disc(shade(leaf, light), x + dx * height, up * height, z, 0.25 * height)


def paint_country(c: Canvas) -> None:
    """Hills, sparse trees and guard rails."""
    paint_hills(c)
    for z, side in itertools.product((70, 52, 38, 28), (-1, 1)):
        if c.rng.random() < 0.75:
            paint_tree(c, side * c.rng.uniform(12, 20), z, c.rng.uniform(4, 6.5))
    for z, side in itertools.product(range(60, 8, -4), (-1, 1)):
        c.bar(shade(STEEL, 0.7), side * 9.0, z, rect(0, 0.16, 0, 0.9))
        c.flank(STEEL, side * 9.0, 0.5, 0.95, z, z + 4)
        c.flank(shade(STEEL, 1.25), side * 9.0, 0.78, 0.9, z, z + 4)


def paint_masts(c: Canvas) -> None:
    """What lights and motorway signs hang from: an arm from the right, or a gantry across the road."""
    lights = [t.x for t in c.scene.things if t.category == "traffic light"]
    z = OVERHEAD + 0.1
    if lights:
        c.bar(MAST, 8.6, z, rect(0, 0.34, 0, 7.0))
        c.bar(MAST, 8.6, z, [(0, 6.6), (0, 6.85), (min(lights) - 8.6, 6.85), (min(lights) - 8.6, 6.6)])
    if any(t.model == "panel" for t in c.scene.things):
        for x in range(-8, 9):
            c.bar(shade(STEEL, 0.85), x, z, rect(0, 0.12, 5.9, 7.0))
        for shape in (rect(0, 18, 5.9, 6.12), rect(0, 18, 6.9, 7.12), rect(-8.8, 0.4, 0, 7.3), rect(8.8, 0.4, 0, 7.3)):
            c.bar(STEEL, 0, z, shape)


# ---- painting: objects ----
def paint_vehicle(c: Canvas, t: Thing) -> None:
    """Shadow and tyres, body, the wheels of the visible side, then the near end with its lamps."""
    (width, length, height), end = SIZES[t.model], "front" if t.oncoming else "rear"
    c.floor((86, 92, 104) if c.snowy else (52, 55, 64), t.x, width + 0.5, t.z - 0.12, t.z + length + 0.2)
    for dx in (-1, 1):
        c.bar(BLACK, t.x, t.z, rect(dx * (width / 2 - 0.3), 0.46, 0, 0.6))
    {"car": paint_car, "truck": paint_truck, "bus": paint_bus}[t.category](c, t)
    if abs(t.x) > width / 2:
        paint_side_wheels(c, t.x - math.copysign(width / 2 + 0.01, t.x), t.z, length)
    scale = (width, CABINS[t.model][0] if t.category == "car" else height)
    c.art(ENDS[f"{t.category} {end}"], t.x, 0, t.z, t.colour, scale)
    paint_lamps(c, t, 0.4 * width, {"car": 0.74 * scale[1], "truck": 1.1, "bus": 0.78}[t.category])


def paint_side_wheels(c: Canvas, x: float, z: float, length: float) -> None:
    for along, (r, colour) in itertools.product((0.19, 0.8), ((0.44, BLACK), (0.22, STEEL))):
        c.quad(colour, *((x, h, z + dz) for dz, h in ring(along * length, 0.44, r, 12)))


def paint_lamps(c: Canvas, t: Thing, dx: float, h: float) -> None:
    """Headlights by dusk and night, tail lamps by night: they say which way a vehicle goes."""
    for x in (t.x - dx, t.x + dx):
        if t.oncoming:
            c.disc(BEAM, x, h, t.z, 0.2, lit=True)
            if c.scene.time != "daytime":
                c.glow(x, h, t.z, 1.0, BEAM, 220)
        else:
            c.bar(TAIL, x, t.z, rect(0, 0.38, h - 0.15, h + 0.15), lit=c.night)
            if c.night:
                c.glow(x, h, t.z, 0.7, LAMPS["red"])


def paint_car(c: Canvas, t: Thing) -> None:
    width, length, roof = SIZES[t.model]
    bonnet, start, end = CABINS[t.model]
    if t.oncoming:
        start, end = 1 - end, 1 - start
    z, cabin, up, half = t.z + start * length, (end - start) * length, roof - bonnet, width / 2
    lean = (0.5, 0.3) if t.oncoming or t.model == "saloon" else (0.2, 0.5)
    c.block(t.colour, t.x, t.z, length, (width, 0.3), (width * 0.97, bonnet), corner=0.16)
    c.block(t.colour, t.x, z, cabin, (width * 0.94, bonnet), (width * 0.78, roof), lean, corner=0.12)

    def pane(colour: Colour, *corners: tuple[float, float, float]) -> None:
        """Corners are in shares of the half width, of the cabin's height, and metres from its near end."""
        c.quad(colour, *((t.x + u * half, bonnet + v * up, z + dz) for u, v, dz in corners))

    glass, a, b = mix(GLASS, c.sky[2], 0.25), 0.06 * lean[0], 0.82 * lean[0]
    pane(glass, (-0.85, 0.06, a), (-0.73, 0.82, b), (0.73, 0.82, b), (0.85, 0.06, a))
    pane(mix(glass, WHITE, 0.16), (-0.6, 0.06, a), (-0.3, 0.82, b), (0.0, 0.82, b), (-0.3, 0.06, a))
    if abs(t.x) > half:
        side = -math.copysign(1, t.x)
        for near, far, rear, front in ((0.1, 0.47, 0.1, 0), (0.53, 0.9, 0, 0.1)):
            low, high = (0.93 * side, 0.08), (0.82 * side, 0.82)
            near, far, top = near * cabin, far * cabin, ((near + rear) * cabin, (far - front) * cabin)
            pane(glass, (*low, near), (*high, top[0]), (*high, top[1]), (*low, far))


def paint_truck(c: Canvas, t: Thing) -> None:
    """A box on a chassis with its cab at the front, which is the far end unless it comes towards the camera."""
    width, length, height = SIZES["truck"]
    cab = c.rng.choice(PAINTS["car"][:5])
    box = t.z + 1.9 if t.oncoming else t.z
    if not t.oncoming:
        c.block(cab, t.x, t.z + length - 1.7, 1.7, (width * 0.9, 0.5), (width * 0.88, 2.9))
    c.block(MAST, t.x, t.z, length - 1.8, (width * 0.9, 0.45), (width * 0.9, 0.9))
    c.block(t.colour, t.x, box, length - 1.9, (width, 0.9), (width, height))
    if abs(t.x) > width / 2:
        c.flank(cab, t.x - math.copysign(width / 2 + 0.01, t.x), 1.5, 2.2, box, box + length - 1.9)
    if t.oncoming:
        c.block(cab, t.x, t.z, 1.8, (width * 0.94, 0.45), (width * 0.9, 3.1), (0.15, 0), corner=0.15)


def paint_bus(c: Canvas, t: Thing) -> None:
    width, length, height = SIZES["bus"]
    c.block(t.colour, t.x, t.z, length, (width, 0.4), (width, height), corner=0.15)
    lit = c.scene.time != "daytime"
    if abs(t.x) > width / 2:
        side = t.x - math.copysign(width / 2 + 0.01, t.x)
        c.flank(WHITE, side, 1.0, 1.35, t.z, t.z + length)
        for z in (0.35, 1.85, 3.35, 4.85, 6.35):
            c.flank(WARM if lit else GLASS, side, 1.75, 2.95, t.z + z, t.z + z + 1.25, lit)


def paint_person(c: Canvas, t: Thing) -> None:
    skin, hair = c.rng.choice(SKINS), c.rng.choice(HAIRS)
    c.floor((60, 62, 70), t.x, 0.9, t.z - 0.1, t.z + 0.3)
    c.art(PERSON, t.x, 0, t.z, t.colour)
    for colour, dx, h, r in (
        (skin, -0.4, 1.1, 0.08),
        (skin, 0.4, 1.1, 0.08),
        (hair, 0, 2.1, 0.2),
        (skin, 0, 2.04, 0.17),
    ):
        c.disc(colour, t.x + dx, h, t.z, r)


def paint_bike(c: Canvas, t: Thing) -> None:
    thick = max(3, int(0.13 * FINE * FOCAL / t.z))
    for dx in (-0.75, 0.75):
        (x, y), r = c.at(t.x + dx, 0.5, t.z), 0.5 * FINE * FOCAL / t.z
        c.draw.ellipse((x - r, y - r, x + r, y + r), None, c.tint(BLACK, t.z), thick)
    for share, stroke in BIKE:
        c.draw.line([c.at(t.x + dx, h, t.z) for dx, h in stroke], c.tint(shade(t.colour, share), t.z), thick)


def paint_sign(c: Canvas, t: Thing) -> None:
    if t.model != "panel":
        c.bar(STEEL, t.x, t.z, rect(0, 0.14, 0, t.h + 0.4))
    c.art(SIGNS[t.model], t.x, t.h + SIZES[t.model][2] / 2, t.z, lit=c.night)  # they reflect the headlights


def paint_light(c: Canvas, t: Thing) -> None:
    width, _, height = SIZES["light"]
    c.bar((150, 156, 164), t.x, t.z, rect(0, width, t.h, t.h + height))
    c.bar(BLACK, t.x, t.z, rect(0, width - 0.16, t.h + 0.08, t.h + height - 0.08))
    for i, (name, colour) in enumerate(LAMPS.items()):
        lit, h = t.light == name, t.h + 0.48 + i * 0.845
        c.disc(colour if lit else shade(colour, 0.22), t.x, h, t.z, 0.41, lit)
        if lit:
            c.disc(mix(colour, WHITE, 0.45), t.x, h, t.z, 0.2, lit)
            c.glow(t.x, h, t.z, 1.5, colour)


def mirror_thing(c: Canvas, t: Thing) -> None:
    """Mirror the lower half of an object on the wet road below it."""
    x1, y1, x2, y2 = (round(v * FINE) for v in t.box)
    foot = c.image.crop((max(0, x1), (y1 + y2) // 2, min(WIDE, x2), y2)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    fade = Image.linear_gradient("L").point(lambda v: (255 - v) // 2).resize(foot.size)
    c.image.paste(foot, (max(0, x1), y2), fade)


BACKGROUNDS = {"city street": paint_city, "residential": paint_suburb, "highway": paint_country}
PAINTERS = {
    **dict.fromkeys(("car", "truck", "bus"), paint_vehicle),
    **{"person": paint_person, "bike": paint_bike, "traffic sign": paint_sign, "traffic light": paint_light},
}


def paint_scene(scene: Scene) -> Image.Image:
    """RGB image of SIZE of a placed scene."""
    c = Canvas(scene)
    paint_sky(c)
    paint_ground(c)
    BACKGROUNDS[scene.place](c)
    paint_masts(c)
    if c.night:  # objects stand out from the land, as in headlights
        c.light = [part * 1.35 for part in c.light]
    for thing in sorted(scene.things, key=lambda t: -t.z):
        PAINTERS[thing.category](c, thing)
        if c.rainy and thing.h == 0:
            mirror_thing(c, thing)
    image = c.image.reduce(FINE)
    if c.rainy or c.snowy:
        image.paste(SNOW if c.snowy else (205, 218, 235), (0, 0), make_drops(c.snowy, c.rng.randrange(4)))
    return image


# ---- labels and files ----
def list_labels(scene: Scene) -> list[dict]:
    labels = []
    for t in scene.things:
        x1, y1, x2, y2 = t.box
        box = {"x1": max(x1, 0), "y1": max(y1, 0), "x2": min(x2, SIZE[0]), "y2": min(y2, SIZE[1])}
        facts = {"occluded": t.occluded, "truncated": t.truncated, "trafficLightColor": t.light}
        labels.append((t.category, facts, {"box2d": {key: round(v, 3) for key, v in box.items()}}))
    area = [scene.project(x, 0, z) for x, z in ((-1.8, 6.5), (-1.8, 30), (1.8, 30), (1.8, 6.5))]
    labels.append(("drivable area", {"areaType": "direct"}, make_poly(area, closed=True)))
    for x, style, kind in scene.lines:
        facts = {"laneDirection": "parallel", "laneStyle": style, "laneType": kind}
        ends = [scene.project(x, 0, max(6.5, abs(x) * 1.8)), scene.project(x, 0, 60)]  # inside the image
        labels.append(("lane", facts, make_poly(ends, closed=False)))
    made = {"manualShape": True, "manualAttributes": True}
    return [{"category": c, "attributes": a, **made, **shape, "id": i} for i, (c, a, shape) in enumerate(labels)]


def make_poly(points: list[Pair], closed: bool) -> dict:
    vertices = [[round(x, 3), round(y, 3)] for x, y in points]
    return {"poly2d": [{"vertices": vertices, "types": "L" * len(vertices), "closed": closed}]}


def name_image(seed: int) -> str:
    """'<ride>-<frame>.jpg'. Times an odd number modulo 2^32 is one-to-one, so no two seeds share a ride."""
    assert 0 <= seed < 2**32, f"seed {seed} is not in 0 .. 2^32 - 1"
    return f"{(seed * 0x9E3779B1 + 0x7F4A7C15) % 2**32:08x}-{hashlib.sha256(b'%d' % seed).hexdigest()[:8]}.jpg"


def draw_scene(seed: int) -> tuple[Image.Image, dict]:
    """The image of a seed, RGB of SIZE, and its frame in BDD100K's 2018 layout with boxes in pixels."""
    scene = sample_scene(seed)
    attributes = {"weather": scene.weather, "scene": scene.place, "timeofday": scene.time}
    frame = {"name": name_image(seed), "attributes": attributes, "timestamp": 10000, "labels": list_labels(scene)}
    return paint_scene(scene), frame


def draw_dataset(folder: Path, seeds: Sequence[int], workers: int | None = None) -> Path:
    """Draw folder/images/*.jpg and folder/labels.json, frames in the order of `seeds`; returns the labels' path.

    Nothing is drawn if the folder already holds these frames of this VERSION. `workers` is a number of processes,
    all cores if None. Raises UserError where the disk is full, or one of them was killed.
    """
    labels, images, stamp = folder / "labels.json", folder / "images", folder / "labels.stamp"
    names = [name_image(seed) for seed in seeds]
    assert len(set(names)) == len(names), "the same seed was given twice"
    made = json.dumps({"version": VERSION, "frames": hashlib.sha256("\n".join(names).encode()).hexdigest()})
    if labels.exists() and stamp.exists() and stamp.read_text() == made and set(names) <= set(os.listdir(images)):
        return labels
    part = labels.with_suffix(".part")
    with explain_writing(folder, "free some space, or start from another folder"):
        images.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)  # written last, so that what was broken off is drawn again
        write_frames(part, draw_frames(images, seeds, workers), len(seeds))
        part.replace(labels)
        stamp.write_text(made)
    return labels


def write_frames(path: Path, frames: Iterator[str], count: int) -> None:
    with path.open("w") as file:
        file.write("[\n")
        for i, frame in enumerate(tqdm(frames, "drawing scenes", count, unit="scene")):
            file.write(("," if i else "") + frame + "\n")
        file.write("]\n")


def draw_frames(images: Path, seeds: Sequence[int], workers: int | None) -> Iterator[str]:
    """The JSON of each seed's frame, once its image is on disk."""
    write = functools.partial(write_scene, images)
    workers = min(workers or count_all_cores(), len(seeds))
    if workers <= 1:
        yield from map(write, seeds)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(write, seeds, chunksize=max(1, min(64, len(seeds) // workers)))
        except BrokenProcessPool:
            raise UserError("a process that draws scenes was killed: mostly for want of memory; start again") from None


def write_scene(images: Path, seed: int) -> str:
    image, frame = draw_scene(seed)
    part = images / (frame["name"] + ".part")
    image.save(part, "JPEG", quality=90)
    part.replace(images / frame["name"])
    return json.dumps(frame)


def write_contact_sheet(path: Path, seeds: Sequence[int], columns: int = 4) -> None:
    sheet = Image.new("RGB", (columns * SIZE[0], math.ceil(len(seeds) / columns) * SIZE[1]))
    for i, seed in enumerate(seeds):
        sheet.paste(draw_scene(seed)[0], (i % columns * SIZE[0], i // columns * SIZE[1]))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12, help="number of scenes")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first scene; the others follow")
    parser.add_argument("--out", type=Path, help="folder for the images and their labels")
    parser.add_argument("--contact-sheet", type=Path, help="file for one image of all scenes")
    parser.add_argument("--workers", type=int, help="processes to draw with (default: all cores)")
    args = parser.parse_args()
    if not (args.out or args.contact_sheet):
        parser.error("give --out, --contact-sheet or both")
    seeds = range(args.first_seed, args.first_seed + args.count)
    if args.out:
        print(draw_dataset(args.out, seeds, args.workers))
    if args.contact_sheet:
        write_contact_sheet(args.contact_sheet, seeds)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
