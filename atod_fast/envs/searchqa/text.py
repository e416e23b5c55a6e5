"""Make text from outside fit to be shown to a model.

It has no control characters, nothing that looks like a tag, and no more characters than asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from atod_fast.envs.text import INVISIBLE, cut_end

NOTHING_FOUND = "No search results found."
STYLES = ("text", "json")

# The beginning of a mark such as "</information>", "<|im_end|>" or "<s>", which could end its own block, or be taken
# for an action or a control token. Joiners and variation selectors stay in a text, which may need them, but they do not
# hide a mark.
_JOINERS = "\u034f\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef"
_TAG = re.compile(rf"<(?=[\s{_JOINERS}]*[/|\uff5c]|[{_JOINERS}]*[^\W\d_])")


def clean(text: str) -> str:
    """Return `text` without invisible characters, each `<` that opens something like a tag replaced by `\u2039`."""
    return _TAG.sub("\u2039", INVISIBLE.sub("", text))


def information(passages: Sequence[str], *, chars: int, style: str = "text") -> str:
    """Return the observation after a search: the passages numbered, each cleaned and cut after `chars` characters.

    Characters are counted as they are shown. style "json" is what verl-agent's search tool shows (Apache-2.0,
    skyrl_gym/tools/search.py): the same text as a JSON object {"result": "..."}, with line ends and letters beyond
    ASCII escaped.
    """
    shown = [cut_end(clean(passage).strip(), chars, _escaped if style == "json" else len) for passage in passages]
    return enclose("".join(f"Doc {number}: {text}\n" for number, text in enumerate(shown, 1)) or NOTHING_FOUND, style)


def enclose(text: str, style: str = "text") -> str:
    """Return `text` in its <information> block."""
    return f"<information>{json.dumps({'result': text}) if style == 'json' else text}</information>"


def _escaped(text: str) -> int:
    """Return the number of characters of `text` within a JSON string."""
    return len(json.dumps(text)) - 2
