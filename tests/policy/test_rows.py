"""From the ranks' trajectories to training rows and micro-batches: tokens are arrays, and all stay as they were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from atod_fast import ranks
from atod_fast.batches import rows
from atod_fast.policy.packing import collate
from atod_fast.records import Trajectory, Turn
from helpers.gloo import run_ranks

LENGTHS = {0: [(4, 3), (5, 0), (2, 1)], 1: [], 2: [(6, 2)], 3: [(3, 0)], 4: [(1, 4), (0, 2)]}  # (prompt, action)


def trajectory(number: int, context: str) -> Trajectory:
    """A trajectory as an agent leaves it: lists of numbers."""
    draw = np.random.default_rng(number)
    turns = []
    for prompt, action in LENGTHS[number]:
        ids = draw.integers(0, 2**31 - 1, prompt + action).tolist()
        logprobs = draw.uniform(-3, 0, action).astype(np.float32).tolist()
        turns.append(Turn(ids[:prompt], ids[prompt:], logprobs, "a déjà vu", "say", "say", True, reward=0.5))
    return Trajectory(number, number // 2, number % 2, context, turns, failure=None if turns else "hung", score=0.25)


def gathered(share: dict[int, list[int]], context: str) -> list[Trajectory]:
    ranks.start()
    return ranks.gather_trajectories([trajectory(number, context) for number in share[ranks.rank()]])


def as_lists(given: Trajectory) -> Trajectory:
    turns = [
        replace(
            turn,
            prompt=list(map(int, turn.prompt)),
            action=list(map(int, turn.action)),
            logprobs=list(map(float, turn.logprobs)),
        )
        for turn in given.turns
    ]
    return replace(given, turns=turns)


@pytest.mark.parametrize("share", [{0: [3, 0], 1: [4, 1, 2]}, {0: [], 1: [4, 3, 2, 1, 0]}])
def test_every_rank_gets_all_trajectories_unchanged_and_in_order(share):
    first, second = run_ranks(2, gathered, share, "window")
    assert [as_lists(t) for t in first] == [as_lists(t) for t in second] == [trajectory(n, "window") for n in range(5)]
    for turn in (turn for t in first for turn in t.turns):
        assert turn.prompt.dtype == turn.action.dtype == np.int32 and turn.logprobs.dtype == np.float32


@pytest.mark.parametrize("context", ["window", "full"])
def test_rows_are_the_turns_tokens_end_to_end(context):
    """Written out with lists. A turn without an action keeps its number; a row without one is left out."""
    played = [trajectory(number, context) for number in LENGTHS]
    expected, number = [], 0
    for one in played:
        for sequence in [[turn] for turn in one.turns] if context == "window" else [one.turns]:
            ids, spans, numbers, logprobs = [], [], [], []
            for turn in sequence:
                ids += turn.prompt + turn.action
                if turn.action:
                    spans.append((len(ids) - len(turn.action), len(ids)))
                    numbers.append(number)
                logprobs += turn.logprobs
                number += 1
            if spans:
                expected.append((ids, spans, numbers, logprobs))
    found = rows(played)
    assert [(row.ids.tolist(), row.spans, row.turns, row.logprobs.tolist()) for row in found] == expected
    assert all(row.ids.dtype == np.int32 and row.logprobs.dtype == np.float32 for row in found)


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_says_where_its_rows_begin(packed):
    made = [row for row in rows([trajectory(number, "full") for number in (0, 2)])]
    batch = collate(made, packed=packed)
    lengths = [len(row.ids) for row in made]
    assert lengths == [15, 8] and batch.longest == 15 and type(batch.longest) is int
    assert batch.row_starts.dtype == torch.int32
    assert batch.row_starts.tolist() == ([0, 15, 23] if packed else [0, 15, 30])
    for start, row in zip(batch.row_starts.tolist(), made, strict=False):
        flat = slice(start, start + len(row.ids))
        assert batch.input_ids.dtype == torch.int64 and batch.input_ids.flatten()[flat].tolist() == row.ids.tolist()
        assert batch.position_ids.flatten()[flat].tolist() == list(range(len(row.ids)))
    assert batch.to(torch.device("meta")).longest == 15


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_without_rows_is_one_token_to_pass_on(packed):
    batch = collate([], packed=packed)
    assert batch.input_ids.tolist() == batch.position_ids.tolist() == [[0]]
    assert batch.row_starts.tolist() == [0, 1] and batch.longest == 1
    parts = (batch.index, batch.target, batch.turn, batch.rollout_logp)
    assert [(len(part), part.dtype) for part in parts] == [(0, torch.int64)] * 3 + [(0, torch.float32)]
