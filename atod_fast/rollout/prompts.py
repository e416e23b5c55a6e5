"""What a chat model is told about a world, and how its answer becomes a command; ALFWorld's after verl-agent.

Wording and projection follow verl-agent (Apache-2.0, agent_system/environments: prompts/alfworld.py, env_manager.py and
env_package/alfworld/projection.py), with which the paper trained. verl-agent always asks for `<think>`; the wording
without it, and everything for context `full`, is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.errors import UserError
from atod_fast.trajectory import Turn


class Prompt(Protocol):
    """The user's side of the conversation about one kind of world, and the reading of the answers.

    Context `window` asks with `message` at every turn; context `full` opens with `first` and goes on with `following`.
    """

    def message(self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]) -> str:
        """The whole user message. `task_observation`: the episode's first. `history`: all finished turns, none at first."""

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        """The first user message."""

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        """A later user message."""

    def project(self, text: str) -> tuple[str, bool]:
        """The command in a response, and whether the response had the required form."""


_OPENING = "\nYou are an expert agent operating in the ALFRED Embodied Environment."
_NOW = "our current observation is: {observation}\nYour admissible actions of the current situation are: [{admissible}]."
_THINK = (
    "You should first reason step-by-step about the current situation. "
    "This reasoning process MUST be enclosed within <think> </think> tags.\n"
    "Once you've finished your reasoning, you should choose an admissible action for current step "
    "and present it within <action> </action> tags.\n"
)
_ACT = "You should choose an admissible action for current step and present it within <action> </action> tags.\n"
_ASK = "\n\nNow it's your turn to take an action.\n"
_HISTORY = (
    " Your task is to: {task}\n"
    "Prior to this step, you have already taken {steps} step(s). Below are the most recent {shown} observations "
    "and the corresponding actions you took: {history}\n"
    "You are now at step {step} and y"
)
_TASK_MARK = "Your task is to: "
_CHINESE = re.compile("[\u4e00-\u9fff]")


class AlfWorldPrompt:
    """`thinking`: ask for, and require, <think> ... </think>. `history`: turns shown with context `window`."""

    def __init__(self, thinking: bool, history: int) -> None:
        self.thinking, self.history = thinking, history
        self._request = _ASK + (_THINK if thinking else _ACT)

    def message(self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]) -> str:
        if not history:
            return self.first(observation, admissible)
        task = task_observation.partition(_TASK_MARK)[2].strip()
        if not self.history:
            # verl-agent's message without history would lose the task after the first turn.
            return self.first(f"{observation}\n\n{_TASK_MARK}{task}", admissible)
        recent = list(enumerate(history, 1))[-self.history :]
        lines = [f"[Observation {n}: '{turn.observation}', Action {n}: '{turn.command}']" for n, turn in recent]
        past = _HISTORY.format(task=task, steps=len(history), shown=len(recent), history="\n".join(lines), step=len(history) + 1)
        return _OPENING + past + self._situation(observation, admissible)

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return f"{_OPENING}\nY{self._situation(observation, admissible)}"

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return f"{observation}\nYour admissible actions of the current situation are: [{_listed(admissible)}]."

    def project(self, text: str) -> tuple[str, bool]:
        """What stands between the first <action> and the first </action>, lower-cased; without both the last 30 characters.

        Also of the wrong form: thinking tags missing where asked for, and any Chinese character.
        """
        lowered = text.lower()
        start, end = lowered.find("<action>"), lowered.find("</action>")
        if start < 0 or end < 0:
            return lowered[-30:], False
        thought = not self.thinking or ("<think>" in text and "</think>" in text)
        return lowered[start + len("<action>") : end].strip(), thought and not _CHINESE.search(text)

    def _situation(self, observation: str, admissible: Sequence[str]) -> str:
        return _NOW.format(observation=observation, admissible=_listed(admissible)) + self._request


def _listed(admissible: Sequence[str]) -> str:
    return "\n ".join(f"'{action}'" for action in admissible if action != "help")


def prompt_for(name: str, env: object, thinking: bool, history: int) -> Prompt:
    """The prompt of `env`, the world that `name` made: its own `prompt(thinking, history)` if it has one."""
    own = getattr(env, "prompt", None)
    if callable(own):
        return own(thinking, history)
    if isinstance(env, AlfWorld):
        return AlfWorldPrompt(thinking, history)
    raise UserError(f"env.name={name!r} has no prompt; give its class a method prompt(thinking, history) that returns one (see rollout/prompts.py)")
