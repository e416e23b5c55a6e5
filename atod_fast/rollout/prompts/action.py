"""What ALFWorld's and WebShop's prompts share: past turns as text, and the reading of `<action> ... </action>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CHINESE = re.compile("[\u4e00-\u9fff]")


def past_turns(turns: Sequence[tuple[str, str]], most: int) -> tuple[int, str]:
    """How many of `turns`, of (observation, command), are shown, and the last `most` (1 or more) of them, a line each."""
    recent = list(enumerate(turns, 1))[-most:]
    lines = [f"[Observation {n}: '{observation}', Action {n}: '{command}']" for n, (observation, command) in recent]
    return len(recent), "\n".join(lines)


def project_action(text: str, thinking: bool, kept: int) -> tuple[str, bool]:
    """What stands between the first <action> and the first </action>, lower-cased; without both the last `kept` characters.

    Also of the wrong form: thinking tags missing where asked for, and any Chinese character.
    """
    lowered = text.lower()
    start, end = lowered.find("<action>"), lowered.find("</action>")
    if start < 0 or end < 0:
        return lowered[-kept:], False
    thought = not thinking or ("<think>" in text and "</think>" in text)
    return lowered[start + len("<action>") : end].strip(), thought and not _CHINESE.search(text)
