"""Passages to search: read from JSON lines, or one at a time from a memory-mapped file.

{"id": "17", "contents": "\"Title\"\nText ..."}      as Search-R1's corpora
{"id": "17", "title": "Title", "text": "Text ..."}  the same passage in parts
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atod_fast.envs.searchqa.jsonl import read_jsonl, text_of


@dataclass(frozen=True, slots=True)
class Passage:
    id: str
    contents: str  # the title in quotes, a newline, the text


def parse_passage(entry: dict[str, Any]) -> Passage:
    """Return the passage of one line. Raise ValueError, with the reason, if it is malformed."""
    return Passage(text_of(entry, "id"), contents_of(entry))


def contents_of(entry: dict[str, Any]) -> str:
    """Return a passage's contents, given whole or as title and text. Raise ValueError if it has none."""
    return (
        text_of(entry, "contents")
        if "contents" in entry or "text" not in entry
        else f'"{text_of(entry, "title")}"\n{text_of(entry, "text")}'
    )


def read_passages(
    paths: Sequence[Path], *, option: str, bad_lines: int, read: Callable[[int], object] = lambda size: None
) -> Iterator[Passage]:
    """Yield the passages of the files one by one; arguments and errors are those of `read_jsonl`."""
    return read_jsonl(
        paths, lambda entry, path, number: parse_passage(entry), option=option, bad_lines=bad_lines, read=read
    )


class PassageFile(Sequence[Passage]):
    """Passages on disk, memory-mapped.

    lines: holds one passage a line. ends: [N] int64, the byte at which each line ends.
    """

    def __init__(self, lines: Path, ends: Path) -> None:
        self._ends = np.load(ends, mmap_mode="r")
        with lines.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._ends.ndim != 1 or self._ends.dtype != np.int64 or self._ends[-1] != len(self._bytes):
            raise ValueError(f"{ends.name} does not belong to {lines.name}")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place: int) -> Passage:
        start = int(self._ends[place - 1]) if place else 0
        return Passage(**json.loads(self._bytes[start : int(self._ends[place])]))


def as_line(passage: Passage) -> bytes:
    """Return a passage as a line of a `PassageFile`."""
    return json.dumps(asdict(passage)).encode() + b"\n"
