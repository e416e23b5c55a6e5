"""Search-QA's prompt, after verl-agent (prompts/search.py, memory/memory.py, env_package/search/projection.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from atod_fast.records import Turn

_OPENING = (
    "\nYou are an expert agent tasked with answering the given question step-by-step.\nYour question: {question}\n"
)
_HISTORY = (
    "\nPrior to this step, you have already taken {steps} step(s). Below is the interaction history where "
    "<search> </search> wrapped your past search queries and <information> </information> wrapped the corresponding "
    "search results returned by the external search engine. History:\n"
    "{history}\n"
)
_ASK = "\nNow it's your turn to respond for the current step.\n"
_THINK = (
    "You should first conduct reasoning process. This process MUST be enclosed within <think> </think> tags. \n"
    "After completing your reasoning, choose only one of the following actions (do not perform both):\n"
)
_ACT = "Choose only one of the following actions (do not perform both):\n"
_ACTIONS = (
    "(1) If you find you lack some knowledge, you can call a search engine to get more external information "
    "using format: <search> your query </search>.\n"
    "(2) If you have enough knowledge to answer the question confidently, provide your final answer "
    "within <answer> </answer> tags, without detailed illustrations. For example, <answer>Beijing</answer>.\n"
)
_AGAIN = "Your response held no valid action.\n"  # for an empty observation, as a message has to say something
_KINDS = ("search", "answer")
_BLOCKS = [re.compile(rf"<{kind}>(.*?)</{kind}>", re.IGNORECASE | re.DOTALL) for kind in _KINDS]
_OPENERS = re.compile("<(?:search|answer)>", re.IGNORECASE)


class SearchPrompt:
    """verl-agent's messages about Search-QA.

    thinking: ask for <think> ... </think>. history: searches shown with context `window`.
    """

    def __init__(self, thinking: bool, history: int) -> None:
        self.history = history
        self._request = _ASK + (_THINK if thinking else _ACT) + _ACTIONS

    def message(
        self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]
    ) -> str:
        if not history or not self.history:
            return self.first(task_observation if history else observation, admissible)
        # The answer to a command is the observation of the next turn.
        answers = [*(turn.observation for turn in history[1:]), observation]
        steps = [
            f"Step {n}:{turn.command} {answer}\n"
            for n, (turn, answer) in enumerate(zip(history, answers, strict=True), 1)
        ]
        past = _HISTORY.format(steps=len(history), history="\n".join(steps[-self.history :]))
        return _OPENING.format(question=task_observation) + past + self._request

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return _OPENING.format(question=observation) + self._request

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return observation or _AGAIN

    def response(self, command: str) -> str:
        """Return the response that gives `command`: the command itself, which has its tags."""
        return command

    def project(self, text: str) -> tuple[str, bool]:
        """Return the first <search> block, else the first <answer> block, else ""; and whether the form is right.

        Only the text up to the first closing tag counts. The form is wrong if there is no block, both kinds, or one
        kind twice. As in verl-agent, <think> is asked for but not required.
        """
        end = next((end for kind in _KINDS if (end := _end(text, f"</{kind}>"))), len(text))
        for kind, block in zip(_KINDS, _BLOCKS, strict=True):
            if found := block.search(text[:end]):
                return f"<{kind}>{found[1].strip()}</{kind}>", len(_OPENERS.findall(text)) == 1
        return "", False


def _end(text: str, tag: str) -> int:
    """Return the position after the first `tag`; 0 if there is none."""
    return text.find(tag) + len(tag) if tag in text else 0
