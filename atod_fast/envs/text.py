"""Text from outside, as a model, a log or a terminal may have it: encodable, visible, of bounded length."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable

CUT = " [... cut ...]"  # stands for the end of a text that was left out
GAP = f"{CUT} "  # stands for the middle of a text that was left out
LONGEST_ERROR = 300  # characters

# Escape sequences of terminals, control characters except tab and newline, and characters without a shape, which could
# hide text or break up a tag. Lone surrogates cannot be encoded. Joiners and variation selectors belong to scripts and emoji.
INVISIBLE = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def encodable(text: str) -> str:
    """`text` without lone surrogates: two halves of a pair are joined, a half without the other becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def fit(text: str, most: int) -> str:
    """`text` without invisible characters; if it is longer than `most` characters, without its middle."""
    return cut_middle(INVISIBLE.sub("", text), most)


def cut_middle(text: str, most: int) -> str:
    """`text`; if it is longer than `most` characters, the first and last of them, `most` in all, around GAP."""
    return text if len(text) <= most else text[: most - most // 2] + GAP + text[len(text) - most // 2 :]


def cut_end(text: str, most: int, length: Callable[[str], int] = len) -> str:
    """`text`; if its `length` is above `most`, its longest beginning that is not, and CUT."""
    if length(text) <= most:
        return text
    return text[: bisect_right(range(most + 1), most, key=lambda kept: length(text[:kept])) - 1] + CUT


def one_line(error: BaseException) -> str:
    """Kind and message of an error on one line that may be printed: the message can be a server's words."""
    text = fit(" ".join(str(error).split()), LONGEST_ERROR).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
