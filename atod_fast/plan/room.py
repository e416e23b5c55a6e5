"""How much of a device's memory a rollout engine may have, awake or asleep while the trainer works."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from atod_fast.config import Config
from atod_fast.models import Attention
from atod_fast.plan.memory import CACHE, Item, engine_memory, totals
from atod_fast.plan.shapes import Shape
from atod_fast.rollout.engines.protocol import Room
from atod_fast.rollout.engines.vllm import limits
from atod_fast.runtime import Runtime

# Of a GPU's memory, what the plan may fill: the rest is for the CUDA context, nccl's buffers and fragmentation.
FILLED = 0.85
# Of the cache that an engine could have if it slept, what must be left for it to stay awake. Typical sequences are much
# shorter than the greatest length, for which the cache is sized.
ENOUGH = 0.5


def rooms(
    config: Config, model: Shape, runtime: Runtime, items: Callable[[Room], Iterable[Item]]
) -> list[tuple[Room, bool]]:
    """Return the rooms that an engine may have on this rank's device, and whether each fits: awake, then asleep.

    items: the memory of a rank whose engine has a certain room. On a GPU the cache gets what the plan leaves at most,
    unless `rollout.kv_cache_gib` gives its size. A room fits within `FILLED` of the memory, with at least `ENOUGH` of
    the cache of an engine that sleeps. Which of the two there are is what `rollout.sleep` and `runtime.room` allow.
    """
    room, size = runtime.room, runtime.memory
    if size is None:
        return [(room, True)]
    heads = Attention(model.layers, model.heads, model.kv_heads, model.head_dim)
    least = limits.cache_bytes(config, heads, runtime.student_dtype, 1)

    def bounded(room: Room) -> Room:
        if not room.cache_bytes or config.rollout.kv_cache_gib:
            return room
        others = list(items(replace(room, cache_bytes=0)))
        phases = next(item.phases for item in others if item.name == CACHE)
        left = FILLED * size - max(totals(others)[phase] for phase in phases)
        return replace(room, cache_bytes=int(min(room.cache_bytes, max(left, least))))

    asleep = bounded(replace(room, sleeps=True)).cache_bytes
    awake = [False] if not room.sleeps or config.rollout.sleep == "auto" else []
    found = [bounded(replace(room, sleeps=sleeps)) for sleeps in (*awake, *([True] if room.sleeps else []))]
    return [
        (each, max(totals(items(each)).values()) <= FILLED * size and each.cache_bytes >= ENOUGH * asleep)
        for each in found
    ]


def room_alone(config: Config, model: Shape, runtime: Runtime) -> Room:
    """Return the room of an engine without a trainer: an evaluation's, which does not sleep."""
    runtime = replace(runtime, room=replace(runtime.room, sleeps=False))
    phases = ("rollout",)
    ((room, _),) = rooms(
        config, model, runtime, lambda room: engine_memory(config, model, replace(runtime, room=room), phases)
    )
    return room
