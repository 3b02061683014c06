"""The facts that a caption says about a driving scene.

    facts = Facts("evening", "clear", "highway", "red", {ObjectKind("car"): 1})

The vocabulary is closed and lies in the tables below; a class or an attribute value that is new belongs there
and nowhere else.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

UNDEFINED = "undefined"  # BDD100K's own word for an attribute that its annotators left open

# Attribute values: BDD100K's, then those that only the reference's README uses.
TIMES_OF_DAY = ("daytime", "night", "dawn/dusk", UNDEFINED, "morning", "afternoon", "evening", "dawn", "dusk")
WEATHERS = ("clear", "overcast", "partly cloudy", "rainy", "snowy", "foggy", UNDEFINED)
# value: where that is, in correct English
SCENES = {
    "city street": "on a city street",
    "highway": "on a highway",
    "residential": "in a residential area",
    "parking lot": "in a parking lot",
    "tunnel": "in a tunnel",
    "gas stations": "at a gas station",
    UNDEFINED: "",
}
LIGHTS = ("red", "yellow", "green")  # the first that is seen is the status: red > yellow > green
TRAFFIC_LIGHT = "traffic light"  # told by its status, never counted among the objects

# class: (regular plural, natural singular, natural plural)
CLASSES = {
    "bicycle": ("bicycles", "bicycle", "bicycles"),
    "bike": ("bikes", "bike", "bikes"),
    "bus": ("buses", "bus", "buses"),
    "car": ("cars", "car", "cars"),
    "caravan": ("caravans", "caravan", "caravans"),
    "drivable area": ("drivable areas", "drivable area", "drivable areas"),
    "lane": ("lanes", "lane marking", "lane markings"),
    "motor": ("motors", "motorbike", "motorbikes"),
    "motorcycle": ("motorcycles", "motorcycle", "motorcycles"),
    "other person": ("other persons", "other person", "other people"),
    "other vehicle": ("other vehicles", "other vehicle", "other vehicles"),
    "pedestrian": ("pedestrians", "pedestrian", "pedestrians"),
    "person": ("persons", "person", "people"),
    "rider": ("riders", "rider", "riders"),
    "traffic sign": ("traffic signs", "traffic sign", "traffic signs"),
    "trailer": ("trailers", "trailer", "trailers"),
    "train": ("trains", "train", "trains"),
    "truck": ("trucks", "truck", "trucks"),
}
# The same class by two names: det_20's and that of the 2018 release, under which scores count both. A rider is no
# person: BDD100K labels who sits on a bike or motor as rider alone, so that neither stands in for the other.
SYNONYMS = {"pedestrian": "person", "bicycle": "bike", "motorcycle": "motor"}
MAX_COUNT = 9999  # of one kind in one caption

# what Facts may hold together
_ATTRIBUTES = frozenset([(None, None, None), *itertools.product(TIMES_OF_DAY, WEATHERS, SCENES)])
AREAS = ("lane", "drivable area")  # all other classes are boxed


class ObjectKind(NamedTuple):
    """One kind of object that a caption counts: its class and how it is seen."""

    name: str
    occluded: bool = False
    truncated: bool = False

    @property
    def qualifier(self) -> str:
        return "partially occluded " * self.occluded + "truncated " * self.truncated

    @property
    def phrase(self) -> str:
        return self.qualifier + self.name


@dataclass(frozen=True)
class Facts:
    """What a caption says of one frame.

    `time_of_day`, `weather` and `scene` are all None when the frame has no such labels at all: its caption then has
    no first sentence. `traffic_light` is None when no lit light is labelled. `objects` maps ObjectKind to its
    count, 1 to MAX_COUNT. Raises ValueError for a value that is not in this module's tables.
    """

    time_of_day: str | None = None
    weather: str | None = None
    scene: str | None = None
    traffic_light: str | None = None
    objects: Mapping[ObjectKind, int] = field(default_factory=dict)

    @classmethod
    def of_known(cls, time_of_day, weather, scene, traffic_light, objects) -> "Facts":
        """The same for values that come out of this module's tables: they are not looked up there again."""
        facts = object.__new__(cls)
        facts.__dict__.update(
            time_of_day=time_of_day, weather=weather, scene=scene, traffic_light=traffic_light, objects=objects
        )
        return facts

    def __post_init__(self):
        attributes = (self.time_of_day, self.weather, self.scene)
        if attributes not in _ATTRIBUTES:
            for value, table in zip(attributes, (TIMES_OF_DAY, WEATHERS, SCENES), strict=True):
                if value not in table:
                    raise ValueError(f"{value!r} is not one of {', '.join(table)}")
        if self.traffic_light not in (None, *LIGHTS):
            raise ValueError(f"traffic light {self.traffic_light!r} is not one of {', '.join(LIGHTS)}")
        for kind, count in self.objects.items():
            if kind[0] not in CLASSES:
                raise ValueError(f"class {kind[0]!r} is not one of {', '.join(CLASSES)}")
            if not 1 <= count <= MAX_COUNT:
                raise ValueError(f"{count} x {kind.phrase!r}: a count is 1 to {MAX_COUNT}")


def merge_synonyms(facts: Facts) -> Facts:
    """The facts with each class under the first of its names, and counts of one kind added up."""
    if not any(kind.name in SYNONYMS for kind in facts.objects):
        return facts
    objects: dict[ObjectKind, int] = {}
    for kind, count in facts.objects.items():
        kind = kind._replace(name=SYNONYMS.get(kind.name, kind.name))
        objects[kind] = objects.get(kind, 0) + count
    return Facts.of_known(facts.time_of_day, facts.weather, facts.scene, facts.traffic_light, objects)


class Frame(NamedTuple):
    """One labelled image. `name` is the file name of its image."""

    name: str
    facts: Facts
