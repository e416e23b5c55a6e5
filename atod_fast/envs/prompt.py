"""Prompts: `PlainPrompt` for any environment, `prompt_for` to get an environment's own, and what prompts share.

The built-in environments word their messages and parse the answers as verl-agent does (Apache-2.0,
agent_system/environments and agent_system/memory), with which the paper trained. verl-agent always asks for `<think>`;
the wording without it is ours, and so is everything for context `full`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from atod_fast.envs.protocol import Environment, Prompt
from atod_fast.envs.text import one_line
from atod_fast.errors import UserError
from atod_fast.records import Turn

MEMBERS = ("message", "first", "following", "project")  # of `Prompt`

_THINK = "First reason step by step within <think> </think> tags. Then give one action within <action> </action> tags."
_ACT = "Give one action within <action> </action> tags."
_NOTHING = "Nothing is to be seen."  # for an empty observation, as a message has to say something
_ACTION = re.compile("<action>(.*?)</action>", re.IGNORECASE | re.DOTALL)
_CHINESE = re.compile("[\u4e00-\u9fff]")
_KEPT = 100  # characters of a response without an action that become the command


def prompt_for(name: str, env: Environment, *, thinking: bool, history: int) -> Prompt:
    """Return the prompt of `env`: what its method `prompt(thinking, history)` returns. name: env.name, for messages.

    Raises:
        UserError: the environment has no such method, the method raises, or its result is no `Prompt`.
    """
    own: Callable[[bool, int], Prompt] | None = getattr(env, "prompt", None)
    if not callable(own):
        raise UserError(
            f"env.name={name!r} has no prompt; give its class a method prompt(thinking, history), "
            "such as one that returns envs.prompt.PlainPrompt (docs/environments.md)"
        )
    try:
        made = own(thinking, history)
    except Exception as error:
        raise UserError(
            f"env.name={name!r}: prompt(thinking, history) fails: {one_line(error)}; docs/environments.md shows one"
        ) from error
    if missing := [member for member in MEMBERS if not callable(getattr(made, member, None))]:
        kind = type(made).__name__
        raise UserError(
            f"env.name={name!r}: prompt(thinking, history) returns {kind}, which lacks {', '.join(missing)}"
        )
    return made


def past_turns(turns: Sequence[tuple[str, str]], most: int) -> tuple[int, str]:
    """Return how many turns are shown, and their text: the last `most` (at least 1) of `turns`, one a line.

    turns: pairs of observation and command.
    """
    recent = list(enumerate(turns, 1))[-most:]
    lines = [f"[Observation {n}: '{observation}', Action {n}: '{command}']" for n, (observation, command) in recent]
    return len(recent), "\n".join(lines)


def project_action(text: str, thinking: bool, kept: int) -> tuple[str, bool]:
    """Return a response's command, lower-cased, and whether the response had the required form.

    The command is the text between the first <action> and the first </action>. If one of them is missing, it is the
    last `kept` characters of the response, and the form is wrong. The form is wrong too if the response lacks thinking
    tags while `thinking` requires them, or contains a Chinese character.
    """
    lowered = text.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return lowered[-kept:], False
    thought = not thinking or ("<think>" in text and "</think>" in text)
    return lowered[start + len("<action>") : end].strip(), thought and not _CHINESE.search(text)


class PlainPrompt:
    """A prompt that asks for `<action> ... </action>`; the text between becomes the command unchanged.

    thinking: ask for, and require, <think> ... </think>. history: turns shown with context `window`. instructions: what
    the environment is about; shown first.
    """

    def __init__(self, thinking: bool, history: int, instructions: str = "") -> None:
        self.thinking, self.history, self.instructions = thinking, history, instructions

    def message(
        self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]
    ) -> str:
        if not history:
            return self.first(observation, admissible)
        past = []
        if len(history) > self.history:
            past.append(f"You began with: {task_observation}")
        if self.history:
            _, lines = past_turns([(turn.observation, turn.command) for turn in history], self.history)
            past.append(f"You have taken {len(history)} step(s). The last of them:\n{lines}")
        return self._joined(
            self.instructions,
            *past,
            f"You are now at step {len(history) + 1}.",
            _situation(observation, admissible),
            self._request,
        )

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return self._joined(self.instructions, _situation(observation, admissible), self._request)

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return _situation(observation, admissible)

    def project(self, text: str) -> tuple[str, bool]:
        """Return a response's command, and whether the response had the required form.

        The command is the first <action> block after </think>, its case kept; without a block, the end of the response.
        """
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
