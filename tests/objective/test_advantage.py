"""Group advantages, each against a slow reading of its formula."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch

from atod_fast.batches import TurnTable
from atod_fast.config import Objective
from atod_fast.objective import rl_advantages
from atod_fast.objective.advantage import discounted_returns
from helpers import reference


def make_table(episodes):
    """episodes: per trajectory (group, [(turn reward, verdict, anchor), ...]); every turn has three tokens."""
    turns = [turn for _, turns in episodes for turn in turns]
    count = len(turns)
    return TurnTable(
        disagreement=torch.zeros(count),
        uncertainty=torch.zeros(count),
        length=torch.full((count,), 3),
        well_formed=torch.tensor([verdict != "malformed" for _, verdict, _ in turns], dtype=torch.bool),
        valid=torch.tensor([verdict == "valid" for _, verdict, _ in turns], dtype=torch.bool),
        turn_reward=torch.tensor([reward for reward, _, _ in turns], dtype=torch.float32),
        anchor=torch.tensor([anchor for _, _, anchor in turns], dtype=torch.int64),
        offsets=torch.tensor([0, *[len(t) for _, t in episodes]]).cumsum(0),
        reward=torch.tensor([sum(reward for reward, _, _ in t) for _, t in episodes], dtype=torch.float32),
        success=torch.zeros(len(episodes), dtype=torch.bool),
        group=torch.tensor([group for group, _ in episodes]),
    )


def random_episodes(seed):
    """Up to ten trajectories in three groups: some of one, some without variance, some of one observation."""
    rng = np.random.default_rng(seed)

    def turn():
        return (
            float(rng.choice([0.0, 0.5, 10.0])),
            str(rng.choice(["valid", "valid", "refused", "malformed"])),
            int(rng.integers(0, 4)),
        )

    return [(int(rng.integers(0, 3)), [turn() for _ in range(rng.integers(1, 5))]) for _ in range(rng.integers(1, 11))]


FLAT = [
    (0, [(1.0, "valid", 0)]),
    (0, [(1.0, "malformed", 0)]),
    (1, [(0.0, "valid", 0), (0.0, "refused", 1)]),
    (2, [(0.5, "malformed", 2)]),
]
BATCHES = [*(random_episodes(seed) for seed in range(12)), FLAT]
OPTIONS = {
    "advantage": ["grpo", "rloo", "gigpo"],
    "normalise_std": [True, False],
    "baseline": ["rows", "trajectory"],
    "invalid_penalty": [0.0, 0.1],
    "invalid": ["form", "accepted"],
    "gigpo_omega": [0.0, 0.7, 1.0],
    "gigpo_gamma": [0.5, 0.95, 1.0],
}


@pytest.mark.parametrize(
    ("advantage", "baseline"),
    [pair for pair in product(OPTIONS["advantage"], OPTIONS["baseline"]) if pair != ("rloo", "rows")],
)
def test_every_combination_of_options_equals_a_slow_reading_of_its_formula(advantage, baseline):
    """One turn at a time, from the formulas in advantage.py and GiGPO's equations 3 and 5 to 8."""
    for values in product([advantage], OPTIONS["normalise_std"], [baseline], *list(OPTIONS.values())[3:]):
        objective = Objective(**dict(zip(OPTIONS, values, strict=True)), std_epsilon=0.01)
        for number, episodes in enumerate(BATCHES):
            found = rl_advantages(make_table(episodes), objective).turn
            expected = reference.advantages(episodes, objective)
            assert found.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-5), (values, number)


def outcome(group, reward, turns=1, verdict="valid"):
    """A trajectory rewarded at its end."""
    return group, [(0.0, verdict, k) for k in range(turns - 1)] + [(reward, verdict, turns - 1)]


def test_grpo_uses_the_unbiased_standard_deviation_as_verl_does():
    objective = Objective(std_epsilon=1e-6)
    rewards = [1.0, 0.0, 0.0, 0.0]
    advantage = rl_advantages(make_table([outcome(0, r) for r in rewards]), objective).turn
    reward = torch.tensor(rewards)
    torch.testing.assert_close(advantage, (reward - reward.mean()) / (reward.std() + 1e-6))
    assert advantage[0] == pytest.approx(1.5, abs=1e-4)


def test_a_group_without_variance_gives_zero_and_is_counted():
    table = make_table([outcome(0, 1.0), outcome(0, 1.0), outcome(1, 1.0), outcome(1, 0.0)])
    result = rl_advantages(table, Objective())
    assert result.turn[:2].tolist() == [0.0, 0.0]
    assert result.turn[2] > 0 > result.turn[3]
    assert result.flat_groups == 0.5


def test_rounding_is_no_variance():
    """The same rewards, summed in another order, differ in the last bit."""
    table = make_table([outcome(0, 10.0) for _ in range(3)])
    table.reward[1] = torch.nextafter(table.reward[1], torch.tensor(11.0))
    result = rl_advantages(table, Objective())
    assert result.turn.tolist() == [0.0, 0.0, 0.0]
    assert result.flat_groups == 1.0


@pytest.mark.parametrize("advantage", ["grpo", "gigpo"])
@pytest.mark.parametrize("baseline", ["rows", "trajectory"])
def test_an_invalid_action_in_a_group_that_always_succeeds_never_explodes(baseline, advantage):
    table = make_table([outcome(0, 1.0), outcome(0, 1.0, verdict="malformed"), outcome(0, 1.0)])
    result = rl_advantages(
        table, Objective(baseline=baseline, advantage=advantage, gigpo_omega=0.0, invalid_penalty=0.1)
    )
    assert result.turn.abs().max() < 10
    assert result.flat_groups == (1.0 if baseline == "trajectory" else 0.0)


def test_a_group_of_one_has_nothing_to_be_compared_with():
    for advantage in ("grpo", "rloo", "gigpo"):
        objective = Objective(advantage=advantage, baseline="trajectory")
        assert rl_advantages(make_table([outcome(0, 1.0)]), objective).turn.tolist() == [0.0]


def test_rows_weigh_a_long_trajectory_more_than_trajectory_statistics_do():
    table = make_table([outcome(0, 1.0, turns=3), outcome(0, 0.0)])
    rows = rl_advantages(table, Objective(baseline="rows", normalise_std=False)).turn
    trajectory = rl_advantages(table, Objective(baseline="trajectory", normalise_std=False)).turn
    assert rows.tolist() == pytest.approx([0.25, 0.25, 0.25, -0.75])
    assert trajectory.tolist() == pytest.approx([0.5, 0.5, 0.5, -0.5])


def test_the_penalty_reaches_the_invalid_turn_alone():
    good = (0, [(0.0, "valid", 0), (1.0, "valid", 1)])
    slip = (0, [(0.0, "malformed", 0), (1.0, "valid", 1)])
    bad = (0, [(0.0, "valid", 0), (0.0, "refused", 1)])
    advantages = {
        invalid: rl_advantages(
            make_table([good, slip, bad]),
            Objective(baseline="trajectory", normalise_std=False, invalid_penalty=0.1, invalid=invalid),
        ).turn.tolist()
        for invalid in ("form", "accepted")
    }
    assert advantages["form"] == pytest.approx([1 / 3, 1 / 3, 1 / 3 - 0.1, 1 / 3, -2 / 3, -2 / 3])
    assert advantages["accepted"] == pytest.approx([1 / 3, 1 / 3, 1 / 3 - 0.1, 1 / 3, -2 / 3, -2 / 3 - 0.1])


def test_a_turn_without_tokens_is_no_row():
    table = make_table([outcome(0, 1.0, turns=2), outcome(0, 0.0)])
    table.length[0] = 0
    result = rl_advantages(table, Objective(baseline="rows", normalise_std=False))
    assert result.turn.tolist() == pytest.approx([0.0, 0.5, -0.5])


def test_a_trajectory_without_turns_counts_by_its_reward_alone():
    table = make_table([outcome(0, 1.0), (0, []), outcome(1, 1.0), outcome(1, 0.0)])
    by_trajectory = rl_advantages(table, Objective(baseline="trajectory", normalise_std=False)).turn
    assert by_trajectory.tolist() == pytest.approx([0.5, 0.5, -0.5])
    by_rows = rl_advantages(table, Objective(baseline="rows", normalise_std=False))
    assert by_rows.turn.tolist() == pytest.approx([0.0, 0.5, -0.5])
    assert by_rows.flat_groups == 0.5


def test_group_numbers_may_have_gaps():
    table = make_table([outcome(7, 1.0), outcome(7, 0.0), outcome(3, 1.0), outcome(3, 0.0)])
    assert rl_advantages(table, Objective(advantage="rloo", baseline="trajectory")).turn.tolist() == [
        1.0,
        -1.0,
        1.0,
        -1.0,
    ]


def test_discounted_returns_stop_at_trajectory_borders():
    returns = discounted_returns(torch.tensor([0.0, 0.0, 1.0, 2.0, 4.0]), torch.tensor([0, 3, 3, 5]), gamma=0.5)
    assert returns.tolist() == [0.25, 0.5, 1.0, 4.0, 4.0]


def test_gigpo_tells_apart_turns_that_saw_the_same_but_did_differently():
    """Both trajectories earn the same, but from the common first observation one took a longer way."""
    short = (0, [(1.0, "valid", 5)])
    long = (0, [(0.0, "valid", 5), (0.0, "valid", 6), (1.0, "valid", 7)])
    counts = defaultdict(int)
    for gamma in (0.5, 1.0):
        advantage = rl_advantages(make_table([short, long]), Objective(advantage="gigpo", gigpo_gamma=gamma)).turn
        counts[gamma] = int((advantage[0] > advantage[1]).item())
        assert advantage[2:].abs().max() == 0
    assert dict(counts) == {0.5: 1, 1.0: 0}


def test_step_groups_do_not_cross_tasks():
    """The same observation in another task's group is another state."""
    alone = [(0, [(1.0, "valid", 5)]), (1, [(0.0, "valid", 5)])]
    assert rl_advantages(make_table(alone), Objective(advantage="gigpo")).turn.tolist() == [0.0, 0.0]
