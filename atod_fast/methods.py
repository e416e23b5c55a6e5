"""What each `objective.preset` stands for.

A preset owns the keys that say *which* method runs, the same keys in each. What is tuned to a task or a model (horizon
and hold, clip ranges, entropy bonus, penalty, min_turns, min_disagreement) it leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Level = dict[str, Any]  # {dotted key: value}


def _schedule(kind: str, kappa: tuple[float, float], rho: tuple[float, float]) -> Level:
    return {
        f"schedule.{name}.{key}": value
        for name, ends in {"kappa": kappa, "rho": rho}.items()
        for key, value in zip(("kind", "start", "end"), (kind, *ends), strict=True)
    }


_PAPER: Level = {
    "objective.divergence": "k1",
    "objective.advantage": "grpo",
    "objective.normalise_std": True,
    "objective.baseline": "rows",  # verl-agent's default; the paper does not settle it
    "objective.aggregation": "token",
    "objective.tis_cap": 2.0,
    **_schedule("linear", kappa=(1.0, 0.1), rho=(1.0, 2.0)),
    "turns.disagreement": "sampled",
    "turns.uncertainty": "sampled",
    "turns.normalise": "minmax",
    "turns.fuse": "softor",
    "turns.scope": "trajectory",
    "turns.budget": "raw",
}
_EXACT: Level = {
    "objective.divergence": "reverse_kl",
    "turns.disagreement": "exact",
    "turns.uncertainty": "exact",
    "turns.budget": "mean1",
}
_UNIFORM: Level = {"turns.fuse": "uniform"}
OBJECTIVES: dict[str, Level] = {
    "paper": _PAPER,
    "exact": _PAPER | _EXACT,
    "opd": _PAPER | _UNIFORM | _schedule("constant", kappa=(1.0, 1.0), rho=(0.0, 0.0)),
    "grpo": _PAPER | _UNIFORM | _schedule("constant", kappa=(0.0, 0.0), rho=(1.0, 1.0)),
    "fixed": _PAPER | _schedule("constant", kappa=(1.0, 1.0), rho=(1.0, 1.0)),
    "sequential": _PAPER | _UNIFORM | _schedule("step", kappa=(1.0, 0.0), rho=(0.0, 1.0)),
}


def nest(level: Mapping[str, Any]) -> dict[str, Any]:
    """A level as sections within sections."""
    out: dict[str, Any] = {}
    for key, value in level.items():
        *sections, name = key.split(".")
        table = out
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return out
