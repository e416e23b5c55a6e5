"""The agent loop and the environment pool, with a tiny model in tiny worlds."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from atod_fast.batches import rows
from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.records import Trajectory
from atod_fast.rollout import agent
from atod_fast.rollout.agent import Episode, rollout
from atod_fast.rollout.engines.protocol import Request
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.pool import Pool
from helpers.paths import ROOT
from helpers.worlds import CLOSE, STOP, VOCABULARY, Corridor, Letters, Slow


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=1024, dtype="float32", **sizes)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_config(context: str = "full", **changes: dict) -> Config:
    how = {"context": context, "prompt_tokens": 400, "response_tokens": 6, "concurrency": 4} | changes.pop(
        "rollout", {}
    )
    return Config.model_validate({"rollout": how, "env": {"step_timeout": 20.0} | changes.pop("env", {})})


def episodes(tasks) -> list[Episode]:
    return [
        Episode(task, group=number, member=number % 2, seed=1000 + number, env_seed=task)
        for number, task in enumerate(tasks)
    ]


def play(
    env, tasks=range(10), config: Config | None = None, slots: int = 4, renderer: Letters | None = None, **options
) -> list[Trajectory]:
    config = config or make_config()
    tasks = episodes(tasks) if isinstance(tasks[0], int) else tasks
    engine = TransformersEngine(make_model(), slots=slots, max_model_len=config.rollout.longest, device="cpu")
    return rollout(engine, env, renderer or Letters(config.rollout.context), tasks, config, **options)


@pytest.mark.parametrize("context", ["full", "window"])
def test_trajectories_hold_what_happened_in_the_order_of_their_episodes(context):
    played = play(Corridor(), range(10), make_config(context))
    letters = Letters(context)
    for number, trajectory in enumerate(played):
        assert (trajectory.task, trajectory.group, trajectory.member, trajectory.context) == (
            number,
            number,
            number % 2,
            context,
        )
        assert (trajectory.task_id, trajectory.task_type, trajectory.failure, trajectory.truncated) == (
            f"corridor-{number}",
            "walk",
            None,
            False,
        )
        assert len(trajectory.turns) == 2 + number % 5
        for place, turn in enumerate(trajectory.turns):
            before = trajectory.turns[place - 1] if place else None
            assert turn.observation == (
                f"task {number} step {place} said {before.command}" if before else f"task {number} seed {number} start"
            )
            assert turn.prompt == letters.prompt(trajectory.turns[:place], turn.observation, {})
            stopped = turn.action[-1] == STOP
            assert (
                1 <= len(turn.action) <= 6
                and len(turn.logprobs) == len(turn.action)
                and (stopped or len(turn.action) == 6)
            )
            assert STOP not in turn.action[:-1] and not {0, CLOSE} & set(turn.action)
            assert (turn.text, turn.command) == letters.parse(turn.action, stopped)[:2]
            assert (turn.well_formed, turn.accepted) == (stopped, len(turn.command) != 4)
            assert turn.valid == (stopped and len(turn.command) != 4)
        won = len(trajectory.turns[-1].command) > 3
        assert trajectory.success == won and trajectory.reward == trajectory.turns[-1].reward == float(won)
    valid = [turn.valid for trajectory in played for turn in trajectory.turns]
    assert True in valid and False in valid and {trajectory.success for trajectory in played} == {True, False}


@pytest.mark.parametrize("context", ["full", "window"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probs_are_those_of_the_training_rows(context, temperature):
    model, letters = make_model(), Letters(context)
    played = play(Corridor(), range(6), make_config(context), temperature=temperature)
    for row in rows(played):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0] / (temperature or 1.0)
        logp = logits.masked_fill(~letters.valid_columns, -torch.inf).log_softmax(-1)
        expected = [logp[place - 1, row.ids[place]].item() for start, stop in row.spans for place in range(start, stop)]
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-5)


def test_an_action_that_was_cut_off_is_closed_in_the_sequence():
    played = play(Corridor())
    closed = [turn.prompt[0] == CLOSE for trajectory in played for turn in trajectory.turns[1:]]
    cut = [turn.action[-1] != STOP for trajectory in played for turn in trajectory.turns[:-1]]
    assert closed == cut and True in cut and False in cut


def test_equal_seeds_repeat_bit_for_bit():
    assert play(Corridor()) == play(Corridor())
    shifted = [Episode(e.task, e.group, e.member, e.seed + 1, e.env_seed) for e in episodes(range(10))]
    assert [t.turns for t in play(Corridor(), shifted)] != [t.turns for t in play(Corridor())]


def test_every_turn_draws_from_a_stream_of_its_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(agent, "Request", lambda key, prompt, seed: seeds.append(seed) or Request(key, prompt, seed))
    played = play(Corridor())
    assert len(set(seeds)) == len(seeds) == sum(len(trajectory.turns) for trajectory in played)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neither_concurrency_nor_the_number_of_ranks_changes_a_trajectory(temperature):
    def actions(played):
        return [[turn.action for turn in trajectory.turns] for trajectory in played]

    whole = actions(play(Corridor(), temperature=temperature))
    assert actions(play(Corridor(), temperature=temperature, config=make_config(rollout={"concurrency": 1}))) == whole
    assert (
        actions(play(Corridor(), temperature=temperature, slots=10, config=make_config(rollout={"concurrency": 10})))
        == whole
    )
    for rank in range(2):
        assert actions(play(Corridor(), episodes(range(10))[rank::2], temperature=temperature)) == whole[rank::2]


def test_worlds_that_take_their_time_give_the_same_trajectories():
    slow = play(Slow(instant=False), temperature=0.0)
    assert [t.turns[-1].command for t in slow] == [t.turns[-1].command for t in play(Corridor(), temperature=0.0)]


def test_a_trajectory_never_waits_for_another():
    """The world of task 3 answers only after task 4's trajectory is over: in lock-step neither would ever end."""
    over = threading.Event()

    class Watched(Corridor):
        def clone(self):
            return Watched(self.tasks, instant=False, faults=self.faults)

        def step(self, action):
            out = super().step(action)
            if self.task == 4 and out[2]:
                over.set()
            return out

    played = play(Watched(instant=False, faults={3: lambda: over.wait(15) or 1 / 0}), [3, 4])
    assert [trajectory.failure for trajectory in played] == [None, None]
    assert [len(trajectory.turns) for trajectory in played] == [5, 6]


@pytest.mark.parametrize("instant", [True, False])
def test_a_world_that_raises_ends_its_own_trajectory_only(instant, caplog):
    env = Corridor(instant=instant, faults={4: lambda: 1 / 0, 7: lambda: {}["key"]})
    played = play(env, temperature=0.0)
    healthy = play(Corridor(), temperature=0.0)
    assert {t.task: t.failure for t in played if t.failure} == {
        4: "ZeroDivisionError: division by zero",
        7: "KeyError: 'key'",
    }
    for broken, whole in zip(played, healthy, strict=True):
        if broken.failure is None:
            assert [turn.action for turn in broken.turns] == [turn.action for turn in whole.turns]
        else:
            assert len(broken.turns) == 2 and not broken.turns[-1].valid and not broken.success
    assert "task 4, turn 2: the trajectory failed: ZeroDivisionError" in caplog.text
    assert all(world.closed for world in env.family)


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
    assert first.failure is None and second.failure == "FileNotFoundError: game.tw-pddl" and second.turns == []


def test_turn_limit_token_limit_and_the_world_s_own_limit_truncate():
    by_turns = play(Corridor(), [4], make_config(env={"max_turns": 3}))[0]
    assert by_turns.truncated and len(by_turns.turns) == 3

    longest = play(Corridor(), [4])[0]
    total = len(rows([longest])[0].ids)
    config = make_config(rollout={"prompt_tokens": total - 1})
    by_tokens = play(Corridor(), [4], config)[0]
    assert by_tokens.truncated and 0 < len(by_tokens.turns) < len(longest.turns)
    assert by_tokens.turns == longest.turns[: len(by_tokens.turns)]
    assert sum(len(turn.prompt) + len(turn.action) for turn in by_tokens.turns) <= config.rollout.longest

    class Bounded(Corridor):
        def clone(self):
            return Bounded()

        def step(self, action):
            observation, reward, over, _, info = super().step(action)
            return observation, reward, over, self.count == 1, info

    by_world = play(Bounded(), [4])[0]
    assert by_world.truncated and len(by_world.turns) == 1


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

    def parse(self, ids, stopped):
        text, command, valid = super().parse(ids, stopped)
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
    assert {t.task: t.failure for t in play(Leaves()) if t.failure} == {4: "SystemExit: 0"}
    lost = {t.task: t.failure for t in play(Uncloned()) if t.failure}
    assert lost and set(lost.values()) == {"OSError: no more"} and len(lost) < 10


class Cut(Corridor):
    """Says text that was cut in UTF-16, wherever an environment says text."""

    def step(self, action):
        observation, *outcome, info = super().step(action)
        return observation + " \ud83d\ude00 and \ud83d", *outcome, info

    def _info(self, valid):
        return super()._info(valid) | {"task_id": "\ude00", "task_type": "a\ud83d", "admissible_actions": ["go \ud83d"]}

    def clone(self):
        return Cut(self.tasks)


def test_halves_of_surrogate_pairs_are_joined_or_replaced():
    pool = Pool(Cut(), workers=1, timeout=1)
    pool.reset(0, 0, 0)
    (answer,) = pool.ready(wait=True)
    assert (answer.info["task_id"], answer.info["task_type"], answer.info["admissible_actions"]) == (
        "\ufffd",
        "a\ufffd",
        ["go \ufffd"],
    )
    pool.step(0, "x")
    (answer,) = pool.ready(wait=True)
    assert answer.observation.endswith(" \U0001f600 and \ufffd")


def test_a_configuration_without_room_is_refused():
    engine = TransformersEngine(make_model(), slots=1, max_model_len=100, device="cpu")
    with pytest.raises(UserError, match="rollout.prompt_tokens=400.* 406 .* 100"):
        rollout(engine, Corridor(), Letters("window"), episodes([0]), make_config("window"))


def test_progress_ends_with_the_totals():
    seen = []
    played = play(Corridor(), progress=lambda *numbers: seen.append(numbers))
    turns = [turn for trajectory in played for turn in trajectory.turns]
    assert seen[-1] == (10, 10, len(turns), sum(len(turn.action) for turn in turns))
    assert all(
        later >= earlier
        for one, two in zip(seen, seen[1:], strict=False)
        for earlier, later in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("instant", [True, False])
def test_as_many_worlds_as_trajectories_in_flight_all_closed_at_the_end(instant):
    env = Corridor(instant=instant)
    play(env, range(12))
    assert len(env.family) == 4 and all(world.closed for world in env.family) and not env.closed


def test_no_more_worlds_at_work_than_workers():
    at_work, most, lock = 0, 0, threading.Lock()

    class Counted(Corridor):
        def clone(self):
            return Counted(instant=False)

        def step(self, action):
            nonlocal at_work, most
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.005)
            with lock:
                at_work -= 1
            return super().step(action)

    play(Counted(instant=False), range(8), make_config(env={"workers": 3}, rollout={"concurrency": 8}), slots=8)
    assert 1 < most <= 3


def test_an_answer_that_comes_too_late_is_not_heard():
    late = threading.Event()
    env = Corridor(instant=False, faults={4: late.wait})
    pool = Pool(env, workers=1, timeout=1.0)
    pool.reset(0, seed=0, task=4)
    assert [answer.failure for answer in pool.ready(wait=True)] == [None]
    for _ in range(2):
        pool.step(0, "go")
        answers = pool.ready(wait=True)
    assert [answer.key for answer in answers] == [0] and answers[0].failure
    late.set()
    pool.reset(0, seed=0, task=5)  # the worker is free again, the key stands for another world
    heard = pool.ready(wait=True)
    assert [(answer.observation, answer.failure) for answer in heard] == [("task 5 seed 0 start", None)]
    pool.close()
    assert pool.ready(wait=False) == [] and len(env.family) == 2


def test_a_world_that_hangs_does_not_keep_the_process_from_ending():
    program = """
import threading
from atod_fast.rollout.pool import Pool

class Hanging:
    instant = False
    def clone(self): return Hanging()
    def reset(self, seed, task): threading.Event().wait()
    def close(self): threading.Event().wait()

pool = Pool(Hanging(), workers=1, timeout=1.0)
pool.reset(0, 0, 0)
print(pool.ready(wait=True)[0].failure)
pool.close()
"""
    root = str(ROOT)
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "no answer" in done.stdout, done.stderr
