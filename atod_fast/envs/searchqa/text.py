"""What came from outside, made fit to be shown to a model: no control characters, nothing that looks like a tag, no more than asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from atod_fast.envs.text import INVISIBLE, cut_end

NOTHING_FOUND = "No search results found."
STYLES = ("text", "json")

# "</information>", "<|im_end|>", "<s>": a mark that could end its own block, or be taken for an action or a control token.
# What joins or varies letters is left in a text, which may need it, but hides no mark.
_JOINERS = "\u034f\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef"
_TAG = re.compile(rf"<(?=[\s{_JOINERS}]*[/|\uff5c]|[{_JOINERS}]*[^\W\d_])")


def clean(text: str) -> str:
    """`text` without invisible characters, each `<` that opens something like a tag replaced by `\u2039`."""
    return _TAG.sub("\u2039", INVISIBLE.sub("", text))


def information(passages: Sequence[str], *, chars: int, style: str = "text") -> str:
    """The observation after a search: the passages numbered, each cleaned and cut after `chars` characters, counted as they are shown.

    style "json" is what verl-agent's search tool shows (Apache-2.0, skyrl_gym/tools/search.py): the same text as a JSON
    object {"result": "..."}, with line ends and letters beyond ASCII escaped.
    """
    shown = [cut_end(clean(passage).strip(), chars, _escaped if style == "json" else len) for passage in passages]
    return enclose("".join(f"Doc {number}: {text}\n" for number, text in enumerate(shown, 1)) or NOTHING_FOUND, style)


def enclose(text: str, style: str = "text") -> str:
    """`text` in its <information> block."""
    return f"<information>{json.dumps({'result': text}) if style == 'json' else text}</information>"


def _escaped(text: str) -> int:
    """Characters of `text` within a JSON string."""
    return len(json.dumps(text)) - 2
