"""Dynamic sampling: which groups are replaced, by which tasks, and that ranks and seeds agree on it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from transformers import AutoTokenizer

from atod_fast.config.settings import load
from atod_fast.errors import EnvironmentsLost, UserError
from atod_fast.models import resolve
from atod_fast.records import Trajectory, Turn
from atod_fast.renderers import make_renderer
from atod_fast.rollout import actor
from atod_fast.rollout.actor import Group, check_failures
from atod_fast.rollout.resampling import flat_groups, resample


def played(number: int, task: int, rewards, failures=()) -> list[Trajectory]:
    """Return a group whose members earn `rewards` over two turns; the members `failures` failed."""
    found = []
    for member, reward in enumerate(rewards):
        trajectory = Trajectory(task, number, member, "full")
        for share in (0.25, 0.75):
            turn = Turn([1], [2], [-1.0], "", "", "", True, reward=share * reward)
            trajectory.turns.append(turn)
        trajectory.failure = "gone" if member in failures else None
        found.append(trajectory)
    return found


def test_a_group_is_flat_if_no_two_of_its_rewards_differ():
    groups = [
        played(0, 0, [10.0, 10.0, 10.0]),
        played(1, 1, [10.0, 0.0, 10.0]),
        played(2, 2, [0.0, 0.0, 0.0]),
        played(3, 3, [0.1 + 0.2, 0.3, 0.3]),  # rounding
        played(4, 4, [0.0, 0.0, 1.0], failures=[2]),  # the one that differs has failed
        played(5, 5, [1.0, 2.0, 3.0], failures=[0, 1, 2]),
        played(6, 6, [-1.0, -1.5, 0.0]),
        played(7, 7, [5.0]),
    ]
    assert flat_groups([t for group in groups for t in group]) == [0, 2, 3, 4, 5, 7]


def by_hand(outcomes, spare, rounds, count):
    """Return {group: task that stays}, groups played besides, and groups replaced, one slot and one task at a time."""
    stays, tasks, extra, replaced = {number: number for number in range(count)}, list(spare), 0, 0
    for _ in range(rounds):
        for number in range(count):
            if len(set(outcomes[stays[number]])) > 1 or not tasks:
                continue
            task = tasks.pop(0)
            extra += 1
            if len(set(outcomes[task])) > 1:
                stays[number], replaced = task, replaced + 1
    return stays, extra, replaced


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("rounds", "spares"), [(1, 9), (3, 9), (3, 2), (2, 0), (50, 9)])
def test_flat_groups_give_way_to_groups_of_other_tasks(seed, rounds, spares):
    rng, count = np.random.default_rng(seed), 5
    outcomes = {task: rng.integers(0, 2, 3).astype(float).tolist() for task in range(count + spares)}
    spare = rng.permutation(np.arange(count, count + spares)).tolist()
    asked = []

    def play(groups, beside):
        asked.extend(groups)
        assert sorted({t.group for t in beside}) == list(range(count)), "beside all of the step's groups"
        return [t for group in groups for t in played(group.number, group.task, outcomes[group.task])]

    everyone = [t for number in range(count) for t in played(number, number, outcomes[number])]
    found = resample(everyone, spare, rounds, play)
    stays, extra, replaced = by_hand(outcomes, spare, rounds, count)
    assert (found.played, found.replaced) == (extra, replaced)
    assert [(t.group, t.member, t.task) for t in found.trajectories] == [
        (number, member, stays[number]) for number in range(count) for member in range(3)
    ]
    assert len({(group.number, group.attempt) for group in asked}) == len({group.task for group in asked}) == extra
    assert all(1 <= group.attempt <= rounds for group in asked)


def test_failed_environments_count_among_all_of_a_step():
    """A round of one group whose task is broken does not stop a run whose other environments work."""
    step, broken = [t for n in range(4) for t in played(n, n, [0.0, 1.0])], played(2, 9, [0.0, 0.0], failures=[0, 1])
    with pytest.raises(EnvironmentsLost):
        check_failures(broken, 0.5, "a round by itself")
    check_failures([*step, *broken], 0.5, "a round")


# --- what the actor is asked for

TASKS, STEPS = 7, 4
SETTINGS = [
    f"env.train={{generate={TASKS}, seed=0}}",
    "env.eval={generate=12, seed=1}",
    "train.tasks_per_step=3",
    "train.group_size=2",
    "eval.tasks=6",
]


@pytest.fixture
def ask(monkeypatch):
    """Return the episodes that an actor's function requests, and what it returns."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:student"))

    def ask(function, *settings, rank=0, ranks=1):
        asked = []

        def rollout(engine, env, renderer, episodes, config, **options):
            asked.extend(episodes)
            return []

        monkeypatch.setattr(actor, "rollout", rollout)
        config = load(None, None, [*SETTINGS, *settings])
        renderer = partial(make_renderer, config, tokenizer, len(tokenizer))
        return asked, function(actor.Actor(config, renderer, rank=rank, ranks=ranks))

    return ask


def test_spare_tasks_are_the_others_in_an_order_of_the_step(ask):
    def tasks(one):
        return [([group.task for group in one.groups(step)], one.spare_tasks(step)) for step in range(1, STEPS + 1)]

    _, found = ask(tasks)
    for own, spare in found:
        assert sorted({*own, *spare}) == list(range(TASKS)) and not {*own} & {*spare}
        assert len(spare) == len({*spare})
    assert found == ask(tasks)[1] == ask(tasks, rank=1, ranks=2)[1], "the same in a run resumed and on every rank"
    assert len({tuple(spare) for _, spare in found}) > 1
    assert found != ask(tasks, "train.seed=1")[1]


def test_tasks_that_a_step_plays_all_leave_none_to_replace_them():
    few = f"train.tasks_per_step={TASKS}", "train.resample_flat=1"
    with pytest.raises(UserError, match=f"finds no other tasks: env.train holds {TASKS}, a step plays .*={TASKS};"):
        actor.open_split(load(None, None, [*SETTINGS, *few]), "train")
    for fewer in ((few[0],), (few[1],)):
        assert len(actor.open_split(load(None, None, [*SETTINGS, *fewer]), "train")) == TASKS


GROUPS = [Group(0, 5, 1), Group(2, 6, 1), Group(0, 4, 2)]


def test_a_further_attempt_draws_random_streams_of_its_own(ask):
    asked, _ = ask(lambda one: (one.train(None, 1), one.train(None, 1, groups=GROUPS)))
    first, again = asked[:6], asked[6:]
    assert [(e.task, e.group, e.member) for e in again] == [(g.task, g.number, m) for g in GROUPS for m in range(2)]
    assert len({e.seed for e in asked}) == len(asked)
    worlds = [e.env_seed for e in asked]
    assert worlds[::2] == worlds[1::2] and len({*worlds}) == len(asked) // 2
    assert not {e.seed for e in again} & {e.env_seed for e in asked} and len(first) == 6


def test_ranks_share_the_groups_of_a_round(ask):
    def function(one):
        one.train(None, 1, groups=GROUPS)

    alone, _ = ask(function)
    for count in (2, 3, 5):
        shares = [ask(function, rank=rank, ranks=count)[0] for rank in range(count)]
        assert sorted((e for share in shares for e in share), key=repr) == sorted(alone, key=repr)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
