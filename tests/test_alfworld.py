"""ALFWorld: recorded TextWorld transcripts, the generator, the loader of official data, and `make`."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atod_fast.envs
from atod_fast.envs import make
from atod_fast.envs.alfworld.engine import NOTHING_HAPPENS, FastAlfWorld
from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import TASK_TYPES, Spec, generate
from atod_fast.envs.alfworld.loader import find_games, playable
from atod_fast.envs.alfworld.pddl import GameError
from atod_fast.envs.protocol import Environment
from atod_fast.errors import UserError

TRANSCRIPTS = Path(__file__).parent / "data" / "alfworld_transcripts.json"
OFFICIAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "alfworld_official_2.1.1.tar.xz"
TREATMENT = {
    "pick_clean_then_place_in_recep": ("cleanobject", "isclean"),
    "pick_heat_then_place_in_recep": ("heatobject", "ishot"),
    "pick_cool_then_place_in_recep": ("coolobject", "iscool"),
}


def next_command(world: FastAlfWorld) -> str:
    """What finishes the task from any state, by a player that sees everything."""
    game, task, held = world.game, world.game.task, world.held

    def say(action: str, **ids: str) -> str:
        return game.texts.commands[action].format(**{word: game.names[name] for word, name in ids.items()})

    def at(place: str, command: str) -> str:
        if place not in world.here:
            return say("gotolocation", r=place)
        return command if world.is_open(place) else say("openobject", r=place)

    lies = sorted(world.facts["inreceptacle"])
    wanted = [(item, place) for item, place in lies if game.kind[item] == task.object and item in game.properties["pickupable"]]
    targets = [place for place in game.receptacles if game.kind[place] == task.receptacle]
    targets.sort(key=lambda place: -sum(where == place for _, where in wanted))
    if held is None:
        item, place = next(pair for pair in wanted if task.type != "pick_two_obj_and_place" or pair[1] != targets[0])
        return at(place, say("pickupobject", o=item, r=place))
    if game.kind[held] != task.object:
        place = next(place for place in game.receptacles if held in game.accepts[place])
        return at(place, say("putobject", o=held, r=place))
    if task.type == "look_at_obj_in_light":
        lamp, place = next(pair for pair in lies if game.kind[pair[0]] == task.toggle)
        return say("toggleobject", o=lamp) if place in world.here else say("gotolocation", r=place)
    action, fact = TREATMENT.get(task.type, (None, None))
    if action and not world.true(fact, held):
        tool = min(game.tools[action])
        return say(action, o=held, r=tool) if tool in world.here else say("gotolocation", r=tool)
    return at(targets[0], say("putobject", o=held, r=targets[0]))


def as_2_1_1(data: dict) -> dict:
    """A generated game in the older wording, with the older domain's two differences."""
    grammar = data["grammar"][: data["grammar"].index("action help")]
    for new, old in (
        ("arrive at {r.name}.", "arrive at {lend.name}."),
        ("move {o} to {r}", "put {o} in/on {r}"),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
    ):
        assert new in grammar
        grammar = grammar.replace(new, old)
    domain = data["pddl_domain"].replace(";(receptacleType ?r SinkType)", "(receptacleType ?r SinkType)")
    return data | {"grammar": grammar, "pddl_domain": domain[: domain.index("(:action help")] + ")"}


def game(task_type: str = "pick_and_place_simple", index: int = 0, **options) -> Game:
    name, data = generate(Spec(task_types=(task_type,), **options), index)
    return Game.parse(data, name)


# --- the engine


@pytest.mark.parametrize("record", json.loads(TRANSCRIPTS.read_text()), ids=lambda record: f"{record['task_type']}-{record['scene']}-{record['grammar']}")
def test_replays_what_textworld_said(record):
    _, data = generate(Spec(), 0)
    data["grammar"] = re.sub("Your task is to: [^\"]*", record["task"], data["grammar"])
    data["pddl_problem"] = record["pddl_problem"]
    world = FastAlfWorld(Game.parse(as_2_1_1(data) if record["grammar"] == "2.1.1" else data, "recorded"))
    assert world.reset() == record["intro"]
    admissible = set(record["admissible"])
    assert world.admissible == sorted(admissible) and not world.won
    for at, (command, observation, appeared, vanished) in enumerate(record["turns"], 1):
        assert world.step(command) == (observation, command in admissible)
        admissible = (admissible | set(appeared)) - set(vanished)
        assert world.admissible == sorted(admissible)
        assert world.won == (at == len(record["turns"]))


tasks = st.sampled_from(TASK_TYPES)
scenes = st.sampled_from(("small", "full"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tasks, scenes, st.integers(0, 9), st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_a_generated_game_can_be_won_from_any_state_and_starts_unsolved(task_type, scene, seed, index, random):
    world = FastAlfWorld(game(task_type, index, scene=scene, seed=seed))
    assert not world.won and world.game.task.type == task_type
    for _ in range(random.randrange(12)):
        world.step(random.choice(world.admissible))
    turns = 0
    while not world.won:
        observation, accepted = world.step(next_command(world))
        turns += 1
        assert accepted and observation != NOTHING_HAPPENS and turns < 30


@settings(max_examples=60, deadline=None)
@given(tasks, st.integers(0, 10**6), st.lists(st.integers(0, 10**6), max_size=15), st.text(max_size=30))
def test_every_listed_command_is_accepted_and_no_other_changes_anything(task_type, index, choices, text):
    world = FastAlfWorld(game(task_type, index))
    for choice in choices:
        assert world.admissible == sorted(set(world.admissible))
        assert world.step(world.admissible[choice % len(world.admissible)])[1]
    before = {name: set(rows) for name, rows in world.facts.items()}
    listed = list(world.admissible)
    if text.strip() not in listed:
        assert world.step(text) == (NOTHING_HAPPENS, False)
        assert world.facts == before and world.admissible == listed


def test_what_textworld_does_that_nobody_would_expect():
    world = FastAlfWorld(game("pick_clean_then_place_in_recep", 4))
    assert world.step("look")[0] == "You are in the middle of a room. Looking quickly around you, you see nothing."
    while world.held is None:
        world.step(next_command(world))
    held, here = world.game.names[world.held], world.game.names[world.here[0]]
    assert f"examine {held}" in world.admissible and f"go to {here}" not in world.admissible
    visible = [world.game.names[item] for item in world.contents(world.here[0])]
    assert not any(f"examine {name}" in world.admissible for name in visible)
    assert world.step(f"go to {here}") == (NOTHING_HAPPENS, False)


def test_the_sentences_come_from_the_game_file():
    _, data = generate(Spec(), 0)
    data["grammar"] = data["grammar"].replace("You are not carrying anything.", "Your {a.indefinite} hand is empty.".replace("{a.indefinite} ", ""))
    assert FastAlfWorld(Game.parse(data, "")).step("inventory")[0] == "Your hand is empty."


@pytest.mark.parametrize(
    ("key", "old", "new", "complaint"),
    [
        ("pddl_domain", "(isClean ?o)\n            )", "(isHot ?o)\n            )", "cleanobject is not ALFWorld's"),
        ("pddl_domain", "(:action look", "(:action sing", "is not ALFWorld's"),
        ("grammar", "openable(r:receptacle) & opened", "locked(r:receptacle) & opened", "asks for locked"),
        ("grammar", "{o.indefinite + ' ' + o.name | inreceptacle", "{o.name.upper() | inreceptacle", "computes"),
        ("grammar", "#examineReceptacle.feedback#\"", "#nowhere#\"", "#nowhere#"),
        ("pddl_problem", "(exists (?r - receptacle)", "(forall (?r - receptacle)", "(forall ...)"),
        ("pddl_problem", "- receptacle\n", "- object\n", "declared|task|receptacle"),
        ("pddl_problem", "(:init", "(:inti", "not (define"),
    ],
)  # fmt: skip
def test_a_game_that_is_not_alfworlds_is_refused_rather_than_played_wrongly(key, old, new, complaint):
    _, data = generate(Spec(), 0)
    assert old in data[key]
    data[key] = data[key].replace(old, new)
    with pytest.raises(GameError):
        Game.parse(data, "")
