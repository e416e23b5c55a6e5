"""The demo beyond ALFWorld: what its tiny models read and say in Search-QA and WebShop, whom they learnt it from, and that they ship."""

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
from atod_fast.demo import WORLDS, build, world_of
from atod_fast.demo.rendering import CompactRenderer
from atod_fast.demo.tokenizer import ACT, BOS, CONTROL, CUT, EOA, PAD, UNK
from atod_fast.envs import make
from atod_fast.envs.dialect import World, trace
from atod_fast.envs.protocol import Environment
from atod_fast.envs.searchqa import dialect as searchqa
from atod_fast.envs.webshop import dialect as webshop
from atod_fast.errors import UserError
from atod_fast.models import load_tokenizer, resolve
from atod_fast.records import Turn
from atod_fast.rollout.actor import make_renderer
from atod_fast.settings import load

pytest.importorskip("bm25s")
pytest.importorskip("rapidfuzz")

BEYOND = [world for world in WORLDS.values() if world.name != "alfworld"]
each_world = pytest.mark.parametrize("world", BEYOND, ids=[world.name for world in BEYOND])
SPLITS = ("train", "eval", "dev")
each_model = pytest.mark.parametrize("name", ["teacher", "student"])


@lru_cache
def tasks(name: str, split: str) -> Environment:
    """The training ("train") or held-out ("eval") tasks of the demo of world `name`."""
    env = load(WORLDS[name].preset).env
    return make(env.name, **(env.options | getattr(env, split)))


@lru_cache
def renderer(name: str) -> CompactRenderer:
    return CompactRenderer(load_tokenizer(f"demo:{name}/student"), WORLDS[name].dialect)


@lru_cache
def tokens(name: str) -> list[str]:
    tokenizer = load_tokenizer(f"demo:{name}/student")
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def spread(env: Environment, count: int) -> range:
    return range(0, len(env), len(env) // count)


# --- what is read and said


def test_a_question_and_what_is_found_are_reduced_to_the_words_that_tell():
    assert " ".join(searchqa.compact("What is the job of the owner of the red lamp?")) == "what job owner red lamp"
    found = '<information>Doc 1: "red lamp"\nThe red lamp is owned by Ada. It was made by Boris. It is kept in Oslo.\n</information>'
    assert " ".join(searchqa.compact(found)) == "red lamp owned ada made boris kept oslo"
    assert searchqa.compact("") == []


@pytest.mark.parametrize(
    ("words", "command"),
    [("search red lamp", "<search>red lamp</search>"), ("answer ada", "<answer>ada</answer>"), ("answer", "<answer></answer>"), ("red lamp", "red lamp")],
)
def test_words_make_a_search_or_an_answer_and_back(words, command):
    assert searchqa.command(words.split()) == command
    assert searchqa.spoken(command) == words.split()


def test_a_page_is_reduced_to_phrases_prices_and_products():
    head = "Instruction: [SEP] Find me super soft, heavy duty curtains with color: navy | grey, and price lower than 90.00 dollars [SEP] "
    assert " ".join(webshop.compact("WebShop [SEP] " + head + "Search")) == "super-soft heavy-duty curtain navy-grey $90"
    results = head + "Back to Search [SEP] Page 2 (Total results: 31) [SEP] < Prev [SEP] Next > [SEP] B000000197 [SEP] Quone Super Soft Curtain [SEP] $78.85"
    assert " ".join(webshop.compact(results)) == "page2 b197 super-soft $80"
    item = head + "Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] x-large [SEP] Neva Makeup Brush [SEP] Price: $4.0 to $6.0 [SEP] Buy Now"
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


@each_world
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_the_model_says_is_a_command_and_the_world_answers_it(world: World, data):
    env = tasks(world.name, "eval").clone()
    env.reset(0, data.draw(st.integers(0, 50)))
    said = data.draw(st.lists(st.sampled_from(sorted(set(tokens(world.name)) - {PAD, ACT, EOA, BOS, UNK, CUT})), max_size=6))
    ids = [*(tokens(world.name).index(word) for word in said), tokens(world.name).index(EOA)]
    text, command, formed = renderer(world.name).parse(ids, stopped=True)
    assert (text, formed) == (" ".join(said), bool(said))
    observation, _, _, _, info = env.step(command)
    assert isinstance(observation, str) and info["is_action_valid"] in (True, False)


@each_world
@given(parts=st.lists(st.sampled_from([*CONTROL, CUT, "red", "\n", "<ACT>", "\u00e9", "page 1", "[SEP]"])), rest=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_world_cannot_speak_in_control_tokens(world: World, parts, rest):
    ids = renderer(world.name).prompt([Turn([], renderer(world.name).action("x"), [], "", "", "", True)], " ".join([*parts, rest]), {})
    shown = [tokens(world.name)[i] for i in ids]
    assert shown[-1] == ACT and not {PAD, ACT, EOA, BOS} & set(shown[:-1])


# --- whom they learnt from


@each_world
def test_the_expert_wins_every_task(world: World):
    env = tasks(world.name, "train")
    played = [trace(world, env, task, Random(0), 0.0, load(world.preset).env.max_turns) for task in spread(env, 150)]
    assert all(won for _, won in played)
    assert not any(step.junk for steps, _ in played for step in steps)


@each_world
def test_the_expert_takes_over_in_any_state(world: World):
    settings = load(world.preset).env
    env = make(settings.name, **(settings.options | settings.eval))
    played = [trace(world, env, task, Random(task), 0.4, max_turns=60) for task in spread(env, 60)]
    assert all(won for _, won in played)
    assert sum(step.junk for steps, _ in played for step in steps) > 60


@each_world
def test_no_word_of_heldout_tasks_is_unknown(world: World):
    env, known = tasks(world.name, "eval"), set(tokens(world.name))
    for task in spread(env, 150):
        for step in trace(world, env, task, Random(task), 0.3, 10)[0]:
            assert set(world.dialect.read(step.observation)) <= known, step.observation
            assert set(world.dialect.words(step.command)) <= known, step.command
            if not step.junk:
                assert world.dialect.command(world.dialect.words(step.command)).lower() == step.command.lower()


# --- what ships


@each_world
def test_the_vocabulary_is_a_function_of_the_preset(world: World):
    env = tasks(world.name, "train")
    assert [*CONTROL, CUT, *world.vocabulary(env, len(env))] == tokens(world.name)
    assert world_of(tokens(world.name)) is world


@each_world
@each_model
def test_shipped_weights_load_and_know_their_tokens(world: World, name: str):
    folder = resolve(f"demo:{world.name}/{name}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == tokens(world.name)
    assert (model.dtype, model.config.head_dim, model.config.vocab_size) == (torch.float32, 32, len(tokenizer))
    assert model.config.tie_word_embeddings
    assert (world.folder / name / "model.safetensors").stat().st_size < 1_000_000


@each_world
def test_the_shipped_teacher_is_ahead_of_the_student_it_ships_with(world: World):
    teacher, student = (build.success(world, world.folder / name, 150, 1.0) for name in ("teacher", "student"))
    assert teacher >= student + 0.05


@each_world
def test_a_build_is_repeatable(world: World, tmp_path):
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            build.build(world, tmp_path / name, seed=3, tasks=20, share=0.005)
    finally:
        torch.set_num_threads(threads)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / run / "student").state_dict() for run in ("one", "two"))
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_world
def test_a_step_by_the_preset_and_an_evaluation_of_what_came_of_it(world: World, tmp_path):
    few = ["--preset", world.preset, "eval.tasks=20"]
    sizes = ["train.steps=1", "train.tasks_per_step=4", "train.group_size=4", "eval.teacher=false"]
    assert train.main([*few, *sizes, "--run-dir", str(tmp_path / "run")]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 1 and line["policy/gradient_norm"] > 0 and line["sync/logprob_gap"] < 1e-5
    assert evaluate.main([str(tmp_path / "run" / "hf"), *few, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["success"] == pytest.approx(line["eval/success"]) and len(found["success_by_type"]) > 1


@each_world
def test_the_models_are_never_taught_in_the_held_out_world(world: World, monkeypatch):
    opened, real = [], build.training_tasks
    monkeypatch.setattr(build, "training_tasks", lambda settings, seed: opened.append(seed) or real(settings, seed=seed))
    env = load(world.preset).env
    build.examples(world, env, 1, renderer(world.name), replace(world.recipes["student"], worlds=12))
    assert opened[0] == env.train["seed"] and len(set(opened)) == 12
    assert not {env.eval["seed"], env.dev["seed"]} & set(opened)
    assert all(recipe.worlds < env.dev["seed"] for recipe in world.recipes.values()), "the shipped ones' worlds come before"


def test_the_tasks_that_choose_are_in_no_other_split():
    catalogues = [tasks("webshop", split).shop.catalogue.products for split in SPLITS]
    shops = [{(product.title, str(product.options)) for product in products} for products in catalogues]
    assert not shops[2] & shops[0] and not shops[2] & shops[1]
    asked = [{question.text: question.answers for question in tasks("searchqa", split)._questions} for split in SPLITS]
    assert not asked[2].keys() & asked[0].keys()
    both = asked[2].keys() & asked[1].keys()  # of one thing in two worlds, whose answers are alike by chance
    assert sum(asked[2][text] == asked[1][text] for text in both) < 0.05 * len(both)


@pytest.mark.parametrize(("preset", "other"), [("demo-searchqa", "demo"), ("demo", "demo-searchqa"), ("demo-webshop", "demo-searchqa")])
def test_models_of_another_world_are_refused(preset: str, other: str):
    config = load(preset)
    env = make(config.env.name, **(config.env.options | config.env.eval))
    tokenizer = load_tokenizer(load(other).student.path)
    with pytest.raises(UserError, match=f"use --preset {other} for that, or --preset {preset} for models of this world"):
        make_renderer(config, tokenizer, len(tokenizer), env)


def test_the_demo_s_models_are_refused_in_a_world_of_another_kind():
    tokenizer = load_tokenizer("demo:student")
    with pytest.raises(UserError, match="env.name='worlds:Corridor': the demo's model speaks of alfworld only; use --preset demo for that, or set"):
        make_renderer(load("demo", overrides=["env.name=worlds:Corridor"]), tokenizer, len(tokenizer), make("worlds:Corridor"))
