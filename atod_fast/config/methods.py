"""The keys that each `objective.preset` expands into.

Every preset sets the same keys, those of the method's equations. It does not set what depends on the task or the model:
horizon and hold, the entropy bonus, the penalty and what counts as invalid, and the constants of variants that no
preset uses. docs/paper.md names the source of each value.
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
    "objective.log_ratio_clip": 0.0,
    "objective.advantage": "grpo",
    "objective.normalise_std": True,
    "objective.std_epsilon": 1e-6,
    "objective.baseline": "rows",  # verl-agent's default; the paper does not settle it
    "objective.ratio": "token",
    "objective.clip": 0.2,
    "objective.clip_high": 0.0,
    "objective.dual_clip": 3.0,
    "objective.aggregation": "token",
    "objective.tis_cap": 0.0,
    "objective.mismatch_mask": 0.0,
    **_schedule("linear", kappa=(1.0, 0.1), rho=(1.0, 2.0)),
    "turns.disagreement": "sampled",
    "turns.uncertainty": "sampled",
    "turns.normalise": "minmax",
    "turns.fuse": "softor",
    "turns.scope": "trajectory",
    "turns.budget": "raw",
    "turns.min_turns": 3,
    "turns.min_disagreement": 0.01,
}
_EXACT: Level = {
    "objective.divergence": "reverse_kl",
    "turns.disagreement": "exact",
    "turns.uncertainty": "exact",
    "turns.budget": "mean1",
}
_UNIFORM: Level = {"turns.fuse": "uniform"}
_CORRECTED: Level = {"objective.tis_cap": 2.0}  # a bf16 engine's log-probs differ a little from the trainer's
_OURS = _PAPER | _CORRECTED
OBJECTIVES: dict[str, Level] = {
    "paper": _PAPER,
    "exact": _OURS | _EXACT,
    "opd": _OURS | _UNIFORM | _schedule("constant", kappa=(1.0, 1.0), rho=(0.0, 0.0)),
    "grpo": _OURS | _UNIFORM | _schedule("constant", kappa=(0.0, 0.0), rho=(1.0, 1.0)),
    "fixed": _OURS | _schedule("constant", kappa=(1.0, 1.0), rho=(1.0, 1.0)),
    "sequential": _OURS | _UNIFORM | _schedule("step", kappa=(1.0, 0.0), rho=(0.0, 1.0)),
}


def nest(level: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings {dotted key: value} as nested tables, as TOML has them."""
    out: dict[str, Any] = {}
    for key, value in level.items():
        *sections, name = key.split(".")
        table = out
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return out
