"""Exact match and F1 of short answers, as in Search-R1 and verl-agent.

Answers are normalised as in SQuAD (Rajpurkar et al. 2016). Only ASCII punctuation and English articles are dropped:
that is what the published numbers were computed with.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalise(answer: str) -> str:
    """Return `answer` in lower case, without punctuation and articles, words one blank apart: "The U.S." -> "us"."""
    return " ".join(_ARTICLE.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: Iterable[str]) -> bool:
    """Return whether `answer` equals any of the `gold` answers after normalisation."""
    said = normalise(answer)
    return any(said == normalise(right) for right in gold)


def f1(answer: str, gold: Iterable[str]) -> float:
    """Return the F1 of `answer`, 0 to 1: the best harmonic mean of word precision and recall against a gold answer.

    It is 0 if there is no gold answer.
    """
    return max((_f1(normalise(answer).split(), normalise(right).split()) for right in gold), default=0.0)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))
