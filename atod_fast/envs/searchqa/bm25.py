"""BM25 search in this process, as in Search-R1's BM25 retriever.

It uses bm25s with Lucene's English analysis and Pyserini's constants (k1 0.9, b 0.4).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from threading import Lock

from atod_fast.envs import bm25
from atod_fast.envs.bm25 import K1, B
from atod_fast.envs.searchqa.passages import Passage
from atod_fast.errors import UserError

INSTANT = 1_000_000  # passages; up to here a search, at most 3.5 ms, is not worth a thread
_WORD = re.compile(r"\w+")
_STEMMING = Lock()  # a PyStemmer object serves one thread at a time


libraries = partial(bm25.libraries, "retriever: search in this process")


@cache
def _analysis():
    bm25s, stemmer = libraries()
    return frozenset(bm25s.stopwords.STOPWORDS_EN), stemmer.Stemmer("porter").stemWord


def term(word: str) -> str:
    """Return the Porter stem of a lower-case word, by which it is searched; "" for a stop word of Lucene's."""
    stop_words, stem = _analysis()
    with _STEMMING:
        return "" if word in stop_words else stem(word)


class TermIds(dict[str, int]):
    """Maps each word to its term's number, in order of first appearance; -1 for a stop word.

    vocabulary: term -> number.
    """

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}

    def __missing__(self, word: str) -> int:
        stem = term(word)
        self[word] = number = self.vocabulary.setdefault(stem, len(self.vocabulary)) if stem else -1
        return number

    def of(self, text: str) -> list[int]:
        """Return the term numbers of the words of `text`, in order, without stop words."""
        return [number for word in _WORD.findall(text.lower()) if (number := self[word]) >= 0]


class TermLists:
    """What bm25s indexes: the passages' term ids and their vocabulary.

    ids: term ids of each passage, iterated several times. vocabulary: term -> number.
    """

    def __init__(self, ids: Iterable[Sequence[int]], vocabulary: dict[str, int]) -> None:
        self.ids, self.vocab = ids, vocabulary


def score_matrix(lists: TermLists, show_progress: bool = False):
    """Return bm25s' index of these passages. Raise UserError if they hold no word."""
    if not lists.vocab:
        raise UserError(
            "retriever: the corpus holds no passage with a word to search for; give JSON lines with id and contents"
        )
    index = libraries()[0].BM25(method="lucene", k1=K1, b=B)
    index.index(lists, create_empty_token=False, show_progress=show_progress)
    return index


class Bm25:
    """A `Retriever` over `passages`, whose scores are in `index` (a bm25s.BM25)."""

    def __init__(self, index, passages: Sequence[Passage]) -> None:
        self.instant = len(passages) <= INSTANT
        self._index, self._passages = index, passages

    @classmethod
    def of(cls, passages: Sequence[Passage]) -> Bm25:
        """Index `passages` in memory: for up to about a hundred thousand of them."""
        numbers = TermIds()
        ids = [numbers.of(passage.contents) for passage in passages]
        return cls(score_matrix(TermLists(ids, numbers.vocabulary)), passages)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, topk: int) -> list[Passage]:
        return [passage for passage, _ in self.scored(query, topk)]

    def scored(self, query: str, topk: int) -> list[tuple[Passage, float]]:
        """Return at most `topk` passages that share a term with `query`, with their scores, best first.

        Passages of equal score are in the corpus's order.
        """
        scores = self._index.get_scores_from_ids(
            self._index.get_tokens_ids([term(word) for word in _WORD.findall(query.lower())])
        )
        return [(self._passages[place], float(scores[place])) for place in bm25.best(scores, topk).tolist()]
