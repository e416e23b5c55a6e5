"""Text of WebShop's products cannot forge a page, hide, or grow without end."""

from __future__ import annotations

import json
import lzma
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.envs.text import CUT
from atod_fast.envs.webshop import catalogue as cleaning
from atod_fast.envs.webshop.catalogue import parse_product
from atod_fast.envs.webshop.pages import LONGEST_PAGE, SEPARATOR, item_page, results_page, sub_page
from helpers.webshop import REAL, needs_real, product

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")
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
