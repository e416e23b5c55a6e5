"""A visit of the shop, from the search page to a purchase: which page an action leads to.

After princeton-nlp/WebShop (MIT, web_agent_site/envs/web_agent_text_env.py: WebAgentTextEnv.step, SimServer.receive),
without its mistakes: an option called "attributes" is an option and no hidden page, `< Prev` works also if the search
words name a page of its site, an option with brackets can be clicked, and the search `<a>` finds products as on its web
site.
"""

from __future__ import annotations

import re
from random import Random

from atod_fast.envs.webshop import pages
from atod_fast.envs.webshop.shop import Shop

_ACTION = re.compile(r"(.+)\[(.+)\]")  # matched at the beginning: what follows the last bracket is ignored


def _parse(action: str) -> tuple[str, str]:
    """Return name and argument of an action, in lower case.

    WebShop cannot click a name with a bracket in it; here everything that is listed can be clicked.
    """
    if action.startswith("click[") and action.endswith("]"):
        return "click", action[6:-1].lower()
    match = _ACTION.match(action)
    return (match[1], match[2].lower()) if match else ("", "")


class Visit:
    """A visit of `shop` for `instruction`. random: draws the results of the search `<r>`.

    page: the current page. options: chosen so far, name -> value. bought: row of what was bought, or None.
    """

    def __init__(self, shop: Shop, instruction: str, random: Random) -> None:
        self._shop, self._instruction, self._random = shop, instruction, random
        self.bought: int | None = None
        self._back_to_search()

    def act(self, action: str) -> bool:
        """Follow `search[words]`, or `click[name]` for a name that is listed; return whether the action was followed.

        Words can be searched from any page. Other actions, and all after a purchase, change nothing.
        """
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
            # A value that two groups of options share belongs to the later one, as in WebShop.
            groups = self._shop.catalogue.products[self._row].options.items()
            self.options[[group for group, values in groups if name in values][-1]] = name

    def _back_to_search(self) -> None:
        self._place, self.options = "search", {}
        self.page = pages.search_page(self._instruction)

    def _results(self, keywords: str, number: int) -> None:
        """Show page `number` of what `keywords` find.

        Turning a page searches anew and forgets options, as in WebShop.
        """
        self._place, self.options = "results", {}
        self._keywords, self._number = keywords, number
        found = self._shop.engine.search(keywords, self._random)
        self._shown = found[(number - 1) * pages.A_PAGE : number * pages.A_PAGE]
        products = [self._shop.catalogue.products[row] for row in self._shown]
        self.page = pages.results_page(self._instruction, products, number, len(found))

    def _item(self) -> None:
        self._place = "item"
        self.page = pages.item_page(self._instruction, self._shop.catalogue.products[self._row])
