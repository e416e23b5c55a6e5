"""Turns and trajectories: what an agent saw and did, as the sampled token ids. They are never re-tokenised.

Rollouts make trajectories; `batches.py` makes tensors of them for the objective and the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    # Of a turn: a list while the episode is played; then, on every rank, an array of int32 or fp32.
    Numbers = Sequence[Any] | NDArray[Any]


@dataclass(slots=True)
class Turn:
    """One turn: the prompt, the response, and the environment's reaction."""

    prompt: Numbers  # context `window`: the whole prompt; `full`: the tokens added since the previous action
    action: Numbers  # ids as sampled, the stop token included when one was sampled
    logprobs: Numbers  # the rollout engine's log-probs of `action` at the rollout temperature
    observation: str  # text shown before this action
    text: str  # decoded action
    command: str  # what was sent to the environment
    well_formed: bool  # the response has the form that the prompt asks for
    accepted: bool = True  # the environment accepted the command as an action
    reward: float = 0.0
    stopped: bool = True  # by a stop token; False: cut off at rollout.response_tokens

    @property
    def valid(self) -> bool:
        return self.well_formed and self.accepted


@dataclass(slots=True)
class Trajectory:
    """One episode of one task."""

    task: int  # index of the task in its environment
    group: int  # the tasks of a step are numbered 0..tasks_per_step-1; trajectories of one group share a task
    member: int  # 0..group_size-1
    context: str  # "window" | "full"
    turns: list[Turn] = field(default_factory=list)
    success: bool = False
    truncated: bool = False  # ended by the turn or token limit
    failure: str | None = None  # the environment raised or hung: why
    task_id: str = ""
    task_type: str = ""
    part: str = ""  # of a mix
    score: float | None = None  # the environment's own score, where it gives one

    @property
    def reward(self) -> float:
        """Sum of the rewards of its turns."""
        return sum(turn.reward for turn in self.turns)


def outcomes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return success rate, number of failed environments, mean turns, and mean score if the environment gives scores.

    Failed environments count as unsolved.
    """
    scores = [t.score for t in trajectories if t.score is not None and t.failure is None]
    return {
        "success": sum(t.success for t in trajectories) / len(trajectories),
        "failed_environments": sum(t.failure is not None for t in trajectories),
        "turns": sum(len(t.turns) for t in trajectories) / len(trajectories),
        **({"score": sum(scores) / len(scores)} if scores else {}),
    }


def success_by_type(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the success rate of each task type, in alphabetical order. Tasks without a type count as the type ""."""
    return _success(trajectories, lambda trajectory: trajectory.task_type)


def success_by_part(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Return the success rate of each part of a mix, in alphabetical order; empty without parts."""
    return _success([t for t in trajectories if t.part], lambda trajectory: trajectory.part)


def _success(trajectories: Sequence[Trajectory], name: Callable[[Trajectory], str]) -> dict[str, float]:
    solved: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        solved.setdefault(name(trajectory), []).append(trajectory.success)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in sorted(solved.items())}
