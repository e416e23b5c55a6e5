"""What came from outside, made fit to be shown to a model: no control characters, nothing that looks like a tag, no more than asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from atod_fast.envs.adapter import INVISIBLE

CUT = " [... cut ...]"  # stands where the end of a passage was left out
NOTHING_FOUND = "No search results found."
STYLES = ("text", "json")

# "</information>", "<|im_end|>", "<s>": a mark that could end its own block, or be taken for an action or a control token.
_TAG = re.compile(r"<(?=[/|\uff5c]|[^\W\d_])")


def clean(text: str) -> str:
    """`text` without invisible characters, each `<` that opens something like a tag replaced by `\u2039`."""
    return _TAG.sub("\u2039", INVISIBLE.sub("", text))


def information(passages: Sequence[str], *, chars: int, style: str = "text") -> str:
    """The observation after a search: the passages numbered, each cleaned and cut after `chars` characters.

    style "json" is what verl-agent's search tool shows (Apache-2.0, skyrl_gym/tools/search.py): the same text as a JSON
    object {"result": "..."}, with line ends and letters beyond ASCII escaped.
    """
    shown = [_cut(clean(passage).strip(), chars) for passage in passages]
    return enclose("".join(f"Doc {number}: {text}\n" for number, text in enumerate(shown, 1)) or NOTHING_FOUND, style)


def enclose(text: str, style: str = "text") -> str:
    """`text` in its <information> block."""
    return f"<information>{json.dumps({'result': text}) if style == 'json' else text}</information>"


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + CUT
