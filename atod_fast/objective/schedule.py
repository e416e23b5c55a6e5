"""The annealed schedule: from imitation (kappa) to reward (rho).

Paper, with first step s = 1:

    p = min(s / T, 1);   kappa = kappa_0 + (kappa_min - kappa_0) p;   rho = rho_0 + (rho_max - rho_0) p

with kappa 1 -> 0.1, rho 1 -> 2 and T = 80, hence kappa(1) = 0.98875, kappa(80) = 0.1, rho(80) = 2, then held.
`Slide.hold` delays the slide: p = clip((s - hold) / horizon, 0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from atod_fast.config import Slide
from atod_fast.errors import UserError

WINDOW = 5  # evaluations in the lagged mean of AdaptiveKappa


def value(slide: Slide, step: int) -> float:
    """Value of `slide` at `step` (counted from 1), for every kind but `adaptive`, which is `AdaptiveKappa`'s.

    An exponential can neither reach 0 nor leave it: `config.Schedule` refuses one that would have to.
    """
    p = min(max((step - slide.hold) / slide.horizon, 0.0), 1.0)
    start, end = slide.start, slide.end
    match slide.kind:
        case "linear":
            return start + (end - start) * p
        case "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * p)) / 2
        case "exponential":
            return start * (end / start) ** p
        case "step":
            return end if p == 1 else start
        case "constant":
            return start
        case _:
            raise ValueError(f"{slide.kind!r} depends on evaluations, not on the step alone: use AdaptiveKappa")


def needs_teacher(kappa: float) -> bool:
    """Whether a step at this kappa looks at the teacher at all; at 0 its forward pass is skipped."""
    return kappa > 0


class AdaptiveKappa:
    """kappa = start * max(1 - S / S_T, 0), never rising again: a teacher is followed as far as it is ahead.

    S is the mean success of the student's last five evaluations on env.dev, S_T the teacher's there. Until the
    first evaluation, and for the first `hold` steps, it is `start`. `end` and `horizon` have no part in it.
    """

    def __init__(self, slide: Slide, teacher_success: float):
        if teacher_success <= 0:
            raise UserError(
                f"schedule.kappa.kind=adaptive measures the student against the teacher, whose success is {teacher_success:g}: "
                "choose another teacher or another kind"
            )
        self.slide = slide
        self.teacher_success = teacher_success
        self._successes: list[float] = []
        self._kappa = slide.start

    def observe(self, success: float) -> None:
        """Take in one evaluation of the student, success in [0, 1]."""
        self._successes = [*self._successes, success][-WINDOW:]
        mean = sum(self._successes) / len(self._successes)
        self._kappa = min(self._kappa, self.slide.start * max(1 - mean / self.teacher_success, 0.0))

    def value(self, step: int) -> float:
        return self.slide.start if step <= self.slide.hold else self._kappa

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in JSON types."""
        return {"successes": list(self._successes), "kappa": self._kappa}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._successes = [float(success) for success in state["successes"]]
        self._kappa = float(state["kappa"])
