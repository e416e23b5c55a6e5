"""What the adapters of foreign interfaces share: tasks by seed, success by reward, text made fit to be shown to a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from atod_fast.envs.options import require, whole
from atod_fast.envs.protocol import Info

if TYPE_CHECKING:
    from atod_fast.envs.prompt import PlainPrompt

CUT = " [... cut ...] "  # stands where the middle of a text was left out, and ends a list that was too long
LONGEST_NAME = 200  # characters of an action, of a task's type or identifier
LONGEST_ERROR = 300  # characters
MOST_ACTIONS = 500  # listed

# A terminal's escape sequences, all control characters but tab and newline, and what shows nothing of its own: it could
# hide text or break up a tag. Lone surrogates cannot be encoded. Joiners and variation selectors are part of scripts and emoji.
INVISIBLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def encodable(text: str) -> str:
    """`text` as UTF-8 can hold it: the halves of a surrogate pair joined, U+FFFD for a half without its other one."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_KINDS: dict[str, Callable[[Any], Any]] = {
    "won": bool,
    "admissible_actions": lambda actions: [encodable(str(action)) for action in actions],
    "is_action_valid": bool,
    "task_type": lambda name: encodable(str(name)),
    "task_id": lambda name: encodable(str(name)),
    "score": float,
}


class Adapter:
    """Task t is what the wrapped world makes of its seed `seed` + t, whatever seed the agent loop gives.

    tasks: their number. won: an episode is won that ends with a step of at least this reward. instructions: what the agent is
    told ahead of the first observation. chars: characters of an observation, of which the middle is left out where it is longer, and
    of all actions listed beside it, of which the last are.
    """

    def __init__(self, *, tasks: int, seed: int, won: float, instructions: str, chars: int) -> None:
        whole(tasks=(tasks, 1), seed=(seed, 0), chars=(chars, 16))
        require("won", won, isinstance(won, int | float), "a number: the reward from which an episode is won")
        require("instructions", instructions, isinstance(instructions, str), "text")
        self._tasks, self._seed, self._won, self._instructions, self._chars = tasks, seed, float(won), instructions, chars

    def __len__(self) -> int:
        return self._tasks

    def prompt(self, thinking: bool, history: int) -> PlainPrompt:
        from atod_fast.envs.prompt import PlainPrompt  # here, because environments do without torch

        return PlainPrompt(thinking, history, self._instructions)

    def _world_seed(self, task: int) -> int:
        if not 0 <= task < self._tasks:
            raise IndexError(f"task {task} of {self._tasks}")
        return self._seed + task

    def _fit(self, text: str) -> str:
        return fit(text, self._chars)

    def _fit_list(self, actions: Sequence[str]) -> list[str]:
        """Of the actions those that there is room for."""
        listed = [fit(action, LONGEST_NAME) for action in actions[:MOST_ACTIONS]]
        room = sum(end <= self._chars for end in accumulate(map(len, listed)))
        return listed[:room] + [CUT.strip()] * (room < len(actions))


def fit(text: str, most: int) -> str:
    """`text` as a model, a log or a terminal may have it: without what is invisible, and of more than `most` characters not the middle."""
    return cut(INVISIBLE.sub("", text), most)


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - most // 2] + CUT + text[len(text) - most // 2 :]


def known_facts(facts: Mapping[str, Any]) -> Info:
    """Those of a foreign world's `facts` that have a name and meaning here, as the types they have here."""
    return Info(**{name: kind(facts[name]) for name, kind in _KINDS.items() if name in facts})


def one_line(error: BaseException) -> str:
    """Its kind and what it says, which may be a server's words, as they may be printed."""
    text = fit(" ".join(str(error).split()), LONGEST_ERROR).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
