"""Questions with their accepted answers, from JSON lines.

    {"id": "nq-17", "question": "who wrote ...", "golden_answers": ["Mary Shelley"], "data_source": "nq"}

NQ, TriviaQA, PopQA, HotpotQA, 2WikiMultihopQA, MuSiQue and Bamboogle are distributed in this form (FlashRAG,
Search-R1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atod_fast.envs.searchqa.jsonl import read_jsonl, text_of
from atod_fast.envs.searchqa.text import clean
from atod_fast.envs.text import cut_end
from atod_fast.errors import UserError

CHARS = 2000  # a longer question is cut


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    text: str
    answers: tuple[str, ...]  # any of them is right
    source: str  # the data set it comes from
    queries: tuple[str, ...] = ()  # searches that find the answer one after the other, if known


def parse_question(entry: dict[str, Any], path: Path, number: int) -> Question:
    """Return the question of one line. Raise ValueError if a part is missing or of the wrong type.

    `golden_answers` may be one answer; a number counts as its digits, an empty answer is left out. If `data_source` is
    missing, it is the file's name.
    """
    given = entry.get("golden_answers")
    given = given if isinstance(given, list) else [given]
    answers = [
        text_of({"an answer": answer}, "an answer") for answer in given if answer is not None and str(answer).strip()
    ]
    if not answers:
        raise ValueError("golden_answers holds no answer" if "golden_answers" in entry else "no golden_answers")
    source = text_of(entry, "data_source") if entry.get("data_source") is not None else path.stem
    return Question(
        clean(text_of(entry, "id")),
        cut_end(clean(text_of(entry, "question")).strip(), CHARS),
        tuple(answers),
        clean(source),
    )


def read_questions(
    paths: Iterable[Path], *, sources: Sequence[str] = (), limit: int | None = None, bad_lines: int = 10
) -> list[Question]:
    """Return the questions of the files in order. Raise UserError if none is left.

    sources: only questions of these. limit: at most so many, evenly spaced. bad_lines: see `read_jsonl`.
    """
    paths = list(paths)
    found = list(read_jsonl(paths, parse_question, option="questions", bad_lines=bad_lines))
    known = dict.fromkeys(question.source for question in found)
    for source in sources:
        if source not in known:
            raise UserError(f"sources={source!r} occurs in no question; the files have {', '.join(known) or 'none'}")
    if sources:
        found = [question for question in found if question.source in sources]
    if not found:
        raise UserError(
            f"questions={', '.join(map(str, paths))!r}: no question in it; "
            "give JSON lines with id, question and golden_answers"
        )
    if limit is None or limit >= len(found):
        return found
    return [found[place * len(found) // limit] for place in range(limit)]
