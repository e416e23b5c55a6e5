"""Dialects: an environment retold in few words for tiny models, with a scripted expert to learn from. For the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from atod_fast.envs.protocol import Environment


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a scripted episode."""

    observation: str
    command: str
    junk: bool  # not to be imitated


Player = Callable[[Sequence[Step], str], str]  # finished steps, observation -> command


@dataclass(frozen=True)
class Dialect:
    """How an environment is retold, and who plays it. The functions have no state."""

    read: Callable[[str], list[str]]  # the words of an observation; lower case, so never a control token
    command: Callable[[Sequence[str]], str]  # the command that an action's words mean, whatever they are
    words: Callable[[str], list[str]]  # the words of a command; the inverse of `command`
    # Every word of the dialect, sorted; where tasks differ in words, those of the first so many tasks.
    vocabulary: Callable[[Environment, int], list[str]]
    expert: Callable[[Environment], Player]  # of the task that the environment was reset to; can take over in any state
    junk: Callable[[Environment, str, Random], str]  # what a bad player might answer to an observation
