"""Dialects, for the demo: an environment's text shortened for tiny models, and a scripted expert to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

from atod_fast.envs.protocol import Environment


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a scripted episode."""

    observation: str
    command: str
    junk: bool  # a bad command on purpose, not to be imitated


Player = Callable[[Sequence[Step], str], str]  # finished steps, observation -> command


E = TypeVar("E", bound=Environment)


@dataclass(frozen=True)
class Dialect(Generic[E]):
    """How an environment's text is shortened, and who plays it. The functions have no state."""

    read: Callable[[str], list[str]]  # observation -> its words; lower case, so never a control token
    command: Callable[[Sequence[str]], str]  # an action's words, whatever they are -> its command
    words: Callable[[str], list[str]]  # command -> its words; the inverse of `command`
    # (environment, n) -> every word of the dialect, sorted; if words differ by task, those of the first n tasks.
    vocabulary: Callable[[E, int], list[str]]
    expert: Callable[[E], Player]  # plays the task of the last reset; can take over in any state
    junk: Callable[[E, str, Random], str]  # a bad player's command after an observation
