"""Memory of a rank by phase of a step: upper bounds by formula, each stated where it is computed.

Without allocator slack and CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from atod_kernels import MIXTURES
from atod_kernels.problem import TILE

from atod_fast.config import Config
from atod_fast.objective import FULL_VOCABULARY
from atod_fast.plan.shapes import Shape, activations, block_activations, cache_line, gathered
from atod_fast.plan.tokens import Step, step_bounds
from atod_fast.rollout.engines.vllm import limits
from atod_fast.runtime import Runtime

PHASES = ("teacher's eval", "rollout", "score", "update")
CACHE = "rollout engine, KV cache"
# An estimate, not measured yet: what vLLM's captured CUDA graphs hold, also while it sleeps.
GRAPHS = 1.5 * 2**30  # bytes


@dataclass(frozen=True, slots=True)
class Item:
    """One use of memory on a rank, and the phases that hold it."""

    name: str
    size: float  # bytes
    phases: tuple[str, ...]


def head_tiles(shape: Shape, kept: int, device: torch.device) -> int:
    """Return the bytes of logits held at a time: four fp32 tiles, and whole rows of `kept` models.

    kept: how many models' logits are needed twice.
    """
    rows, columns = TILE["cpu" if device.type == "cpu" else "accelerator"]
    return 4 * rows * (4 * columns + kept * max(columns, shape.vocabulary))


def memory(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime) -> Iterator[Item]:
    """Yield what a rank holds and when. P parameters and c bytes per element of student or teacher, W ranks that
    share a copy of the parameters.

    teacher: None if it neither scores nor plays.

    Masters 4P/W, gradients 4P/W, AdamW 8P/W; the frozen teacher cP/W. The head's op adds the fp32 gradients of the
    hidden states [A, H] and of its weight [V, H] to its tiles, A being the action tokens of a micro-batch; if lean, it
    keeps no logits and rounds the weight's gradient slice by slice. For the rollout engine see `engine_memory`.
    """
    ranks, shards, device = runtime.ranks, runtime.shards, runtime.device
    c, ct = runtime.student_dtype.itemsize, runtime.teacher_dtype.itemsize
    step, rollout, objective = step_bounds(config), config.rollout, config.objective
    scores, plays = config.teacher_scores, config.teacher_plays
    exact_loss = scores and objective.divergence in FULL_VOCABULARY
    exact = exact_loss or (scores and config.turns.disagreement == "exact")
    mixture = scores and objective.divergence in MIXTURES
    share = -(-step.action_tokens // ranks)
    micro = micro_batch(config, step, runtime)
    phases = PHASES if plays else PHASES[1:]

    yield Item("student, fp32 masters", 4 * student.parameters / shards, phases)
    yield Item("student, AdamW moments", 8 * student.parameters / shards, PHASES[1:])
    yield Item("student, gradients", 4 * student.parameters / shards, ("update",))
    yield Item("student, gathered", gathered(student, c), ("score", "update"))
    reducing = min(student.parameters, student.root + student.block)  # as computed, and in fp32 on their way
    yield Item("student, gradients to reduce", reducing * (c + 4), ("update",))
    if teacher is not None and scores:
        if not config.teacher.offload:
            yield Item("teacher, shard", ct * teacher.parameters / shards, phases)
        whole = ct * teacher.parameters
        yield Item("teacher, gathered", whole if runtime.gathered else gathered(teacher, ct), ("score",))
        if exact_loss:
            yield Item("teacher, head", teacher.root * ct, ("update",))
        if exact:
            held = ("score", "update") if exact_loss else ("score",)
            yield Item("teacher, final hidden states", share * teacher.hidden * ct, held)

    yield from engine_memory(config, student, runtime, phases)
    if teacher is not None and plays:
        tokens = runtime.teacher_room.concurrency * rollout.longest
        yield Item("teacher's engine", teacher.parameters * c + tokens * cache_line(teacher, c), PHASES[:1])

    scoring = micro * block_activations(student, c)
    if teacher is not None and scores:  # one after the other
        scoring = max(scoring, micro_batch(config, step, runtime, runtime.joined) * block_activations(teacher, ct))
    yield Item("activations", scoring, ("score",))
    yield Item("activations", micro * activations(student, c, runtime.checkpointing), ("update",))
    lean = config.student.head == "lean"
    yield Item("head, logit tiles", head_tiles(student, 2 * mixture, device), ("score",))
    yield Item("head, logit tiles", head_tiles(student, 0 if lean else 1 + exact_loss, device), ("update",))
    yield Item(
        "head, fp32 gradients",
        4 * student.hidden * (min(micro, share) + (0 if lean else student.vocabulary)),
        ("update",),
    )


def micro_batch(config: Config, step: Step, runtime: Runtime, joined: int = 1) -> int:
    """Return the most tokens of `joined` micro-batches on a rank."""
    one = max(config.train.microbatch_tokens, config.rollout.longest)
    return min(joined * one, -(-step.tokens // runtime.ranks))


def engine_memory(config: Config, model: Shape, runtime: Runtime, phases: tuple[str, ...]) -> Iterator[Item]:
    """Yield what the rollout engine of `model` holds in `phases`.

    Asleep, vLLM holds neither weights nor cache, and the transformers engine no cache. On CUDA vLLM also holds CUDA
    graphs, and in a rollout the fp32 logits of all sequences four times (as they come, masked, as log-probs, with
    noise) and one batch's activations in the widest part of a block.
    """
    c, room, rollout = runtime.student_dtype.itemsize, runtime.room, config.rollout
    awake = ("rollout",) if room.sleeps else phases
    if runtime.engine != "vllm":
        yield Item("rollout engine, weights", model.parameters * c, phases)
        yield Item(CACHE, room.concurrency * rollout.longest * cache_line(model, c), awake)
        return
    together = rollout.tensor_parallel
    yield Item("rollout engine, weights", model.parameters * c / together, awake)
    yield Item(CACHE, room.cache_bytes, awake)
    if runtime.device.type == "cuda":
        if not rollout.enforce_eager:
            yield Item("rollout engine, CUDA graphs", GRAPHS, phases)
        batch = limits.batch_tokens(runtime.device, rollout.longest, room.concurrency)
        widest = 4 * model.hidden + 3 * model.intermediate / together
        workspace = 4 * 4 * room.concurrency * model.vocabulary + batch * widest * c
        yield Item("rollout engine, workspace", workspace, ("rollout",))


def totals(items: Iterable[Item]) -> dict[str, float]:
    """Return the bytes held in each phase."""
    found: dict[str, float] = {phase: 0.0 for phase in PHASES}
    for item in items:
        for phase in item.phases:
            found[phase] += item.size
    return found


def table(items: list[Item]) -> Iterator[str]:
    """Yield a table with a line per name and a column per phase."""
    cells: dict[str, dict[str, float]] = {}
    for item in items:
        for phase in item.phases:
            cells.setdefault(item.name, {})[phase] = item.size
    phases = [phase for phase in PHASES if any(phase in line for line in cells.values())]
    cells["total"] = {phase: totals(items)[phase] for phase in phases}
    unit, name = (2**30, "GiB") if max(cells["total"].values()) >= 2**30 else (2**20, "MiB")
    yield f"{f'memory of a rank, {name}':30}" + "".join(f"{phase:>16}" for phase in phases)
    for title, line in cells.items():
        yield f"{title:30}" + "".join(f"{line[phase] / unit:16.2f}" if phase in line else " " * 16 for phase in phases)
