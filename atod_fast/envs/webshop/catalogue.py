"""The products of a shop, read from WebShop's files and cleaned as WebShop cleans them.

After princeton-nlp/WebShop (MIT, web_agent_site/engine/engine.py: load_products, generate_product_prices), with two
differences. Text is made safe: `[SEP]`, which separates the pieces of a page, becomes `[sep]` in a product's text,
control characters and invisible ones become spaces, and text beyond the sizes below is cut. And entries that WebShop
would fail on are left out. Neither changes a character of the 1,000-product set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from sys import intern
from typing import Any

from atod_fast.envs.text import INVISIBLE, cut_end
from atod_fast.envs.webshop.reading import Malformed, read
from atod_fast.errors import UserError

LONGEST_LINE = 1_000  # characters of a title, an option or an attribute; 232 in the 1,000-product set
LONGEST_TEXT = 20_000  # characters of a description or a bullet point; 15,481 in that set
MOST_VALUES = 500  # options with their values, bullet points or attributes of one product; 52 in that set
LONGEST_ASIN = 10  # WebShop leaves out products with longer ones
NO_PRICE = 100.0  # dollars, for a product without a price

# Soft hyphens and zero-width spaces stay: the 1,000-product set has five.
_UNSEEN = re.compile(f"(?![\xad\u200b])(?:{INVISIBLE.pattern})")
_UNSEEN_OR_BREAK = re.compile(f"{_UNSEEN.pattern}|[\t\n]")


@dataclass(frozen=True, slots=True)
class Product:
    asin: str  # Amazon's identifier, at most 10 characters
    title: str
    description: str
    bullets: tuple[str, ...]
    options: dict[str, tuple[str, ...]]  # "color" -> values, all in lower case
    attributes: tuple[str, ...]
    category: str  # one of five departments
    query: str  # the search that found it on Amazon
    product_category: str  # "Beauty › Hair Care › ..."
    prices: tuple[float, ...]  # dollars: one, or the two ends of a range

    @property
    def price_tag(self) -> str:
        """The price as a page shows it: "$19.99", or "$10.0 to $25.0"."""
        return " to ".join(f"${price}" for price in self.prices)


@dataclass(frozen=True, slots=True)
class Instruction:
    """What a goal for a product asks for."""

    text: str
    attributes: tuple[str, ...]
    options: tuple[str, ...] = ()  # values, if people wrote the instruction


@dataclass(frozen=True, slots=True)
class Facts:
    """What the attribute file says about a product."""

    attributes: tuple[str, ...] = ("DUMMY_ATTR",)  # WebShop's stand-in
    instruction: Instruction | None = None


class Catalogue:
    """All products, each once, with their prices and instructions. Shared, read-only, by all episodes.

    prices: dollars by row. Within a range the price is drawn by `random`, in the order of the rows, as in WebShop.
    instructions: by identifier, for the products that have one in the attribute file.
    """

    def __init__(self, products: Iterable[Product], facts: Mapping[str, Facts], random: Random) -> None:
        first: dict[str, Product] = {}
        for product in products:
            if product.asin != "nan" and len(product.asin) <= LONGEST_ASIN:
                first.setdefault(product.asin, product)
        self.products = list(first.values())
        self.prices = [p.prices[0] if len(p.prices) == 1 else random.uniform(*p.prices) for p in self.products]
        self.instructions = {
            asin: facts[asin].instruction for asin in first if asin in facts and facts[asin].instruction
        }


def load(
    products: str | Path,
    attributes: str | Path,
    random: Random,
    *,
    num_products: int | None = None,
    malformed: int = 100,
) -> Catalogue:
    """Return the catalogue of WebShop's files `items_shuffle*.json` and `items_ins_v2*.json`.

    num_products: only the first so many entries. malformed: so many malformed entries of a file are left out. Raises
    UserError if a file cannot be read, has more malformed entries, or leaves no product.
    """
    facts = dict(read("attributes", attributes, malformed, parse_facts))
    entries = read("products", products, malformed, lambda entry: parse_product(entry, facts))
    catalogue = Catalogue(islice(entries, num_products), facts, random)
    if not catalogue.products:
        raise UserError(f"products={str(products)!r} holds no product; give WebShop's items_shuffle*.json")
    return catalogue


def parse_facts(entry: Any) -> tuple[str, Facts]:
    """Return a product's identifier and facts from an entry of the attribute file. Raise Malformed if it is none."""
    asin, facts = entry if isinstance(entry, tuple) else ("", None)
    if not isinstance(facts, dict):
        raise Malformed("not an identifier with an object")
    attributes = tuple(map(intern, lines(facts, "attributes"))) if "attributes" in facts else Facts().attributes
    if facts.get("instruction") is None:
        return asin, Facts(attributes)
    wanted = tuple(map(intern, lines(facts, "instruction_attributes")))
    if not wanted:
        raise Malformed("instruction_attributes is empty")
    return asin, Facts(attributes, Instruction(line(string(facts, "instruction")), wanted))


def parse_product(entry: Any, facts: Mapping[str, Facts]) -> Product:
    """Return the product that an element of the product file describes. Raise Malformed if it is none."""
    if not isinstance(entry, dict):
        raise Malformed("not an object")
    asin = string(entry, "asin")
    if not asin or asin != line(asin).strip():
        raise Malformed("asin is no identifier")
    bullets = entry.get("small_description")
    return Product(
        asin=asin,
        title=line(string(entry, "name")),
        description=text(string(entry, "full_description")),
        bullets=tuple(
            map(
                text,
                strings({"small_description": [bullets] if isinstance(bullets, str) else bullets}, "small_description"),
            )
        ),
        options=_options(entry.get("customization_options")),
        attributes=facts.get(asin, Facts()).attributes,
        category=intern(line(string(entry, "category"))),
        query=intern(line(string(entry, "query")).lower().strip()),
        product_category=intern(line(string(entry, "product_category"))),
        prices=_prices(entry.get("pricing")),
    )


def _options(groups: Any) -> dict[str, tuple[str, ...]]:
    if not groups:
        return {}
    if not isinstance(groups, dict):
        raise Malformed("customization_options is no object")
    options: dict[str, tuple[str, ...]] = {}
    for name, values in groups.items():
        if values is None:
            continue
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise Malformed(f"option {name[:40]!r} is no list of objects")
        options[intern(line(name).lower())] = tuple(
            intern(line(string(value, "value")).strip().replace("/", " | ").lower()) for value in values
        )
    texts = [text for name, values in options.items() for text in (name, *values)]
    if len(texts) > MOST_VALUES or sum(map(len, texts)) > LONGEST_TEXT:
        raise Malformed(
            f"{len(texts)} options and values of {sum(map(len, texts))} characters, "
            f"{MOST_VALUES} of {LONGEST_TEXT} are the most"
        )
    return options


def _prices(pricing: Any) -> tuple[float, ...]:
    """Return the prices of "$19.99", "$10.00$25.00" (as found) or [10.0, 25.0] (as WebShop converts it)."""
    if not pricing:
        return (NO_PRICE,)
    try:
        parts = (
            [re.sub(r"[^\d.]", "", part) for part in pricing.split("$")[1:]]
            if isinstance(pricing, str)
            else list(pricing)
        )
        prices = tuple(float(part) for part in parts[:2])
    except (TypeError, ValueError, OverflowError):
        prices = ()
    if not prices or not all(0 <= price < math.inf for price in prices):
        raise Malformed(f"pricing {str(pricing)[:40]!r} is no price")
    return prices


def string(entry: Mapping[str, Any], key: str) -> str:
    """Return the string `entry[key]`. Raise Malformed if it is none."""
    if not isinstance(entry.get(key), str):
        raise Malformed(f"{key} is missing or no string")
    return entry[key]


def strings(entry: Mapping[str, Any], key: str) -> list[str]:
    """Return the list of strings `entry[key]`. Raise Malformed if it is none, or too long."""
    values = entry.get(key)
    if not isinstance(values, list) or len(values) > MOST_VALUES or not all(isinstance(value, str) for value in values):
        raise Malformed(f"{key} is missing or no list of at most {MOST_VALUES} strings")
    return values


def lines(entry: Mapping[str, Any], key: str) -> list[str]:
    """Return the strings `entry[key]`, each made safe by `line`. Raise Malformed as `strings` does."""
    return [line(value) for value in strings(entry, key)]


def line(value: str) -> str:
    """Return `value` as one piece of a page: on one line, of bounded length, without `[SEP]`."""
    return _safe(value, LONGEST_LINE, _UNSEEN_OR_BREAK)


def text(value: str) -> str:
    """Return `value` made safe like `line`, but with its line breaks and a longer bound."""
    return _safe(value, LONGEST_TEXT, _UNSEEN)


def _safe(value: str, longest: int, forbidden: re.Pattern[str]) -> str:
    value = cut_end(value, longest)
    if not value.isprintable():
        value = forbidden.sub(" ", value)
    return value.replace("[SEP]", "[sep]")
