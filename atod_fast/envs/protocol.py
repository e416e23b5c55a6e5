"""The interface of an environment, text in and text out, and of the prompt that words its messages to a chat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar, runtime_checkable

from atod_fast.envs.text import encodable
from atod_fast.records import Turn


class Info(TypedDict, total=False):
    """Facts that come with an observation."""

    won: bool
    admissible_actions: list[str]  # in the environment's order; empty if the action space is open
    is_action_valid: bool  # the last action was accepted
    task_type: str
    task_id: str
    score: float  # the environment's own metric, if finer than `won`
    part: str  # of a mix, by which success is reported too


class Usual(NamedTuple):
    """Usual sizes of an environment's episodes, for plans: tokens of a vocabulary of about 150,000."""

    turns: float  # of an episode
    prompt_tokens: float  # of a turn with context `window`
    response_tokens: float  # of a turn


@runtime_checkable
class Environment(Protocol):
    """A text environment with a fixed set of tasks, after gymnasium's interface.

    `instant` is True if a step is pure in-process computation that takes at most a few milliseconds: the agent loop
    then steps the environment synchronously, which makes rollouts repeatable. Others run in a pool with a time limit.

    A chat model needs a method `prompt(thinking: bool, history: int) -> Prompt` too. thinking: rollout.thinking,
    whether the model is asked to think aloud. history: rollout.history, past turns to show with context `window`.

    Its class may have an attribute `usual: Usual`, from which `--dry-run` plans a usual step, and a method
    `expert() -> Expert`, which `atod_fast.collect` plays: an expert for the task of the last reset.
    """

    instant: bool

    def __len__(self) -> int:
        """Return the number of tasks; task indices are 0..len-1."""
        ...

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        """Start `task`; return observation and info. Equal seed, task and actions give an equal episode."""
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        """Return observation, reward, terminated, truncated and info."""
        ...

    def clone(self) -> Environment:
        """Return another, independent episode over the same (shared, read-only) tasks."""
        ...

    def close(self) -> None:
        """Release what the episode holds."""


class Expert(Protocol):
    """A scripted player of one episode. It may use hidden state: what the environment does not show to an agent."""

    def act(self, observation: str, info: Info) -> str:
        """Return the next command, after the observation and the info that the environment has just returned."""
        ...


class Prompt(Protocol):
    """The user's side of a conversation about one kind of environment, and the parser of the model's responses.

    Context `window` calls `message` at every turn; context `full` calls `first` once and `following` afterwards.

    It may have a method `response(command: str) -> str`, the response without thinking that gives a command, if that is
    not `<action>command</action>`.
    """

    def message(
        self,
        task_observation: str,
        history: Sequence[Turn],
        observation: str,
        admissible: Sequence[str],
    ) -> str:
        """Return the whole user message.

        task_observation: the episode's first observation. history: all finished turns, none at first.
        """
        ...

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        """Return the first user message."""
        ...

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        """Return a later user message."""
        ...

    def project(self, text: str) -> tuple[str, bool]:
        """Return the command in a response, and whether the response had the required form."""
        ...


_KINDS: dict[str, Callable[[Any], Any]] = {
    "won": bool,
    "admissible_actions": lambda actions: [encodable(str(action)) for action in actions],
    "is_action_valid": bool,
    "task_type": lambda name: encodable(str(name)),
    "task_id": lambda name: encodable(str(name)),
    "score": float,
    "part": lambda name: encodable(str(name)),
}


def known_facts(facts: Mapping[str, Any]) -> Info:
    """Return those `facts` of another interface's environment that `Info` has keys for, converted to its types."""
    return Info(**{name: kind(facts[name]) for name, kind in _KINDS.items() if name in facts})


E = TypeVar("E")


def copy_with(env: E, **changes: Any) -> E:
    """Return a shallow copy of `env` with some attributes replaced; the others are shared. For `clone`."""
    other = copy(env)
    vars(other).update(changes)
    return other
