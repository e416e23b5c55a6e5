"""One way through the shop, from the search page to a purchase: which page an action leads to.

After princeton-nlp/WebShop (MIT, web_agent_site/envs/web_agent_text_env.py: WebAgentTextEnv.step, SimServer.receive), but for
where it trips over itself: an option called "attributes" is an option and no hidden page, `< Prev` works also where the search
words name a page of its site, an option with brackets can be clicked, and the search `<a>` finds products as on its web site.
"""

from __future__ import annotations

import re
from random import Random

from atod_fast.envs.webshop import pages
from atod_fast.envs.webshop.shop import Shop

_ACTION = re.compile(r"(.+)\[(.+)\]")  # matched at the beginning only: what follows the last bracket does not count


def _parse(action: str) -> tuple[str, str]:
    """Name and argument, in lower case. WebShop cannot click what has a bracket in it; here whatever is listed can be."""
    if action.startswith("click[") and action.endswith("]"):
        return "click", action[6:-1].lower()
    match = _ACTION.match(action)
    return (match[1], match[2].lower()) if match else ("", "")


class Visit:
    """A visit of `shop` for `instruction`. random: of the search `<r>`.

    page: what is shown. options: chosen so far, value by name. bought: row in the catalogue, once something is.
    """

    def __init__(self, shop: Shop, instruction: str, random: Random) -> None:
        self._shop, self._instruction, self._random = shop, instruction, random
        self.bought: int | None = None
        self._back_to_search()

    def act(self, action: str) -> bool:
        """Follow `search[words]`, from any page, or `click[what]`; False, and nothing happens, where it is neither or cannot be clicked."""
        name, argument = _parse(action)
        if self.bought is not None:
            return False
        if name == "search":
            self._results(argument, 1)
        elif name == "click" and argument in self.page.clickables:
            self._click(argument)
        else:
            return False
        return True

    def _click(self, name: str) -> None:
        if name == pages.SEARCH_BAR:
            return
        if name == pages.BACK:
            self._back_to_search()
        elif self._place == "results":
            if name in (pages.NEXT, pages.PREVIOUS):
                self._results(self._keywords, self._number + (1 if name == pages.NEXT else -1))
            else:
                self._row = next(row for row in self._shown if self._shop.catalogue.products[row].asin.lower() == name)
                self._item()
        elif name == pages.PREVIOUS:
            if self._place == "item":
                self._results(self._keywords, self._number)
            else:
                self._item()
        elif name == pages.BUY:
            self.bought = self._row
        elif name in pages.SUB_PAGES:
            self._place = "sub"
            self.page = pages.sub_page(self._instruction, self._shop.catalogue.products[self._row], name)
        else:
            # Where two groups of options have a value in common it belongs to the later one, as in WebShop.
            groups = self._shop.catalogue.products[self._row].options.items()
            self.options[[group for group, values in groups if name in values][-1]] = name

    def _back_to_search(self) -> None:
        self._place, self.options = "search", {}
        self.page = pages.search_page(self._instruction)

    def _results(self, keywords: str, number: int) -> None:
        """Page `number` of what `keywords` find. Turning a page searches anew and forgets options, as in WebShop."""
        self._place, self.options = "results", {}
        self._keywords, self._number = keywords, number
        found = self._shop.engine.search(keywords, self._random)
        self._shown = found[(number - 1) * pages.A_PAGE : number * pages.A_PAGE]
        products = [self._shop.catalogue.products[row] for row in self._shown]
        self.page = pages.results_page(self._instruction, products, number, len(found))

    def _item(self) -> None:
        self._place = "item"
        self.page = pages.item_page(self._instruction, self._shop.catalogue.products[self._row])
