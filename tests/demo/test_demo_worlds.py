"""The demos beyond ALFWorld: what the tiny Search-QA and WebShop models read and say, their experts, and that they
ship.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from atod_fast import evaluate, train
from atod_fast.config.settings import load
from atod_fast.demo import build
from atod_fast.demo.build import trace
from atod_fast.demo.demos import DEMOS, Demo
from atod_fast.demo.rendering import CompactRenderer
from atod_fast.demo.tokenizer import ACT, BOS, CONTROL, CUT, EOA, PAD, UNK
from atod_fast.envs import make
from atod_fast.envs.protocol import Environment
from atod_fast.envs.searchqa import dialect as searchqa
from atod_fast.envs.webshop import dialect as webshop
from atod_fast.errors import UserError
from atod_fast.models import load_tokenizer, resolve
from atod_fast.records import Turn
from atod_fast.renderers import make_renderer

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")

BEYOND = [demo for demo in DEMOS.values() if demo.name != "alfworld"]
each_demo = pytest.mark.parametrize("demo", BEYOND, ids=[demo.name for demo in BEYOND])
SPLITS = ("train", "eval", "dev")
each_model = pytest.mark.parametrize("name", ["teacher", "student"])


@lru_cache
def tasks(name: str, split: str) -> Environment:
    """The training ("train") or held-out ("eval") tasks of the demo of world `name`."""
    env = load(DEMOS[name].preset).env
    return make(env.name, **(env.options | getattr(env, split)))


@lru_cache
def renderer(name: str) -> CompactRenderer:
    return CompactRenderer(load_tokenizer(f"demo:{name}/student"), DEMOS[name].dialect)


@lru_cache
def tokens(name: str) -> list[str]:
    tokenizer = load_tokenizer(f"demo:{name}/student")
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def spread(env: Environment, count: int) -> range:
    return range(0, len(env), len(env) // count)


# --- what is read and said


def test_a_question_and_what_is_found_are_reduced_to_the_words_that_tell():
    assert " ".join(searchqa.compact("What is the job of the owner of the red lamp?")) == "what job owner red lamp"
    found = (
        '<information>Doc 1: "red lamp"\nThe red lamp is owned by Ada. It was made by Boris. It is kept in Oslo.\n'
        "</information>"
    )
    assert " ".join(searchqa.compact(found)) == "red lamp owned ada made boris kept oslo"
    assert searchqa.compact("") == []


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("search red lamp", "<search>red lamp</search>"),
        ("answer ada", "<answer>ada</answer>"),
        ("answer", "<answer></answer>"),
        ("red lamp", "red lamp"),
    ],
)
def test_words_make_a_search_or_an_answer_and_back(words, command):
    assert searchqa.command(words.split()) == command
    assert searchqa.spoken(command) == words.split()


def test_a_page_is_reduced_to_phrases_prices_and_products():
    head = (
        "Instruction: [SEP] Find me super soft, heavy duty curtains with color: navy | grey, "
        "and price lower than 90.00 dollars [SEP] "
    )
    assert (
        " ".join(webshop.compact("WebShop [SEP] " + head + "Search")) == "super-soft heavy-duty curtain navy-grey $90"
    )
    results = head + (
        "Back to Search [SEP] Page 2 (Total results: 31) [SEP] < Prev [SEP] Next > [SEP] B000000197 [SEP] "
        "Quone Super Soft Curtain [SEP] $78.85"
    )
    assert " ".join(webshop.compact(results)) == "page2 b197 super-soft $80"
    item = head + (
        "Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] x-large [SEP] Neva Makeup Brush [SEP] "
        "Price: $4.0 to $6.0 [SEP] Buy Now"
    )
    assert " ".join(webshop.compact(item)) == "red x-large $10 buy"


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("search super-soft t-shirt 12-count-pack-of-3", "search[super soft t-shirt 12 count (pack of 3)]"),
        ("click b7", "click[b000000007]"),
        ("click navy-grey", "click[navy | grey]"),
        ("buy", "click[buy now]"),
        ("prev", "click[< prev]"),
        ("features", "click[features]"),
        ("super-soft", "super-soft"),
    ],
)
def test_words_make_a_shoppers_action_and_back(words, command):
    assert webshop.command(words.split()) == command
    assert webshop.spoken(command) == words.split()


@each_demo
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_model_says_is_a_command_and_the_world_answers_it(demo: Demo, data):
    env = tasks(demo.name, "eval").clone()
    env.reset(0, data.draw(st.integers(0, 50)))
    said = data.draw(
        st.lists(st.sampled_from(sorted(set(tokens(demo.name)) - {PAD, ACT, EOA, BOS, UNK, CUT})), max_size=6)
    )
    ids = [*(tokens(demo.name).index(word) for word in said), tokens(demo.name).index(EOA)]
    text, command, formed = renderer(demo.name).parse(ids, stopped=True, info={})
    assert (text, formed) == (" ".join(said), bool(said))
    observation, _, _, _, info = env.step(command)
    assert isinstance(observation, str) and info["is_action_valid"] in (True, False)


@each_demo
@given(
    parts=st.lists(st.sampled_from([*CONTROL, CUT, "red", "\n", "<ACT>", "\u00e9", "page 1", "[SEP]"])),
    rest=st.text(max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_the_world_cannot_speak_in_control_tokens(demo: Demo, parts, rest):
    ids = renderer(demo.name).prompt(
        [Turn([], renderer(demo.name).action("x"), [], "", "", "", True)], " ".join([*parts, rest]), {}
    )
    shown = [tokens(demo.name)[i] for i in ids]
    assert shown[-1] == ACT and not {PAD, ACT, EOA, BOS} & set(shown[:-1])


# --- whom they learnt from


@each_demo
def test_the_expert_wins_every_task(demo: Demo):
    env = tasks(demo.name, "train")
    played = [
        trace(demo.dialect, env, task, Random(0), 0.0, load(demo.preset).env.max_turns) for task in spread(env, 150)
    ]
    assert all(won for _, won in played)
    assert not any(step.junk for steps, _ in played for step in steps)


@each_demo
def test_the_expert_takes_over_in_any_state(demo: Demo):
    settings = load(demo.preset).env
    env = make(settings.name, **(settings.options | settings.eval))
    played = [trace(demo.dialect, env, task, Random(task), 0.4, max_turns=60) for task in spread(env, 60)]
    assert all(won for _, won in played)
    assert sum(step.junk for steps, _ in played for step in steps) > 60


@each_demo
def test_no_word_of_heldout_tasks_is_unknown(demo: Demo):
    env, known = tasks(demo.name, "eval"), set(tokens(demo.name))
    for task in spread(env, 150):
        for step in trace(demo.dialect, env, task, Random(task), 0.3, 10)[0]:
            assert set(demo.dialect.read(step.observation)) <= known, step.observation
            assert set(demo.dialect.words(step.command)) <= known, step.command
            if not step.junk:
                assert demo.dialect.command(demo.dialect.words(step.command)).lower() == step.command.lower()


# --- what ships


@each_demo
def test_the_vocabulary_is_a_function_of_the_preset(demo: Demo):
    env = tasks(demo.name, "train")
    assert [*CONTROL, CUT, *demo.dialect.vocabulary(env, len(env))] == tokens(demo.name)
    asked = load_tokenizer(f"demo:{demo.name}/student").init_kwargs
    assert (asked["atod_renderer"], asked["atod_environment"]) == ("compact", demo.name)


@each_demo
@each_model
def test_shipped_weights_load_and_know_their_tokens(demo: Demo, name: str):
    folder = resolve(f"demo:{demo.name}/{name}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == tokens(demo.name)
    assert (model.dtype, model.config.head_dim, model.config.vocab_size) == (torch.float32, 32, len(tokenizer))
    assert model.config.tie_word_embeddings
    assert (demo.folder / name / "model.safetensors").stat().st_size < 1_000_000


@each_demo
def test_the_shipped_teacher_is_ahead_of_the_student_it_ships_with(demo: Demo):
    teacher, student = (build.success(demo, demo.folder / name, 150, 1.0) for name in ("teacher", "student"))
    assert teacher >= student + 0.05


@each_demo
def test_a_build_is_repeatable(demo: Demo, tmp_path):
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            build.build(demo, tmp_path / name, seed=3, tasks=20, share=0.005)
    finally:
        torch.set_num_threads(threads)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / run / "student").state_dict() for run in ("one", "two")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_demo
def test_a_step_by_the_preset_and_an_evaluation_of_what_came_of_it(demo: Demo, tmp_path):
    few = ["--preset", demo.preset, "eval.tasks=20"]
    sizes = ["train.steps=1", "train.tasks_per_step=4", "train.group_size=4", "eval.teacher=false"]
    assert train.main([*few, *sizes, "--run-dir", str(tmp_path / "run")]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 1 and line["policy/gradient_norm"] > 0 and line["sync/logprob_gap"] < 1e-5
    assert evaluate.main([str(tmp_path / "run" / "hf"), *few, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["success"] == pytest.approx(line["eval/success"]) and len(found["success_by_type"]) > 1


@each_demo
def test_the_models_are_never_taught_in_the_held_out_world(demo: Demo, monkeypatch):
    opened, real = [], build.training_tasks
    monkeypatch.setattr(
        build, "training_tasks", lambda settings, seed: opened.append(seed) or real(settings, seed=seed)
    )
    env = load(demo.preset).env
    build.examples(demo, env, 1, renderer(demo.name), replace(demo.recipes["student"], environments=12))
    assert opened[0] == env.train["seed"] and len(set(opened)) == 12
    assert not {env.eval["seed"], env.dev["seed"]} & set(opened)
    assert all(recipe.environments < env.dev["seed"] for recipe in demo.recipes.values()), (
        "the shipped ones' worlds come before"
    )


def test_the_tasks_that_choose_are_in_no_other_split():
    catalogues = [tasks("webshop", split).shop.catalogue.products for split in SPLITS]
    shops = [{(product.title, str(product.options)) for product in products} for products in catalogues]
    assert not shops[2] & shops[0] and not shops[2] & shops[1]
    asked = [{question.text: question.answers for question in tasks("searchqa", split)._questions} for split in SPLITS]
    assert not asked[2].keys() & asked[0].keys()
    both = asked[2].keys() & asked[1].keys()  # of one thing in two worlds, whose answers are alike by chance
    assert sum(asked[2][text] == asked[1][text] for text in both) < 0.05 * len(both)


@pytest.mark.parametrize(
    ("preset", "other"), [("demo-searchqa", "demo"), ("demo", "demo-searchqa"), ("demo-webshop", "demo-searchqa")]
)
def test_models_of_another_world_are_refused(preset: str, other: str):
    config = load(preset)
    env = make(config.env.name, **(config.env.options | config.env.eval))
    tokenizer = load_tokenizer(load(other).student.path)
    with pytest.raises(
        UserError, match=f"use --preset {other} for that, or --preset {preset} for models of this environment"
    ):
        make_renderer(config, tokenizer, len(tokenizer), env)


def test_the_demo_s_models_are_refused_in_a_world_of_another_kind():
    tokenizer = load_tokenizer("demo:student")
    with pytest.raises(
        UserError,
        match="env.name='helpers.worlds:Corridor': the demo's model speaks of alfworld only; "
        "use --preset demo for that, or set",
    ):
        make_renderer(
            load("demo", overrides=["env.name=helpers.worlds:Corridor"]),
            tokenizer,
            len(tokenizer),
            make("helpers.worlds:Corridor"),
        )


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, 'no chat template; use a chat or instruct model .*add "atod_renderer": "compact" and.*"atod_environment"'),
        (
            {"atod_renderer": "compct", "atod_environment": "alfworld"},
            "atod_renderer='compct' in tokenizer_config.json of .* is none of compact; correct it",
        ),
        (
            {"atod_renderer": "compact"},
            "atod_environment=None in tokenizer_config.json of .* is none of alfworld, searchqa, webshop; correct it",
        ),
    ],
)
def test_a_model_that_asks_for_no_renderer_or_an_unknown_one_is_refused(asked, words, tmp_path):
    tokenizer = load_tokenizer("demo:student")
    for key in ("atod_renderer", "atod_environment"):
        tokenizer.init_kwargs.pop(key)
    tokenizer.init_kwargs |= asked
    tokenizer.save_pretrained(tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), load("demo")
    with pytest.raises(UserError, match=words):
        make_renderer(config, tokenizer, len(tokenizer), make("alfworld", generate=1))
