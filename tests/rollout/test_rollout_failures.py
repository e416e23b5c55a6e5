"""What fails in an environment, or between it and the engine, ends its own trajectory only."""

from __future__ import annotations

import re
import sys
import threading

import numpy as np
import pytest

from helpers.agent import make_config, play
from helpers.worlds import Corridor, Letters


@pytest.mark.parametrize("instant", [True, False])
def test_a_world_that_raises_ends_its_own_trajectory_only(instant, caplog):
    env = Corridor(instant=instant, faults={4: lambda: 1 / 0, 7: lambda: {}["key"]})
    played = play(env, temperature=0.0)
    healthy = play(Corridor(), temperature=0.0)
    failed = {t.task: t.failure for t in played if t.failure}
    assert failed.keys() == {4, 7}
    assert re.fullmatch(r"ZeroDivisionError: division by zero \(test_rollout_failures\.py:\d+\)", failed[4])
    assert re.fullmatch(r"KeyError: 'key' \(test_rollout_failures\.py:\d+\)", failed[7])
    for broken, whole in zip(played, healthy, strict=True):
        if broken.failure is None:
            assert [turn.action for turn in broken.turns] == [turn.action for turn in whole.turns]
        else:
            assert len(broken.turns) == 2 and not broken.turns[-1].valid and not broken.success
    assert "task 4, turn 2: the trajectory failed: ZeroDivisionError" in caplog.text
    assert all(world.closed for world in env.family)


def test_one_warning_for_each_error_of_a_line(caplog):
    """Messages that differ from task to task are one error of the code that raises them."""
    play(Corridor(faults={task: lambda task=task: {}[task] for task in range(6)}), temperature=0.0)
    assert caplog.text.count("the trajectory failed: KeyError: ") == 1


@pytest.mark.parametrize("instant", [True, False])
@pytest.mark.parametrize(
    ("call", "reply", "why"),
    [
        (
            "step",
            ("", 0.0, True, {}),
            "step returned 4 values; 5 are due: observation, reward, terminated, truncated, info",
        ),
        ("step", None, "step returned NoneType; 5 are due"),
        ("reset", "text", "reset returned str; 2 are due: observation, info"),
    ],
)
def test_a_reply_of_other_parts_says_which_are_due(instant, call, reply, why, monkeypatch):
    monkeypatch.setattr(Corridor, call, lambda world, *given: reply)
    assert all(t.failure.startswith(f"TypeError: {why}") for t in play(Corridor(instant=instant), temperature=0.0))


@pytest.mark.parametrize("instant", [True, False])
@pytest.mark.parametrize(
    ("reward", "why"),
    [
        (float("nan"), "ValueError: the reward is nan"),
        (float("-inf"), "ValueError: the reward is -inf"),
        ("much", "ValueError"),
    ],
)
def test_a_reward_that_is_no_finite_number_ends_its_own_trajectory_only(instant, reward, why):
    class Generous(Corridor):
        def clone(self):
            return Generous(self.tasks, instant=self.instant)

        def step(self, action):
            observation, *others = super().step(action)
            return (observation, reward, *others[1:]) if self.task == 4 and self.count == 2 else (observation, *others)

    played = play(Generous(instant=instant), temperature=0.0)
    assert [(t.task, len(t.turns), t.turns[-1].reward) for t in played if t.failure] == [(4, 2, 0.0)]
    assert played[4].failure.startswith(why)
    healthy = play(Corridor(), temperature=0.0)
    assert [[turn.action for turn in t.turns] for t in played if t.task != 4] == [
        [turn.action for turn in t.turns] for t in healthy if t.task != 4
    ]


@pytest.mark.parametrize("instant", [True, False])
@pytest.mark.parametrize("method", ["reset", "step"])
@pytest.mark.parametrize(
    ("observation", "info", "why"),
    [
        (5, {}, "TypeError: the observation is int, the info dict"),
        ("text", None, "TypeError: the observation is str, the info NoneType"),
        ("text", {"score": "good"}, "ValueError: could not convert string to float: 'good'"),
        ("text", {"score": float("inf")}, "ValueError: the score is inf"),
        ("text", {"admissible_actions": 5}, "TypeError: 'int' object is not iterable"),
    ],
)
def test_what_the_protocol_does_not_know_ends_its_own_trajectory_only(instant, method, observation, info, why):
    class Odd(Corridor):
        def clone(self):
            return Odd(self.tasks, instant=self.instant)

        def reset(self, seed, task):
            told = super().reset(seed, task)
            return (observation, info) if (task, method) == (4, "reset") else told

        def step(self, action):
            told = super().step(action)
            return (observation, *told[1:4], info) if (self.task, method) == (4, "step") else told

    played = play(Odd(instant=instant), [3, 4], temperature=0.0)
    assert played[0].failure is None and played[1].failure.startswith(why)
    assert [len(t.turns) for t in played] == [5, 1 if method == "step" else 0]


@pytest.mark.parametrize("place", [2, 3])
def test_an_end_that_is_neither_true_nor_false_ends_its_own_trajectory_only(place):
    class Undecided(Corridor):
        def clone(self):
            return Undecided()

        def step(self, action):
            told = list(super().step(action))
            told[place] = np.zeros(2) if self.task == 4 else told[place]
            return tuple(told)

    played = play(Undecided(), [3, 4], temperature=0.0)
    assert [t.failure is None for t in played] == [True, False] and played[1].failure.startswith(
        "ValueError: The truth value"
    )


def test_facts_of_other_types_are_taken_for_what_they_mean():
    class Numpy(Corridor):
        def clone(self):
            return Numpy()

        def step(self, action):
            observation, reward, over, cut, info = super().step(action)
            return (
                observation,
                np.float32(reward),
                np.bool_(over),
                np.bool_(cut),
                info | {"won": np.bool_(over), "score": np.float32(0.5), "task_id": 5},
            )

    (trajectory,) = play(Numpy(), [4])
    kinds = [type(value) for value in (trajectory.success, trajectory.score, trajectory.turns[-1].reward)]
    assert kinds == [bool, float, float] and trajectory.score == 0.5 and trajectory.failure is None


def test_a_world_that_hangs_ends_its_own_trajectory_only():
    release = threading.Event()
    env = Corridor(instant=False, faults={4: release.wait, 5: release.wait})
    played = play(env, config=make_config(env={"step_timeout": 1.0, "workers": 4}), temperature=0.0)
    release.set()
    assert {t.task for t in played if t.failure} == {4, 5}
    assert all("no answer within env.step_timeout=1 s" in t.failure for t in played if t.failure)
    healthy = [t for t in play(Corridor(), temperature=0.0) if t.task not in (4, 5)]
    assert [[turn.action for turn in t.turns] for t in played if not t.failure] == [
        [turn.action for turn in t.turns] for t in healthy
    ]


def test_a_world_that_cannot_start_ends_its_trajectory_without_turns():
    class Shut(Corridor):
        def clone(self):
            return Shut()

        def reset(self, seed, task):
            if task == 1:
                raise FileNotFoundError("game.tw-pddl")
            return super().reset(seed, task)

    first, second = play(Shut(), range(2))
    assert first.failure is None and second.failure.startswith("FileNotFoundError: game.tw-pddl (")
    assert second.turns == []


class Odd(Letters):
    """Shows the `trouble` of one task: a prompt too long, none at all, or one that cannot be made or read."""

    def __init__(self, context: str, trouble: str):
        super().__init__(context)
        self.trouble = trouble

    def prompt(self, turns, observation, info):
        ids = super().prompt(turns, observation, info)
        if not observation.startswith("task 4 "):
            return ids
        if self.trouble == "raises":
            raise KeyError("no such word")
        return {"long": ids * 100, "empty": []}.get(self.trouble, ids)

    def parse(self, ids, stopped, info):
        text, command, valid = super().parse(ids, stopped, info)
        if self.trouble == "unread" and text == self.unread:
            raise ValueError("unreadable")
        return text, None if self.trouble == "no text" and text == self.unread else command, valid


@pytest.mark.parametrize("context", ["window", "full"])
@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("long", "its first prompt has .* tokens, room is for 1 to .*: rollout.prompt_tokens=400 may be raised"),
        ("empty", "its first prompt has 0 tokens"),
        ("raises", "its observation could not be made a prompt: KeyError: 'no such word'"),
        ("unread", "its answer could not be read: ValueError: unreadable"),
        ("no text", "its answer could not be read: TypeError: the command is NoneType"),
    ],
)
def test_what_fails_between_environment_and_engine_ends_its_trajectory_alone(trouble, why, context):
    healthy = play(Corridor(), config=make_config(context))
    renderer = Odd(context, trouble)
    renderer.unread = healthy[4].turns[0].text
    played = play(Corridor(), config=make_config(context), renderer=renderer)
    assert [t.task for t in played if t.failure] == [4]
    assert re.match(why, played[4].failure) and played[4].turns == []
    for found, right in zip(played, healthy, strict=True):
        if found.failure is None:
            assert [turn.action for turn in found.turns] == [turn.action for turn in right.turns]


class Leaves(Corridor):
    """Calls sys.exit in one task, as a script turned environment may."""

    def reset(self, seed, task):
        if task == 4:
            sys.exit(0)
        return super().reset(seed, task)

    def clone(self):
        return Leaves(self.tasks)


class Uncloned(Corridor):
    """Can be cloned only three times."""

    def clone(self):
        if len(self.family) == 3:
            raise OSError("no more")
        return super().clone()


def test_an_environment_that_exits_or_cannot_be_cloned_fails_its_trajectory_alone():
    left = {t.task: t.failure for t in play(Leaves()) if t.failure}
    assert left.keys() == {4} and left[4].startswith("SystemExit: 0 (")
    lost = {t.task: t.failure for t in play(Uncloned()) if t.failure}
    assert 0 < len(lost) < 10 and all(reason.startswith("OSError: no more (") for reason in lost.values())
