"""Whether a run fits the memory of its GPUs, and which keys make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from atod_fast.config import Config
from atod_fast.config.settings import show
from atod_fast.errors import UserError
from atod_fast.plan.memory import Item, totals
from atod_fast.plan.room import FILLED

Plan = Callable[[Config], list[Item]]  # the memory of a rank under these settings

# Keys that lower memory, in the order in which they cost least, with the values to try.
REMEDIES: dict[str, tuple[object, ...]] = {
    "student.gradient_checkpointing": ("auto",),
    "teacher.microbatch_tokens": (0,),
    "student.head": ("lean",),
    "train.microbatch_tokens": (8192, 4096, 2048),
    "rollout.concurrency": (32, 16, 8, 4, 1),
    "teacher.offload": (True,),
}


def changed(config: Config, keys: Mapping[str, object]) -> Config:
    """Return `config` with other values of some keys, which are not checked."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(update={s: getattr(config, s).model_copy(update=u) for s, u in sections.items()})


def largest(items: list[Item]) -> float:
    """Return the bytes of the phase that needs most."""
    return max(totals(items).values())


def check(config: Config, plan: Plan, memory: int) -> None:
    """Raise UserError, with the keys that make it fit, if a rank needs more than the `memory` bytes of its GPU."""
    items = plan(config)
    phase, needed = max(totals(items).items(), key=lambda each: each[1])
    if needed <= memory:
        return
    most = max((item for item in items if phase in item.phases), key=lambda item: item.size)
    found = remedies(config, plan, FILLED * memory)
    keys = " ".join(f"{key}={show(value)}" for key, value in found.items())
    remedy = f"set {keys}" if keys else "use more GPUs, larger ones, or smaller models"
    raise UserError(
        f"a rank needs {needed / 2**30:.1f} GiB ({phase}; the largest part is {most.name}, {most.size / 2**30:.1f}), "
        f"and its GPU has {memory / 2**30:.1f}; {remedy}"
    )


def tight(items: list[Item], memory: int) -> list[str]:
    """Return a warning if a rank fills more of its GPU's `memory` bytes than a plan should, else nothing."""
    phase, needed = max(totals(items).items(), key=lambda each: each[1])
    if needed <= FILLED * memory:
        return []
    return [
        f"a rank needs up to {needed / 2**30:.1f} GiB ({phase}) of its GPU's {memory / 2**30:.1f}, which leaves "
        "little for the CUDA context and fragmentation: it may run out of memory"
    ]


def remedies(config: Config, plan: Plan, memory: float) -> dict[str, object]:
    """Return the keys of `REMEDIES` with which a run fits `memory` bytes: one if one is enough, else as many as needed.

    Empty if all of them together do not make it fit.
    """
    for key, value in _lower(config):
        if largest(plan(changed(config, {key: value}))) <= memory:
            return {key: value}
    found: dict[str, object] = {}
    for key, value in _lower(config):
        found[key] = value
        if largest(plan(changed(config, found))) <= memory:
            break
    else:
        return {}
    for key in [*found]:
        fewer = {other: value for other, value in found.items() if other != key}
        if largest(plan(changed(config, fewer))) <= memory:
            found = fewer
    return found


def _lower(config: Config) -> Iterator[tuple[str, object]]:
    """Yield the values of `REMEDIES` that are not in force, numbers from the highest that lowers the present one."""
    for key, values in REMEDIES.items():
        section, name = key.split(".")
        now = getattr(getattr(config, section), name)
        for value in values:
            if value != now and now is not True and not (type(value) is int and type(now) is int and 0 < now <= value):
                yield key, value


def longest_prompt(config: Config, plan: Plan, memory: float, most: int) -> int:
    """Return the greatest `rollout.prompt_tokens` that fits `memory` bytes, at most `most`; 0 if none does."""

    def fits(tokens: int) -> bool:
        return largest(plan(changed(config, {"rollout.prompt_tokens": tokens}))) <= memory

    low, high = max(8, config.rollout.response_tokens + 1), most
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
