"""WebShop's score against its formula: prices, options, attributes, titles and their nouns."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import replace
from difflib import SequenceMatcher
from random import Random

import pytest

from atod_fast.envs.webshop import nouns
from atod_fast.envs.webshop.catalogue import Facts, parse_product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.reward import attributes_met, matcher, options_met, score, type_reward
from atod_fast.errors import UserError
from helpers.webshop import ATTRIBUTES, COLOURS, HUMAN, ITEMS, WORDS, made_up, needs_real, product, real

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")


def similarity(one: str, other: str) -> int:
    """Return thefuzz's token_set_ratio, written from its description with the standard library's ratio."""

    def words(text: str) -> set[str]:
        return set(re.sub(r"\W", " ", "".join(c for c in text if not "\x80" <= c <= "\xff")).lower().split())

    def ratio(a: str, b: str) -> int:
        return round(100 * SequenceMatcher(None, a, b).ratio()) if a and b else 0

    ours, theirs = words(one), words(other)
    if not ours or not theirs:
        return 0
    both = " ".join(sorted(ours & theirs))
    first = " ".join(filter(None, [both, " ".join(sorted(ours - theirs))]))
    second = " ".join(filter(None, [both, " ".join(sorted(theirs - ours))]))
    return max(ratio(both, first), ratio(both, second), ratio(first, second))


def formula(goal, bought, price: float, chosen: dict[str, str], find_nouns=nouns.heuristic) -> float:
    """r_type * (n_attr + n_option + [price <= limit]) / (|attrs| + |options| + 1), from the paper's formula and
    WebShop's rules."""
    attributes = 0
    for want in goal.attributes:
        listed = any(similarity(has, want) > 85 for has in bought.attributes)
        told = (
            want in bought.title.lower()
            or want in " ".join(bought.bullets).lower()
            or want in bought.description.lower()
        )
        attributes += listed or told
    named = isinstance(goal.options, dict)
    options = 0
    for want in goal.options.items() if named else goal.options:
        # In a (name, value) pair the value is normalised only if it is exactly a colour; a plain value becomes the
        # first colour that it contains.
        inside = want if named else [want]
        colour = [c for c in COLOURS if (c in inside if named else c in want)]
        target = colour[0] if colour else " ".join(inside)
        options += any(similarity(next((c for c in COLOURS if c in has), has), target) > 85 for has in chosen.values())
    total = (attributes + options + (price <= goal.price_upper)) / (len(goal.attributes) + len(goal.options) + 1)

    asked, got = find_nouns(goal.product.title), find_nouns(bought.title)
    title_score = len(set(asked) & set(got)) / len(asked) if asked else 0.2
    categories = [{part.strip() for part in one.product_category.split("›")} for one in (goal.product, bought)]
    query_differs, unrelated = bought.query != goal.product.query, len(categories[0] & categories[1]) < 2
    r_type = 1.0
    if query_differs and unrelated and title_score <= 0.2:
        r_type = 0.5
    if title_score < 0.1:
        r_type = 0.1
    if title_score == 0:
        r_type = 0.0
    return r_type * total


def purchases(shop: WebShop, count: int, seed: int):
    """Draw random goals and purchases: a third each the right product, one from the same search, any one."""
    random, products = Random(seed), shop.shop.catalogue.products
    for number in range(count):
        goal = shop.shop.goals[random.randrange(len(shop))]
        alike = [row for row, one in enumerate(products) if one.query == goal.product.query]
        row = (products.index(goal.product), random.choice(alike), random.randrange(len(products)))[number % 3]
        chosen = {
            name: random.choice(values)
            for name, values in products[row].options.items()
            if values and random.random() < 0.8
        }
        if number % 6 == 0:
            chosen |= (
                {name: value for name, value in goal.options.items() if name in products[row].options}
                if isinstance(goal.options, dict)
                else {}
            )
        yield goal, products[row], shop.shop.catalogue.prices[row], chosen


SHOPS = [
    lambda: made_up("small"),
    lambda: made_up("full"),
    lambda: WebShop(products=ITEMS, attributes=ATTRIBUTES, human_goals=HUMAN, nouns="heuristic"),
    pytest.param(real, marks=needs_real),
]


@pytest.mark.parametrize("open_shop", SHOPS, ids=["small", "full", "human", "real"])
def test_scores_are_the_formulas(open_shop):
    shop, alike, seen = open_shop(), matcher(), set()
    for goal, bought, price, chosen in purchases(shop, 240, seed=1):
        found = score(goal, bought, price, chosen, nouns.heuristic, alike)
        assert found == pytest.approx(formula(goal, bought, price, chosen), abs=1e-12), (goal, bought, price, chosen)
        seen.add(round(found, 6))
    assert len(seen) > 8 and 1.0 in seen


def test_a_visit_s_score_is_the_formula_s_of_recorded_nouns():
    shop, random, seen = WebShop(products=ITEMS, attributes=ATTRIBUTES, nouns="heuristic"), Random(3), set()
    rows = [row for row, one in enumerate(shop.shop.catalogue.products) if one.title]
    for _ in range(60):
        shop.reset(0, random.randrange(len(shop)))
        row = random.choice(rows)
        bought = shop.shop.catalogue.products[row]
        shop.step(f"search[{bought.title}]")
        if not shop.step(f"click[{bought.asin}]")[4]["is_action_valid"]:
            continue
        chosen = {name: random.choice(values) for name, values in bought.options.items() if values}
        chosen = {name: value for name, value in chosen.items() if shop.step(f"click[{value}]")[4]["is_action_valid"]}
        info = shop.step("click[buy now]")[4]
        expected = formula(shop.goal, bought, shop.shop.catalogue.prices[row], chosen, WORDS["nouns"].__getitem__)
        assert info["score"] == pytest.approx(expected, abs=1e-12), (shop.goal, bought, chosen)
        seen.add(round(expected, 6))
    assert len(seen) > 5


def test_a_price_at_the_limit_is_met_and_one_above_it_is_not():
    goal, alike = made_up().shop.goals[0], matcher()
    bought = [
        score(goal, goal.product, price, goal.options, nouns.heuristic, alike)
        for price in (goal.price_upper, goal.price_upper + 0.01)
    ]
    assert bought[0] == 1.0 > bought[1]


@pytest.mark.parametrize(
    ("wanted", "chosen", "met"),
    [
        (["cool powder snow", "xl"], ["powder snow", "xl"], 2),
        (["blue grey"], ["sky blue"], 1),  # both are "blue", the first colour of WebShop's list in them
        ({"color": "light grey"}, ["pale grey"], 1),  # "grey" is a word of "color light grey"
        (["lightgrey"], ["pale grey"], 1),
        ({"color": "lightgrey"}, ["pale grey"], 0),  # a named value stays as it is, unless it is a bare colour
        (["red wine"], ["deep red"], 1),
        ({"color": "red"}, ["deep red"], 1),
        ({"size": "x-large"}, ["large"], 1),  # the words of one are among those of the other
        ({"size": "medium"}, ["large"], 0),
        ({"count": "abcdefghijklmnopqrs"}, ["abcdefghijklmnopqrs count x"], 1),
        ([], ["red"], 0),
        (["red"], [], 0),
    ],
)
def test_options_are_met_by_like_values(wanted, chosen, met):
    assert options_met(wanted, chosen, matcher()) == met


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_of_the_original_is_found_in_a_value(colour):
    assert options_met([f"xq{colour}xq of quartz"], [colour], matcher()) == 1


@pytest.mark.parametrize(
    ("wanted", "met"),
    [
        ("essential oils", True),
        ("tea tree", True),
        ("oak", True),
        ("easy clean", True),
        ("gluten free", True),
        ("pine", False),
        ("essential", True),
        ("oils", False),
    ],
)
def test_attributes_are_met_by_like_ones_or_by_the_text(wanted, met):
    bought = parse_product(
        product(asin="B0", name="OAK Table", small_description=["Easy clean"], full_description="It is Gluten Free."),
        {"B0": Facts(("essential oil", "tea tree leaf"))},
    )
    assert attributes_met([wanted], bought, matcher()) == met


LETTERS = "abcdefghijklmnopqrst"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (LETTERS[:15], True),  # 85.7%
        (LETTERS + "uvwxyz0", False),  # 85.1%
        ("T " + LETTERS.upper() + "!", True),
        ("", False),
        ("é" + LETTERS, True),
    ],
)
def test_strings_are_alike_above_85_percent_after_rounding(other, expected):
    assert matcher()(LETTERS, other) == expected == (similarity(LETTERS, other) > 85)


@pytest.mark.parametrize(
    ("title", "query", "category", "expected"),
    [
        ("Walnut Side Table", "chairs", "Home › Chairs", 1.0),  # two of three nouns
        ("Walnut Chair", "chairs", "Home › Chairs", 0.0),
        ("Walnut Chair", "side tables", "Home › Tables › Side", 0.0),  # no noun in common: nothing helps
        ("With One of the Two", "chairs", "Home › Chairs", 0.0),
    ],
)
def test_type_reward_by_title_query_and_category(title, query, category, expected):
    wanted = parse_product(
        product(name="Oak Side Table", query="side tables", product_category="Home › Tables › Side"), {}
    )
    assert (
        type_reward(wanted, replace(wanted, title=title, query=query, product_category=category), nouns.heuristic)
        == expected
    )


@pytest.mark.parametrize(
    ("shared", "related", "expected"),
    [
        (0, True, 0.0),
        (1, False, 0.1),
        (1, True, 0.1),
        (2, False, 0.5),
        (2, True, 1.0),
        (4, False, 0.5),
        (5, False, 1.0),
    ],
)
def test_type_reward_by_share_of_nouns(shared, related, expected):
    words = [f"noun{letter}" for letter in "abcdefghijklmnopqrst"]  # twenty: 0.05, 0.1, 0.2 and 0.25 of them
    wanted = parse_product(product(name=" ".join(words), query="q", product_category="a › b › c"), {})
    bought = replace(
        wanted, title=" ".join(words[:shared]), query="other", product_category="c › x › b" if related else "c › x"
    )
    assert type_reward(wanted, bought, nouns.heuristic) == expected


def test_a_title_without_nouns_asks_for_nothing_more_than_the_kind():
    wanted = parse_product(product(name="100 % of it", query="side tables", product_category="Home › Tables"), {})
    assert type_reward(wanted, wanted, nouns.heuristic) == 1.0
    assert (
        type_reward(wanted, replace(wanted, query="chairs", product_category="Home › Chairs"), nouns.heuristic) == 0.5
    )


def test_nouns_without_a_tagger_are_words_that_are_no_function_words():
    assert nouns.heuristic("Women's Shoes for 2 Feet, 12oz of 4K USB-C Cable (Pack of 3) with L'Oreal") == (
        "women", "shoes", "feet", "usb", "c", "cable", "pack", "l", "oreal",
    )  # fmt: skip


def test_spacy_is_used_where_it_is_and_named_where_it_is_missing(monkeypatch, caplog):
    class Word:
        def __init__(self, text):
            self.text, self.pos_ = text, "PROPN" if text[0].isupper() else "VERB"

    class Spacy:
        installed = True

        @classmethod
        def load(cls, name, disable):
            if not cls.installed:
                raise OSError(f"[E050] Can't find model '{name}'.")
            return lambda title: map(Word, title.split())

    def active(choice):
        nouns.tagger.cache_clear()
        return nouns.tagger(choice)

    try:
        monkeypatch.setitem(sys.modules, "spacy", Spacy)
        for choice in ("auto", "spacy"):
            name, tag = active(choice)
            assert name == "spacy" and tag("Oak makes Tables") == ("oak", "tables")
        assert active("heuristic") == ("heuristic", nouns.heuristic)
        Spacy.installed = False
        with pytest.raises(UserError, match="nouns='spacy'.*en_core_web_sm.*use heuristic"):
            active("spacy")
        monkeypatch.setitem(sys.modules, "spacy", None)
        with pytest.raises(UserError, match="nouns='spacy'.*pip install spacy"):
            active("spacy")
        caplog.clear()
        assert active("heuristic")[0] == "heuristic" and not caplog.records
        assert active("auto")[0] == nouns.tagger("auto")[0] == "heuristic"
        assert [record.levelno for record in caplog.records] == [logging.WARNING] and "by heuristic" in caplog.text
    finally:
        nouns.tagger.cache_clear()
