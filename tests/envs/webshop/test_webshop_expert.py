"""WebShop's scripted expert buys what a goal was made from."""

from __future__ import annotations

from random import Random

import pytest

from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.reward import score
from helpers.experts import play
from helpers.paths import DATA
from helpers.webshop import ATTRIBUTES, HUMAN, ITEMS

PRODUCTS, FACTS = DATA / "webshop_products_1000.jsonl.xz", DATA / "webshop_items_ins_v2_1000.json"


def reachable(env: WebShop) -> bool:
    """Return whether buying the goal's own product with the goal's options scores 1.

    The recorded catalogue has odd products, such as one with an option "Buy Now", which no visitor can choose.
    """
    catalogue, goal = env.shop.catalogue, env.goal
    price = catalogue.prices[next(n for n, p in enumerate(catalogue.products) if p.asin == goal.product.asin)]
    values = goal.options if isinstance(goal.options, dict) else dict(enumerate(goal.options))
    if "ODD" in goal.product.asin:
        return False
    return score(goal, goal.product, price, values, env._tag, env._alike) == 1


SHOPS = {
    "generated": lambda: WebShop(generate=60, seed=5, nouns="heuristic"),
    "full pages": lambda: WebShop(generate=60, seed=6, scale="full", nouns="heuristic"),
    "recorded": lambda: WebShop(products=ITEMS, attributes=ATTRIBUTES, nouns="heuristic"),
    "human goals": lambda: WebShop(products=ITEMS, attributes=ATTRIBUTES, human_goals=HUMAN, nouns="heuristic"),
}


@pytest.mark.parametrize("shop", SHOPS)
def test_webshop_goals_are_fulfilled_where_their_own_product_fulfils_them(shop):
    env = SHOPS[shop]()
    tasks = Random(0).sample(range(len(env)), min(60, len(env)))
    for task in tasks:
        commands, info = play(env, task, 15)
        if "ODD" not in env.goal.product.asin:
            assert commands[0].startswith("search[") and commands[-1] == "click[buy now]"
        assert info["won"] or not reachable(env), commands
    assert tasks


@pytest.mark.skipif(not PRODUCTS.exists(), reason="needs the 1,000-product set in shared/data")
def test_the_real_products_are_bought():
    env = WebShop(products=PRODUCTS, attributes=FACTS, nouns="heuristic", split="train")
    scores = [play(env, task, 15)[1]["score"] for task in Random(1).sample(range(len(env)), 60)]
    assert sum(scores) / len(scores) > 0.95 and sum(score == 1 for score in scores) >= 0.85 * len(scores)
