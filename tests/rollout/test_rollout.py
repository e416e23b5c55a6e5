"""The agent loop and the environment pool, with a tiny model in tiny worlds."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from atod_fast.batches import rows
from atod_fast.errors import UserError
from atod_fast.rollout import agent
from atod_fast.rollout.agent import Episode, rollout
from atod_fast.rollout.engines.protocol import Request
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.pool import Pool
from helpers.agent import episodes, make_config, make_model, play
from helpers.worlds import CLOSE, STOP, Corridor, Letters, Slow


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
            assert (turn.text, turn.command) == letters.parse(turn.action, stopped, {})[:2]
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
            logits = model(torch.from_numpy(row.ids)[None]).logits[0] / (temperature or 1.0)
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
    for slots in (1, 10):
        assert actions(play(Corridor(), temperature=temperature, slots=slots)) == whole
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
