"""The base of the adapters to other interfaces: tasks by seed, success by reward, a plain prompt, bounded text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from atod_fast.envs.options import require, whole
from atod_fast.envs.prompt import PlainPrompt
from atod_fast.envs.text import CUT, fit

LONGEST_NAME = 200  # characters of an action, of a task's type or identifier
MOST_ACTIONS = 500  # that are listed at most


class Adapter:
    """Base of the adapters. Task t resets the wrapped environment with `seed` + t; the agent loop's seed is unused.

    tasks: number of tasks. won: an episode is won if the reward of its last step is at least this. instructions: shown
    to the agent before the first observation. chars: most characters of an observation, whose middle is cut out if it
    is longer, and of all listed actions together, of which the last are left out.
    """

    def __init__(self, *, tasks: int, seed: int, won: float, instructions: str, chars: int) -> None:
        whole(tasks=(tasks, 1), seed=(seed, 0), chars=(chars, 16))
        require("won", won, isinstance(won, int | float), "a number: the reward from which an episode is won")
        require("instructions", instructions, isinstance(instructions, str), "text")
        self._tasks, self._seed, self._won, self._instructions, self._chars = (
            tasks,
            seed,
            float(won),
            instructions,
            chars,
        )

    def __len__(self) -> int:
        return self._tasks

    def prompt(self, thinking: bool, history: int) -> PlainPrompt:
        return PlainPrompt(thinking, history, self._instructions)

    def _world_seed(self, task: int) -> int:
        if not 0 <= task < self._tasks:
            raise IndexError(f"task {task} of {self._tasks}")
        return self._seed + task

    def _fit(self, text: str) -> str:
        return fit(text, self._chars)

    def _fit_list(self, actions: Sequence[str]) -> list[str]:
        """Return the first actions that fit, with a mark at the end if some are left out."""
        listed = [fit(action, LONGEST_NAME) for action in actions[:MOST_ACTIONS]]
        room = sum(end <= self._chars for end in accumulate(map(len, listed)))
        return listed[:room] + [CUT.strip()] * (room < len(actions))
