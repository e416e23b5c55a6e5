"""Search with a server of Search-R1's protocol (Apache-2.0, search_r1/search/retrieval_server.py):

    POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}
    {"result": [[{"document": {"id": "17", "contents": "\"Title\"\\ntext"}, "score": 12.3}, ...]]}

The server is not trusted: the size, shape and time of its answers are bounded here, and its text is cleaned where it
is shown.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from threading import Event, Lock, Semaphore
from typing import Any

from atod_fast.envs.searchqa.passages import Passage, contents_of
from atod_fast.envs.searchqa.post import Poster, TooLong, without_secrets
from atod_fast.envs.searchqa.retriever import BadAnswer, RetrieverError
from atod_fast.envs.searchqa.text import clean
from atod_fast.errors import UserError

WINDOW = 0.004  # seconds a query waits for others to share its request
BATCH = 64  # most queries in a request
ANSWER_BYTES = 1 << 20  # most bytes of an answer for each of its queries
FIRST_WAIT, LONGEST_WAIT = 0.25, 4.0  # seconds before a retry, doubled each time

Outcome = list[Passage] | RetrieverError | BadAnswer
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Batch:
    """Queries that share a request. The thread of the first one sends it; the others wait until it is `done`."""

    topk: int
    queries: list[str] = field(default_factory=list)
    full: Event = field(default_factory=Event)
    done: Event = field(default_factory=Event)
    outcomes: list[Outcome] = field(default_factory=list)


class HttpRetriever:
    """A `Retriever` that asks the server at `url`; a URL without a path means /retrieve.

    Queries that threads ask within a few milliseconds, or while `concurrency` requests are under way, share a request.
    timeout: seconds for an attempt, from connecting to the last byte. retries: further attempts after one that found no
    server, ran out of time or met a server that is overloaded or broken (408, 429, 5xx); all together should take less
    than env.step_timeout. If a query in a shared request was refused (400, 413, 422, 500) or badly answered, it is
    asked again alone, so that one query cannot spoil the others.
    """

    instant = False

    def __init__(self, url: str, *, timeout: float = 10.0, retries: int = 3, concurrency: int = 8) -> None:
        try:
            import tenacity

            self._poster = Poster(url, "/retrieve", timeout)
        except ImportError as error:
            raise UserError(
                f"retriever={without_secrets(url)!r} needs urllib3 and tenacity ({error}); "
                "pip install 'atod_fast[search]'"
            ) from None
        self.url, self._timeout, self._attempts = self._poster.shown, timeout, retries + 1
        self._retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_exponential(FIRST_WAIT, max=LONGEST_WAIT),
            retry=tenacity.retry_if_exception(_passing),
            reraise=True,
        )
        self._slots, self._lock, self._open = Semaphore(concurrency), Lock(), None
        self._warned: set[str] = set()

    def search(self, query: str, topk: int) -> list[Passage]:
        batch, place = self._join(query, topk)
        if place == 0:
            self._send(batch)
        batch.done.wait()
        outcome = batch.outcomes[place]
        if len(batch.queries) > 1 and _spoilt(outcome):
            with self._slots:
                outcome = self._ask([query], topk)[0]
        if isinstance(outcome, BadAnswer):
            self._warn(str(outcome))
        if isinstance(outcome, Exception):
            raise type(outcome)(*outcome.args)  # each thread raises its own copy
        return outcome

    def _join(self, query: str, topk: int) -> tuple[_Batch, int]:
        with self._lock:
            if self._open is None or self._open.topk != topk:
                self._open = _Batch(topk)
            batch = self._open
            batch.queries.append(query)
            if len(batch.queries) == BATCH:
                self._open = None
                batch.full.set()
            return batch, len(batch.queries) - 1

    def _send(self, batch: _Batch) -> None:
        try:
            batch.full.wait(WINDOW)
            with self._slots:
                with self._lock:
                    if self._open is batch:
                        self._open = None
                batch.outcomes = self._ask(batch.queries, batch.topk)
        finally:
            batch.outcomes = batch.outcomes or [
                RetrieverError(f"retriever {self.url}: the request was broken off")
            ] * len(batch.queries)
            batch.done.set()

    def _ask(self, queries: list[str], topk: int) -> list[Outcome]:
        """Return the outcome of each query; a failure of the whole request is the outcome of all."""
        request = json.dumps({"queries": queries, "topk": topk, "return_scores": True}).encode()
        try:
            answer = self._retrying(self._attempt, request, ANSWER_BYTES * len(queries))
            return read_answer(answer, len(queries), topk)
        except RetrieverError as error:
            attempts = f" in {self._attempts} attempt{'s' * (self._attempts > 1)}" if _passing(error) else ""
            line = (
                f"retriever {self.url}: {error}{attempts}; "
                "see that it runs and speaks the protocol, or correct env.options.retriever"
            )
            return [RetrieverError(line, error.status)] * len(queries)
        except BadAnswer as error:
            return [error] * len(queries)

    def _attempt(self, request: bytes, most: int) -> bytes:
        """Return the body of the answer to one POST. Raise RetrieverError or BadAnswer if there is none."""
        try:
            status, body = self._poster.post(request, most)
        except TooLong as error:
            raise BadAnswer(str(error)) from None
        except TimeoutError:
            raise RetrieverError(f"no whole answer within timeout={self._timeout:g} s") from None
        except ConnectionError as error:
            raise RetrieverError(f"no answer ({_excerpt(str(error).encode())})") from error
        if status != 200:
            raise RetrieverError(f"HTTP status {status}: {_excerpt(body)}", status)
        return body

    def _warn(self, reason: str) -> None:
        """Log a warning once for each reason, not for each turn."""
        if reason not in self._warned and len(self._warned) < 20:
            self._warned.add(reason)
            _log.warning("retriever %s gave %s; a turn that gets such an answer counts as invalid", self.url, reason)


def read_answer(body: bytes, queries: int, topk: int) -> list[Outcome]:
    """Return the passages of each query, with a BadAnswer in place of malformed ones.

    Raises BadAnswer if the whole answer is malformed. Documents may come without scores around them, as Search-R1's
    server sends them if `return_scores` is false.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer(f"an answer that is not JSON: {_excerpt(body)}") from None
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, list):
        raise BadAnswer(f"JSON without a list 'result': {_excerpt(body)}")
    if len(result) != queries:
        raise BadAnswer(f"{len(result)} results for {queries} queries")
    return [_passages(found, topk) for found in result]


def _passages(found: Any, topk: int) -> Outcome:
    if not isinstance(found, list):
        return BadAnswer("a result that is not a list of documents")
    passages = [passage for entry in found if (passage := _passage(entry))][:topk]
    return passages if passages or not found else BadAnswer("a result of documents without text")


def _passage(entry: Any) -> Passage | None:
    """Return a passage, or None if the entry holds no text. Search-R1's BM25 server sends no id."""
    document = entry.get("document", entry) if isinstance(entry, dict) else None
    if not isinstance(document, dict) or not isinstance(document.get("contents", ""), str):
        return None
    name = document.get("id")
    try:
        return Passage(str(name) if isinstance(name, str | int) else "unknown", contents_of(document))
    except ValueError:
        return None


def _spoilt(outcome: Outcome) -> bool:
    """Return whether another query of the same request may be the cause."""
    return isinstance(outcome, BadAnswer) or (
        isinstance(outcome, RetrieverError) and outcome.status in (400, 413, 422, 500)
    )


def _passing(error: BaseException) -> bool:
    """Return whether another attempt may succeed."""
    return isinstance(error, RetrieverError) and (
        error.status is None or error.status in (408, 429) or error.status >= 500
    )


def _excerpt(body: bytes) -> str:
    """Return the beginning of `body` as a line that can be logged."""
    return " ".join(clean(bytes(body[:400]).decode(errors="replace")).split())[:160]
