"""Group advantages, each against a slow reading of its formula."""

import statistics
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.config import Objective
from atod_fast.objective import rl_advantages
from atod_fast.objective.advantage import discounted_returns
from atod_fast.trajectory import TurnTable


def make_table(episodes):
    """episodes: per trajectory (group, [(turn reward, valid, anchor), ...]); every turn has three tokens."""
    turns = [turn for _, turns in episodes for turn in turns]
    count = len(turns)
    return TurnTable(
        disagreement=torch.zeros(count),
        uncertainty=torch.zeros(count),
        length=torch.full((count,), 3),
        valid=torch.tensor([valid for _, valid, _ in turns], dtype=torch.bool),
        turn_reward=torch.tensor([reward for reward, _, _ in turns], dtype=torch.float32),
        anchor=torch.tensor([anchor for _, _, anchor in turns], dtype=torch.int64),
        offsets=torch.tensor([0, *[len(t) for _, t in episodes]]).cumsum(0),
        reward=torch.tensor([sum(reward for reward, _, _ in t) for _, t in episodes], dtype=torch.float32),
        success=torch.zeros(len(episodes), dtype=torch.bool),
        group=torch.tensor([group for group, _ in episodes]),
    )


episode = st.tuples(
    st.integers(0, 2),
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(0, 3)), min_size=1, max_size=4),
)
episodes = st.lists(episode, min_size=1, max_size=10)


def z_score(value, values, objective):
    if not objective.normalise_std:
        return value - statistics.mean(values)
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return 0.0 if std < 1e-6 else (value - statistics.mean(values)) / (std + objective.std_epsilon)


def slow_advantages(episodes, objective):
    """One turn at a time, from the formulas in advantage.py and GiGPO's equations 3 and 5 to 8."""
    rows = []  # group, trajectory, R_n, r_k, step return, anchor
    for number, (group, turns) in enumerate(episodes):
        total = sum(reward for reward, _, _ in turns)
        for k, (_, valid, anchor) in enumerate(turns):
            penalty = 0.0 if valid else objective.invalid_penalty
            later = sum(objective.gigpo_gamma**j * turns[k + j][0] for j in range(len(turns) - k))
            rows.append((group, number, total, total - penalty, later - penalty, anchor))

    out = []
    for me, (group, number, total, reward, step_return, anchor) in enumerate(rows):
        if objective.baseline == "rows":
            peers = [row[3] for row in rows if row[0] == group]
            others = [row[3] for i, row in enumerate(rows) if row[0] == group and i != me]
            own = reward
        else:
            by_trajectory = {row[1]: row[2] for row in rows if row[0] == group}
            peers = list(by_trajectory.values())
            others = [r for n, r in by_trajectory.items() if n != number]
            own = total
        if objective.advantage == "rloo":
            out.append(reward - (statistics.mean(others) if others else own))
            continue
        advantage = z_score(reward, peers, objective)
        if objective.advantage == "gigpo":
            alike = [row[4] for row in rows if row[0] == group and row[5] == anchor]
            advantage += objective.gigpo_omega * z_score(step_return, alike, objective)
        out.append(advantage)
    return out


@settings(deadline=None, max_examples=60)
@given(
    episodes=episodes,
    advantage=st.sampled_from(["grpo", "rloo", "gigpo"]),
    baseline=st.sampled_from(["rows", "trajectory"]),
    normalise_std=st.booleans(),
    penalty=st.sampled_from([0.0, 0.1]),
)
def test_every_variant_equals_a_slow_reading_of_its_formula(episodes, advantage, baseline, normalise_std, penalty):
    objective = Objective(advantage=advantage, baseline=baseline, normalise_std=normalise_std, invalid_penalty=penalty, gigpo_omega=0.7)
    fast = rl_advantages(make_table(episodes), objective).turn
    torch.testing.assert_close(fast.double(), torch.tensor(slow_advantages(episodes, objective)).double(), atol=2e-5, rtol=2e-5)


def outcome(group, reward, turns=1, valid=True):
    """A trajectory rewarded at its end."""
    return group, [(0.0, valid, k) for k in range(turns - 1)] + [(reward, valid, turns - 1)]


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
    """The same rewards added up in another order differ in the last bit."""
    table = make_table([outcome(0, 10.0) for _ in range(3)])
    table.reward[1] = torch.nextafter(table.reward[1], torch.tensor(11.0))
    result = rl_advantages(table, Objective())
    assert result.turn.tolist() == [0.0, 0.0, 0.0]
    assert result.flat_groups == 1.0


@pytest.mark.parametrize("advantage", ["grpo", "gigpo"])
@pytest.mark.parametrize("baseline", ["rows", "trajectory"])
def test_an_invalid_action_in_a_group_that_always_succeeds_never_explodes(baseline, advantage):
    table = make_table([outcome(0, 1.0), outcome(0, 1.0, valid=False), outcome(0, 1.0)])
    result = rl_advantages(table, Objective(baseline=baseline, advantage=advantage, gigpo_omega=0.0, invalid_penalty=0.1))
    assert result.turn.abs().max() < 10
    assert result.flat_groups == (1.0 if baseline == "trajectory" else 0.0)


def test_a_group_of_one_has_nothing_to_be_compared_with():
    for advantage in ("grpo", "rloo", "gigpo"):
        assert rl_advantages(make_table([outcome(0, 1.0)]), Objective(advantage=advantage)).turn.tolist() == [0.0]


def test_rows_weigh_a_long_trajectory_more_than_trajectory_statistics_do():
    table = make_table([outcome(0, 1.0, turns=3), outcome(0, 0.0)])
    rows = rl_advantages(table, Objective(baseline="rows", normalise_std=False)).turn
    trajectory = rl_advantages(table, Objective(baseline="trajectory", normalise_std=False)).turn
    assert rows.tolist() == pytest.approx([0.25, 0.25, 0.25, -0.75])
    assert trajectory.tolist() == pytest.approx([0.5, 0.5, 0.5, -0.5])


def test_the_penalty_reaches_the_invalid_turn_alone():
    good = (0, [(0.0, True, 0), (1.0, True, 1)])
    slip = (0, [(0.0, False, 0), (1.0, True, 1)])
    bad = (0, [(0.0, True, 0), (0.0, True, 1)])
    advantage = rl_advantages(make_table([good, slip, bad]), Objective(baseline="trajectory", normalise_std=False, invalid_penalty=0.1)).turn
    assert advantage.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3 - 0.1, 1 / 3, -2 / 3, -2 / 3])


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
    assert rl_advantages(table, Objective(advantage="rloo")).turn.tolist() == [1.0, -1.0, 1.0, -1.0]


def test_discounted_returns_stop_at_trajectory_borders():
    returns = discounted_returns(torch.tensor([0.0, 0.0, 1.0, 2.0, 4.0]), torch.tensor([0, 3, 3, 5]), gamma=0.5)
    assert returns.tolist() == [0.25, 0.5, 1.0, 4.0, 4.0]


def test_gigpo_tells_apart_turns_that_saw_the_same_but_did_differently():
    """Same reward for both trajectories, but from the common first observation one took a longer way."""
    short = (0, [(1.0, True, 5)])
    long = (0, [(0.0, True, 5), (0.0, True, 6), (1.0, True, 7)])
    counts = defaultdict(int)
    for gamma in (0.5, 1.0):
        advantage = rl_advantages(make_table([short, long]), Objective(advantage="gigpo", gigpo_gamma=gamma)).turn
        counts[gamma] = int((advantage[0] > advantage[1]).item())
        assert advantage[2:].abs().max() == 0
    assert dict(counts) == {0.5: 1, 1.0: 0}


def test_step_groups_do_not_cross_tasks():
    """The same observation in another task's group is another state."""
    alone = [(0, [(1.0, True, 5)]), (1, [(0.0, True, 5)])]
    assert rl_advantages(make_table(alone), Objective(advantage="gigpo")).turn.tolist() == [0.0, 0.0]
