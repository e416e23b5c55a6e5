"""WebShop's search engine: BM25 over title, description, first bullet point and options.

The original uses Lucene 8 through Pyserini 0.17 (its defaults: k1 0.9, b 0.4, Porter stems, Lucene's English stop
words). Here bm25s scores with Lucene's formula, words are split as by Lucene's StandardTokenizer, and equal scores are
ordered by identifier as in Anserini. What still differs: Lucene rounds document lengths to four significant bits, stems
-logy and -bly one step further, and takes emoji and Chinese characters for words. Measured against it on the
1,000-product set (bench/webshop_fidelity.py): the same first hit in 98.5% of 3,303 queries, on average 98.6% of the
first ten hits and 99.2% of the first fifty.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from functools import cached_property, lru_cache
from random import Random

import numpy as np

from atod_fast.envs.bm25 import K1, B, best, libraries
from atod_fast.envs.webshop.catalogue import Product

HITS = 50  # most results of a search
MARKS = ("<a>", "<c>", "<q>")  # before an attribute, category or query: find all products that have it
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the "
    "their then there these they this to was will with".split()
)
CACHED_QUERIES = 4096
CACHED_WORDS = 1 << 16

# A word goes on over an apostrophe, full stop or colon between letters, and over one of .,;' between digits.
_WORD = re.compile(r"\w+(?:(?:(?<=[^\W\d_])['’.:·](?=[^\W\d_])|(?<=\d)['’.,;](?=\d))\w+)*")


class SearchEngine:
    """Finds products. Shared, read-only, by all episodes. Raises UserError without bm25s and PyStemmer."""

    def __init__(self, products: list[Product]) -> None:
        bm25s, stemmer = libraries("env.name='webshop'")
        self._products = products
        porter = stemmer.Stemmer("porter").stemWord

        @lru_cache(maxsize=CACHED_WORDS)
        def stem(word: str) -> str:
            word = word.removesuffix("'s").removesuffix("’s")
            # Lucene's stemmer leaves words of two letters alone: "us" is no "u".
            return "" if word in STOP_WORDS else porter(word) if len(word) > 2 else word

        self._stem = stem
        self._vocabulary: dict[str, int] = {}
        documents = [
            array("i", (self._vocabulary.setdefault(word, len(self._vocabulary)) for word in self.words(document(p))))
            for p in products
        ]
        self._bm25 = bm25s.BM25(k1=K1, b=B, method="lucene")
        if self._vocabulary:
            self._bm25.index((documents, self._vocabulary), show_progress=False)
        self._order = np.argsort(np.argsort([p.asin for p in products])).astype(np.int32)
        self._ranked = lru_cache(maxsize=CACHED_QUERIES)(self._rank)

    def words(self, text: str) -> list[str]:
        """Return the stems of the words of `text`, without stop words."""
        return [stem for word in _WORD.findall(text.lower()) if (stem := self._stem(word))]

    def search(self, keywords: str, random: Random) -> tuple[int, ...]:
        """Return the rows of the catalogue that `keywords` find, the best first, at most 50.

        As in WebShop `<r>` finds 50 at random, and a mark finds all products that have what follows it.
        """
        mark, *words = keywords.split(" ")
        if mark == "<r>":
            return tuple(random.sample(range(len(self._products)), min(HITS, len(self._products))))
        if mark in MARKS:
            name = words[:1] if mark == "<c>" else words  # WebShop's categories are single words
            return self._shelves[mark].get(" ".join(name).strip(), ())
        return self._ranked(keywords)

    @cached_property
    def _shelves(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Rows by attribute, category and query, under the mark that searches them."""
        shelves: dict[str, defaultdict[str, list[int]]] = {mark: defaultdict(list) for mark in MARKS}
        for row, product in enumerate(self._products):
            for attribute in dict.fromkeys(product.attributes):
                shelves["<a>"][attribute].append(row)
            shelves["<c>"][product.category].append(row)
            shelves["<q>"][product.query].append(row)
        return {mark: {name: tuple(rows) for name, rows in shelf.items()} for mark, shelf in shelves.items()}

    def _rank(self, keywords: str) -> tuple[int, ...]:
        words = [self._vocabulary[word] for word in self.words(keywords) if word in self._vocabulary]
        if not words:
            return ()
        return tuple(best(self._bm25.get_scores_from_ids(words), HITS, self._order).tolist())


def document(product: Product) -> str:
    """Return the text that the index holds of a product (search_engine/convert_product_file_format.py)."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    return " ".join([product.title, product.description, *product.bullets[:1], options])
