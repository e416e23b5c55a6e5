"""Find passages for a query: with an index in this process, or a server of Search-R1's protocol."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

from atod_fast.envs.searchqa.bm25 import Bm25
from atod_fast.envs.searchqa.passages import Passage, read_passages
from atod_fast.envs.searchqa.post import without_secrets
from atod_fast.envs.searchqa.store import load
from atod_fast.errors import NotHere


class RetrieverError(Exception):
    """The retriever is down, or refuses to search. `status`: of its HTTP answer, None if it gave none."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class BadAnswer(Exception):
    """The retriever's answer to this query is malformed or too long."""


class Retriever(Protocol):
    """Finds passages. Shared by all episodes, which may call it from several threads."""

    instant: bool  # as for an `Environment`

    def search(self, query: str, topk: int) -> list[Passage]:
        """Return at most `topk` passages, best first. Raise RetrieverError or BadAnswer."""
        ...


def is_url(retriever: str) -> bool:
    """Return whether `retriever` is an http or https URL rather than a path."""
    return retriever.lower().startswith(("http://", "https://"))


def local_path(retriever: str) -> Path:
    """Return the path of an index folder or a corpus. Raise NotHere if nothing is there."""
    path = Path(retriever).expanduser()
    if not path.is_dir() and not path.is_file():
        raise NotHere(
            f"retriever={without_secrets(retriever)!r} is no index folder, no corpus .jsonl and no http(s) URL; "
            "give one of these"
        )
    return path


def open_local(path: Path, bad_lines: int) -> Bm25:
    """Return the index in a folder, or index a corpus in memory. Equal arguments give the same object."""
    if path.is_dir():
        return load(path)
    return _indexed(path.resolve(), path.stat().st_mtime_ns, bad_lines)


@lru_cache(maxsize=4)
def _indexed(corpus: Path, written: int, bad_lines: int) -> Bm25:
    return Bm25.of(list(read_passages([corpus], option="retriever", bad_lines=bad_lines)))
