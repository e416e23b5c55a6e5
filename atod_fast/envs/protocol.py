"""What an environment offers: text in, text out. It may bring a prompt, which words the messages to a chat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol, TypedDict, TypeVar, runtime_checkable

from atod_fast.envs.text import encodable
from atod_fast.records import Turn


class Info(TypedDict, total=False):
    """Facts beside an observation."""

    won: bool
    admissible_actions: list[str]  # in the environment's order; empty where the action space is open
    is_action_valid: bool  # the last action was accepted
    task_type: str
    task_id: str
    score: float  # the environment's own metric where it is finer than `won`


@runtime_checkable
class Environment(Protocol):
    """A text environment with a fixed set of tasks, after gymnasium's interface.

    `instant` is True where a step is pure in-process computation (well under a millisecond to a few): the agent loop
    then steps it synchronously, which makes rollouts repeatable. Others run in a pool with a time limit.

    A chat model also needs a method `prompt(thinking: bool, history: int) -> Prompt`. thinking: rollout.thinking, whether
    the model is asked to think aloud. history: rollout.history, past turns to show with context `window`.
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


class Prompt(Protocol):
    """The user's side of a conversation about one kind of environment, and the parser of the answers.

    Context `window` asks with `message` at every turn; context `full` opens with `first` and goes on with `following`.
    """

    def message(
        self,
        task_observation: str,
        history: Sequence[Turn],
        observation: str,
        admissible: Sequence[str],
    ) -> str:
        """The whole user message. task_observation: the episode's first. history: all finished turns, none at first."""

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        """The first user message."""

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        """A later user message."""

    def project(self, text: str) -> tuple[str, bool]:
        """The command in a response, and whether the response had the required form."""


_KINDS: dict[str, Callable[[Any], Any]] = {
    "won": bool,
    "admissible_actions": lambda actions: [encodable(str(action)) for action in actions],
    "is_action_valid": bool,
    "task_type": lambda name: encodable(str(name)),
    "task_id": lambda name: encodable(str(name)),
    "score": float,
}


def known_facts(facts: Mapping[str, Any]) -> Info:
    """Those `facts` of a foreign environment that `Info` has a key for, converted to the types of `Info`."""
    return Info(**{name: kind(facts[name]) for name, kind in _KINDS.items() if name in facts})


E = TypeVar("E")


def copy_with(env: E, **changes: Any) -> E:
    """A shallow copy of `env` with some attributes replaced; the others are shared. `clone` is made of it."""
    other = copy(env)
    vars(other).update(changes)
    return other
