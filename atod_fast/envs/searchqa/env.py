"""Search-QA as an `Environment`: a question, searches, an answer; the rules of verl-agent's search environment."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atod_fast.envs.options import choice, goes_with, whole
from atod_fast.envs.protocol import Info, Usual, copy_with
from atod_fast.envs.searchqa.bm25 import Bm25
from atod_fast.envs.searchqa.client import HttpRetriever
from atod_fast.envs.searchqa.expert import SearchQAExpert
from atod_fast.envs.searchqa.generator import generate as generate_world
from atod_fast.envs.searchqa.prompt import SearchPrompt
from atod_fast.envs.searchqa.questions import Question, read_questions
from atod_fast.envs.searchqa.retriever import BadAnswer, Retriever, is_url, local_path, open_local
from atod_fast.envs.searchqa.score import exact_match, f1
from atod_fast.envs.searchqa.text import NOTHING_FOUND, STYLES, enclose, information
from atod_fast.errors import UserError

UNUSABLE = "The search engine gave no usable answer."
_COMMAND = re.compile(r"<(search|answer)>((?:(?!</\1>).)*)</\1>", re.IGNORECASE | re.DOTALL)
_OPENING = re.compile("<(?:search|answer)>", re.IGNORECASE)

Paths = str | os.PathLike | Sequence[str | os.PathLike]


def parse_command(action: str) -> tuple[str, str] | None:
    """Return ("search", query) or ("answer", text); None unless the action is exactly one of these blocks.

    verl-agent's projection (agent_system/environments/env_package/search/projection.py, Apache-2.0) reduces a response
    to a single block or to nothing. A response with both kinds, one kind twice, or neither is invalid there and here.
    """
    block = _COMMAND.fullmatch(action.strip())
    if block is None or _OPENING.search(block[2]):
        return None
    return block[1].lower(), block[2].strip()


class SearchQA:
    """Questions to be answered with the help of a search engine.

    Commands: `<search>query</search>`, answered by `<information>...</information>`, and `<answer>text</answer>`, which
    ends the episode. Anything else is invalid, and the observation after it is empty. The first observation is the
    question. A retriever that fails raises RetrieverError; if its answer is malformed, the turn counts as invalid.
    Nothing is truncated here: env.max_turns cuts off, 4 in the preset as in verl-agent.

    What is asked, and where it is looked up (exactly one of the two):
      questions: JSON-lines files {id, question, golden_answers, data_source}, with sources (only these data_source) and
        limit (so many, evenly spaced over the files). retriever: an index folder, a corpus .jsonl of passages {id,
        contents} to be indexed in memory, or the URL of a server; with a URL timeout (seconds for an attempt), retries,
        and concurrency (simultaneous requests). bad_lines: so many malformed lines are skipped.
      generate: number of questions about a made-up world, with seed and hops (most searches that a question needs, 1 or
        2). Even and odd seeds have no thing in common.
    topk: passages of a search. passage_chars: a longer passage is cut. results: "text", or "json" for verl-agent's
      format.
    reward: of an answer that matches exactly; all else gives 0. info["score"] is the answer's F1, 0 before it.
    """

    usual = Usual(turns=3, prompt_tokens=822, response_tokens=60)  # bench/prompts.py; the rest assumed

    def __init__(
        self,
        *,
        questions: Paths | None = None,
        retriever: str | os.PathLike | None = None,
        sources: Sequence[str] = (),
        limit: int | None = None,
        bad_lines: int = 10,
        timeout: float = 10.0,
        retries: int = 3,
        concurrency: int = 8,
        generate: int | None = None,
        seed: int = 0,
        hops: int = 2,
        topk: int = 3,
        passage_chars: int = 1500,
        results: str = "text",
        reward: float = 1.0,
    ) -> None:
        if (generate is None) == (questions is None and retriever is None):
            raise UserError(
                "searchqa takes either questions=<files> with retriever=<index, corpus or URL>, or generate=N"
            )
        whole(topk=(topk, 1), passage_chars=(passage_chars, 1))
        _number(reward=reward)
        choice("results", results, STYLES)
        given = {"sources": sources, "limit": limit, "bad_lines": bad_lines}
        remote = {"timeout": timeout, "retries": retries, "concurrency": concurrency}
        made = {"seed": seed, "hops": hops}
        if generate is not None:
            _only("questions=", given | remote)
            self._questions, self._retriever = _generated(generate, seed, hops)
        else:
            _only("generate=N", made)
            self._questions, self._retriever = _existing(questions, retriever, given, remote)
        self.instant = self._retriever.instant
        self._topk, self._chars, self._style, self._reward = topk, passage_chars, results, float(reward)
        self._asked: Question | None = None

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def question(self) -> Question:
        """The question of this episode. Raises RuntimeError before the first reset."""
        if self._asked is None:
            raise RuntimeError("step before reset")
        return self._asked

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        """Ask question `task`. The environment is deterministic: `seed` changes nothing."""
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} of {len(self)} questions")
        self._asked, self._over = self._questions[task], False
        return self._asked.text, self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        question = self.question
        if self._over:
            raise RuntimeError("step after the end of the episode")
        kind, text = parse_command(action) or (None, "")
        if kind == "answer":
            self._over = True
            won = exact_match(text, question.answers)
            return "", self._reward if won else 0.0, True, False, self._info(True, won, f1(text, question.answers))
        observation, valid = self._search(text) if kind else ("", False)
        return observation, 0.0, False, False, self._info(valid)

    def clone(self) -> SearchQA:
        return copy_with(self, _asked=None)

    def prompt(self, thinking: bool, history: int) -> SearchPrompt:
        return SearchPrompt(thinking, history)

    def expert(self) -> SearchQAExpert:
        """Return a scripted player of the question of the last reset."""
        return SearchQAExpert(self.question)

    def close(self) -> None:
        self._asked = None

    def _search(self, query: str) -> tuple[str, bool]:
        """Return the observation after a search, and whether the retriever's answer was usable."""
        if not query:
            return enclose(NOTHING_FOUND, self._style), True
        try:
            found = self._retriever.search(query, self._topk)
        except BadAnswer:
            return enclose(UNUSABLE, self._style), False
        return information([passage.contents for passage in found], chars=self._chars, style=self._style), True

    def _info(self, valid: bool, won: bool = False, score: float = 0.0) -> Info:
        return Info(
            won=won,
            admissible_actions=[],
            is_action_valid=valid,
            task_type=self.question.source,
            task_id=self.question.id,
            score=score,
        )


def _generated(count: int, seed: int, hops: int) -> tuple[list[Question], Retriever]:
    whole(generate=(count, 1), seed=(seed, 0), hops=(hops, 1))
    if hops > 2:
        raise UserError(f"hops={hops} is too many; the made-up world has questions of 1 and 2")
    world = generate_world(seed, hops)
    if count > len(world.questions):
        raise UserError(
            f"generate={count} is too many; the world of seed={seed}, hops={hops} has {len(world.questions)} questions"
        )
    return world.questions[:count], Bm25.of(world.passages)


def _existing(
    questions: Paths | None, retriever: str | os.PathLike | None, given: dict, remote: dict
) -> tuple[list[Question], Retriever]:
    for name, value, what in (
        ("questions", questions, "JSON lines of questions"),
        ("retriever", retriever, "an index folder, a corpus .jsonl or a URL"),
    ):
        if value is None:
            raise UserError(f"searchqa needs {name}=: {what}")
    whole(bad_lines=(given["bad_lines"], 0), **({} if given["limit"] is None else {"limit": (given["limit"], 1)}))
    paths = _texts("questions", questions, "a JSON-lines file or a list of them")
    sources = _texts("sources", given["sources"], "a data_source or a list of them")
    if not isinstance(retriever, str | os.PathLike):
        raise UserError(f"retriever={retriever!r} must be an index folder, a corpus .jsonl or a URL")
    local = None if is_url(os.fspath(retriever)) else local_path(os.fspath(retriever))
    found = read_questions(
        [Path(path).expanduser() for path in paths], sources=sources, limit=given["limit"], bad_lines=given["bad_lines"]
    )
    if local is None:
        whole(retries=(remote["retries"], 0), concurrency=(remote["concurrency"], 1))
        _number(timeout=remote["timeout"])
        if not 0 < remote["timeout"] < 3600:
            raise UserError(f"timeout={remote['timeout']!r} must be a number of seconds above 0 and below 3600")
        return found, HttpRetriever(os.fspath(retriever), **remote)
    _only("retriever=<URL>", remote)
    return found, open_local(local, given["bad_lines"])


_DEFAULTS = dict(SearchQA.__init__.__kwdefaults__ or {})


def _only(source: str, options: dict) -> None:
    goes_with(source, **{name: (value, _DEFAULTS[name]) for name, value in options.items() if value != []})


def _texts(name: str, value: Any, what: str) -> list[str]:
    """Return `value` as a list; a single text becomes a list of one. Raise UserError if it is neither."""
    texts = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str | os.PathLike) for text in texts):
        raise UserError(f"{name}={value!r} must be {what}")
    return [os.fspath(text) for text in texts]


def _number(**options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"{name}={value!r} must be a finite number")
