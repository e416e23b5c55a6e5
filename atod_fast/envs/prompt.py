"""A prompt for any world, without words of its own about it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from atod_fast.records import Turn

_THINK = "First reason step by step within <think> </think> tags. Then give one action within <action> </action> tags."
_ACT = "Give one action within <action> </action> tags."
_NOTHING = "Nothing is to be seen."  # in a growing conversation an empty message would say nothing
_ACTION = re.compile("<action>(.*?)</action>", re.IGNORECASE | re.DOTALL)
_CHINESE = re.compile("[\u4e00-\u9fff]")
_KEPT = 100  # characters of a response without an action that become the command


def past_turns(turns: Sequence[tuple[str, str]], most: int) -> tuple[int, str]:
    """How many of `turns`, of (observation, command), are shown, and the last `most` (1 or more) of them, a line each."""
    recent = list(enumerate(turns, 1))[-most:]
    lines = [f"[Observation {n}: '{observation}', Action {n}: '{command}']" for n, (observation, command) in recent]
    return len(recent), "\n".join(lines)


def project_action(text: str, thinking: bool, kept: int) -> tuple[str, bool]:
    """What stands between the first <action> and the first </action>, lower-cased; without both the last `kept` characters.

    Also of the wrong form: thinking tags missing where asked for, and any Chinese character.
    """
    lowered = text.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return lowered[-kept:], False
    thought = not thinking or ("<think>" in text and "</think>" in text)
    return lowered[start + len("<action>") : end].strip(), thought and not _CHINESE.search(text)


class PlainPrompt:
    """Asks for `<action> ... </action>`, whose text becomes the command as it is.

    `thinking`: ask for, and require, <think> ... </think>. `history`: turns shown with context `window`. `instructions`: what
    the world is about, ahead of everything else.
    """

    def __init__(self, thinking: bool, history: int, instructions: str = "") -> None:
        self.thinking, self.history, self.instructions = thinking, history, instructions

    def message(self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]) -> str:
        if not history:
            return self.first(observation, admissible)
        past = []
        if len(history) > self.history:
            past.append(f"You began with: {task_observation}")
        if self.history:
            _, lines = past_turns([(turn.observation, turn.command) for turn in history], self.history)
            past.append(f"You have taken {len(history)} step(s). The last of them:\n{lines}")
        return self._joined(self.instructions, *past, f"You are now at step {len(history) + 1}.", _situation(observation, admissible), self._request)

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return self._joined(self.instructions, _situation(observation, admissible), self._request)

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return _situation(observation, admissible)

    def project(self, text: str) -> tuple[str, bool]:
        """The first <action> block after what was thought; without one the end of the response. The letters keep their case."""
        found = _ACTION.search(text.rpartition("</think>")[2])
        if found is None:
            return text.strip()[-_KEPT:], False
        return found[1].strip(), not self.thinking or "<think>" in text and "</think>" in text

    @property
    def _request(self) -> str:
        return _THINK if self.thinking else _ACT

    @staticmethod
    def _joined(*parts: str) -> str:
        return "\n\n".join(part for part in parts if part)


def _situation(observation: str, admissible: Sequence[str]) -> str:
    names = ", ".join(f'"{action}"' if "'" in action else f"'{action}'" for action in admissible)
    return (observation or _NOTHING) + (f"\nYour admissible actions: {names}." if admissible else "")
