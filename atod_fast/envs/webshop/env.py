"""WebShop as an `Environment`: official files or a made-up catalogue, text-mode rules, rewards after verl-agent."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

from atod_fast.envs.options import choice, goes_with, whole
from atod_fast.envs.protocol import Info, Usual, copy_with
from atod_fast.envs.webshop.expert import WebShopExpert
from atod_fast.envs.webshop.generator import SCALES
from atod_fast.envs.webshop.goals import SPLITS, Goal
from atod_fast.envs.webshop.nouns import TAGGERS, tagger
from atod_fast.envs.webshop.pages import done_page
from atod_fast.envs.webshop.prompt import WebShopPrompt
from atod_fast.envs.webshop.reward import matcher, score
from atod_fast.envs.webshop.shop import Source, generated
from atod_fast.envs.webshop.visit import Visit
from atod_fast.errors import UserError

File = str | os.PathLike
REWARD = 10.0  # of a purchase with score 1


class WebShop:
    """WebShop in its text mode.

    Where the products come from (exactly one):
      products: WebShop's `items_shuffle*.json`, with attributes, its `items_ins_v2*.json`; also as JSON lines, .gz or
        .xz. With num_products only the first so many; up to `malformed` malformed entries of a file are left out.
      generate: number of made-up products, with seed and scale ("small": short pages; "full": as long as real ones).
    human_goals: WebShop's `items_human_ins.json`, to use instructions that people wrote instead of one for every
      combination of options.
    split: of the goals, shuffled with WebShop's seed, "test" has the first 500 (half if there are fewer than 1,000),
      "train" the others, "all" both. Of train's goals "dev" has the first 1,000 (half if there are fewer than 2,000),
      "rest" the others: to choose on dev, train on rest.
    nouns: what finds nouns for the score: "spacy", "heuristic", or "auto", which is spaCy if it is installed. The
      attribute `nouns` says which one is active.

    An episode ends with a purchase, whose reward is 10 if the score is 1, else 0 (verl-agent). `info["score"]` is the
    score. Actions are `search[words]`, on any page, and `click[what]`, for what is listed; others are not accepted. An
    episode's `seed` matters to WebShop's search `<r>` alone.
    """

    instant = True
    usual = Usual(turns=8, prompt_tokens=992, response_tokens=60)  # bench/prompts.py; the rest assumed

    def __init__(
        self,
        *,
        products: File | None = None,
        attributes: File | None = None,
        human_goals: File | None = None,
        num_products: int | None = None,
        malformed: int = 100,
        generate: int | None = None,
        seed: int = 0,
        scale: str = "small",
        split: str = "all",
        nouns: str = "auto",
    ) -> None:
        if (generate is None) == (products is None):
            raise UserError(
                "webshop takes exactly one of products=<items_shuffle.json>, with attributes=<items_ins_v2.json>, "
                "and generate=N"
            )
        for name, value, known in (("scale", scale, SCALES), ("split", split, SPLITS), ("nouns", nouns, TAGGERS)):
            choice(name, value, known)
        whole(malformed=(malformed, 0), seed=(seed, 0))
        whole(
            **{
                name: (value, 1)
                for name, value in (("num_products", num_products), ("generate", generate))
                if value is not None
            }
        )
        self._alike = matcher()
        self.nouns, self._tag = tagger(nouns)
        if generate is not None:
            files = {"attributes": (attributes, None), "human_goals": (human_goals, None)}
            goes_with("products=", **files, num_products=(num_products, None), malformed=(malformed, 100))
            self.shop = generated(generate, seed, scale)
        else:
            goes_with("generate=N", seed=(seed, 0), scale=(scale, "small"))
            if attributes is None:
                raise UserError(
                    f"products={str(products)!r} needs attributes=<items_ins_v2.json>, which says what is true of them"
                )
            human = None if human_goals is None else _file("human_goals", human_goals)
            self.shop = Source(
                _file("products", products), _file("attributes", attributes), human, num_products, malformed
            ).open()
        self._places = self.shop.goals.split(split)
        if not self._places:
            count, goals = len(self.shop.catalogue.products), len(self.shop.goals)
            raise UserError(
                f"split={split!r} is empty: {count} products make {goals} goals; "
                "give more products, or attributes that belong to them"
            )
        self._visit: Visit | None = None

    def __len__(self) -> int:
        return len(self._places)

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} of {len(self)} goals")
        self._task: int = task
        self.goal: Goal = self.shop.goals[self._places[task]]
        self._score = 0.0
        self._visit = Visit(self.shop, self.goal.instruction, Random(f"{seed} {task}"))
        return self._visit.page.text, self._info(self._visit, True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        visit = self._visit
        if visit is None:
            raise RuntimeError("step before reset")
        accepted, reward = visit.act(action), 0.0
        if accepted and visit.bought is not None:
            product, price = self.shop.catalogue.products[visit.bought], self.shop.catalogue.prices[visit.bought]
            self._score = score(self.goal, product, price, visit.options, self._tag, self._alike)
            visit.page = done_page(product, visit.options, self._score)
            reward = REWARD * (self._score == 1)
        return visit.page.text, reward, visit.bought is not None, False, self._info(visit, accepted)

    def clone(self) -> WebShop:
        return copy_with(self, _visit=None)

    def prompt(self, thinking: bool, history: int) -> WebShopPrompt:
        return WebShopPrompt(thinking, history)

    def expert(self) -> WebShopExpert:
        """Return a scripted player of the goal of the last reset."""
        return WebShopExpert(self.goal)

    def close(self) -> None:
        self._visit = None

    def _info(self, visit: Visit, accepted: bool) -> Info:
        return Info(
            won=self._score == 1,
            admissible_actions=visit.page.admissible,
            is_action_valid=accepted,
            task_type=self.goal.product.category,
            task_id=f"{self.goal.product.asin}/{self._places[self._task]}",
            score=self._score,
        )


def _file(option: str, value: Any) -> Path:
    try:
        return Path(value).expanduser()
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{option}={value!r} is no file's path ({error}); give one of WebShop's data files") from error
