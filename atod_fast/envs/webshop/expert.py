"""A scripted expert for WebShop. It uses hidden state: the product and the options that a goal was made from.

It searches for what the instruction asks for, turns pages until the product is listed, opens it, chooses the options
and buys. If the product is not found, it searches for the product's title, which the instruction does not tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from atod_fast.envs.protocol import Info
from atod_fast.envs.webshop.goals import Goal
from atod_fast.envs.webshop.pages import BUY, NEXT, PREVIOUS

PAGES = 3  # of results, looked through before the title is searched
LONGEST = 150  # characters of a search
_UNSAID = re.compile(r"[^ -~]|[\[\]<>]")  # characters that a search leaves out


class WebShopExpert:
    """Plays one visit for `goal`."""

    def __init__(self, goal: Goal) -> None:
        options = goal.options
        values = list(options.values() if isinstance(options, Mapping) else options)
        self._asin = goal.product.asin.lower()
        product = goal.product
        wordings = (
            " ".join([*goal.attributes, product.query, *values]),
            product.title,
            product.description,
            product.asin,
        )
        self._searches = [f"search[{words}]" for words in map(_words, wordings) if words][:2]
        self._options = [value for wanted in values if (value := _listed(wanted, goal))]
        self._page, self._opened = 0, False
        self._left: list[str] = []  # options still to be chosen

    def act(self, observation: str, info: Info) -> str:
        """Return the next command."""
        actions = info.get("admissible_actions", [])
        if f"click[{BUY}]" in actions:
            if not self._opened:
                return f"click[{PREVIOUS}]"
            return f"click[{self._left.pop(0)}]" if self._left else f"click[{BUY}]"
        self._opened = f"click[{self._asin}]" in actions
        if self._opened:
            self._left = list(self._options)
            return f"click[{self._asin}]"
        if f"click[{NEXT}]" in actions and 0 < self._page < PAGES:
            self._page += 1
            return f"click[{NEXT}]"
        self._page = 1
        return self._searches.pop(0) if len(self._searches) > 1 else self._searches[0]


def _words(text: str) -> str:
    """Return the first words of `text` to search for, each once."""
    said, length = [], 0
    for word in dict.fromkeys(_UNSAID.sub(" ", text.lower()).split()):
        length += len(word) + 1
        if length > LONGEST:
            break
        said.append(word)
    return " ".join(said)


def _listed(wanted: str, goal: Goal) -> str | None:
    """Return the value of the goal's product that is `wanted`, as its page lists it; None if none is."""
    values = [value for values in goal.product.options.values() for value in values]
    return next((value for value in values if value.lower() == wanted.lower()), None)
