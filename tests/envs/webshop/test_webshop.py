"""WebShop as an environment: recorded transcripts of the original, actions, episodes, purchases and refusals."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atod_fast.envs.protocol import Environment
from atod_fast.envs.webshop.catalogue import Catalogue, Facts, Instruction, parse_product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.goals import Goals
from atod_fast.envs.webshop.pages import SEPARATOR
from atod_fast.envs.webshop.search import SearchEngine
from atod_fast.envs.webshop.shop import Shop
from atod_fast.envs.webshop.visit import Visit
from helpers.webshop import ATTRIBUTES, HUMAN, ITEMS, RECORDED, made_up, product

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")


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
