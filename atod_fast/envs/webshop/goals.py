"""What a shopper is asked to buy: WebShop's goals, made from its files in its order.

After princeton-nlp/WebShop (MIT, web_agent_site/engine/goal.py: get_synthetic_goals, get_human_goals, and the shuffle
in envs/web_agent_text_env.py). Each instruction that people wrote is a goal. Without these, each combination of options
of a product that has an instruction is one. The 1,000-product set makes 6,910 goals, the whole set millions, so only
their sources are held.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from atod_fast.envs.webshop.catalogue import Catalogue, Instruction, Product, line, lines, string
from atod_fast.envs.webshop.reading import Malformed, read
from atod_fast.errors import UserError

SHUFFLE_SEED = 233  # WebShop's
TEST_GOALS = 500  # the first of the shuffled goals, as in WebShop and verl-agent
DEV_GOALS = 1000  # the next, on which WebShop's own training chooses
SPLITS = ("all", "train", "test", "dev", "rest")
STEPS = [10.0 * step for step in range(1, 100)]  # possible price limits, dollars
NO_LIMIT = 1_000_000.0  # dollars
MOST_COMBINATIONS = 100_000  # of a product's options; no goal asks for a product with more

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Goal:
    product: Product  # one that fulfils it
    instruction: str
    attributes: tuple[str, ...]
    options: Mapping[str, str] | tuple[str, ...]  # by name, or only values if people wrote the instruction
    price_upper: float  # dollars


@dataclass(frozen=True, slots=True)
class _Source:
    """A product with an instruction: one goal, or one for each combination of options."""

    product: Product
    instruction: Instruction
    price_upper: float
    human: bool

    @property
    def count(self) -> int:
        return 1 if self.human else prod(map(len, self.product.options.values()))

    def goal(self, number: int) -> Goal:
        limit = "" if self.price_upper == NO_LIMIT else f", and price lower than {self.price_upper:.2f} dollars"
        if self.human:
            options: Mapping[str, str] | tuple[str, ...] = self.instruction.options
            wording = self.instruction.text.strip(".")
        else:
            options = {}
            for name in sorted(self.product.options, reverse=True):  # the last name varies fastest
                values = self.product.options[name]
                number, choice = divmod(number, len(values))
                options[name] = values[choice]
            options = dict(reversed(options.items()))
            chosen = ", and ".join(f"{name}: {value}" for name, value in options.items())
            wording = self.instruction.text + (f" with {chosen}" if chosen else "")
        return Goal(self.product, wording + limit, self.instruction.attributes, options, self.price_upper)


class Goals:
    """A catalogue's goals, shuffled; each is made when it is read.

    human: instructions by product identifier, used in place of the catalogue's own. random: draws the price limits.
    """

    def __init__(
        self, catalogue: Catalogue, human: Mapping[str, tuple[Instruction, ...]] | None, random: Random
    ) -> None:
        self._sources: list[_Source] = []
        unasked = 0
        for product, price in zip(catalogue.products, catalogue.prices, strict=True):
            if human is None:
                own = catalogue.instructions.get(product.asin)
                wanted = (own,) if own else ()
            else:
                wanted = human.get(product.asin, ())
            for instruction in wanted:
                source = _Source(product, instruction, _limit(price, random), human is not None)
                if source.count <= MOST_COMBINATIONS:
                    self._sources.append(source)
                else:
                    unasked += 1
        if unasked:
            _log.warning(
                "%d products have more than %d combinations of options; no goal asks for them",
                unasked,
                MOST_COMBINATIONS,
            )
        self._ends = list(accumulate(source.count for source in self._sources))
        self._order = array("Q", range(self._ends[-1] if self._ends else 0))
        Random(SHUFFLE_SEED).shuffle(self._order)

    def __len__(self) -> int:
        return len(self._order)

    def split(self, name: str) -> range:
        """Return the places in the shuffled goals that belong to the split `name`.

        "test" has the first 500, or half of them if there are fewer than 1,000; "train" the others (verl-agent's
        split); "all" both. Of the others "dev" has the first 1,000, or half of them if there are fewer than 2,000, and
        "rest" those that remain: WebShop's own splits.
        """
        total = len(self._order)
        test = min(TEST_GOALS, total // 2)
        dev = test + min(DEV_GOALS, (total - test) // 2)
        ends = {"all": (0, total), "train": (test, total), "test": (0, test), "dev": (test, dev), "rest": (dev, total)}
        return range(*ends[name])

    def __getitem__(self, place: int) -> Goal:
        number = self._order[place]
        at = bisect_right(self._ends, number)
        return self._sources[at].goal(number - (self._ends[at - 1] if at else 0))


def _limit(price: float, random: Random) -> float:
    """Return a random price limit: the larger of two of the next four steps above `price`.

    It is NO_LIMIT if fewer than two steps are left.
    """
    steps = [step for step in STEPS if step > price][:4]
    return max(random.sample(steps, 2)) if len(steps) >= 2 else NO_LIMIT


def load_human(path: str | Path, malformed: int) -> dict[str, tuple[Instruction, ...]]:
    """Return the instructions that people wrote, by product, from WebShop's `items_human_ins.json`.

    Raises UserError as `reading.read` does, and if there are none.
    """
    human = dict(read("human_goals", path, malformed, parse_human))
    if not human:
        raise UserError(f"human_goals={str(path)!r} holds no instruction; give WebShop's items_human_ins.json")
    return human


def parse_human(entry: Any) -> tuple[str, tuple[Instruction, ...]]:
    """Return a product's identifier and instructions from an entry of that file. Raise Malformed if it is none.

    Instructions without attributes are left out, as in WebShop.
    """
    asin, written = entry if isinstance(entry, tuple) else ("", None)
    if not isinstance(written, list) or not all(isinstance(one, dict) for one in written):
        raise Malformed("not an identifier with a list of objects")
    made = [
        Instruction(
            line(string(one, "instruction")),
            tuple(lines(one, "instruction_attributes")),
            tuple(lines(one, "instruction_options")),
        )
        for one in written
    ]
    return asin, tuple(one for one in made if one.attributes)
