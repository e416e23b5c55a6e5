"""What is decided once by the memory of a GPU: recomputed blocks, a sleeping engine, how the teacher scores."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoConfig

from atod_fast.config import Config
from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.models import skeleton
from atod_fast.plan.choices import MOST_JOINED, choose
from atod_fast.plan.memory import memory, totals
from atod_fast.plan.room import ENOUGH, FILLED
from atod_fast.plan.shapes import Shape, shape_of
from atod_fast.published import CONFIGS
from atod_fast.rollout.engines.vllm import limits
from atod_fast.runtime import Runtime

CPU, CUDA, GIB = torch.device("cpu"), torch.device("cuda"), 2**30
CACHE = "rollout.kv_cache_gib=4"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(limits, "installed", lambda: "0.32.0")


@cache
def shape(name: str) -> Shape:
    return shape_of(skeleton(AutoConfig.for_model(**CONFIGS[name])))


def undecided(config: Config, gib: float | None, device=CUDA) -> Runtime:
    models = {"student": config.student.path, "teacher": config.teacher.path}
    shapes = {role: AutoConfig.for_model(**CONFIGS[path]) for role, path in models.items()}
    made = Runtime.of(config, device, shapes=shapes, ranks=8)
    return replace(made, memory=gib and int(gib * GIB))


def chosen(
    gib: float | None, *overrides: str, preset="alfworld-1.7b", recomputes=True, packs=True, device=CUDA
) -> Runtime:
    config = load(preset, None, overrides)
    models = shape(config.student.path), shape(config.teacher.path)
    return choose(config, *models, undecided(config, gib, device), recomputes=recomputes, packs=packs)


def needed(phase: str | None = None, *overrides: str, sleeps=False, **changes) -> float:
    """Return the GiB of a GPU that a run needs, in its fullest phase or in one, if all is decided by hand."""
    config = load("alfworld-1.7b", None, overrides)
    given = undecided(config, None)
    given = replace(given, room=replace(given.room, sleeps=sleeps), **changes)
    found = totals(memory(config, shape(config.student.path), shape(config.teacher.path), given))
    return (found[phase] if phase else max(found.values())) / FILLED / GIB


def test_the_four_choices_come_in_their_order_of_preference():
    """Just above what a choice needs it is taken; just below, the next that fits."""
    order = [(False, False), (True, False), (False, True), (True, True)]  # (recompute, sleep)
    sizes = {pair: needed(None, CACHE, checkpointing=pair[0], sleeps=pair[1]) for pair in order}
    assert sizes[True, True] < min(sizes[True, False], sizes[False, True])
    edges = sorted(factor * size for size in sizes.values() for factor in (0.999, 1.001))
    seen = set()
    for gib in edges:
        found = chosen(gib, CACHE)
        expected = next((pair for pair in order if sizes[pair] <= gib), order[-1])
        assert (found.checkpointing, found.room.sleeps) == expected, gib
        seen.add(expected)
    assert seen >= {(False, False), (True, False), (True, True)}


def test_the_engine_sleeps_where_that_is_enough_and_recomputing_is_not():
    given = "rollout.kv_cache_gib=30", "train.microbatch_tokens=2560"
    asleep, awake = (needed(None, *given, checkpointing=again, sleeps=not again) for again in (False, True))
    assert asleep < awake
    found = chosen((asleep + awake) / 2, *given)
    assert (found.checkpointing, found.room.sleeps) == (False, True)


@pytest.mark.parametrize(("again", "word"), [(False, "false"), (True, "true")])
def test_with_the_one_given_the_other_is_decided(again, word):
    awake = needed(None, CACHE, checkpointing=again)
    for factor, sleeps in ((0.999, True), (1.001, False)):
        found = chosen(factor * awake, CACHE, f"student.gradient_checkpointing={word}")
        assert (found.checkpointing, found.room.sleeps) == (again, sleeps)
    for sleep in ("on", "off"):
        enough = needed(None, CACHE, checkpointing=False, sleeps=sleep == "on")
        for factor, recompute in ((0.999, True), (1.001, False)):
            found = chosen(factor * enough, CACHE, f"rollout.sleep={sleep}")
            assert (found.checkpointing, found.room.sleeps) == (recompute, sleep == "on")


def test_keeping_activations_may_not_starve_the_cache():
    """With a cache that takes what is left, recomputing comes before a cache below half of a sleeping engine's."""
    starved = 0
    for gib in range(14, 60, 2):
        found, asleep = (chosen(gib, *sleep, preset="searchqa-1.7b") for sleep in ((), ("rollout.sleep=on",)))
        if not found.room.sleeps:
            assert found.room.cache_bytes >= ENOUGH * asleep.room.cache_bytes, gib
            starved += found.checkpointing
    assert starved


def test_a_model_that_cannot_recompute_is_refused_only_if_it_is_asked_to():
    assert not chosen(10, recomputes=False).checkpointing and chosen(10).checkpointing
    assert not chosen(10, "student.gradient_checkpointing=false", recomputes=False).checkpointing
    for gib, device in ((10, CUDA), (None, CPU)):
        with pytest.raises(UserError, match="true: the student cannot recompute its activations; set .*=auto"):
            chosen(gib, "student.gradient_checkpointing=true", recomputes=False, device=device)


def test_a_cpu_decides_nothing():
    cpu = ["student.compute_dtype=fp32", "teacher.compute_dtype=fp32", "rollout.engine=transformers"]
    found = chosen(None, *cpu, device=CPU)
    assert (found.checkpointing, found.room.sleeps, found.gathered, found.joined) == (False, False, False, 1)
    assert chosen(None, *cpu, "student.gradient_checkpointing=true", device=CPU).checkpointing
    assert chosen(None, *cpu, "teacher.microbatch_tokens=70000", device=CPU).joined == 4


def test_the_teacher_is_gathered_where_the_score_phase_has_room_for_it():
    small = "train.microbatch_tokens=2560", CACHE
    size = needed("score", *small, checkpointing=True, gathered=True)
    assert size > needed(None, *small, checkpointing=True), "the update is smaller"
    for factor, gathered in ((0.999, False), (1.001, True)):
        assert chosen(factor * size, *small).gathered == gathered
    assert chosen(79.2).gathered and not chosen(79.2, preset="alfworld-4b").gathered, "57 GiB of a 30B teacher"
    more = needed("score", *small, gathered=True) - needed("score", *small)
    teacher = shape("Qwen/Qwen3-4B")
    assert more * FILLED * GIB == pytest.approx(2 * (teacher.parameters - teacher.root - 2 * teacher.block))


def test_as_many_micro_batches_are_joined_as_the_score_phase_has_room_for():
    given = "student.gradient_checkpointing=true", CACHE
    for count in (2, 5):
        size = needed("score", *given, gathered=True, joined=count)
        assert chosen(1.001 * size, *given).joined == count
        assert chosen(0.999 * size, *given).joined == count - 1
    assert chosen(1000).joined == MOST_JOINED == 8
    assert chosen(1000, packs=False).joined == 1
    assert chosen(1000, "teacher.microbatch_tokens=40000").joined == 2, "whole micro-batches"
    assert chosen(20, "teacher.microbatch_tokens=400000").joined == 24, "as it is set"


def test_budgets_of_the_teacher_that_cannot_be_kept_are_refused():
    with pytest.raises(UserError, match=r"teacher.microbatch_tokens=16 holds no micro-batch of train.*=16384"):
        load("alfworld-1.7b", None, ["teacher.microbatch_tokens=16"])
    with pytest.raises(UserError, match="joins micro-batches of packed rows.*set student.attention=varlen, or"):
        chosen(80, "teacher.microbatch_tokens=40000", packs=False)
    assert chosen(80, "teacher.microbatch_tokens=16384", packs=False).joined == 1, "asks for nothing"
