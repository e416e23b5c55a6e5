"""Trajectories as JSONL, one object each: what was seen and said, turn by turn, with the turn's signals and weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from atod_fast.trajectory import Trajectory, TurnTable

FACTS = ("task", "group", "member", "task_id", "task_type", "reward", "success", "score", "truncated", "failure")


def write(path: Path, trajectories: Sequence[Trajectory], table: TurnTable, weight: Tensor, advantage: Tensor) -> None:
    """`weight` and `advantage` [K] are the turns' T-DUR weights and reinforcement-learning advantages.

    A trajectory whose environment failed is not in the table; its turns stand without signals.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    signals = {
        "disagreement": table.disagreement.tolist(),
        "uncertainty": table.uncertainty.tolist(),
        "weight": weight.tolist(),
        "advantage": advantage.tolist(),
    }
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            turns = []
            for turn in trajectory.turns:
                facts = {key: getattr(turn, key) for key in ("observation", "text", "command", "valid", "reward", "action")}
                if trajectory.failure is None:
                    facts |= {key: round(values[number], 6) for key, values in signals.items()}
                    number += 1
                turns.append(facts)
            facts = {key: getattr(trajectory, key) for key in FACTS}
            file.write(json.dumps(facts | {"turns": turns}, ensure_ascii=False) + "\n")
