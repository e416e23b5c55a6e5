"""What the adapters of foreign interfaces share: tasks by seed, success by reward, text made fit to be shown to a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from atod_fast.envs.protocol import Info
from atod_fast.errors import UserError

if TYPE_CHECKING:
    from atod_fast.rollout.prompts.plain import PlainPrompt

CUT = " [... cut ...] "  # stands where the middle of an observation was left out

# A terminal's escape sequences, all control characters but tab and newline, and what shows nothing of its own: it could
# hide text or break up a tag. Lone surrogates cannot be encoded. Joiners and variation selectors are part of scripts and emoji.
INVISIBLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)

_KINDS: dict[str, Callable[[Any], Any]] = {
    "won": bool,
    "admissible_actions": lambda actions: [str(action) for action in actions],
    "is_action_valid": bool,
    "task_type": str,
    "task_id": str,
    "score": float,
}


class Adapter:
    """Task t is what the wrapped world makes of its seed `seed` + t, whatever seed the agent loop gives.

    tasks: their number. won: an episode is won that ends with a step of at least this reward. instructions: what the agent is
    told ahead of the first observation. chars: characters of an observation; of a longer one the middle is left out.
    """

    def __init__(self, *, tasks: int, seed: int, won: float, instructions: str, chars: int) -> None:
        for name, value, least in (("tasks", tasks, 1), ("seed", seed, 0), ("chars", chars, 16)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name}={value!r} must be a whole number of at least {least}")
        if not isinstance(won, int | float):
            raise UserError(f"won={won!r} must be a number: the reward from which an episode is won")
        self._tasks, self._seed, self._won, self._instructions, self._chars = tasks, seed, float(won), instructions, chars

    def __len__(self) -> int:
        return self._tasks

    def prompt(self, thinking: bool, history: int) -> PlainPrompt:
        from atod_fast.rollout.prompts.plain import PlainPrompt  # here, because environments do without torch

        return PlainPrompt(thinking, history, self._instructions)

    def _world_seed(self, task: int) -> int:
        if not 0 <= task < self._tasks:
            raise IndexError(f"task {task} of {self._tasks}")
        return self._seed + task

    def _fit(self, text: str) -> str:
        text, most = INVISIBLE.sub("", text), self._chars
        return text if len(text) <= most else text[: most - most // 2] + CUT + text[len(text) - most // 2 :]


def known_facts(facts: Mapping[str, Any]) -> Info:
    """Those of a foreign world's `facts` that have a name and meaning here, as the types they have here."""
    return Info(**{name: kind(facts[name]) for name, kind in _KINDS.items() if name in facts})


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
