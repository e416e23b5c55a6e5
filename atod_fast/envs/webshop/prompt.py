"""WebShop's prompt, after verl-agent (prompts/webshop.py, env_manager.py, env_package/webshop/projection.py)."""

from __future__ import annotations

from collections.abc import Sequence

from atod_fast.envs.prompt import past_turns, project_action
from atod_fast.envs.webshop.pages import SEPARATOR
from atod_fast.records import Turn

# verl-agent's two templates differ in a blank at the end of the first line; the hyphen is a non-breaking one.
_OPENING = (
    "\nYou are an expert autonomous agent operating in the WebShop e\u2011commerce environment.{blank}\n"
    "Your task is to: {task}.\n"
)
_HISTORY = (
    "Prior to this step, you have already taken {steps} step(s). Below are the most recent {shown} observations "
    "and the corresponding actions you took: {history}\n"
    "You are now at step {step} and your"
)
_NOW = " current observation is: {observation}."
_ADMISSIBLE = "\nYour admissible actions of the current situation are: \n[\n{admissible}\n]."
_ASK = "\n\nNow it's your turn to take one action for the current step.\n"
_THINK = (
    "You should first reason step-by-step about the current situation, "
    "then think carefully which admissible action best advances the shopping goal. "
    "This reasoning process MUST be enclosed within <think> </think> tags. \n"
    "Once you've finished your reasoning, you should choose an admissible action for current step "
    "and present it within <action> </action> tags.\n"
)
_ACT = "You should choose an admissible action for current step and present it within <action> </action> tags.\n"
_MARK = "Instruction:"  # the piece of a page before the task
_LONGEST = 13_000  # characters of a message; a longer one leaves out the history
_KEPT = 20  # characters of a response without an action that become the command


class WebShopPrompt:
    """verl-agent's messages about WebShop.

    thinking: ask for, and require, <think> ... </think>. history: turns shown with context `window`.
    """

    def __init__(self, thinking: bool, history: int) -> None:
        self.thinking, self.history = thinking, history
        self._request = _ASK + (_THINK if thinking else _ACT)

    def message(
        self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]
    ) -> str:
        task, _ = _parted(task_observation)
        plain = self._alone(task, observation, admissible)
        if not history or not self.history:
            return plain
        shown, lines = past_turns([(_parted(turn.observation)[1], turn.command) for turn in history], self.history)
        past = _HISTORY.format(steps=len(history), shown=shown, history=lines, step=len(history) + 1)
        whole = _OPENING.format(blank="", task=task) + past + self._situation(observation, admissible)
        return whole if len(whole) <= _LONGEST else plain

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return self._alone(_parted(observation)[0], observation, admissible)

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return _parted(observation)[1] + _ADMISSIBLE.format(admissible=_listed(admissible))

    def project(self, text: str) -> tuple[str, bool]:
        return project_action(text, self.thinking, _KEPT)

    def _alone(self, task: str, observation: str, admissible: Sequence[str]) -> str:
        return _OPENING.format(blank=" ", task=task) + "Your" + self._situation(observation, admissible)

    def _situation(self, observation: str, admissible: Sequence[str]) -> str:
        return (
            _NOW.format(observation=_parted(observation)[1])
            + _ADMISSIBLE.format(admissible=_listed(admissible))
            + self._request
        )


def _parted(observation: str) -> tuple[str, str]:
    """Return (task, the page's pieces after it, quoted), or ("", page) if the page states no task."""
    pieces = observation.split(SEPARATOR)
    if _MARK not in pieces[:-1]:
        return "", observation
    task, *rest = pieces[pieces.index(_MARK) + 1 :]
    return task, SEPARATOR.join(f"'{piece}'" for piece in rest)


def _listed(admissible: Sequence[str]) -> str:
    return "\n".join(f"'{action}'," for action in admissible)
