"""Turn weights: the paper's worked example, budgets, and what is counted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.config import Turns
from atod_fast.objective import (
    profile,
    token_signals,
    weigh_turns,
)
from helpers.table import make_table

torch.set_num_threads(1)


def test_the_papers_worked_example():
    table = make_table(
        [5],
        disagreement=torch.tensor([0.101, 0.228, 0.022, 0.019, 0.138]),
        uncertainty=torch.tensor([0.037, 0.025, 0.010, 0.006, 0.008]),
    )
    weights = weigh_turns(table, Turns())
    assert weights.weight.tolist() == pytest.approx([1.00, 1.00, 0.142, 0.000, 0.597], abs=5e-4)
    assert (weights.unweighted, weights.fallbacks) == (0.0, 0)


def test_short_and_agreeing_trajectories_keep_weight_one_and_are_counted():
    table = make_table([2, 4, 4, 3])
    table.disagreement[2:6] = torch.tensor([0.0, 0.001, 0.009, 0.002])
    weights = weigh_turns(table, Turns())
    assert weights.weight[:6].tolist() == [1.0] * 6
    assert (weights.weight[6:] != 1).any()
    assert weights.unweighted == 0.5


def test_a_turn_without_tokens_is_compared_with_none():
    disagreement, uncertainty = torch.tensor([0.3, 0.0, 0.1, 0.2]), torch.tensor([0.5, 0.0, 0.3, 0.4])
    with_silence = weigh_turns(
        make_table([4], lengths=[2, 0, 2, 2], disagreement=disagreement, uncertainty=uncertainty), Turns()
    )
    acted = torch.tensor([0, 2, 3])
    without = weigh_turns(
        make_table([3], lengths=[2, 2, 2], disagreement=disagreement[acted], uncertainty=uncertainty[acted]), Turns()
    )
    assert with_silence.weight[acted].tolist() == without.weight.tolist() == pytest.approx([1.0, 0.0, 0.75])


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    scope=st.sampled_from(["trajectory", "batch"]),
)
def test_mean1_spends_the_budget_of_uniform_weights_wherever_a_scale_exists(sizes, seed, scope):
    """2/3 of the tokens at w = 0 and 1/3 at the cap of 2 is the last case with mean 1."""
    table = make_table(sizes, seed=seed)
    weight, raw = (weigh_turns(table, Turns(budget=budget, scope=scope)) for budget in ("mean1", "raw"))
    short = torch.repeat_interleave(torch.tensor(sizes) < 3, torch.tensor(sizes))
    assert (weight.weight[short] == 1).all()
    parts = (
        [~short]
        if scope == "batch"
        else [
            (torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)) == n) & ~short
            for n in range(len(sizes))
        ]
    )
    lost = 0
    for part in (part for part in parts if part.any()):
        length, w = table.length[part].double(), weight.weight[part].double()
        assert w.min() >= 0.5 and w.max() <= 2
        assert (length * w).sum() / length.sum() == pytest.approx(1, abs=1e-5)
        reachable = torch.where(raw.weight[part] > 0, 2.0, 0.5).double()
        lost += int((length * reachable).sum() / length.sum() < 1) * (
            1 if scope == "trajectory" else int((torch.tensor(sizes) >= 3).sum())
        )
    assert weight.fallbacks == lost


def test_a_mean1_budget_that_cannot_be_met_is_counted():
    """One short turn holds all the weight: even at the cap of 2 the mean stays below 1."""
    table = make_table(
        [3], lengths=[1, 20, 20], disagreement=torch.tensor([1.0, 0.0, 0.0]), uncertainty=torch.tensor([1.0, 0.0, 0.0])
    )
    weights = weigh_turns(table, Turns(budget="mean1"))
    assert weights.weight.tolist() == [1.0, 1.0, 1.0]
    assert weights.fallbacks == 1


def test_shuffled_weights_are_the_same_on_every_rank_and_depend_on_the_seed():
    table = make_table([6, 6])
    shuffled = [
        weigh_turns(table, Turns(fuse="shuffled"), torch.Generator().manual_seed(seed)).weight for seed in (1, 1, 2)
    ]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])


def test_signals_are_sampled_or_exact():
    old, teacher, entropy, divergence = (torch.tensor(x) for x in ([-1.0, -2.0], [-3.0, -0.5], [0.7, 0.8], [0.3, 0.4]))
    assert [x.tolist() for x in token_signals(Turns(), old, teacher, entropy, divergence)] == [[2.0, 1.5], [1.0, 2.0]]
    exact = token_signals(Turns(disagreement="exact", uncertainty="exact"), old, teacher, entropy, divergence)
    assert exact == (divergence, entropy)


def test_profile_is_a_mean_over_the_trajectories_that_got_that_far():
    assert profile(torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0, 9.0]), torch.tensor([0, 3, 3, 5, 6])) == pytest.approx(
        [13 / 3, 3.0, 5.0]
    )
