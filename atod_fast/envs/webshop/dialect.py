"""WebShop's dialect: a word for each phrase of the generated catalogues, and a scripted expert that knows the goal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil
from random import Random

from atod_fast.envs.dialect import Dialect, Player, Step
from atod_fast.envs.webshop.catalogue import Product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.generator import KINDS, VALUES
from atod_fast.envs.webshop.goals import STEPS, Goal
from atod_fast.envs.webshop.pages import BACK, BUY, NEXT, PREVIOUS, SEPARATOR, SUB_PAGES

VERBS = ("search", "click")
# Clicked without a verb.
BUTTONS = {"buy": BUY, "back": BACK, "prev": PREVIOUS, "next": NEXT} | {name: name for name in SUB_PAGES}

HIGHEST_LIMIT = 170  # dollars, of a price limit in the small catalogues


def _word(phrase: str) -> str:
    return re.sub(r"\W+", "-", phrase.lower()).strip("-")


def _shown(value: str) -> str:
    return value.lower().replace("/", " | ")


_TEXTS = {_word(text): text.lower() for kind in KINDS for text in (*kind.attributes, kind.noun)}
_TEXTS |= {_word(value): _shown(value) for values in VALUES.values() for value in values}
_WORDS = {text: word for word, text in _TEXTS.items()} | {kind.query: _word(kind.noun) for kind in KINDS}
_KINDS = frozenset(_word(kind.noun) for kind in KINDS)
# The longest first: of phrases that begin alike the longest is meant.
_PHRASE = "|".join(map(re.escape, sorted(_WORDS, key=len, reverse=True)))
_PRICE = r"\$?(?P<price>[0-9]{1,6}\.[0-9]+)(?: to \$[0-9.]+)?"
_READ = re.compile(
    rf"(?<![\w-])(?:(?P<phrase>{_PHRASE})|b(?P<asin>[0-9]{{9}})|{_PRICE}|(?P<buy>{BUY})|page (?P<page>[0-9]))(?![\w-])"
)
_COMMAND = re.compile(r"(search|click)\[(.*)\]")


def compact(page: str) -> list[str]:
    """Return the informative phrases of a page, a word each.

    They are attributes, option values, products, prices, and `buy` if it is offered. The instruction, and with it the
    kind of product, is read on the first page only. Prices are rounded up to tens of dollars, as price limits are; of a
    range the lower end counts.
    """
    text = page.lower()
    _, inside, rest = text.partition(BACK)
    words = [_read(found) for found in _READ.finditer(rest if inside else text)]
    return [word for word in words if word not in _KINDS] if inside else words


def _read(found: re.Match[str]) -> str:
    if found["phrase"]:
        return _WORDS[found["phrase"]]
    if found["price"]:
        return f"${ceil(float(found['price']) / 10) * 10}"
    if found["asin"]:
        return f"b{int(found['asin'])}"
    return f"page{found['page']}" if found["page"] else "buy"


def _text(word: str) -> str:
    """Return the text that a word stands for."""
    return f"b{int(word[1:]):09d}" if re.fullmatch(r"b\d{1,9}", word) else _TEXTS.get(word, word)


def command(words: Sequence[str]) -> str:
    """Return the command that words make.

    `search tea-tree shampoo` -> `search[tea tree shampoo]`, `click b7` -> `click[b000000007]`,
    `buy` -> `click[buy now]`.
    """
    if len(words) == 1 and words[0] in BUTTONS:
        return f"click[{BUTTONS[words[0]]}]"
    verb, *rest = words or [""]
    return f"{verb}[{' '.join(map(_text, rest))}]" if verb in VERBS else " ".join(words)


def spoken(command: str) -> list[str]:
    """Return the words of a command; the inverse of `command`."""
    block = _COMMAND.fullmatch(command)
    if block is None:
        return command.split()
    button = next((word for word, text in BUTTONS.items() if block[1] == "click" and block[2] == text), None)
    return [button] if button else [block[1], *compact(block[2])]


def vocabulary(env: WebShop, count: int) -> list[str]:
    """Return, sorted, every word that a shortened page or a command can hold, in any catalogue of this size.

    Page numbers above six are unknown words.
    """
    products = (f"b{int(product.asin[1:])}" for product in env.shop.catalogue.products)
    prices = (f"${int(step)}" for step in STEPS if step <= HIGHEST_LIMIT)
    return sorted({*VERBS, *BUTTONS, *_TEXTS, *products, *prices, *(f"page{number}" for number in range(1, 7))})


def _options(goal: Goal) -> Mapping[str, str]:
    """Return the option values that a goal asks for, by name. A goal that people wrote names none: ValueError."""
    if not isinstance(goal.options, Mapping):
        raise ValueError("the dialect needs goals of a generated catalogue, whose options have names")
    return goal.options


def fulfils(goal: Goal, product: Product, price: float) -> bool:
    """Return whether `product`, with the goal's options and at `price` dollars, is what the goal asks for."""
    alike = product.query == goal.product.query and set(goal.attributes) <= set(product.attributes)
    return (
        alike
        and price <= goal.price_upper
        and all(value in product.options.get(name, ()) for name, value in _options(goal).items())
    )


def player(env: WebShop) -> Player:
    """Return a player that searches for all that is asked for, opens the first product that fulfils it, and buys it.

    It chooses the options before it buys.
    """
    goal, wanted, catalogue = env.goal, _options(env.goal), env.shop.catalogue
    products = {product.asin.lower(): product for product in catalogue.products}
    good = {
        asin
        for (asin, product), price in zip(products.items(), catalogue.prices, strict=True)
        if fulfils(goal, product, price)
    }
    search = f"search[{' '.join((*goal.attributes, _TEXTS[_WORDS[goal.product.query]], *wanted.values()))}]"

    def play(steps: Sequence[Step], observation: str) -> str:
        pieces = observation.lower().split(SEPARATOR.lower())
        if BACK not in pieces:
            return search
        if any("(total results:" in piece for piece in pieces):
            asin = next((piece for piece in pieces if piece in good), None)
            if asin is not None:
                return f"click[{asin}]"
            asked = next((step.command for step in reversed(steps) if step.command.startswith("search[")), "")
            # After an empty page there are no more products.
            turn_page = asked == search and any(piece in products for piece in pieces)
            return f"click[{NEXT}]" if turn_page else search
        at = max(
            n
            for n, step in enumerate(steps)
            if _clicked(step) in products and _clicked(step) in step.observation.lower()
        )
        opened = _clicked(steps[at])
        if BUY not in pieces or opened not in good:
            return f"click[{PREVIOUS}]"
        options = products[opened].options
        chosen = {
            name: _clicked(step)
            for step in steps[at + 1 :]
            for name, values in options.items()
            if _clicked(step) in values
        }
        return next((f"click[{value}]" for name, value in wanted.items() if chosen.get(name) != value), f"click[{BUY}]")

    return play


def _clicked(step: Step) -> str:
    return step.command[len("click[") : -1] if step.command.startswith("click[") else ""


def junk(env: WebShop, observation: str, rng: Random) -> str:
    """Return a bad command: a detour, a click on what is no button, half a search, or no command.

    It is never a purchase, which would end the episode.
    """
    shown = [word for word in compact(observation) if word not in BUTTONS and not word.startswith(("$", "page"))] or [
        _WORDS[env.goal.product.query]
    ]
    word = rng.choice(shown)
    choices = [
        f"click[{_text(word)}]",
        f"search[{_text(word)}]",
        word,
        f"click[{rng.choice((BACK, PREVIOUS, NEXT, *SUB_PAGES))}]",
    ]
    return rng.choices(choices, weights=(4, 1, 1, 2))[0]


DIALECT = Dialect(
    read=compact,
    command=command,
    words=spoken,
    vocabulary=vocabulary,
    expert=player,
    junk=junk,
)
