import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.policy.packing import collate, partition
from helpers.tiny import random_rows


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    ranks=st.integers(1, 5),
    minibatch_rows=st.integers(0, 17),
    budget=st.integers(16, 200),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_row_is_learnt_from_once_and_all_ranks_run_the_same_number_of_passes(
    count, ranks, minibatch_rows, budget, packed, seed
):
    rows = random_rows(count, seed)
    made = partition(
        rows, ranks=ranks, minibatch_rows=minibatch_rows, budget=budget, packed=packed, rng=np.random.default_rng(seed)
    )
    flat = sorted(row for minibatch in made for rank in minibatch for micro in rank for row in micro)
    assert flat == list(range(count))
    for minibatch in made:
        sizes = [sum(len(micro) for micro in rank) for rank in minibatch]
        assert len({len(rank) for rank in minibatch}) == 1
        assert not minibatch_rows or sum(sizes) <= minibatch_rows
        for micro in (m for rank in minibatch for m in rank if len(m) > 1):
            lengths = [len(rows[row].ids) for row in micro]
            assert (sum(lengths) if packed else max(lengths) * len(lengths)) <= budget
    totals = [sum(len(micro) for rank in minibatch for micro in rank) for minibatch in made]
    assert max(totals) - min(totals) <= 1


def test_which_rows_share_an_update_does_not_depend_on_the_number_of_ranks():
    rows = random_rows(23)
    one, three = (
        partition(rows, ranks=n, minibatch_rows=8, budget=64, packed=False, rng=np.random.default_rng(5))
        for n in (1, 3)
    )
    members = [
        [{row for rank in minibatch for micro in rank for row in micro} for minibatch in made] for made in (one, three)
    ]
    assert members[0] == members[1]


def test_tokens_are_shared_evenly_over_ranks():
    rows = random_rows(64)
    (minibatch,) = partition(rows, ranks=4, minibatch_rows=0, budget=128, packed=True, rng=np.random.default_rng(0))
    load = [sum(len(rows[row].ids) for micro in rank for row in micro) for rank in minibatch]
    assert max(load) - min(load) <= 40


def test_the_index_points_at_the_position_before_each_action_token():
    rows = random_rows(5)
    for packed in (False, True):
        batch = collate(rows, packed=packed)
        assert torch.equal(batch.input_ids.flatten()[batch.index + 1], batch.target)
        assert torch.equal(
            batch.position_ids.flatten()[batch.index] + 1,
            torch.tensor([i for row in rows for a, b in row.spans for i in range(a, b)]),
        )
        assert batch.turn.tolist() == [
            turn for row in rows for (a, b), turn in zip(row.spans, row.turns, strict=True) for _ in range(a, b)
        ]
        assert batch.rollout_logp.tolist() == [value for row in rows for value in row.logprobs]
