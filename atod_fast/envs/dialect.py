"""What the demo needs to know of a world: how its tiny models are told of it, and who shows them what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from atod_fast.envs.protocol import Environment
from atod_fast.models import DEMO_WEIGHTS


@dataclass(frozen=True)
class Dialect:
    """A world in few words. None of these functions keeps anything in mind."""

    read: Callable[[str], list[str]]  # an observation's words that tell states apart; lower case, so never a control token
    command: Callable[[Sequence[str]], str]  # what the words of an action say to the world, whatever they are
    words: Callable[[str], list[str]]  # the words of a command; the inverse of `command`
    verbs: tuple[str, ...]  # words by which a vocabulary is known to be this world's


@dataclass(frozen=True, slots=True)
class Step:
    observation: str
    command: str
    junk: bool  # not to be imitated


Player = Callable[[Sequence[Step], str], str]  # finished steps, observation -> command


@dataclass(frozen=True)
class Recipe:
    """How much supervision a model gets."""

    traces: int  # of each task
    tokens: int  # trained on, over all epochs
    seed: int
    worlds: int = 1  # the preset's, and others, so that the facts of one are not learnt by heart


@dataclass(frozen=True)
class World:
    name: str
    env: type
    preset: str  # its settings
    folder: Path  # of the shipped teacher/ and student/
    dialect: Dialect
    vocabulary: Callable[[Environment, int], list[str]]  # every word of the dialect, sorted; of the first so many tasks, where they differ
    expert: Callable[[Environment], Player]  # of the task that the environment was reset to; can take over in any state
    junk: Callable[[Environment, str, Random], str]  # what a bad player might say on an observation
    recipes: Mapping[str, Recipe]  # teacher's and student's


def weights(name: str) -> Path:
    """Folder of the models of world `name`."""
    return DEMO_WEIGHTS / name


def trace(world: World, env: Environment, task: int, rng: Random, junk_rate: float, max_turns: int) -> tuple[list[Step], bool]:
    """Let the expert play `task`, each turn with probability `junk_rate` saying junk instead; the steps, and whether it won."""
    observation, info = env.reset(0, task)
    player = world.expert(env)
    steps: list[Step] = []
    over = False
    while len(steps) < max_turns and not over:
        wanted, bad = player(steps, observation), rng.random() < junk_rate
        command = world.junk(env, observation, rng) if bad else wanted
        steps.append(Step(observation, command, bad))
        observation, _, terminated, truncated, info = env.step(command)
        over = terminated or truncated
    return steps, info["won"]
