"""What makes a run fit the memory of its GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from atod_fast.config.settings import load
from atod_fast.machines import parse
from atod_fast.models import skeleton
from atod_fast.plan import fit
from atod_fast.plan.choices import choose
from atod_fast.plan.memory import Item, memory, totals
from atod_fast.plan.shapes import shape_of
from atod_fast.published import CONFIGS
from atod_fast.runtime import Runtime

GIB = 2**30
CUDA = torch.device("cuda")
SMALL = 30 * GIB  # of a GPU on which nothing is chosen for which there is no room


@pytest.fixture(scope="module")
def plan():
    shapes = {name: shape_of(skeleton(AutoConfig.for_model(**facts))) for name, facts in CONFIGS.items()}
    configs = {name: AutoConfig.for_model(**facts) for name, facts in CONFIGS.items()}

    def planned(config) -> list[Item]:
        models = {"student": configs[config.student.path], "teacher": configs[config.teacher.path]}
        runtime = Runtime.of(config, CUDA, shapes=models, ranks=8, elsewhere=parse("8xh100"))
        runtime = replace(runtime, memory=SMALL)
        models = shapes[config.student.path], shapes[config.teacher.path]
        return list(memory(config, *models, choose(config, *models, runtime, recomputes=True, packs=True)))

    return planned


def test_a_phase_holds_the_sum_of_its_items():
    items = [Item("a", 3.0, ("rollout", "update")), Item("b", 4.0, ("update",))]
    assert totals(items) | {"rollout": 3.0, "update": 7.0} == totals(items) and fit.largest(items) == 7.0


def test_one_key_is_enough_where_it_is(plan):
    config = load("alfworld-4b", None, ["student.gradient_checkpointing=false", "rollout.concurrency=8"])
    needed = fit.largest(plan(config))
    found = fit.remedies(config, plan, 0.7 * needed)
    assert found == {"student.gradient_checkpointing": "auto"}
    assert fit.largest(plan(fit.changed(config, found))) <= 0.7 * needed


def test_several_keys_where_one_is_not_and_none_where_all_are_too_few(plan):
    config = load("alfworld-4b", None, ["student.gradient_checkpointing=false"])
    least = fit.largest(plan(fit.changed(config, dict(fit._lower(config)))))
    found = fit.remedies(config, plan, 1.05 * least)
    assert len(found) > 1 and fit.largest(plan(fit.changed(config, found))) <= 1.05 * least
    assert fit.remedies(config, plan, 0.9 * least) == {}


def test_no_key_is_named_that_is_not_needed(plan):
    config = load("alfworld-4b", None, ["student.gradient_checkpointing=false", "train.microbatch_tokens=32768"])
    least = fit.largest(plan(fit.changed(config, dict(fit._lower(config)))))
    for room in (1.02 * least, 1.3 * least, 1.6 * least):
        found = fit.remedies(config, plan, room)
        assert found
        for key in found:
            fewer = {other: value for other, value in found.items() if other != key}
            assert fit.largest(plan(fit.changed(config, fewer))) > room, key


def test_a_plan_that_leaves_little_is_told():
    items = [Item("a", 90.0 * GIB, ("update",))]
    assert fit.tight(items, 120 * GIB) == []
    assert "a rank needs up to 90.0 GiB (update) of its GPU's 100.0" in fit.tight(items, 100 * GIB)[0]


def test_the_longest_prompt_fits_and_one_token_more_does_not(plan):
    config = load("alfworld-4b", None, ["rollout.concurrency=16"])
    budget = SMALL
    longest = fit.longest_prompt(config, plan, budget, 40000)
    assert 1000 < longest < 40000

    def needs(tokens: int) -> float:
        return fit.largest(plan(fit.changed(config, {"rollout.prompt_tokens": tokens})))

    assert needs(longest) <= budget < needs(longest + 1)
    assert fit.longest_prompt(config, plan, 1 * GIB, 40000) == 0
    assert fit.longest_prompt(config, plan, budget, 512) == 0  # no room for a prompt beside the response


def test_changed_leaves_the_rest_alone():
    config = load("own", None, ["student.path=a", "teacher.path=b", "env.name=alfworld"])
    other = fit.changed(config, {"student.head": "lean", "train.microbatch_tokens": 2048})
    assert (other.student.head, other.train.microbatch_tokens) == ("lean", 2048)
    assert other.student.path == "a" and config.student.head == "auto" and other.teacher == config.teacher


def test_a_switch_that_is_on_is_no_remedy_and_a_teachers_own_budget_may_go():
    config = load("alfworld-4b", None, ["student.gradient_checkpointing=true", "teacher.microbatch_tokens=65536"])
    keys = [key for key, _ in fit._lower(config)]
    assert "student.gradient_checkpointing" not in keys and ("teacher.microbatch_tokens", 0) in fit._lower(config)
    assert "student.gradient_checkpointing" not in [key for key, _ in fit._lower(load("alfworld-4b"))]
