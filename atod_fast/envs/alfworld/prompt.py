"""ALFWorld's prompt, after verl-agent (prompts/alfworld.py, env_manager.py, env_package/alfworld/projection.py)."""

from __future__ import annotations

from collections.abc import Sequence

from atod_fast.envs.prompt import past_turns, project_action
from atod_fast.records import Turn

_OPENING = "\nYou are an expert agent operating in the ALFRED Embodied Environment."
_NOW = (
    "our current observation is: {observation}\nYour admissible actions of the current situation are: [{admissible}]."
)
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
_KEPT = 30  # characters of a response without an action that become the command


class AlfWorldPrompt:
    """verl-agent's messages about ALFWorld.

    thinking: ask for, and require, <think> ... </think>. history: turns shown with context `window`.
    """

    def __init__(self, thinking: bool, history: int) -> None:
        self.thinking, self.history = thinking, history
        self._request = _ASK + (_THINK if thinking else _ACT)

    def message(
        self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]
    ) -> str:
        if not history:
            return self.first(observation, admissible)
        task = task_observation.partition(_TASK_MARK)[2].strip()
        if not self.history:
            # verl-agent's message without history would lose the task after the first turn.
            return self.first(f"{observation}\n\n{_TASK_MARK}{task}", admissible)
        shown, lines = past_turns([(turn.observation, turn.command) for turn in history], self.history)
        past = _HISTORY.format(task=task, steps=len(history), shown=shown, history=lines, step=len(history) + 1)
        return _OPENING + past + self._situation(observation, admissible)

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return f"{_OPENING}\nY{self._situation(observation, admissible)}"

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return f"{observation}\nYour admissible actions of the current situation are: [{_listed(admissible)}]."

    def project(self, text: str) -> tuple[str, bool]:
        return project_action(text, self.thinking, _KEPT)

    def _situation(self, observation: str, admissible: Sequence[str]) -> str:
        return _NOW.format(observation=observation, admissible=_listed(admissible)) + self._request


def _listed(admissible: Sequence[str]) -> str:
    return "\n ".join(f"'{action}'" for action in admissible if action != "help")
