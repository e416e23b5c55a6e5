"""The adapter for gymnasium's environments, in the real agent loop."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType

import numpy as np
import pytest

from atod_fast.envs.adapters import adapter
from atod_fast.envs.adapters.gymnasium import Gymnasium
from atod_fast.envs.adapters.openenv import OpenEnv
from atod_fast.envs.text import GAP
from atod_fast.errors import UserError
from helpers.guess import HOSTILE_ACTIONS, HOSTILE_TEXT, check_shown, play, won_by_halving

FROZEN = {"id": "FrozenLake-v1", "tasks": 50, "observation": "render", "actions": ["left", "down", "right", "Up"]}


def registered(gymnasium: ModuleType, spaces: tuple | None = None, **changes) -> str:
    """A gymnasium environment that reports its seed, counts its steps and ends after three; `changes` replace what a
    step returns."""

    class Counter(gymnasium.Env):
        observation_space = gymnasium.spaces.Text(1000)
        action_space = spaces[0] if spaces else gymnasium.spaces.Text(1000)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.count = 0
            return changes.get("text", f"start {seed}"), changes.get("info", {})

        def step(self, action):
            self.count += 1
            over = self.count == 3
            text = changes.get("text", f"step {self.count} {action!r}")
            return text, changes.get("reward", np.float32(over)), np.bool_(over), False, changes.get("info", {})

        def close(self):
            changes.get("closed", []).append(self)

    gymnasium.register("Counter-v0", Counter)
    return "Counter-v0"


def test_a_gymnasium_environment_is_played_by_the_agent_loop(page, gymnasium):
    class Game(gymnasium.Env):
        action_space, observation_space = gymnasium.spaces.Text(9), gymnasium.spaces.Text(99)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.world = page.Guess(tasks=1, seed=seed)
            return self.world.reset(0, 0)

        def step(self, action):
            return self.world.step(action)

    gymnasium.register("Guess-v0", Game)
    played = play(Gymnasium(id="Guess-v0", tasks=20, seed=5, instructions="You guess."))
    won_by_halving(played)
    assert [
        t.turns for t in play(Gymnasium(id="Guess-v0", tasks=20, seed=5, instructions="You guess.", instant=False))
    ] == [t.turns for t in played]
    assert [t.turns[-1].command for t in play(Gymnasium(id="Guess-v0", tasks=20, seed=6), 11)] == [
        t.turns[-1].command for t in played[1:]
    ]


def test_frozen_lake_is_walked_by_name_and_seen_in_words(gymnasium):
    env = Gymnasium(**FROZEN, kwargs={"is_slippery": False})
    observation, info = env.reset(0, 0)
    assert observation.split() == ["[red", "S]FFF", "FHFH", "FFFH", "HFFG"]
    assert info == {
        "won": False,
        "is_action_valid": True,
        "task_id": "FrozenLake-v1/0",
        "admissible_actions": FROZEN["actions"],
    }
    assert env.step("jump") == (observation, 0.0, False, False, info | {"is_action_valid": False})
    path = [env.step(action) for action in ("down", " DOWN", "right", "right", "down", "right")]
    assert [step[1:4] for step in path] == [(0.0, False, False)] * 5 + [(1.0, True, False)]
    assert [step[4]["won"] for step in path] == [False] * 5 + [True] and "HFF[red G]" in path[-1][0]
    assert all(type(step[1]) is float and type(step[2]) is bool for step in path), (
        "numpy's own types do not become JSON"
    )


def test_a_task_is_a_seed_and_repeats_in_a_clone_whatever_the_loop_s_seed(gymnasium):
    first, second = Gymnasium(**FROZEN), Gymnasium(**FROZEN | {"seed": 3})

    def walk(env, seed, task):
        return env.reset(seed, task), [env.step(action) for action in ["right", "down"] * 6]

    assert walk(first, 1, 4) == walk(first.clone(), 2, 4)
    assert walk(first, 0, 4)[1] == [
        (*step[:4], step[4] | {"task_id": "FrozenLake-v1/4"}) for step in walk(second, 0, 1)[1]
    ]
    assert len({str(walk(first, 0, task)[1][:-1]) for task in range(6)}) > 1, "the ice is slippery by the seed"
    with pytest.raises(IndexError):
        first.reset(0, 50)
    with pytest.raises(RuntimeError, match="step before reset"):
        first.clone().step("left")


def test_the_mask_says_which_actions_there_are(gymnasium):
    env = Gymnasium(id="Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3", tasks=3, observation="render")
    observation, info = env.reset(0, 0)
    assert set(info["admissible_actions"]) < {"0", "1", "2", "3", "4", "5"} and re.search(r"\[yellow .\]", observation)
    forbidden = ({"0", "1", "2", "3"} - set(info["admissible_actions"]) or {"5"}).pop()
    assert env.step(forbidden)[4]["is_action_valid"] is False
    assert env.step(info["admissible_actions"][0])[1] == -1.0


def test_what_the_environment_tells_of_itself_goes_through(gymnasium):
    told = {
        "won": np.bool_(True),
        "score": np.float32(0.5),
        "task_type": "count",
        "admissible_actions": ("a", "b"),
        "unheard": object(),
    }
    env = Gymnasium(id=registered(gymnasium, info=told), tasks=3)
    env.reset(0, 0)
    observation, _, _, _, info = env.step("Say THIS")
    assert observation == "step 1 'Say THIS'", "commands for a Text space keep their letters"
    assert info == {
        "won": True,
        "score": 0.5,
        "task_type": "count",
        "admissible_actions": ["a", "b"],
        "is_action_valid": True,
        "task_id": "Counter-v0/0",
    }
    assert json.dumps(info)


def test_success_is_an_end_with_enough_reward(gymnasium):
    for reward, least, expected in ((5.0, 5.0, True), (5.0, 6.0, False), (-1.0, -2.0, True)):
        env = Gymnasium(id=registered(gymnasium, reward=reward), tasks=1, won=least)
        env.reset(0, 0)
        assert [env.step("x")[4]["won"] for _ in range(3)] == [False, False, expected]
        del gymnasium.registry["Counter-v0"]
    cut = Gymnasium(id=registered(gymnasium), tasks=1, max_steps=2)
    cut.reset(0, 0)
    assert [cut.step("x")[2:4] for _ in range(2)] == [(False, False), (False, True)]


def test_a_discrete_space_may_start_anywhere_and_a_function_may_tell_the_observation(gymnasium, page):
    page.told = lambda observation, info: f"told: {observation}"
    env = Gymnasium(
        id=registered(gymnasium, (gymnasium.spaces.Discrete(2, start=-1),)),
        tasks=1,
        actions=["down", "up"],
        observation="guess:told",
    )
    assert env.reset(0, 0)[0] == "told: start 0"
    assert [env.step(action)[0] for action in ("down", "up")] == ["told: step 1 -1", "told: step 2 0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"id": "FrozenLak-v1"}, "id='FrozenLak-v1' is not registered with gymnasium; did you mean FrozenLake-v1"),
        ({"id": "Zork"}, "id='Zork' is not registered with gymnasium; give module:id"),
        ({"id": "nowhere_at_all:Zork-v0"}, "cannot be made: ModuleNotFoundError"),
        ({"kwargs": {"ice": 3}}, "unexpected keyword argument 'ice'"),
        ({"observation": "text"}, "observation='text' gives int, not text; use observation=render"),
        ({"observation": "picture"}, "observation='picture' is not known; use text, render or module:function"),
        ({"observation": "os:nothing"}, "observation='os:nothing' cannot be loaded"),
        ({"observation": ".os:sep"}, "observation='.os:sep' cannot be loaded"),
        ({"observation": "os:sep"}, "observation='os:sep' is not a function"),
        (
            {"id": "Blackjack-v1", "actions": []},
            "observation='render': Blackjack-v1 draws in human, rgb_array, not in ansi",
        ),
        ({"id": "Pendulum-v1", "observation": "text"}, "actions are Box, not Text or Discrete; wrap it"),
        ({"actions": ["a", "b", "A", "c"]}, "has 3 different names; FrozenLake-v1 has 4 actions"),
        ({"tasks": 0}, "tasks=0 must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"won": "often"}, "won='often' must be a number"),
        ({"instructions": 5}, "instructions=5 must be text"),
        ({"id": 5}, "id=5 must be the name of an environment"),
        ({"kwargs": 5}, "kwargs=5 must be a table of arguments"),
        ({"observation": 5}, "observation=5 must be text, render or module:function"),
        ({"actions": "left"}, "actions='left' must be a list of names"),
        ({"instant": "no"}, "instant='no' must be true or false"),
        ({"max_steps": "many"}, "id='FrozenLake-v1' cannot be made: "),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_gymnasium_cannot_do_is_said_on_one_line(gymnasium, options, words):
    with pytest.raises(UserError) as error:
        Gymnasium(**FROZEN | options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_gymnasium_or_websockets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    with pytest.raises(UserError, match=r"atod_fast\[gym\]"):
        Gymnasium(**FROZEN)
    with pytest.raises(UserError, match=r"atod_fast\[openenv\]"):
        OpenEnv(url="http://127.0.0.1:1", tasks=1)


def test_what_a_gymnasium_environment_tells_is_cleaned_and_cut(gymnasium):
    info = {"admissible_actions": HOSTILE_ACTIONS, "task_type": "\x1b[2J" + "t" * 500, "task_id": "\x1b[2J" + "i" * 500}
    env = Gymnasium(id=registered(gymnasium, text=HOSTILE_TEXT, info=info), tasks=1)
    for observation, *_, told in (env.reset(0, 0), env.step("x")):
        check_shown(observation, told)
        assert len(told["task_type"]) == len(told["task_id"]) == 200 + len(GAP)
    assert len(Gymnasium(id="Counter-v0", tasks=1, chars=20).reset(0, 0)[1]["admissible_actions"]) == 2, (
        "the list's characters are counted"
    )


def test_all_of_many_actions_are_accepted_though_not_all_are_listed(gymnasium):
    env = Gymnasium(id=registered(gymnasium, (gymnasium.spaces.Discrete(20_000),)), tasks=1)
    info = env.reset(0, 0)[1]
    assert info["admissible_actions"] == [*map(str, range(adapter.MOST_ACTIONS)), "[... cut ...]"]
    assert env.step("19999")[0] == "step 1 19999" and env.step("20000")[4]["is_action_valid"] is False


def test_closing_closes_the_gymnasium_environment_and_a_reset_makes_another(gymnasium):
    closed = []
    env = Gymnasium(id=registered(gymnasium, closed=closed), tasks=1)
    assert len(closed) == 1, "the first try's"
    env.reset(0, 0)
    env.close()
    env.close()
    assert len(closed) == 2 and env.reset(0, 0)[0] == "start 0"
