"""The pages of the shop, with their text and what can be clicked, character for character as in WebShop's text mode.

After princeton-nlp/WebShop (MIT, web_agent_site/templates/*.html as envs/web_agent_text_env.py reads them: the visible
strings, stripped, joined by ` [SEP] `). Chosen options are not shown, and the last page has all of WebShop's text, also
what its web site hides.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atod_fast.envs.text import cut_middle
from atod_fast.envs.webshop.catalogue import Product

SEPARATOR = " [SEP] "
BACK, PREVIOUS, NEXT, BUY = "back to search", "< prev", "next >", "buy now"
SUB_PAGES = ("description", "features", "reviews")
SEARCH_BAR = "search"  # the button beside it, which does nothing
A_PAGE = 10  # products on a page of results
LONGEST_PAGE = 25_000  # characters; a longer page loses its middle

_ASCII_SPACE = " \t\n\x0c\r"


@dataclass(frozen=True, slots=True)
class Page:
    text: str
    clickables: tuple[str, ...]  # in lower case, in WebShop's order

    @property
    def admissible(self) -> list[str]:
        """The actions as verl-agent lists them (agent_system/environments/env_manager.py: format_avail_actions)."""
        bar = ["search[<your query>]"] if self.clickables == (SEARCH_BAR,) else []
        return bar + [f"click[{name}]" for name in self.clickables]


def search_page(instruction: str) -> Page:
    """Return the page on which a visit begins: the instruction and the search bar."""
    return _page(["WebShop", "Instruction:", *_string(instruction), "Search"], [SEARCH_BAR])


def results_page(instruction: str, products: Sequence[Product], page: int, total: int) -> Page:
    """Return page number `page`, from 1, of `total` results. products: those on this page."""
    pieces = [*_head(instruction), f"Page {page} (Total results: {total})", *(["< Prev"] if page > 1 else []), "Next >"]
    for product in products:
        pieces += [product.asin, *_string(product.title), product.price_tag]
    buttons = [BACK, *([PREVIOUS] if page > 1 else []), NEXT]
    return _page(pieces, buttons + [product.asin.lower() for product in products])


def item_page(instruction: str, product: Product) -> Page:
    """Return the page of a product: its options with their values, title and price, and the button that buys it."""
    pieces = [*_head(instruction), "< Prev"]
    for name, values in product.options.items():
        pieces += _string(name)
        for value in values:
            pieces += _string(value)
    pieces += [
        *_string(product.title),
        f"Price: {product.price_tag}",
        "Rating: N.A.",
        "Description",
        "Features",
        "Reviews",
        "Buy Now",
    ]
    return _page(
        pieces, [BACK, PREVIOUS, *SUB_PAGES, BUY, *(value for values in product.options.values() for value in values)]
    )


def sub_page(instruction: str, product: Product, name: str) -> Page:
    """Return the page `name`, one of `SUB_PAGES`, of a product. Reviews are empty, as WebShop loads none."""
    pieces = [*_head(instruction), "< Prev"]
    if name == "description":
        pieces += _string(product.description)
    elif name == "features":
        for bullet in product.bullets:
            pieces += _string(" " + bullet)
    return _page(pieces, [BACK, PREVIOUS])


def done_page(product: Product, options: Mapping[str, str], score: float) -> Page:
    """Return the last page, after the purchase of `product` with these options; it shows the score, in [0, 1]."""
    chosen = json.dumps(options, sort_keys=True)
    for character in "<>&'":  # as Flask writes JSON into a page
        chosen = chosen.replace(character, f"\\u{ord(character):04x}")
    nothing = "None"  # in place of what WebShop leaves out here
    return _page(
        ["Thank you for shopping with us!", "Your code:", nothing, "(Paste it in your MTurk interface.)"]
        + [
            "Purchased",
            "asin",
            product.asin,
            "options",
            chosen,
            "attrs",
            nothing,
            "category",
            nothing,
            "query",
            nothing,
            "product category",
            nothing,
        ]
        + [
            "Target",
            "asin",
            "options",
            "attrs",
            "price upper",
            "instuction text",
            "category",
            "product category",
            "query",
            "Goal",
            nothing,
        ]
        + ["Reward", "Your score (min 0.0, max 1.0)", str(score), "Reward Details", nothing],
        [],
    )


def _head(instruction: str) -> list[str]:
    return ["Instruction:", *_string(instruction), "Back to Search"]


def _string(text: str) -> list[str]:
    """Return the visible string, if any, that WebShop's parser makes of `text` between two tags.

    Empty text and bare line breaks make none.
    """
    bare = not text.strip(_ASCII_SPACE)
    return [] if bare and (not text or "\n" in text) else [text.strip()]


def _page(pieces: list[str], clickables: Iterable[str]) -> Page:
    return Page(cut_middle(SEPARATOR.join(pieces), LONGEST_PAGE), tuple(dict.fromkeys(clickables)))
