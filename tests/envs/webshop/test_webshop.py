"""WebShop: recorded transcripts of the original, the score against its formula, tolerance of bad data, generator."""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import os
import re
import subprocess
import sys
from dataclasses import replace
from difflib import SequenceMatcher
from functools import lru_cache
from math import log
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atod_fast.envs import make
from atod_fast.envs.protocol import Environment
from atod_fast.envs.text import CUT
from atod_fast.envs.webshop import catalogue as cleaning
from atod_fast.envs.webshop import nouns, reading
from atod_fast.envs.webshop.catalogue import Catalogue, Facts, Instruction, parse_product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.generator import generate_files
from atod_fast.envs.webshop.goals import SPLITS, Goals
from atod_fast.envs.webshop.pages import LONGEST_PAGE, SEPARATOR, item_page, results_page, sub_page
from atod_fast.envs.webshop.reading import Malformed
from atod_fast.envs.webshop.reward import attributes_met, matcher, options_met, score, type_reward
from atod_fast.envs.webshop.search import SearchEngine
from atod_fast.envs.webshop.shop import Shop
from atod_fast.envs.webshop.visit import Visit
from atod_fast.errors import UserError
from helpers.paths import DATA

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")

RECORDED = Path(__file__).parent / "data"
ITEMS, ATTRIBUTES, HUMAN = (RECORDED / f"{name}.json" for name in ("items", "attributes", "human"))
REAL = DATA / "products_1000.jsonl.xz"
WORDS = json.loads((RECORDED / "words.json").read_text(encoding="utf-8"))
COLOURS = WORDS["colours"]
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the 1,000-product set in shared/data")


@lru_cache
def real() -> WebShop:
    return WebShop(products=REAL, attributes=DATA / "items_ins_v2_1000.json", nouns="heuristic")


@lru_cache
def made_up(scale: str = "small") -> WebShop:
    return WebShop(generate=60, seed=5, scale=scale, nouns="heuristic")


def product(**changes):
    """A product of the original format, and what its file would say of it."""
    entry = generate_files(1, 0).products[0] | changes
    return {key: value for key, value in entry.items() if value is not ...}


# --- pages and actions


def test_replays_what_the_original_said():
    recorded = json.loads((RECORDED / "transcripts.json").read_text(encoding="utf-8"))
    shop = WebShop(products=ITEMS, attributes=ATTRIBUTES, nouns="heuristic")
    goals = [shop.shop.goals[place] for place in range(len(shop))]
    assert [[goal.product.asin, goal.instruction, goal.price_upper] for goal in goals] == recorded["goals"]
    scores = set()
    for episode in recorded["episodes"]:
        observation, info = shop.reset(0, episode["task"])
        for action, expected, clickables, scored, done in episode["steps"]:
            if action:
                observation, reward, terminated, truncated, info = shop.step(action)
                assert (terminated, truncated, reward) == (done, False, 10.0 * (scored == 1))
            assert observation == expected
            assert info["admissible_actions"] == ["search[<your query>]"] * (clickables == ["search"]) + [
                f"click[{name}]" for name in clickables
            ]
            assert info["score"] == scored and info["won"] == (scored == 1)
            scores.add(scored)
    assert {0.0, 1.0} < scores


def test_goals_that_people_wrote_are_the_originals():
    recorded = json.loads((RECORDED / "transcripts.json").read_text(encoding="utf-8"))["human_goals"]
    shop = WebShop(products=ITEMS, attributes=ATTRIBUTES, human_goals=HUMAN, nouns="heuristic")
    goals = [shop.shop.goals[place] for place in range(len(shop))]
    assert [[goal.product.asin, goal.instruction, goal.price_upper, list(goal.options)] for goal in goals] == recorded


actions = st.one_of(
    st.text(max_size=30),
    st.builds("{}[{}]".format, st.sampled_from(("search", "click", "Search", "buy", "")), st.text(max_size=20)),
    st.sampled_from(
        (
            "search[<r>]",
            "search[<a> tea tree]",
            "search[<a>]",
            "search[<c> beauty]",
            "search[<c>]",
            "search[<q> curtains]",
            "search[ ]",
            "search[the]",
        )
    ),
    st.integers(0, 60),  # that admissible action
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(("small", "full")), st.integers(0, 50), st.lists(actions, max_size=25))
@example("small", 0, ["search[<r>]", 2, 2, 5, "click[]", "search[", "]", "click[buy now"])
def test_no_action_raises_and_what_is_listed_is_accepted(scale, task, script):
    shop = made_up(scale).clone()
    observation, info = shop.reset(1, task)
    instruction = SEPARATOR.join(["Instruction:", shop.goal.instruction])
    over = False
    for action in script:
        listed = info["admissible_actions"]
        if isinstance(action, int):
            action = listed[action % len(listed)].replace("<your query>", "rose gold brush") if listed else "click[x]"
            must_accept = bool(listed)
        else:
            must_accept = action in listed
        unlisted = action.startswith("click[") and not any(action.lower().startswith(one) for one in listed)
        before = observation
        observation, reward, terminated, truncated, info = shop.step(action)
        assert not (must_accept and not info["is_action_valid"]) and not (unlisted and info["is_action_valid"])
        if not info["is_action_valid"]:
            assert observation == before and reward == 0
        assert not truncated and terminated >= over and reward in (0, 10) and 0 <= info["score"] <= 1
        over = terminated
        assert instruction in observation or over
        assert len(set(info["admissible_actions"])) == len(info["admissible_actions"])
    assert isinstance(shop, Environment)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 9), st.randoms(use_true_random=False))
def test_equal_seeds_make_equal_episodes_and_clones_share_only_the_shop(task, seed, random):
    one, other, bystander = made_up().clone(), made_up().clone(), made_up().clone()
    assert one.shop is other.shop
    assert one.reset(seed, task) == other.reset(seed, task)
    info = bystander.reset(seed, task)[1]
    info = one.reset(seed, task)[1]
    for _ in range(12):
        listed = info["admissible_actions"] or ["click[x]"]
        action = random.choice([*listed, "search[<r>]", "search[water resistant]"])
        answer = one.step(action)
        assert answer == other.step(action)
        info = answer[4]
    assert bystander.step("click[search]")[0] == bystander.reset(seed, task)[0]


def test_the_search_by_chance_follows_the_seed():
    def found(seed):
        shop = WebShop(generate=200, seed=2, nouns="heuristic")
        shop.reset(seed, 0)
        return shop.step("search[<r>]")[0]

    assert found(1) == found(1) != found(2)


def test_the_product_asked_for_can_be_bought_for_full_score():
    for shop in (made_up("small"), made_up("full")):
        won = [buy(shop, task) for task in range(len(shop))]
        assert all(won)
        assert shop.step("click[back to search]")[1:4] == (0.0, True, False)  # a visit ends with a purchase


def buy(shop: WebShop, task: int) -> bool:
    """Buy the product that the goal was made of, as a visitor would."""
    _, info = shop.reset(0, task)
    link = f"click[{shop.goal.product.asin.lower()}]"
    info = shop.step("search[<q> " + shop.goal.product.query + "]")[4]
    while link not in info["admissible_actions"]:
        info = shop.step("click[next >]")[4]
    shop.step(link)
    for value in shop.goal.options.values():
        assert shop.step(f"click[{value}]")[4]["is_action_valid"]
    _, reward, terminated, _, info = shop.step("click[buy now]")
    assert terminated and info["won"] == (reward == 10) == (info["score"] == 1)
    return info["won"]


def test_rewards_are_all_or_nothing_and_the_score_is_told():
    shop, scores = made_up().clone(), set()
    for task in range(20):
        _, info = shop.reset(0, task)
        assert info["task_type"] == shop.goal.product.category != ""
        links = shop.step("search[<q> " + shop.goal.product.query + "]")[4]["admissible_actions"]
        shop.step(links[2])
        _, reward, _, _, info = shop.step("click[buy now]")
        assert reward == 10 * (info["score"] == 1)
        scores.add(info["score"])
    assert len(scores) > 3


def test_a_value_of_two_options_belongs_to_the_later_one_and_turning_back_forgets_options():
    groups = {"Top": [{"value": "Oak"}, {"value": "Pine"}], "Legs": [{"value": "Oak"}]}
    facts = {"B0": Facts((), Instruction("Find me tables", ("oak",)))}
    catalogue = Catalogue(
        [parse_product(product(asin="B0", name="Side Table", customization_options=groups), facts)], facts, Random(0)
    )
    visit = Visit(Shop(catalogue, Goals(catalogue, None, Random(0)), SearchEngine(catalogue.products)), "i", Random(0))
    for action, chosen in (
        ("search[side table]", {}),
        ("click[b0]", {}),
        ("click[oak]", {"legs": "oak"}),
        ("click[PINE]", {"legs": "oak", "top": "pine"}),
        ("click[reviews]", {"legs": "oak", "top": "pine"}),
        ("click[< prev]", {"legs": "oak", "top": "pine"}),
        ("click[< prev]", {}),
    ):
        assert visit.act(action) and visit.options == chosen


# --- the score


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


# --- goals


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


# --- files


def same_shops(one: WebShop, other: WebShop) -> bool:
    goals = [[shop.shop.goals[place] for place in range(len(shop))] for shop in (one, other)]
    return goals[0] == goals[1] and vars(one.shop.catalogue) == vars(other.shop.catalogue)


@pytest.mark.parametrize("scale", ["small", "full"])
def test_generated_files_load_as_the_generated_shop(tmp_path, scale):
    files = generate_files(60, 5, scale)
    paths = files.write(tmp_path)
    assert same_shops(made_up(scale), WebShop(products=paths[0], attributes=paths[1], nouns="heuristic"))
    asked = WebShop(products=paths[0], attributes=paths[1], human_goals=paths[2], nouns="heuristic")
    assert len(asked) == len(files.human)
    packed = tmp_path / "items.jsonl.xz"
    packed.write_bytes(lzma.compress("\n\n".join(map(json.dumps, files.products)).encode()))
    facts = tmp_path / "facts.json.gz"
    facts.write_bytes(gzip.compress(json.dumps(files.attributes).encode()))
    assert same_shops(made_up(scale), WebShop(products=packed, attributes=facts, nouns="heuristic"))
    assert (
        len(WebShop(products=packed, attributes=facts, num_products=7, nouns="heuristic").shop.catalogue.products) == 7
    )


def test_a_catalogue_is_a_function_of_seed_and_scale():
    assert generate_files(20, 1) == generate_files(20, 1) != generate_files(20, 2)
    assert generate_files(20, 1).products == generate_files(30, 1).products[:20]
    assert len(json.dumps(generate_files(20, 1, "full").products)) > 2 * len(json.dumps(generate_files(20, 1).products))


def test_splits_and_clones_share_one_shop_and_changed_files_are_read_again(tmp_path):
    products, attributes, _ = generate_files(20, 0).write(tmp_path)
    train, test = (
        WebShop(products=products, attributes=attributes, split=split, nouns="heuristic") for split in ("train", "test")
    )
    assert train.shop is test.shop is train.clone().shop
    generate_files(10, 0).write(tmp_path)
    os.utime(products, ns=(1, 1))
    assert len(WebShop(products=products, attributes=attributes, nouns="heuristic").shop.catalogue.products) == 10


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(json_values, max_size=6) | st.dictionaries(st.text(max_size=6), json_values, max_size=6),
    st.integers(1, 40),
    st.sampled_from((None, 2)),
)
def test_reading_piece_by_piece_gives_what_json_gives(tmp_path_factory, content, chunk, indent):
    path = tmp_path_factory.getbasetemp() / "content.json"
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        found = list(reading.read("products", path, 0, lambda entry: entry))
    assert found == (content if isinstance(content, list) else list(content.items()))


def test_bytes_that_are_no_text_are_marked_and_an_entry_has_a_longest_size(tmp_path, monkeypatch):
    path = tmp_path / "items.json"
    path.write_bytes(b'["a\xffb"]')
    assert list(reading.read("products", path, 0, lambda entry: entry)) == ["a\ufffdb"]
    path.write_text(json.dumps(["x" * 1000]))
    assert list(reading.read("products", path, 0, len)) == [1000]
    monkeypatch.setattr(reading, "CHUNK", 10)
    monkeypatch.setattr(reading, "LONGEST_ENTRY", 100)
    with pytest.raises(UserError, match="no JSON at character 1 "):
        list(reading.read("products", path, 0, len))


def test_malformed_lines_are_named_counted_and_left_out_up_to_a_limit(tmp_path, caplog):
    files = generate_files(30, 0)
    _, attributes, _ = files.write(tmp_path)
    rows = list(map(json.dumps, files.products))
    rows[3], rows[7], rows[9] = rows[3][:50], '["no", "product"]', json.dumps(files.products[9] | {"pricing": "free"})
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    shop = WebShop(products=path, attributes=attributes, malformed=3, nouns="heuristic")
    assert len(shop.shop.catalogue.products) == 27
    assert "left out 3 malformed entries" in caplog.text
    for told in ("line 4: not JSON", "line 8: not an object", "line 10: pricing 'free' is no price"):
        assert told in caplog.text
    with pytest.raises(
        UserError,
        match=(
            r"products='.*items.jsonl' has more than malformed=2 malformed entries, "
            r"the first line 4: not JSON.*mend the file"
        ),
    ):
        WebShop(products=path, attributes=attributes, malformed=2, nouns="heuristic")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"asin": ...}, "asin is missing or no string"),
        ({"asin": " "}, "asin is no identifier"),
        ({"asin": "B0[SEP]1"}, "asin is no identifier"),
        ({"name": None}, "name is missing"),
        ({"full_description": 3}, "full_description is missing"),
        ({"small_description": [1]}, "small_description is missing or no list"),
        ({"small_description": ["x"] * 501}, "no list of at most 500 strings"),
        ({"customization_options": [1]}, "customization_options is no object"),
        ({"customization_options": {"Color": "red"}}, "option 'Color' is no list of objects"),
        ({"customization_options": {"Color": [{"price": 1}]}}, "value is missing"),
        (
            {"customization_options": {"Color": [{"value": str(n)} for n in range(500)]}},
            "501 options and values of 1395 characters, 500 of 20000 are",
        ),
        ({"customization_options": {str(n): [] for n in range(501)}}, "501 options and values"),
        (
            {"customization_options": {"Color": [{"value": f"{n:0800}"} for n in range(30)]}},
            "31 options and values of 24005 characters",
        ),
        ({"pricing": "$1.2.3"}, "is no price"),
        ({"pricing": [float("inf")]}, "is no price"),
        ({"pricing": {"low": 1}}, "is no price"),
        ({"category": ["x"]}, "category is missing"),
    ],
)
def test_what_is_wrong_with_a_product_is_said(changes, reason):
    with pytest.raises(Malformed, match=reason):
        parse_product(product(**changes), {})


@pytest.mark.parametrize(
    ("option", "content", "reason"),
    [
        ("products", "[{]", "no JSON at character 1 "),
        ("products", '[{"a": 1} {"b": 2}]', "no JSON at character 10, where ',' should be"),
        ("products", "[1, 2", "no JSON at character"),
        ("products", '"text"', "neither a JSON array nor a JSON object"),
        ("products", "", "neither"),
        ("products", "[]", "holds no product"),
        ("products", "[" * 100_000, "no JSON at character"),
        (
            "attributes",
            '{"B000000000": [1]}',
            "malformed=0 malformed entries, the first entry 'B000000000': not an identifier with an object",
        ),
        ("attributes", '{"B000000000": {"attributes": "x"}}', "attributes is missing or no list"),
        (
            "attributes",
            '{"B000000000": {"instruction": "x", "instruction_attributes": []}}',
            "instruction_attributes is empty",
        ),
        ("attributes", "[1]", "entry 1: not an identifier"),
        ("attributes", "{}", "split='all' is empty: 9 products make 0 goals"),
        (
            "human_goals",
            '{"B000000000": [{"instruction": "x", "instruction_attributes": ["a"]}]}',
            "instruction_options is missing",
        ),
        ("human_goals", "{}", "holds no instruction"),
        ("human_goals", '{"B000000000": 1}', "not an identifier with a list"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path, option, content, reason):
    paths = dict(zip(("products", "attributes", "human_goals"), generate_files(9, 0).write(tmp_path), strict=True))
    paths[option].write_text(content, encoding="utf-8")
    if option == "attributes":
        del paths["human_goals"]
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        WebShop(**paths, malformed=2 * (option == "products"), nouns="heuristic")
    assert "\n" not in str(error.value) and (option in str(error.value))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "exactly one of products="),
        ({"generate": 5, "products": ITEMS}, "exactly one of products="),
        ({"products": ITEMS}, "needs attributes="),
        ({"products": "nowhere.json", "attributes": ATTRIBUTES}, "products='nowhere.json' cannot be read"),
        ({"products": ITEMS, "attributes": ATTRIBUTES, "seed": 3}, "seed=3 goes with generate=N"),
        ({"generate": 5, "human_goals": HUMAN}, "goes with products="),
        ({"generate": 5, "malformed": 5}, "malformed=5 goes with products="),
        ({"generate": 0}, "generate=0 must be a whole number of at least 1"),
        ({"generate": True}, "generate=True must be a whole number"),
        (
            {"generate": 5, "split": "tests"},
            "split='tests' is not one of all, train, test, dev, rest; did you mean test?",
        ),
        ({"generate": 5, "scale": "big"}, "scale='big' is not one of small, full"),
        ({"generate": 5, "nouns": "spicy"}, "did you mean spacy?"),
        ({"generate": 5, "splits": "test"}, "did you mean split?"),
        ({"generate": 5, "reward": 4}, "has no option 'reward'"),
        ({"generate": 5, "split": ["test"]}, "split=['test'] must be text"),
        ({"products": 5, "attributes": ATTRIBUTES}, "products=5 is no file's path"),
        ({"products": ITEMS, "attributes": ["x"]}, "attributes=['x'] is no file's path"),
        ({"products": ITEMS, "attributes": ATTRIBUTES, "human_goals": 3}, "human_goals=3 is no file's path"),
        ({"products": "~nosuchuser/x", "attributes": ATTRIBUTES}, "products='~nosuchuser/x' is no file's path"),
    ],
)
def test_options_that_cannot_be_are_refused(options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        make("atod_fast.envs.webshop.env:WebShop", **options)


def test_steps_need_a_reset_and_tasks_have_numbers():
    shop = made_up().clone()
    with pytest.raises(RuntimeError, match="step before reset"):
        shop.step("click[search]")
    for task in (-1, len(shop)):
        with pytest.raises(IndexError, match=f"task {task} of"):
            shop.reset(0, task)


def test_missing_libraries_are_named(monkeypatch):
    for module, told in (("rapidfuzz.fuzz", "rapidfuzz"), ("Stemmer", "PyStemmer")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=rf"{told}.*pip install 'atod_fast\[search\]'"):
                WebShop(generate=3, seed=12345, nouns="heuristic")


def test_importing_the_world_imports_nothing_heavy():
    code = (
        "import sys, atod_fast.envs.webshop.env; "
        "print(sorted({'torch', 'bm25s', 'Stemmer', 'rapidfuzz', 'spacy'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


# --- hostile text

hostile = st.text(max_size=40) | st.lists(
    st.sampled_from(
        ("[SEP]", " [SEP] ", "[S", "EP]", "/", "\n", "\x00", "\x1b[31m", "<|im_end|>", "Buy Now", "]", " ", "</p>")
    )
).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    hostile, hostile, st.lists(hostile, max_size=3), st.dictionaries(hostile, st.lists(hostile, max_size=3), max_size=3)
)
def test_text_of_a_product_cannot_forge_a_pages_structure(title, description, bullets, options):
    groups = {name: [{"value": value} for value in values] for name, values in options.items()}
    one = parse_product(
        product(name=title, full_description=description, small_description=bullets, customization_options=groups), {}
    )
    values = sum(map(len, one.options.values()))
    for page, most, fixed in (
        (item_page("i", one), 4 + len(one.options) + values + 7, 4 + 6),
        (results_page("i", [one], 1, 1), 5 + 3, 5 + 2),
        (sub_page("i", one, "description"), 5, 4),
        (sub_page("i", one, "features"), 4 + len(bullets), 4),
    ):
        pieces = page.text.split(SEPARATOR)
        assert page.text.count("[SEP]") == len(pieces) - 1 and fixed <= len(pieces) <= most
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.text)
        assert not any("\n" in action for action in page.admissible)


def test_what_is_too_long_is_cut_with_a_mark():
    long = parse_product(
        product(
            name="t" * 5000, full_description="d" * 50_000, customization_options={"Color": [{"value": "c" * 3000}]}
        ),
        {},
    )
    page = item_page("i", long)
    assert len(page.text) < 2500 and page.text.count(CUT) == 2 and f"click[{'c' * 1000}{CUT}]" in page.admissible
    assert sub_page("i", long, "description").text.endswith("d" + CUT)
    assert cleaning.line("y" * 1000) == "y" * 1000


def test_a_page_has_a_longest_size_and_keeps_its_ends():
    many = parse_product(product(name="t" * 5000, small_description=["b" * 30_000] * 500), {})
    page = sub_page("i", many, "features")
    assert (
        len(page.text) < LONGEST_PAGE + 20
        and page.text.count(CUT) > 0
        and page.text.startswith("Instruction: [SEP] i [SEP] Back to Search")
    )
    options = {"Color": [{"value": str(n) * 9} for n in range(400)]}
    item = item_page("i" * 20_000, parse_product(product(customization_options=options), {}))
    assert (
        len(item.text) < LONGEST_PAGE + 20
        and item.text.count(CUT) == 1
        and item.text.endswith("Buy Now")
        and "click[399399399399399399399399399]" in item.admissible
    )


def test_what_cannot_be_seen_does_not_get_through():
    for hidden in ("\u202e", "\u2066", "\u2060", "\u200f", "\ufeff", "\U000e0041", "\u2028", "\x1b[31m", "\x00"):
        assert cleaning.line(f"a{hidden}b") == cleaning.text(f"a{hidden}b") == "a b"
    assert cleaning.line("a\tb\nc") == "a b c" and cleaning.text("a\tb\nc") == "a\tb\nc"


def test_lone_surrogates_do_not_get_through():
    assert parse_product(json.loads(json.dumps(product(name="a\ud800b"))), {}).title == "a b"


@needs_real
def test_real_products_are_left_as_they_are():
    for entry in map(json.loads, lzma.open(REAL, "rt", encoding="utf-8")):
        bullets = (
            entry["small_description"] if isinstance(entry["small_description"], list) else [entry["small_description"]]
        )
        values = [value["value"] for group in (entry["customization_options"] or {}).values() for value in group or ()]
        assert all(cleaning.text(one) == one for one in [entry["full_description"], *bullets])
        assert all(
            cleaning.line(one) == one
            for one in [entry["name"], entry["category"], entry["query"], entry["product_category"], *values]
        )
