"""WebShop's goals and its search."""

from __future__ import annotations

from math import log
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_fast.envs.webshop.catalogue import Catalogue, Facts, Instruction, parse_product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.goals import SPLITS, Goals
from atod_fast.envs.webshop.search import SearchEngine
from helpers.webshop import made_up, needs_real, product, real

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")


def test_test_goals_are_the_first_500_or_the_first_half_and_dev_the_next_1000_or_the_next_half():
    for count, test, dev in ((1000, 500, 1000), (400, 500, None), (60, None, None)):
        shops = {split: WebShop(generate=count, seed=5, split=split, nouns="heuristic") for split in SPLITS}
        ids = {split: [shop.reset(0, task)[1]["task_id"] for task in range(len(shop))] for split, shop in shops.items()}
        assert ids["test"] + ids["train"] == ids["all"] and len(set(ids["all"])) == len(ids["all"])
        assert len(ids["test"]) == (test or len(ids["all"]) // 2)
        assert ids["dev"] + ids["rest"] == ids["train"] and len(ids["dev"]) == (dev or len(ids["train"]) // 2)
    assert len(ids["all"]) < 1000


def test_goals_are_each_combination_of_options_in_webshops_shuffle():
    entry = product(
        customization_options={"b": [{"value": "1"}, {"value": "2"}], "A": [{"value": v} for v in "xyz"], "c": None}
    )
    facts = {entry["asin"]: Facts((), Instruction("Find me tables", ("oak",)))}
    goals = Goals(Catalogue([parse_product(entry, facts)], facts, Random(0)), None, Random(0))
    expected = [{"a": a, "b": b} for a in "xyz" for b in "12"]
    Random(233).shuffle(expected)
    made = [goals[place] for place in range(len(goals))]
    assert [goal.options for goal in made] == expected
    limit = f", and price lower than {made[0].price_upper:.2f} dollars"
    assert [goal.instruction for goal in made] == [
        f"Find me tables with a: {o['a']}, and b: {o['b']}{limit}" for o in expected
    ]


@given(st.floats(0, 1200), st.integers(0, 99))
def test_a_price_limit_is_above_the_price_by_at_most_four_steps(price, seed):
    facts = {"B0": Facts((), Instruction("Find me tables", ("oak",)))}
    made = parse_product(product(asin="B0", pricing=[price], customization_options=""), facts)
    goal = Goals(Catalogue([made], facts, Random(seed)), None, Random(seed))[0]
    if price >= 980:
        assert goal.price_upper == 1e6 and goal.instruction == "Find me tables"
    else:
        assert goal.price_upper % 10 == 0 and 10 < goal.price_upper - price + 1e-9 and goal.price_upper <= 990
        assert goal.price_upper - price <= 40 and f"lower than {goal.price_upper:.2f} dollars" in goal.instruction


def test_too_many_combinations_make_no_goal(caplog):
    options = {f"group {letter}": [{"value": str(value)} for value in range(20)] for letter in "abcd"}
    facts = {"B0": Facts((), Instruction("Find me tables", ("oak",)))}
    products = [parse_product(product(asin="B0", customization_options=options), facts)]
    assert len(Goals(Catalogue(products, facts, Random(0)), None, Random(0))) == 0
    assert "1 products have more than 100000 combinations" in caplog.text


# --- the search


def test_words_are_lucenes():
    words = made_up().shop.engine.words
    assert words("The Women's shoes, US 7.5 for running! 1,000 x3-large e.g. and/or us") == (
        ["women", "shoe", "us", "7.5", "run", "1,000", "x3", "larg", "e.g", "us"]
    )
    assert words("it is 's") == ["s"] and words("") == []
    assert words("generously") == ["gener"], "Porter's stem; his later English one is generous"


def test_hits_are_by_bm25_then_by_identifier():
    texts = {
        "B3": "red oak table",
        "B1": "red oak table",
        "B2": "red red sofa",
        "B4": "blue chair",
        "B5": "",
        "B6": "oak",
    }
    bare = dict(full_description="", small_description=[], customization_options="")
    engine = SearchEngine([parse_product(product(asin=asin, name=text, **bare), {}) for asin, text in texts.items()])
    found = [list(texts)[row] for row in engine.search("red oak", Random(0))]
    documents = [text.split() for text in texts.values()]
    mean = sum(map(len, documents)) / len(documents)

    def bm25(document):
        total = 0.0
        for word in ("red", "oak"):
            has = sum(word in other for other in documents)
            rarity = log(1 + (len(documents) - has + 0.5) / (has + 0.5))
            often = document.count(word)
            total += rarity * often / (often + 0.9 * (1 - 0.4 + 0.4 * len(document) / mean))
        return total

    expected = sorted(
        (asin for asin, text in texts.items() if bm25(text.split()) > 0),
        key=lambda asin: (-bm25(texts[asin].split()), asin),
    )
    assert found == expected and found[:2] == ["B1", "B3"]
    assert engine.search("the", Random(0)) == engine.search("nowhere", Random(0)) == ()


def test_a_search_finds_at_most_fifty():
    bare = dict(name="oak", full_description="", small_description=[], customization_options="")
    engine = SearchEngine([parse_product(product(asin=f"B{number:02}", **bare), {}) for number in range(60)])
    assert engine.search("oak", Random(0)) == tuple(range(50)) and len(set(engine.search("<r>", Random(0)))) == 50


def test_title_description_first_bullet_and_options_are_searched():
    groups = {"wood": [{"value": "walnut"}]}
    shown = dict(
        name="table",
        full_description="sturdy",
        small_description=["easy", "cheap"],
        customization_options=groups,
        category="furniture",
    )
    engine = SearchEngine(
        [parse_product(product(asin="B0", **shown), {}), parse_product(product(asin="B1", category="food"), {})]
    )
    found = [
        word
        for word in ("table", "sturdy", "easy", "cheap", "wood", "walnut", "furniture")
        if 0 in engine.search(word, Random(0))
    ]
    assert found == ["table", "sturdy", "easy", "wood", "walnut"]
    assert engine.search("<c> furniture", Random(0)) == engine.search("<c> furniture and more", Random(0)) == (0,)
    assert engine.search("<c> food", Random(0)) == (1,) and engine.search("<c>", Random(0)) == ()


def test_a_shop_without_a_word_finds_nothing():
    blank = dict(name="", full_description="", small_description=[], customization_options="")
    assert SearchEngine([parse_product(product(**blank), {})]).search("table", Random(0)) == ()


@needs_real
def test_a_products_title_finds_it_first_in_the_real_set():
    shop = real().shop
    hits = [
        shop.engine.search(one.title.lower(), Random(0))[:1] == (row,)
        for row, one in enumerate(shop.catalogue.products)
    ]
    assert sum(hits) > 980  # some titles come twice
