"""How much of a device's memory a rollout engine gets, and whether it sleeps while the trainer works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from atod_fast.config import Config
from atod_fast.models import Attention
from atod_fast.plan.memory import CACHE, Item, engine_memory, memory, totals
from atod_fast.plan.shapes import Shape
from atod_fast.rollout.engines.protocol import Room
from atod_fast.rollout.engines.vllm import limits
from atod_fast.runtime import Runtime

# Of a GPU's memory, what the plan may fill: the rest is for the CUDA context, nccl's buffers and fragmentation.
FILLED = 0.85
# Of the cache that an engine could have if it slept, what must be left for it to stay awake. Typical sequences are much
# shorter than the greatest length, for which the cache is sized.
ENOUGH = 0.5


def room_beside(config: Config, student: Shape, teacher: Shape | None, runtime: Runtime) -> Room:
    """Return the room that a training run has for its rollout engine on this rank's device.

    On a GPU the cache gets what the plan leaves at most, unless `rollout.kv_cache_gib` gives its size. With
    `rollout.sleep=auto` the engine sleeps only if it does not fit beside the trainer's largest phase, with at least
    half of the cache that it would have otherwise.
    """
    return _fitted(config, student, runtime, lambda room: memory(config, student, teacher, replace(runtime, room=room)))


def room_alone(config: Config, model: Shape, runtime: Runtime) -> Room:
    """Return the room of an engine without a trainer: an evaluation's, which does not sleep."""
    runtime = replace(runtime, room=replace(runtime.room, sleeps=False))
    phases = ("rollout",)
    return _fitted(
        config, model, runtime, lambda room: engine_memory(config, model, replace(runtime, room=room), phases)
    )


def _fitted(config: Config, model: Shape, runtime: Runtime, items: Callable[[Room], Iterable[Item]]) -> Room:
    room, size = runtime.room, runtime.memory
    if size is None:
        return room
    heads = Attention(model.layers, model.heads, model.kv_heads, model.head_dim)
    least = limits.cache_bytes(config, heads, runtime.student_dtype, 1)

    def bounded(room: Room) -> Room:
        if not room.cache_bytes or config.rollout.kv_cache_gib:
            return room
        others = list(items(replace(room, cache_bytes=0)))
        phases = next(item.phases for item in others if item.name == CACHE)
        left = FILLED * size - max(totals(others)[phase] for phase in phases)
        return replace(room, cache_bytes=int(min(room.cache_bytes, max(left, least))))

    room, awake = bounded(room), bounded(replace(room, sleeps=False))
    fits = max(totals(items(awake)).values()) <= FILLED * size and awake.cache_bytes >= ENOUGH * room.cache_bytes
    return awake if config.rollout.sleep == "auto" and fits else room
