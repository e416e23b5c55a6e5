"""The questions and the corpus of helpers/searchqa.py as files."""

from __future__ import annotations

import pytest

from helpers.searchqa import CORPUS, QUESTIONS, write


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> tuple[str, str]:
    """Questions and corpus."""
    root = tmp_path_factory.mktemp("searchqa")
    corpus = [{"id": passage.id, "contents": passage.contents} for passage in CORPUS]
    return str(write(root / "quiz.jsonl", QUESTIONS)), str(write(root / "corpus.jsonl", corpus))
