"""Which episodes an actor asks for: tasks, groups, seeds and temperature."""

from functools import partial

import pytest
from transformers import AutoTokenizer

from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.models import resolve
from atod_fast.renderers import make_renderer
from atod_fast.rollout import actor

TASKS, STEPS = 5, 5  # two groups a step: two epochs
SETTINGS = [
    f"env.train={{generate={TASKS}, seed=0}}",
    "env.eval={generate=12, seed=1}",
    "env.dev={generate=12, seed=5}",
    "train.tasks_per_step=2",
    "train.group_size=3",
    "eval.tasks=6",
    "rollout.temperature=0.7",
    "eval.temperature=0.4",
]


@pytest.fixture
def ask(monkeypatch):
    """Return what an actor's function requests: the episodes, and the temperature."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:student"))

    def ask(function, *settings, rank=0, ranks=1):
        asked = []

        def rollout(engine, env, renderer, episodes, config, *, temperature, progress):
            asked.append((len(env), episodes, temperature))
            return []

        monkeypatch.setattr(actor, "rollout", rollout)
        config = load(None, None, [*SETTINGS, *settings])
        function(actor.Actor(config, partial(make_renderer, config, tokenizer, len(tokenizer)), rank=rank, ranks=ranks))
        return asked

    return ask


def train(one):
    for step in range(1, STEPS + 1):
        one.train(None, step)


def test_groups_share_a_task_and_a_world_and_each_member_draws_its_own(ask):
    asked = ask(train)
    everyone = [episode for _, episodes, _ in asked for episode in episodes]
    assert len({e.seed for e in everyone}) == len(everyone) == STEPS * 2 * 3
    worlds = []
    for _, episodes, temperature in asked:
        assert temperature == 0.7
        assert [(e.group, e.member) for e in episodes] == [(group, member) for group in range(2) for member in range(3)]
        for group in (episodes[:3], episodes[3:]):
            assert len({e.task for e in group}) == len({e.env_seed for e in group}) == 1
            worlds.append(group[0].env_seed)
    assert len(set(worlds)) == STEPS * 2


def test_each_epoch_shows_every_task_once_in_an_order_of_its_own(ask):
    orders = []
    for seed in (0, 1):
        tasks = [e.task for _, episodes, _ in ask(train, f"train.seed={seed}") for e in episodes if e.member == 0]
        orders += [tasks[:TASKS], tasks[TASKS:]]
    assert all(sorted(order) == list(range(TASKS)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_ranks_share_what_one_rank_asks_for(ask):
    for function in (train, lambda one: one.evaluate(None)):
        alone, first, second = ask(function), ask(function, ranks=2), ask(function, rank=1, ranks=2)
        for (_, whole, _), (_, some, _), (_, others, _) in zip(alone, first, second, strict=True):
            assert sorted(some + others, key=repr) == sorted(whole, key=repr) and len(some) == len(others)


def test_every_evaluation_of_every_run_plays_the_same_held_out_episodes(ask):
    again = ask(lambda one: (one.evaluate(None), train(one), one.evaluate(None)), "train.seed=1")
    (count, episodes, temperature), last = again[0], again[-1]
    assert count == 12 and temperature == 0.4 and last == again[0]
    assert len({e.task for e in episodes}) == len({e.seed for e in episodes}) == 6
    assert ask(lambda one: one.evaluate(None)) == [again[0]]
    assert len({e.env_seed for e in episodes}) == 6 and {e.member for e in episodes} == {0}


def test_the_tasks_that_choose_are_drawn_by_themselves_the_same_in_every_run(ask):
    (held_out,), (dev,) = ask(lambda one: one.evaluate(None)), ask(lambda one: one.evaluate(None, "dev"))
    assert [dev] == ask(lambda one: one.evaluate(None, "dev"), "train.seed=1")
    assert dev[0] == 12 and dev[2] == 0.4 and len({e.task for e in dev[1]}) == 6
    assert not {e.seed for e in dev[1]} & {e.seed for e in held_out[1]}
    with pytest.raises(UserError, match="eval.tasks=13 exceeds the 12 tasks of env.dev"):
        ask(lambda one: one.evaluate(None, "dev"), "env.eval.generate=13", "eval.tasks=13")
