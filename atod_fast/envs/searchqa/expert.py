"""A scripted expert for Search-QA. It uses hidden state: the accepted answers, and the searches that find them.

It searches first for the question, or with the question's own searches where they are known, then for the question
together with the answer, and last for the answer. It gives an answer that it has read in the results, and none that
it has not: such an episode is not won.
"""

from __future__ import annotations

from atod_fast.envs.protocol import Info
from atod_fast.envs.searchqa.questions import Question
from atod_fast.envs.searchqa.score import normalise

CLOSED = ("yes", "no")  # answers that no passage states: the question is searched once


class SearchQAExpert:
    """Plays one episode of `question`."""

    def __init__(self, question: Question) -> None:
        self._question, self._searches = question, 0
        text, answer = _plain(question.text), _plain(question.answers[0])
        self._queries = [*map(_plain, question.queries)] or [text, f"{text} {answer}", answer]
        self._read = ""

    def act(self, observation: str, info: Info) -> str:
        """Return the next command."""
        if self._searches:
            self._read = f"{self._read} {normalise(observation)} "
        answer = self._found()
        if answer is not None:
            return f"<answer>{answer}</answer>"
        query = self._queries[min(self._searches, len(self._queries) - 1)]
        self._searches += 1
        return f"<search>{query}</search>"

    def _found(self) -> str | None:
        """Return an accepted answer to give now: one that was read, when all searches known to be needed are done."""
        if self._searches < max(1, len(self._question.queries)):
            return None
        for answer in self._question.answers:
            words = normalise(answer)
            if words in CLOSED or words and f" {words} " in self._read:
                return _plain(answer)
        return None


def _plain(text: str) -> str:
    """Return `text` on one line, without tags."""
    return " ".join(text.replace("<", " ").replace(">", " ").split())
