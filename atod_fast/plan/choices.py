"""What a run does with its GPUs' memory: whether blocks recompute and the engine sleeps, and how the teacher scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.plan.memory import memory, totals
from atod_fast.plan.room import FILLED, rooms
from atod_fast.plan.shapes import Shape
from atod_fast.runtime import Runtime

MOST_JOINED = 8  # micro-batches in one of the teacher's forward passes: it keeps nothing for a backward pass


def choose(
    config: Config, student: Shape, teacher: Shape | None, runtime: Runtime, *, recomputes: bool, packs: bool
) -> Runtime:
    """Return `runtime` with everything decided that depends on the memory of this rank's GPU; on a CPU unchanged.

    In this order of preference, the first that fits: neither recompute blocks nor let the engine sleep; recompute; let
    it sleep; do both. What the score phase leaves then gathers the teacher once a step and joins its micro-batches.

    recomputes: the student's blocks can recompute their activations. packs: rows are packed.

    Raises:
        UserError: a setting asks for what the models cannot do.
    """
    asked = config.student.gradient_checkpointing
    if asked is True and not recomputes:
        raise UserError(
            "student.gradient_checkpointing=true: the student cannot recompute its activations; "
            "set student.gradient_checkpointing=auto"
        )
    scores = teacher is not None and config.teacher_scores
    if scores and not packs and config.teacher.microbatch_tokens > config.train.microbatch_tokens:
        raise UserError(
            f"teacher.microbatch_tokens={config.teacher.microbatch_tokens} joins micro-batches of packed rows, and the "
            "models do not pack them; set student.attention=varlen, or teacher.microbatch_tokens=0"
        )
    if runtime.memory is None:
        return runtime
    checkpointing = [asked] if asked != "auto" else [False, True] if recomputes else [False]
    runtime = _trainer_and_engine(config, student, teacher, runtime, checkpointing)
    return _teacher(config, student, teacher, runtime, packs) if scores else runtime


def fits(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime, *phases: str) -> bool:
    """Return whether the plan's `phases` (none: all) fit the part of the GPU's memory that it may fill."""
    assert runtime.memory is not None
    found = totals(memory(config, student, teacher, runtime))
    return max(found[phase] for phase in phases or found) <= FILLED * runtime.memory


def _trainer_and_engine(
    config: Config, student: Shape, teacher: Shape | None, runtime: Runtime, checkpointing: list[bool]
) -> Runtime:
    """Return `runtime` with the engine's room and whether to recompute: the first choice that fits, or the smallest."""

    def choices() -> Iterator[tuple[Runtime, bool]]:
        for again in checkpointing:
            given = replace(runtime, checkpointing=again)
            beside = rooms(
                config,
                student,
                given,
                lambda room, given=given: memory(config, student, teacher, replace(given, room=room)),
            )
            for room, fit in beside:
                yield replace(given, room=room), fit

    found = sorted(choices(), key=lambda choice: choice[0].room.sleeps)  # stable: then recomputing last
    return next((choice for choice, fit in found if fit), found[-1][0])


def _teacher(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime, packs: bool) -> Runtime:
    """Return `runtime` with the teacher gathered if it fits, and the most micro-batches joined that fit."""
    gathered = replace(runtime, gathered=True)
    if fits(config, student, teacher, gathered, "score"):
        runtime = gathered
    if config.teacher.microbatch_tokens or not packs:
        return runtime
    joined = (replace(runtime, joined=count) for count in range(MOST_JOINED, 1, -1))
    return next((each for each in joined if fits(config, student, teacher, each, "score")), runtime)
