"""WebShop's recorded catalogue, shops of real and of generated products, and a product of the original format."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest

from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.generator import generate_files
from helpers.paths import DATA, ROOT

RECORDED = ROOT / "tests" / "envs" / "webshop" / "data"
ITEMS, ATTRIBUTES, HUMAN = (RECORDED / f"{name}.json" for name in ("items", "attributes", "human"))
REAL = DATA / "webshop_products_1000.jsonl.xz"
WORDS = json.loads((RECORDED / "words.json").read_text(encoding="utf-8"))
COLOURS = WORDS["colours"]
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the 1,000-product set in shared/data")


@lru_cache
def real() -> WebShop:
    return WebShop(products=REAL, attributes=DATA / "webshop_items_ins_v2_1000.json", nouns="heuristic")


@lru_cache
def made_up(scale: str = "small") -> WebShop:
    return WebShop(generate=60, seed=5, scale=scale, nouns="heuristic")


def product(**changes):
    """A product of the original format, and what its file would say of it."""
    entry = generate_files(1, 0).products[0] | changes
    return {key: value for key, value in entry.items() if value is not ...}
