"""Captions as BDD100K has them, drawn from what is published of its labels, and captions of a made-up model of them.

    rows = draw_predictions(rides=600, frames=2)

No label of BDD100K is in it. Of its val labels (10,000 frames) the shares of weather, time of day and scene are taken,
the boxes of each class (with traffic lights 18.5 a frame, quartiles 11, 17 and 24), 9.4 lanes and areas a frame, 47 %
of boxes occluded and 7 % truncated: counts of bdd100k_labels_images_val.json (Yu et al., BDD100K, CVPR 2020). Made up,
for want of figures, is that attributes are independent, that a ride has one time, weather and scene, how many frames
have a lit light and how lanes and areas share the 9.4. The model gets attributes right as often as image classifiers of
the BDD100K model zoo, and the count of a kind as often as its detectors find a box; otherwise it finds each object with
that probability.
"""

import random
from collections import Counter
from collections.abc import Collection

import numpy as np

from captioner.bdd100k.facts import LIGHTS, Facts, ObjectKind
from captioner.bdd100k.wording import describe
from captioner.scoring.predictions import Prediction

WEATHERS = {"clear": 53.5, "overcast": 12.4, "undefined": 11.6, "snowy": 7.7, "rainy": 7.4, "partly cloudy": 7.4,
            "foggy": 0.1}  # fmt: skip
TIMES = {"daytime": 52.6, "night": 39.3, "dawn/dusk": 7.8, "undefined": 0.35}
SCENES = {"city street": 61.1, "highway": 25.0, "residential": 12.5, "undefined": 0.5, "parking lot": 0.5,
          "tunnel": 0.3, "gas stations": 0.1}  # fmt: skip
BOXES = {"car": 10.2506, "traffic sign": 3.4908, "person": 1.3262, "truck": 0.4245, "bus": 0.1597, "bike": 0.1007,
         "rider": 0.0649, "motor": 0.0452, "train": 0.0015}  # a frame  # fmt: skip
OCCLUDED, TRUNCATED = 0.47, 0.07
AREA_LABELS = 9.4  # lanes and drivable areas a frame
CROWDING = 4.65  # shape of the gamma distribution of how full a frame is, which gives the quartiles
LIT = {"red": 0.15, "yellow": 0.01, "green": 0.25, None: 0.59}  # made up

# how often the model is right
RIGHT = {"time_of_day": 0.937, "weather": 0.82, "scene": 0.78, "light": 0.85, "count": 0.53}
INVENTED = 0.05  # objects of each class that it invents, a frame


def pick(rng: random.Random, shares: dict):
    return rng.choices([*shares], [*shares.values()])[0]


def draw_ride(rng: random.Random, numbers: np.random.Generator, frames: int, weathers: dict) -> list[Facts]:
    """The facts of the frames of one ride."""
    time, weather, scene = pick(rng, TIMES), pick(rng, weathers), pick(rng, SCENES)
    full = numbers.gamma(CROWDING, 1 / CROWDING)
    facts = []
    for _ in range(frames):
        objects = Counter()
        for name, mean in BOXES.items():
            for _ in range(numbers.poisson(mean * full)):
                objects[ObjectKind(name, rng.random() < OCCLUDED, rng.random() < TRUNCATED)] += 1
        areas = 1 + numbers.poisson(0.8)
        objects[ObjectKind("drivable area")] = int(areas)
        if lanes := int(numbers.poisson(AREA_LABELS - 1.8)):
            objects[ObjectKind("lane")] = lanes
        facts.append(Facts(time, weather, scene, pick(rng, LIT), dict(objects)))
    return facts


def see(facts: Facts, rng: random.Random, numbers: np.random.Generator) -> Facts:
    """What the model says of a frame."""
    attributes = {}
    for name, shares in (("time_of_day", TIMES), ("weather", WEATHERS), ("scene", SCENES)):
        right = rng.random() < RIGHT[name]
        others = {value: share for value, share in shares.items() if value != getattr(facts, name)}
        attributes[name] = getattr(facts, name) if right else pick(rng, others)
    objects = {}
    for kind, count in facts.objects.items():
        found = count if rng.random() < RIGHT["count"] else int(numbers.binomial(count, RIGHT["count"]))
        if found:
            objects[kind] = found
    for name in BOXES:
        if rng.random() < INVENTED / 2:
            objects.setdefault(ObjectKind(name, rng.random() < OCCLUDED), 1)
    light = facts.traffic_light if rng.random() < RIGHT["light"] else rng.choice([*LIGHTS, None])
    return Facts(**attributes, traffic_light=light, objects=objects)


def draw_predictions(rides: int, frames: int, without: Collection[str] = ()) -> list[Prediction]:
    """The model's captions of the frames of so many rides, none of the weathers `without`."""
    weathers = {weather: share for weather, share in WEATHERS.items() if weather not in without}
    rows = []
    for ride in range(rides):
        drawn = draw_ride(random.Random(f"0-{ride}"), np.random.default_rng((0, ride)), frames, weathers)
        rng, numbers = random.Random(f"model-0-{ride}"), np.random.default_rng((0, ride, 1))
        for frame, facts in enumerate(drawn):
            name = f"{ride:08x}-{frame:08x}.jpg"
            rows.append(Prediction(name, describe(see(facts, rng, numbers)), [describe(facts)]))
    return rows
