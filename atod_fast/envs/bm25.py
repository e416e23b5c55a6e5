"""What the two search engines share: the BM25 libraries, Anserini's constants, and the best of many scores."""

from __future__ import annotations

import logging
from types import ModuleType

import numpy as np

from atod_fast.errors import UserError

K1, B = 0.9, 0.4


def libraries(needed_by: str) -> tuple[ModuleType, ModuleType]:
    """Return the modules bm25s and PyStemmer. Raise UserError, which names `needed_by`, if one is not installed."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise UserError(f"{needed_by} needs bm25s and PyStemmer ({error}); pip install 'atod_fast[search]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # bm25s sets it to DEBUG on import
    return bm25s, Stemmer


def best(scores: np.ndarray, most: int, order: np.ndarray | None = None) -> np.ndarray:
    """Return the indices of the `most` highest scores above 0, the highest first; [<= most] int64.

    scores: [N]. order: [N]; of equal scores the one with the lower order comes first, by default the lower index.
    """
    found = np.flatnonzero(scores > 0)
    if len(found) > most:
        found = found[scores[found] >= np.partition(scores[found], -most)[-most]]
    ties = found if order is None else order[found]
    return found[np.lexsort((ties, -scores[found]))][:most]
