"""WebShop's files: generated ones, ones read piece by piece, and damaged ones."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.envs import make
from atod_fast.envs.webshop import reading
from atod_fast.envs.webshop.catalogue import parse_product
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.generator import generate_files
from atod_fast.envs.webshop.reading import Malformed
from atod_fast.errors import UserError
from helpers.webshop import ATTRIBUTES, HUMAN, ITEMS, made_up, product

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")


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
