"""Text from outside, made fit for a model, a log or a terminal: encodable, visible, of bounded length."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable

CUT = " [... cut ...]"  # replaces the end of a text that was cut
GAP = f"{CUT} "  # replaces the middle of a text that was cut
LONGEST_ERROR = 300  # characters

# Escape sequences of terminals, control characters except tab and newline, characters without a shape, which could hide
# text or break up a tag, and lone surrogates, which cannot be encoded. Joiners and variation selectors are left alone:
# scripts and emoji need them.
INVISIBLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]"
    "|[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def encodable(text: str) -> str:
    """Return `text` without lone surrogates: two halves of a pair are joined, a half alone becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fit(text: str, most: int) -> str:
    """Return `text` without invisible characters and, if it is longer than `most` characters, without its middle."""
    return cut_middle(INVISIBLE.sub("", text), most)


def cut_middle(text: str, most: int) -> str:
    """Return `text`; if it is longer than `most` characters, its two ends, `most` characters in all, around GAP."""
    return text if len(text) <= most else text[: most - most // 2] + GAP + text[len(text) - most // 2 :]


def cut_end(text: str, most: int, length: Callable[[str], int] = len) -> str:
    """Return `text`; if its `length` is above `most`, its longest beginning that fits, followed by CUT."""
    if length(text) <= most:
        return text
    return text[: bisect_right(range(most + 1), most, key=lambda kept: length(text[:kept])) - 1] + CUT


def one_line(error: BaseException) -> str:
    """Return the kind and message of an error on one printable line; the message may be a server's words."""
    text = fit(" ".join(str(error).split()), LONGEST_ERROR).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
