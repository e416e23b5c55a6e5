"""Generate games from ALFWorld's tables, without a download: valid, winnable, and not solved at the start.

A room is one of ALFRED's 120 floor plans, plus the furniture that its layout does not list, with objects in places that
may hold them. `full` keeps the whole room; `small` keeps one receptacle of each type and a handful of objects.

Game i is a pure function of (seed, i, options). What tells games apart for an agent (task, furniture, what lies where)
is hashed, and a seed admits only hashes of its own parity. Games of an even and of an odd seed therefore never
coincide: after training on seed 0, evaluation on seed 1 is held out by construction.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from random import Random
from typing import NamedTuple

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
# Default of small scenes: what a kitchen with one thing of each type allows.
SMALL_TASK_TYPES = tuple(kind for kind in TASK_TYPES if kind not in ("look_at_obj_in_light", "pick_two_obj_and_place"))
# Rooms of each task type, as in ALFRED; small scenes use kitchens where possible.
ROOMS = {
    "pick_and_place_simple": ("kitchen", "living room", "bedroom", "bathroom"),
    "look_at_obj_in_light": ("bedroom", "living room"),
    "pick_clean_then_place_in_recep": ("kitchen", "bathroom"),
    "pick_heat_then_place_in_recep": ("kitchen",),
    "pick_cool_then_place_in_recep": ("kitchen",),
    "pick_two_obj_and_place": ("kitchen", "living room", "bedroom", "bathroom"),
}
# Furniture that ALFRED's rooms have but its layouts of reachable receptacles do not list.
ADDED = {
    "kitchen": ("StoveBurner", "StoveBurner", "StoveBurner", "StoveBurner", "CoffeeMachine", "Toaster", "GarbageCan"),
    "living room": ("GarbageCan",),
    "bedroom": ("GarbageCan", "LaundryHamper"),
    "bathroom": ("GarbageCan", "HandTowelHolder", "TowelHolder", "ToiletPaperHanger"),
}
STATION = {
    "pick_clean_then_place_in_recep": ("SinkBasin", "cleanable"),
    "pick_heat_then_place_in_recep": ("Microwave", "heatable"),
    "pick_cool_then_place_in_recep": ("Fridge", "coolable"),
}
LAMP, LAMP_SURFACES = "DeskLamp", ("Desk", "SideTable", "Dresser", "Shelf", "CoffeeTable", "DiningTable")
COPIES = (0, 1, 1, 2, 3)  # of an object type in a full scene, equally likely
CROWD = 3  # most objects on one receptacle of a small scene

Place = tuple[int, int, int, int]  # x and z in quarter metres, quarter turns, camera horizon in degrees


@dataclass(frozen=True)
class Spec:
    """Options of generated games."""

    seed: int = 0
    task_types: tuple[str, ...] = TASK_TYPES
    scene: str = "small"  # small | full
    receptacles: int = 6  # at most, in a small scene
    objects: int = 6  # at most, in a small scene


class Thing(NamedTuple):
    id: str  # "Mug|+00.10|+00.92|-01.37", and "Sink|-01.90|+00.97|-01.50|SinkBasin" is a SinkBasin
    type: str


@dataclass(frozen=True)
class Scene:
    """A furnished and stocked room with its task."""

    furniture: dict[Thing, Place]
    lies: dict[Thing, Thing]  # object -> the receptacle it starts in
    object: str
    receptacle: str  # "" for look_at_obj_in_light
    toggle: str  # "" for all others

    def content(self, task_type: str) -> str:
        """Return what tells this game from others: no coordinates, no numbering, no wording of the task."""
        kinds = sorted(thing.type for thing in self.furniture)
        return repr(
            (
                task_type,
                self.object,
                self.receptacle,
                kinds,
                sorted((item.type, place.type) for item, place in self.lies.items()),
            )
        )


@lru_cache(maxsize=1)
def _tables() -> dict:
    """Return `data/tables.json`, with each floor plan's receptacles as {Thing: Place}."""
    tables = json.loads(_data("tables.json"))
    tables["contains"] = {kind: frozenset(items) for kind, items in tables["contains"].items()}
    for plans in tables["rooms"].values():
        for plan in plans.values():
            ids = {name: name.split("|") for name in plan["receptacles"]}
            plan["receptacles"] = {
                Thing(name, parts[4] if parts[4:] else parts[0]): tuple(plan["receptacles"][name])
                for name, parts in ids.items()
            }
    return tables


@lru_cache(maxsize=4)
def _data(name: str) -> str:
    return resources.files("atod_fast.envs.alfworld").joinpath("data", name).read_text(encoding="utf-8")


def generate(spec: Spec, index: int) -> tuple[str, dict[str, object]]:
    """Return the task id and the game-file content (as in `game.tw-pddl`, 2.1.2 grammar) of game `index`."""
    task_type = spec.task_types[index % len(spec.task_types)]
    rng = Random(f"{spec.scene} {spec.receptacles} {spec.objects} {task_type} {spec.seed} {index}")
    while True:
        scene = _scene(rng, spec, task_type)
        if scene is not None and zlib.crc32(scene.content(task_type).encode()) % 2 == spec.seed % 2:
            break
    task = _tables()["tasks"][task_type]
    asked = {"obj": scene.object, "recep": scene.receptacle, "toggle": scene.toggle}
    sentence = rng.choice(task["templates"]).format(**{key: value.lower() for key, value in asked.items()})
    name = f"generated/{spec.scene}/{task_type}-{scene.object}-{scene.receptacle or scene.toggle}/{spec.seed}-{index}"
    return name, {
        "pddl_domain": _data("alfred.pddl"),
        "grammar": _data("alfred.twl2").replace("UNKNOWN GOAL", sentence),
        "pddl_problem": _problem(rng, scene, task["goal"].format(**asked)),
        "solvable": True,
    }


def _scene(rng: Random, spec: Spec, task_type: str) -> Scene | None:
    """Return a random scene for the task, or None if what was drawn leaves no room for it."""
    tables, small = _tables(), spec.scene == "small"
    contains, properties = tables["contains"], tables["properties"]
    room = "kitchen" if small and "kitchen" in ROOMS[task_type] else rng.choice(ROOMS[task_type])
    plan = rng.choice(list(tables["rooms"][room].values()))
    furniture = _furnish(rng, plan["receptacles"], ADDED[room], one_of_each=small)
    station_type, able = STATION.get(task_type, ("", ""))
    station = [place for place in furniture if place.type == station_type][:1]
    if station_type and not station:
        return None
    looking = task_type == "look_at_obj_in_light"
    surfaces = [place for place in furniture if place.type in LAMP_SURFACES]
    if looking and not surfaces:
        return None
    lamp_at = rng.sample(surfaces, 1) if looking else []

    # The task's object, where it must go, and where it lies: never already where it must go.
    objects = [name for name in plan["objects"] if name not in properties["toggleable"]]
    able_objects = [name for name in objects if not able or name in properties[able]]
    if not able_objects:
        return None
    item = rng.choice(able_objects)
    homes = [place for place in furniture if item in contains[place.type]]
    targets = sorted({place.type for place in homes} - {station_type})
    target = "" if looking else rng.choice(targets or [""])
    sources = [place for place in homes if place.type != target]
    if not sources or not (target or looking):
        return None
    copies = 2 if task_type == "pick_two_obj_and_place" else 1
    lies = {_thing(rng, item): rng.choice(sources) for _ in range(copies)}
    lies.update({_thing(rng, LAMP): place for place in lamp_at})

    if small:
        needed = dict.fromkeys([*lies.values(), *station, *(place for place in homes if place.type == target)])
        spare = [place for place in furniture if place not in needed]
        keep = [*needed, *rng.sample(spare, max(0, min(len(spare), spec.receptacles - len(needed))))]
        furniture = {place: furniture[place] for place in keep}
    crowd = Counter(lies.values())
    for other in rng.sample(objects, len(objects)):
        open_to = [
            p
            for p in furniture
            if other in contains[p.type] and (other, p.type) != (item, target) and not (small and crowd[p] >= CROWD)
        ]
        for _ in range(other != item if small else rng.choice(COPIES)):
            if open_to and (len(lies) < spec.objects or not small):
                place = rng.choice(open_to)
                lies[_thing(rng, other)] = place
                crowd[place] += 1
    return Scene(furniture, lies, item, target, LAMP if looking else "")


def _furnish(rng: Random, layout: dict[Thing, Place], added: tuple[str, ...], one_of_each: bool) -> dict[Thing, Place]:
    """Return the receptacles of a floor plan. A small scene gives each a location of its own."""
    furniture = dict(layout)
    missing = Counter(added) - Counter(thing.type for thing in furniture)
    for kind in missing.elements():
        furniture[_thing(rng, kind)] = (
            rng.randint(-9, 9),
            rng.randint(-9, 9),
            rng.randint(0, 3),
            rng.choice((-30, 0, 30, 45, 60)),
        )
    if not one_of_each:
        return furniture
    chosen: dict[str, Thing] = {}
    taken: set[Place] = set()
    for thing in rng.sample(list(furniture), len(furniture)):
        if thing.type not in chosen and furniture[thing] not in taken:
            chosen[thing.type] = thing
            taken.add(furniture[thing])
    return {thing: furniture[thing] for thing in chosen.values()}


def _thing(rng: Random, kind: str) -> Thing:
    return Thing("|".join([kind, *(f"{rng.uniform(-3, 3):+06.2f}" for _ in range(3))]), kind)


def _problem(rng: Random, scene: Scene, goal: str) -> str:
    """Return the PDDL problem, spelled as ALFWorld spells it."""
    tables = _tables()
    where = {place: _pddl("loc|{}|{}|{}|{}".format(*at)) for place, at in scene.furniture.items()}
    start = _pddl(f"loc|{rng.randint(-9, 9)}|{rng.randint(-9, 9)}|{rng.randint(0, 3)}|30")
    while start in where.values():
        start = _pddl(f"loc|{rng.randint(-9, 9)}|{rng.randint(-9, 9)}|{rng.randint(0, 3)}|30")
    ids = {thing: _pddl(thing.id) for thing in (*scene.furniture, *scene.lies)}
    object_types, receptacle_types = ({thing.type for thing in things} for things in (scene.lies, scene.furniture))
    objects = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in sorted(object_types)),
        *(f"{kind}Type - rtype" for kind in sorted(receptacle_types)),
        *(f"{ids[item]} - object" for item in scene.lies),
        *(f"{ids[place]} - receptacle" for place in scene.furniture),
        *(f"{place} - location" for place in sorted({*where.values(), start})),
    ]
    facts = [f"(atLocation agent1 {start})"]
    for place in scene.furniture:
        facts += [
            f"(receptacleType {ids[place]} {place.type}Type)",
            f"(receptacleAtLocation {ids[place]} {where[place]})",
        ]
        facts += [f"(openable {ids[place]})"] if place.type in tables["openable"] else []
    for item, place in scene.lies.items():
        facts += [f"(objectType {ids[item]} {item.type}Type)", f"(inReceptacle {ids[item]} {ids[place]})"]
        facts += [f"(objectAtLocation {ids[item]} {where[place]})"]
        facts += [f"({able} {ids[item]})" for able, kinds in tables["properties"].items() if item.type in kinds]
        facts += [f"(isReceptacleObject {ids[item]})"] if item.type in tables["receptacle_objects"] else []
        facts += [f"(pickupable {ids[item]})"] if item.type not in tables["properties"]["toggleable"] else []
    for kind in sorted(receptacle_types):
        facts += [f"(canContain {kind}Type {item}Type)" for item in sorted(tables["contains"][kind] & object_types)]
    lines = "\n        ".join
    return (
        "(define (problem generated)\n    (:domain alfred)\n"
        f"    (:objects\n        {lines(objects)})\n    (:init\n        {lines(facts)})\n    {goal}\n"
    )


def _pddl(name: str) -> str:
    """Return an id as ALFWorld spells it in PDDL."""
    for sign, word in (("-", "_minus_"), ("|", "_bar_"), ("+", "_plus_"), (".", "_dot_")):
        name = name.replace(sign, word)
    return name
