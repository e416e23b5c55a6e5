"""An update whose gradient is not finite: nothing changes, on every rank, and too many in a row stop the run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from atod_fast import ranks
from atod_fast.config.settings import load
from atod_fast.errors import GuardError
from atod_fast.objective import Streams
from atod_fast.policy import checkpoint
from atod_fast.policy.learner import Learner
from atod_fast.runtime import Runtime
from helpers.gloo import run_ranks
from helpers.tiny import random_rows, save_model


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "student")


def begin(student: str, *settings: str):
    """Return a new learner, and the scored micro-batches and streams of three mini-batches."""
    device, mesh = ranks.start()
    own = [f"student.path={student}", "objective.preset=grpo", "teacher.path=", "train.minibatch_rows=4"]
    config = load(None, None, [*own, "train.microbatch_tokens=80", *settings])
    learner = Learner(config, Runtime.of(config, device, mesh=mesh), None)
    batches, _ = learner.partition(random_rows(12), step=1)
    scored = learner.score_student(batches, None)
    generator = torch.Generator().manual_seed(5)
    return learner, scored, [[stream_of(micro.logp, generator) for micro in minibatch] for minibatch in scored]


def stream_of(logp: torch.Tensor, generator: torch.Generator) -> Streams:
    advantage = torch.randn(len(logp), generator=generator)
    flat = {name: torch.full_like(logp, value) for name, value in (("entropy_weight", 0.01), ("weight", 0.02))}
    return Streams(advantage, advantage, old_logp=logp, policy_weight=torch.ones_like(logp), **flat)


def poison(streams: list[list[Streams]], which: set[int], rank: int) -> list[list[Streams]]:
    """Return the streams, whose mini-batches `which` have a loss that is not finite on one rank alone."""
    if ranks.rank() != rank:
        return streams
    bad = torch.tensor([math.nan, math.inf])
    return [
        [replace(s, advantage=s.advantage * bad[n % 2]) for s in part] if n in which else part
        for n, part in enumerate(streams)
    ]


def state(learner: Learner) -> dict[str, list]:
    """Return weights, moments and step counts, whole."""
    found = {}
    for name, parameter in learner.student.named_parameters():
        found[name] = [parameter.detach().full_tensor().tolist()]
        for values in learner.optimizer.state.get(parameter, {}).values():
            found[name].append((values.full_tensor() if hasattr(values, "full_tensor") else values).tolist())
    return found


def without(scored, streams, which):
    keep = [n for n in range(len(scored)) if n not in which]
    return [scored[n] for n in keep], [streams[n] for n in keep]


def skip(student: str, which: set[int], rank: int):
    """Return what is left of an update with skipped mini-batches, and of one without these mini-batches."""
    found = []
    for given in (False, True):
        learner, scored, streams = begin(student)
        scored, streams = (scored, poison(streams, which, rank)) if given else without(scored, streams, which)
        said = learner.update(scored, streams, 0.01)
        found.append((state(learner), said, learner.updates, learner.skipped))
    return found


@pytest.mark.parametrize(("which", "in_a_row"), [({0}, 0), ({1}, 0), ({2}, 1), ({0, 1}, 0), ({1, 2}, 2)])
def test_a_skipped_update_is_none_whichever_rank_it_comes_from(student, which, in_a_row):
    both = run_ranks(2, skip, student, which, 1)
    assert both[0][1][0] == both[1][1][0], "ranks agree"
    for (left, told, count, _), (given, said, updates, skipped) in both:
        assert given == left
        assert updates == count == 3 - len(which) and skipped == in_a_row
        assert said.pop("skipped") == len(which) and told.pop("skipped") == 0
        assert said == told and all(map(math.isfinite, said.values()))
        assert {len(values) for values in given.values()} == {4}, "a weight, its count and two moments"


def row(student: str):
    """Return what a learner says, the row it counts, and the guard's message, of four steps that skip up to two."""
    learner, scored, streams = begin(student, "guard.skipped_updates=2")
    counts = []
    for which in ({0, 1}, {1, 2}, set(), {2}):
        counts.append((learner.update(scored, poison(streams, which, 0), 0.01)["skipped"], learner.skipped))
    before, updates = state(learner), learner.updates
    with pytest.raises(GuardError) as error:
        learner.update(scored, poison(streams, {0, 1}, 0), 0.01)
    return counts, str(error.value), state(learner) == before, learner.updates - updates


def test_a_row_of_skipped_updates_goes_over_steps_and_ends_the_run(student):
    for counts, message, same, updates in run_ranks(2, row, student):
        assert counts == [(2, 0), (2, 2), (0, 0), (1, 1)]
        assert "in update 2 of the step: the loss is not finite" in message and "nor were the 2 before it" in message
        assert same and updates == 0


def none_allowed(student: str):
    learner, scored, streams = begin(student, "guard.skipped_updates=0")
    with pytest.raises(GuardError) as error:
        learner.update(scored, poison(streams, {1}, 0), 0.01)
    return learner.updates, str(error.value)


def test_the_first_one_ends_a_run_that_allows_none(student):
    ((updates, message),) = run_ranks(1, none_allowed, student)
    assert updates == 1 and "in update 2 of the step" in message and "It was not applied; resume" in message


def saved_unused(student: str, folder):
    """Skip a whole first step and save; return the states of three ways to go on, and what the step said."""
    learner, scored, streams = begin(student)
    said = learner.update(scored, poison(streams, {0, 1, 2}, 0), 0.01)
    path = checkpoint.save(folder, 1, learner.student, learner.optimizer, {"before": {}}, keep=1)
    other, _, _ = begin(student)
    checkpoint.load(path, other.student, other.optimizer)
    fresh, _, _ = begin(student)
    for each in (learner, other, fresh):
        each.update(scored, streams, 0.01)
    return [state(each) for each in (learner, other, fresh)], said


def test_an_optimiser_that_is_saved_unused_has_taken_no_step(student, tmp_path):
    for (went_on, resumed, fresh), said in run_ranks(2, saved_unused, student, tmp_path):
        assert went_on == resumed == fresh
        assert said.pop("skipped") == 3 and all(map(math.isnan, said.values())) and "loss" in said
