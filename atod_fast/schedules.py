"""Values that change over a run's steps: kappa (imitation), rho (reward) and the learning rate.

Paper, with first step s = 1:

    p = min(s / T, 1);   kappa = kappa_0 + (kappa_min - kappa_0) p;   rho = rho_0 + (rho_max - rho_0) p

with kappa 1 -> 0.1, rho 1 -> 2 and T = 80, hence kappa(1) = 0.98875, kappa(80) = 0.1, rho(80) = 2, constant after that.
`Slide.hold` delays the slide: p = clip((s - hold) / horizon, 0, 1).

A new shape is a name in `SlideShape` or `RateShape` and a case in `Annealed` or `LearningRate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from atod_fast.errors import UserError

if TYPE_CHECKING:
    from atod_fast.config import Slide, Train

SlideShape = Literal["linear", "cosine", "exponential", "step", "constant"]  # of a Slide
RateShape = Literal["constant", "linear", "cosine"]  # of the learning rate
WINDOW = 5  # evaluations in the lagged mean of AdaptiveKappa


class Schedule(Protocol):
    """A value for every step of a run."""

    def value(self, step: int) -> float:
        """Return the value at `step`, counted from 1."""
        ...

    def observe(self, success: float) -> None:
        """Record the student's success rate, in [0, 1], in one evaluation on env.dev."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in JSON types; empty if the value depends on the step alone."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class _OfStep:
    """A schedule that depends on the step alone."""

    def observe(self, success: float) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class Annealed(_OfStep):
    """A value that moves from `slide.start` to `slide.end` in the shape `slide.kind`.

    An exponential can neither reach 0 nor leave it; `config.Schedule` rejects one that would have to.
    """

    def __init__(self, slide: Slide):
        self.slide = slide

    def value(self, step: int) -> float:
        start, end = self.slide.start, self.slide.end
        p = min(max((step - self.slide.hold) / self.slide.horizon, 0.0), 1.0)
        match self.slide.kind:
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
        raise ValueError(f"{self.slide.kind!r} is no shape of a schedule that depends on the step alone")


class AdaptiveKappa:
    """kappa = start * max(1 - S / S_T, 0), never rising again: imitate as far as the teacher is ahead.

    S is the student's mean success in its last five evaluations on env.dev, S_T the teacher's success there. kappa is
    `start` until the first evaluation and for the first `hold` steps. `end` and `horizon` are not used.
    """

    def __init__(self, slide: Slide, teacher_success: float):
        """Raise UserError for a teacher that never succeeds."""
        if teacher_success <= 0:
            raise UserError(
                "schedule.kappa.kind=adaptive measures the student against the teacher, "
                f"whose success is {teacher_success:g}: "
                "choose another teacher or another kind"
            )
        self.slide = slide
        self.teacher_success = teacher_success
        self._successes: list[float] = []
        self._kappa = slide.start

    def observe(self, success: float) -> None:
        self._successes = [*self._successes, success][-WINDOW:]
        mean = sum(self._successes) / len(self._successes)
        self._kappa = min(self._kappa, self.slide.start * max(1 - mean / self.teacher_success, 0.0))

    def value(self, step: int) -> float:
        return self.slide.start if step <= self.slide.hold else self._kappa

    def state_dict(self) -> dict[str, Any]:
        return {"successes": list(self._successes), "kappa": self._kappa}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._successes = [float(success) for success in state["successes"]]
        self._kappa = float(state["kappa"])


class LearningRate(_OfStep):
    """The learning rate: train.learning_rate * linear warm-up over train.warmup_steps * decay by train.schedule.

    With p = step / train.steps and f = train.final_learning_rate, which the last step reaches, the decay is

        constant  1
        linear    1 - (1 - f) p
        cosine    f + (1 - f) (1 + cos(pi p)) / 2
    """

    def __init__(self, train: Train):
        self.train = train

    def value(self, step: int) -> float:
        train = self.train
        warm = min(1.0, step / train.warmup_steps) if train.warmup_steps else 1.0
        return train.learning_rate * warm * self._left(step)

    def _left(self, step: int) -> float:
        train, final = self.train, self.train.final_learning_rate
        match train.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - (1 - final) * step / train.steps
            case "cosine":
                return final + (1 - final) * (1 + math.cos(math.pi * step / train.steps)) / 2


def make(slide: Slide, teacher_success: float = 0.0) -> Schedule:
    """Return the schedule of `slide`. teacher_success: on env.dev; only `adaptive` reads it."""
    return AdaptiveKappa(slide, teacher_success) if slide.kind == "adaptive" else Annealed(slide)
