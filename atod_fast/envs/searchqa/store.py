"""An index on disk: built passage by passage, opened by memory mapping.

The folder holds bm25s' own files, the passages (`passages.jsonl`, `ends.npy`) and `index.json`, which is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from secrets import token_hex

import numpy as np

from atod_fast.envs.searchqa.bm25 import Bm25, TermIds, TermLists, libraries, score_matrix
from atod_fast.envs.searchqa.passages import Passage, PassageFile, as_line
from atod_fast.errors import UserError

LINES, ENDS, MARK = "passages.jsonl", "ends.npy", "index.json"
FORMAT = {"format": 1, "analysis": "lower case, Lucene English stop words, Porter stems"}


class _Lists:
    """Term ids of each passage, read from one flat file as plain lists."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray) -> None:
        self._flat, self._ends = flat, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for end in self._ends.tolist():
            yield self._flat[start:end].tolist()
            start = end


def build(passages: Iterable[Passage], folder: Path, *, show_progress: bool = False) -> int:
    """Index `passages` into the new `folder`; return their number.

    Neither passages nor their term lists are held in memory: the peak is bm25s' construction of the score matrix, about
    40 bytes for each pair of a passage and a term in it. Raises UserError if `folder` exists or the passages hold no
    word, OSError if it cannot be written; an unfinished folder is removed.
    """
    if folder.exists():
        raise UserError(f"--out {str(folder)!r} exists; give a folder that does not")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{token_hex(4)}")
    partial.mkdir()
    try:
        count = _build(passages, partial, show_progress)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _build(passages: Iterable[Passage], folder: Path, show_progress: bool) -> int:
    numbers, flat = TermIds(), folder / "terms.tmp"
    ends, term_ends, size, terms = array("q"), array("q"), 0, 0
    with (folder / LINES).open("wb") as lines, flat.open("wb") as ids:
        for passage in passages:
            size += lines.write(as_line(passage))
            ends.append(size)
            row = array("i", numbers.of(passage.contents))
            row.tofile(ids)
            terms += len(row)
            term_ends.append(terms)
    np.save(folder / ENDS, np.frombuffer(ends, np.int64))
    rows = np.memmap(flat, np.int32, "r") if terms else np.empty(0, np.int32)
    score_matrix(TermLists(_Lists(rows, np.frombuffer(term_ends, np.int64)), numbers.vocabulary), show_progress).save(
        folder
    )
    del rows
    flat.unlink()
    (folder / MARK).write_text(json.dumps(FORMAT | {"passages": len(ends)}, indent=1) + "\n", encoding="utf-8")
    return len(ends)


def load(folder: Path) -> Bm25:
    """Return the index in `folder`, memory-mapped except for its vocabulary. Raise UserError if it holds no index.

    All callers get the same object.
    """
    mark = folder / MARK
    if not mark.is_file():
        raise UserError(
            f"retriever={str(folder)!r} holds no index; "
            "build one: python -m atod_fast.envs.searchqa.index CORPUS.jsonl --out FOLDER"
        )
    return _load(folder.resolve(), mark.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _load(folder: Path, built: int) -> Bm25:
    bm25s, _ = libraries()
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if {key: mark.get(key) for key in FORMAT} != FORMAT:
            raise ValueError("made by another version")
        passages = PassageFile(folder / LINES, folder / ENDS)
        index = bm25s.BM25.load(folder, mmap=True)
        scores = index.scores
        whole = (
            len(passages) == mark["passages"] == scores["num_docs"]
            and len(scores["data"]) == len(scores["indices"]) == scores["indptr"][-1]
        )
        if not whole:
            raise ValueError("its files do not belong together")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(
            f"retriever={str(folder)!r} is damaged ({error}); build it again: python -m atod_fast.envs.searchqa.index"
        ) from None
    return Bm25(index, passages)
