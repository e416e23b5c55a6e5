"""What a world must offer. Strings in, strings out; prompts and projections live in `rollout/prompts`."""

from __future__ import annotations

from typing import Protocol, TypedDict, runtime_checkable


class Info(TypedDict, total=False):
    """Facts beside an observation."""

    won: bool
    admissible_actions: list[str]  # in the world's order; empty where the action space is open
    is_action_valid: bool  # the last action was accepted
    task_type: str
    task_id: str
    score: float  # the environment's own metric where it is finer than `won`


@runtime_checkable
class Environment(Protocol):
    """A text world with a fixed set of tasks, after gymnasium's interface.

    `instant` is True where a step is pure in-process computation (well under a millisecond to a few): the agent loop
    then steps it synchronously, which makes rollouts repeatable. Others run in a pool with a time limit.
    """

    instant: bool

    def __len__(self) -> int:
        """Number of tasks; task indices are 0..len-1."""

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        """Start `task`; equal seed and task give an equal episode under equal actions."""

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Observation, reward, terminated, truncated, info."""

    def clone(self) -> Environment:
        """Another, independent episode over the same (shared, read-only) tasks."""

    def close(self) -> None:
        """Release what the episode holds."""
