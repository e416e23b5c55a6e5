"""ALFWorld: recorded TextWorld transcripts, the generator, the loader of official data, and `make`."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atod_fast.envs
from atod_fast.config import Env
from atod_fast.envs import make
from atod_fast.envs.alfworld.engine import NOTHING_HAPPENS, FastAlfWorld
from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import SMALL_TASK_TYPES, TASK_TYPES, Spec, generate
from atod_fast.envs.alfworld.loader import find_games, playable
from atod_fast.envs.alfworld.pddl import GameError
from atod_fast.envs.protocol import Environment
from atod_fast.errors import UserError
from helpers.alfworld import TRANSCRIPTS, as_2_1_1, next_command


def game(task_type: str = "pick_and_place_simple", index: int = 0, **options) -> Game:
    name, data = generate(Spec(task_types=(task_type,), **options), index)
    return Game.parse(data, name)


# --- the engine


@pytest.mark.parametrize(
    "record",
    json.loads(TRANSCRIPTS.read_text()) if TRANSCRIPTS.exists() else [],
    ids=lambda record: f"{record['task_type']}-{record['scene']}-{record['grammar']}",
)
def test_replays_what_textworld_said(record):
    _, data = generate(Spec(), 0)
    data["grammar"] = re.sub('Your task is to: [^"]*', record["task"], data["grammar"])
    data["pddl_problem"] = record["pddl_problem"]
    world = FastAlfWorld(Game.parse(as_2_1_1(data) if record["grammar"] == "2.1.1" else data, "recorded"))
    assert world.reset() == record["intro"]
    admissible = set(record["admissible"])
    assert world.admissible == sorted(admissible) and not world.won
    for at, (command, observation, appeared, vanished) in enumerate(record["turns"], 1):
        assert world.step(command) == (observation, command.strip() in admissible)
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
    data["grammar"] = data["grammar"].replace(
        "You are not carrying anything.", "Your {a.indefinite} hand is empty.".replace("{a.indefinite} ", "")
    )
    assert FastAlfWorld(Game.parse(data, "")).step("inventory")[0] == "Your hand is empty."


@pytest.mark.parametrize(
    ("key", "old", "new", "complaint"),
    [
        (
            "pddl_domain",
            "(isClean ?o)\n            )",
            "(isHot ?o)\n            )",
            "action cleanobject is not ALFWorld's",
        ),
        ("pddl_domain", "(:action look", "(:action sing", "is not ALFWorld's"),
        ("grammar", "openable(r:receptacle) & opened", "locked(r:receptacle) & opened", "asks for locked"),
        ("grammar", "{o.indefinite + ' ' + o.name | inreceptacle", "{o.name.upper() | inreceptacle", "computes"),
        ("grammar", '#examineReceptacle.feedback#"', '#nowhere#"', "no #nowhere#"),
        ("grammar", "action OpenObject", "action Unlock", "no text for the action openobject"),
        ("pddl_problem", "(exists (?r - receptacle)", "(forall (?r - receptacle)", "(forall ...)"),
        ("pddl_problem", " - receptacle\n", " - object\n", "is not of the form the domain declares"),
        ("pddl_problem", "(receptacleType ?r ", "(receptacleType ?r No", "things that are not in the game"),
        ("pddl_problem", "(:init", "(:inti", "not (define"),
    ],
)
def test_a_game_that_is_not_alfworlds_is_refused_rather_than_played_wrongly(key, old, new, complaint):
    _, data = generate(Spec(), 0)
    assert old in data[key]
    with pytest.raises(GameError, match=re.escape(complaint)):
        Game.parse(data | {key: data[key].replace(old, new)}, "")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(("pddl_domain", "grammar", "pddl_problem")), st.floats(0, 1), st.integers(1, 60))
def test_damage_is_a_game_error_or_harmless(key, where, length):
    _, data = generate(Spec(), 0)
    at = int(where * len(data[key]))
    damaged = data | {key: data[key][:at] + data[key][at + length :]}
    try:
        world = FastAlfWorld(Game.parse(damaged, ""))
    except GameError:
        return
    world.step(world.admissible[0])


# --- the generator


def content(data: dict) -> tuple:
    """Return what tells a small scene from another: facts and goal without coordinates."""
    facts, goal = data["pddl_problem"].split("(:goal")
    lies = re.findall(r"\(inReceptacle ([A-Za-z]+)\S* ([A-Za-z]+)", facts)
    return frozenset(lies), frozenset(re.findall(r"\(receptacleType ([A-Za-z]+)", facts)), goal


def test_training_and_evaluation_games_share_nothing():
    """Nor are any two of them the same game in another place."""
    splits = [
        Env().train,
        Env().eval,
        Env().dev,
        {"generate": 2000, "seed": 3},
    ]  # the last: those of bench/demo_study.py
    games = [[generate(Spec(at["seed"], SMALL_TASK_TYPES), i)[1] for i in range(at["generate"])] for at in splits]
    assert len({data["pddl_problem"] for split in games for data in split}) == sum(map(len, games)) == 8300
    for one, other in combinations([set(map(content, split)) for split in games], 2):
        assert not one & other


def test_a_game_depends_on_seed_index_and_options_alone():
    spec = Spec(seed=3, scene="full")
    games = [generate(spec, i) for i in (5, 2, 5)]
    assert games[0] == games[2] != games[1]
    assert generate(Spec(seed=5, scene="full"), 5) != games[0]
    code = "from atod_fast.envs.alfworld.generator import *; print(generate(Spec(seed=3, scene='full'), 5))"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip() == str(games[0])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9), st.integers(3, 9))
def test_small_scenes_are_kitchens_with_one_of_each(index, receptacles, objects):
    env = make("alfworld", generate=10**9, receptacles=receptacles, objects=objects)
    env.reset(0, index)
    kinds = [env.game.kind[place] for place in env.game.receptacles]
    things = [env.game.kind[item] for item, _ in env.game.initial["inreceptacle"]]
    assert len(set(kinds)) == len(kinds) <= receptacles and len(set(things)) == len(things) <= objects
    assert len(env.game.at) == len(kinds) and not {"bed", "sofa", "toilet"} & set(kinds)


def test_full_scenes_hold_all_six_types_and_share_places():
    env = make("alfworld", generate=48, scene="full")
    seen = [env.reset(0, i)[1]["task_type"] for i in range(48) if env.reset(0, i)]
    assert set(seen) == set(TASK_TYPES)
    crowded = [env.game for i in range(48) if env.reset(0, i) and len(env.game.at) < len(env.game.receptacles)]
    assert crowded and max(len(one.receptacles) for one in crowded) > 20


# --- the environment


def test_it_speaks_the_protocol_and_pays_once_the_goal_is_reached():
    env = make("alfworld", generate=8, seed=1, reward=7)
    assert isinstance(env, Environment) and env.instant and len(env) == 8
    observation, info = env.reset(0, 3)
    assert (
        observation.startswith("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room.")
        and "Your task is to: " in observation
    )
    assert (
        info.keys() == {"won", "admissible_actions", "is_action_valid", "task_type", "task_id"}
        and info["task_type"] in info["task_id"]
    )
    assert env.step("fly")[1:4] == (0.0, False, False) and not env.step("fly")[4]["is_action_valid"]
    rewards = []
    while not info["won"]:
        observation, reward, terminated, truncated, info = env.step(next_command(env.engine))
        rewards.append(reward)
        assert terminated == info["won"] and not truncated and info["is_action_valid"]
    assert rewards == [0.0] * (len(rewards) - 1) + [7.0]
    with pytest.raises(IndexError):
        env.reset(0, 8)


def play(env: AlfWorld, task: int) -> list:
    log = [env.reset(0, task)]
    random = Random(task)
    for _ in range(20):
        log.append(env.step(random.choice(log[-1][-1]["admissible_actions"])))
    return log


def test_clones_and_threads_do_not_disturb_each_other():
    env = make("alfworld", generate=6, scene="full")
    alone = [play(env, task) for task in range(6)]
    clones = [make("alfworld", generate=6, scene="full").clone()]
    clones += [clones[0].clone() for _ in range(5)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(play, clones, range(6))) == alone
    assert clones[0].game is not clones[1].game and clones[0]._games is clones[1]._games


def test_a_missing_textworld_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "alfworld.agents.utils.misc", None)
    with pytest.raises(UserError, match=r"engine='textworld' needs alfworld .* pip install alfworld==0.4.2"):
        make("alfworld", generate=1, engine="textworld")


def test_environments_do_not_import_torch():
    code = (
        "import sys; from atod_fast.envs import make; make('alfworld', generate=2).reset(0, 0); "
        "print({'torch', 'textworld', 'alfworld'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- official data


def write(root: Path, folder: str, content: str | bytes) -> Path:
    file = root / folder / "trial_T1" / "game.tw-pddl"
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_games_are_judged_by_their_task_folder_not_by_where_they_lie(tmp_path):
    text = json.dumps(generate(Spec(task_types=("pick_and_place_simple",)), 0)[1])
    root = tmp_path / "media" / "removable" / "AppleSliced" / "json_2.1.1" / "train"
    write(root, "pick_and_place_simple-X-None-Y-1", text)
    write(root, "pick_and_place_with_movable_recep-X-Bowl-Y-1", text)
    assert len(make("alfworld", split="train", data=str(root.parents[1]))) == 1


def test_the_loader_takes_what_alfworld_would_play_and_names_what_is_damaged(tmp_path, caplog):
    text = {kind: json.dumps(generate(Spec(task_types=(kind,)), 0)[1]) for kind in TASK_TYPES}
    simple = text["pick_and_place_simple"]
    root = tmp_path / "json_2.1.1" / "valid_seen"
    good = [write(root, f"{kind}-X-None-Y-1", text[kind]) for kind in TASK_TYPES]
    write(root, "pick_and_place_with_movable_recep-X-Bowl-Y-1", simple)
    write(root, "pick_and_place_simple-AppleSliced-None-Y-1", simple)
    write(root, "pick_and_place_simple-unsolvable", simple.replace('"solvable": true', '"solvable": false'))
    write(root, "pick_and_place_simple-unchecked", simple.replace('"solvable": true', '"unchecked": true'))
    damaged = [
        write(root, "pick_and_place_simple-cut", simple[: len(simple) // 2]),
        write(root, "pick_and_place_simple-bytes", b"\xff\xfe"),
        write(root, "pick_and_place_simple-list", "[1, 2]"),
        write(root, "pick_and_place_simple-goal", simple.replace("(:goal", "(:gaol")),
        write(root, "pick_and_place_simple-key", simple.replace('"grammar"', '"grandma"')),
    ]
    with caplog.at_level(logging.WARNING):
        env = make("alfworld", split="valid_seen", data=str(tmp_path))
    assert len(env) == len(good) and {env.reset(0, i)[1]["task_type"] for i in range(len(env))} == set(TASK_TYPES)
    assert "skipped 5 of 15" in caplog.text and str(damaged[0]) in caplog.text
    assert env.reset(0, 0)[1]["task_id"] == "/".join(sorted(good)[0].parts[-3:-1])
    assert len(make("alfworld", games=[str(good[0]), good[3].parent])) == 2
    assert len(make("alfworld", games=str(tmp_path), task_types=["look_at_obj_in_light"])) == 1
    with pytest.raises(UserError, match="5 damaged, first .*pick_and_place_simple-"):
        playable(damaged)
    with pytest.raises(UserError, match="none passes"):
        playable(find_games([root / "pick_and_place_simple-unsolvable"]))


def test_the_data_folder_may_come_from_the_environment(tmp_path, monkeypatch):
    write(tmp_path / "json_2.1.1" / "train", "a", json.dumps(generate(Spec(), 0)[1]))
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert len(make("alfworld", split="train")) == 1
    with pytest.raises(UserError, match="valid_unseen"):
        make("alfworld", split="valid_unseen")
    monkeypatch.delenv("ALFWORLD_DATA")
    with pytest.raises(UserError, match="alfworld-download"):
        make("alfworld", split="train")


def test_official_games_are_read_and_each_can_be_won(official):
    env = make("alfworld", split="valid_seen", data=str(official))
    assert len(env) == 140
    seen = set()
    for task in range(len(env)):
        _, info = env.reset(0, task)
        folder = info["task_id"].split("-")[0]
        assert info["task_type"] == folder
        seen.add(folder)
        for _ in range(40):
            if info["won"]:
                break
            info = env.step(next_command(env.engine))[4]
        assert info["won"], info["task_id"]
    assert seen == set(TASK_TYPES)


# --- make


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("alfword", {}, "env.name='alfword' is not known; did you mean alfworld?"),
        ("nothing_like_it", {}, "known: alfworld"),
        ("web_shop", {}, "did you mean webshop?"),
        ("webshop", {"generat": 3}, "no option 'generat'; did you mean generate?"),
        ("searchqa", {"split": "train"}, "env.name='searchqa' has no option 'split'"),
        ("no_such_module:World", {}, "cannot be loaded"),
        ("atod_fast.envs.alfworld.env:Alf", {}, "cannot be loaded"),
        ("alfworld", {"generat": 3}, "no option 'generat'; did you mean generate?"),
        ("alfworld", {}, "exactly one of generate"),
        ("alfworld", {"generate": 3, "split": "train"}, "exactly one of generate"),
        ("alfworld", {"generate": 0}, "generate=0 must be"),
        ("alfworld", {"generate": 3, "seed": 1.5}, "seed=1.5 must be"),
        ("alfworld", {"generate": 3, "receptacles": 2}, "receptacles=2 must be"),
        ("alfworld", {"generate": 3, "task_types": ["pick_two"]}, "task_types='pick_two' is not one of"),
        ("alfworld", {"generate": 3, "scene": "ful"}, "scene='ful' is not one of small, full; did you mean full?"),
        ("alfworld", {"split": "train", "scene": "full"}, "scene='full' goes with generate=N"),
        ("alfworld", {"generate": 3, "data": "."}, "data='.' goes with split"),
        ("alfworld", {"generate": 3, "engine": "texworld"}, "did you mean textworld?"),
        ("alfworld", {"split": "valid_sen", "data": "."}, "did you mean valid_seen?"),
        ("alfworld", {"games": ["/nowhere/game.tw-pddl"]}, "'/nowhere/game.tw-pddl' does not exist"),
    ],
)
def test_mistakes_get_one_clear_line(name, options, complaint):
    with pytest.raises(UserError) as caught:
        make(name, **options)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_other_worlds_come_by_module_and_class_or_by_entry_point(monkeypatch):
    own = make("atod_fast.envs.alfworld.env:AlfWorld", generate=1)
    assert type(own) is AlfWorld
    offered = EntryPoint("kitchens", "atod_fast.envs.alfworld.env:AlfWorld", atod_fast.envs.GROUP)
    monkeypatch.setattr(
        atod_fast.envs, "entry_points", lambda group: (offered,) if group == atod_fast.envs.GROUP else ()
    )
    assert len(make("kitchens", generate=4)) == 4
    with pytest.raises(UserError, match="did you mean kitchens"):
        make("kitchen")
