"""The fast engine against TextWorld itself, step by step.

`PYTHONPATH=tests python tests/envs/alfworld/test_alfworld_textworld.py` records the transcripts that test_alfworld.py
replays where TextWorld is not installed.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

from atod_fast.envs import make
from atod_fast.envs.alfworld.engine import FastAlfWorld
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import TASK_TYPES, Spec, generate
from atod_fast.envs.alfworld.textworld import TextWorldEngine
from helpers.alfworld import TRANSCRIPTS, as_2_1_1, next_command

pytest.importorskip("textworld")
pytest.importorskip("alfworld")
pytestmark = pytest.mark.textworld


def as_2_1_2(data: dict) -> dict:
    """An official (2.1.1) game in the wording of the games that alfworld-download fetches today."""
    _, ours = generate(Spec(), 0)
    grammar = data["grammar"]
    for old, new in (
        ("arrive at {lend.name}.", "arrive at {r.name}."),
        ("put {o} in/on {r}", "move {o} to {r}"),
        ("You put the {o.name} in/on the {r.name}.", "You move the {o.name} to the {r.name}."),
    ):
        assert old in grammar
        grammar = grammar.replace(old, new)
    helping = ours["grammar"][ours["grammar"].index("action help") :]
    return data | {"grammar": grammar + helping, "pddl_domain": ours["pddl_domain"]}


_PARSED: dict = {}


@contextmanager
def remembering() -> Iterator[None]:
    """Cache TextWorld's parsing: it parses the same few grammar symbols at every step and translates every problem
    twice. That is five times faster with the same output; `test_untouched_textworld` plays without it."""
    import fast_downward
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule

    parse, query, translate = (
        textgen._parse_and_convert,
        Rule.__dict__["parse_conjunctive_query"],
        fast_downward.pddl2sas,
    )
    translated: dict = {}

    def parse_once(text, rule_name="start", **options):
        if (text, rule_name) not in _PARSED:
            _PARSED[text, rule_name] = parse(text, rule_name=rule_name, **options)
        return copy.deepcopy(_PARSED[text, rule_name])

    def query_once(cls, expression):
        if expression not in _PARSED:
            _PARSED[expression] = query.__func__(cls, expression)
        return _PARSED[expression]

    def translate_once(domain, problem, verbose=False, optimize=False):
        # Skip the second, optimised translation: it is for the planner, which these tests do not use.
        if (domain, problem) not in translated:
            translated.clear()
            translated[domain, problem] = translate(domain, problem, verbose=verbose)
        return translated[domain, problem]

    textgen._parse_and_convert, Rule.parse_conjunctive_query, fast_downward.pddl2sas = (
        parse_once,
        classmethod(query_once),
        translate_once,
    )
    try:
        yield
    finally:
        textgen._parse_and_convert, Rule.parse_conjunctive_query, fast_downward.pddl2sas = parse, query, translate


class Both:
    """A game in both engines at once; raises at any difference in text, admissible commands or victory."""

    def __init__(self, engine: TextWorldEngine, data: dict, name: str) -> None:
        self.fast, self.slow = FastAlfWorld(Game.parse(data, name)), engine
        engine.load(self.fast.game)
        self.log = [(None, self.fast.reset(), self.fast.admissible)]
        assert self.log[0][1] == engine.reset()
        self._agree(name)

    def step(self, command: str) -> None:
        said = self.fast.step(command)
        assert said == self.slow.step(command), command
        self._agree(command)
        self.log.append((command, said[0], self.fast.admissible))

    def _agree(self, where: str) -> None:
        assert self.fast.admissible == self.slow.admissible, where
        assert self.fast.won == self.slow.won, where

    def wander(self, random: Random, steps: int) -> None:
        """Play mostly commands that change something, some that look around, some nonsense; end early if that wins the
        game."""
        for _ in range(steps):
            if self.fast.won:
                return
            acting = [
                command
                for command in self.fast.admissible
                if command.split()[0] not in ("go", "look", "inventory", "examine", "help", "close")
            ]
            roll = random.random()
            if roll < 0.05:
                self.step(random.choice(("go to nowhere 9", "LOOK", "", " inventory ", "take mug 1", "help")))
            elif roll < 0.15:
                self.step("look")
            else:
                self.step(random.choice(acting if acting and roll < 0.7 else self.fast.admissible))

    def finish(self) -> None:
        for _ in range(40):
            if self.fast.won:
                return
            self.step(next_command(self.fast))
        raise AssertionError(f"not won: {self.log[-1]}")


@pytest.fixture(scope="module")
def untouched():
    engine = TextWorldEngine()
    yield engine
    engine.close()


@pytest.fixture
def engine(untouched):
    with remembering():
        yield untouched


def test_untouched_textworld(untouched):
    name, data = generate(Spec(seed=11), 1)
    both = Both(untouched, data, name)
    both.wander(Random(0), 6)
    both.finish()


@pytest.mark.parametrize("version", ["2.1.1", "2.1.2"])
@pytest.mark.parametrize("scene", ["small", "full"])
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_generated_games_go_alike_to_the_end(engine, task_type, scene, version):
    name, data = generate(Spec(seed=7, scene=scene, task_types=(task_type,)), 0 if version == "2.1.1" else 1)
    both = Both(engine, as_2_1_1(data) if version == "2.1.1" else data, name)
    both.wander(Random(task_type + version), 10)
    both.finish()


@pytest.mark.parametrize("version", ["2.1.1", "2.1.2"])
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_official_games_go_alike_to_the_end(engine, official, task_type, version):
    file = Random(task_type + version).choice(sorted(official.rglob(f"{task_type}-*/*/game.tw-pddl")))
    data = json.loads(file.read_text())
    both = Both(engine, data if version == "2.1.1" else as_2_1_2(data), str(file))
    both.wander(Random(1), 15)
    both.finish()


ODD = {
    "an object cold from the start": r"\(isCool (?!\?)",
    "an object inside another": r"\(inReceptacleObject (?!\?)",
    "an object in two receptacles": r"\(inReceptacle (\S+) \S+\)(?=.*\(inReceptacle \1 )",
    "receptacles that share a place": r"\(receptacleAtLocation \S+ (\S+)\)(?=.*\(receptacleAtLocation \S+ \1\))",
}


@pytest.mark.parametrize("oddity", ODD)
def test_oddities_of_official_games(engine, official, oddity):
    files = sorted(official.rglob("game.tw-pddl"))
    Random(oddity).shuffle(files)
    odd = [
        file
        for file in files
        if re.search(ODD[oddity], json.loads(file.read_text())["pddl_problem"].partition("(:goal")[0], re.DOTALL)
    ]
    for file in odd[:2]:
        Both(engine, json.loads(file.read_text()), str(file)).wander(Random(2), 30)
    assert odd


def test_objects_left_beside_a_receptacle(engine):
    """An object carried between two receptacles of one place is seen next to the first: the only list that `look`
    shows."""
    for index in range(40):
        name, data = generate(Spec(seed=3, scene="full", task_types=("pick_and_place_simple",)), index)
        world = FastAlfWorld(Game.parse(data, name))
        move = next(_moves_within_a_place(world), None)
        if move:
            break
    both = Both(engine, data, name)
    for command in (*move, "look"):
        both.step(command)
    assert re.search(r"Next to it, you see an? \w+ \d+\.", both.log[-1][1])


def _moves_within_a_place(world: FastAlfWorld) -> Iterator[list[str]]:
    game = world.game
    for item, place in sorted(world.facts["inreceptacle"]):
        beside = [other for other in game.at[game.location[place]] if other != place and item in game.accepts[other]]
        for other in beside:
            say = game.texts.commands
            names = {"o": game.names[item], "r": game.names[place]}
            opening = [say["openobject"].format(r=game.names[r]) for r in (place, other) if not world.is_open(r)]
            if item in game.properties["pickupable"]:
                yield [
                    say["gotolocation"].format(**names),
                    *opening,
                    say["pickupobject"].format(**names),
                    say["putobject"].format(o=names["o"], r=game.names[other]),
                ]


def test_the_backend_plays_the_environment(engine):
    fast, slow = (make("alfworld", generate=3, seed=5, engine=name) for name in ("fast", "textworld"))
    assert fast.instant and not slow.instant
    argv = list(sys.argv)
    for task in (0, 2):
        state = fast.reset(0, task)
        assert state == slow.reset(0, task)
        while not state[-1]["won"]:
            command = next_command(fast.engine)
            state = fast.step(command)
            assert state == slow.step(command)
    assert slow.step("nonsense")[-1]["is_action_valid"] is False
    slow.close()
    assert sys.argv == argv


def record() -> None:
    """Write the transcripts as TextWorld gives them; `Both` asserts that the fast engine agrees."""
    records = []
    with remembering():
        engine = TextWorldEngine()
        for number, task_type in enumerate(TASK_TYPES):
            versions = ("2.1.1", "2.1.2") if number % 2 else ("2.1.2", "2.1.1")
            for scene, version in zip(("small", "full"), versions, strict=True):
                games = (generate(Spec(seed=21, scene=scene, task_types=(task_type,)), index) for index in range(30))
                name, data = min(games, key=lambda one: len(one[1]["pddl_problem"]))
                both = Both(engine, as_2_1_1(data) if version == "2.1.1" else data, name)
                both.wander(Random(name + version), 12)
                both.finish()
                turns, listed = [], set(both.log[0][2])
                for command, observation, admissible in both.log[1:]:
                    turns.append(
                        [command, observation, sorted(set(admissible) - listed), sorted(listed - set(admissible))]
                    )
                    listed = set(admissible)
                records.append(
                    {
                        "task_type": task_type,
                        "scene": scene,
                        "grammar": version,
                        "task": re.search('Your task is to: [^"]*', data["grammar"])[0],
                        "pddl_problem": data["pddl_problem"],
                        "intro": both.log[0][1],
                        "admissible": both.log[0][2],
                        "turns": turns,
                    }
                )
        engine.close()
    TRANSCRIPTS.parent.mkdir(exist_ok=True)
    TRANSCRIPTS.write_text("[\n" + ",\n".join(json.dumps(one) for one in records) + "\n]\n")


if __name__ == "__main__":
    record()
