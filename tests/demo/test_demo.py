"""The embedded default: what the tiny models read and write, whom they learnt it from, and that they can be rebuilt."""

from __future__ import annotations

from functools import lru_cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from atod_fast.demo import build
from atod_fast.demo.build import trace
from atod_fast.demo.demos import DEMOS
from atod_fast.demo.rendering import OBSERVATION_TOKENS, CompactRenderer
from atod_fast.demo.tokenizer import ACT, BOS, CONTROL, CUT, EOA, PAD, UNK
from atod_fast.envs import make
from atod_fast.envs.alfworld.dialect import DIALECT, Expert, compact, junk, vocabulary
from atod_fast.envs.alfworld.engine import FastAlfWorld
from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import SMALL_TASK_TYPES, TASK_TYPES, Spec, generate
from atod_fast.models import DEMO_WEIGHTS
from atod_fast.records import Turn

ALFWORLD = DEMOS["alfworld"]
SHIPPED = sorted(ALFWORLD.recipes)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "student")


@lru_cache(maxsize=1)
def renderer() -> CompactRenderer:
    return CompactRenderer(tokenizer(), DIALECT)


@lru_cache(maxsize=4)
def games(seed: int, count: int) -> list[Game]:
    """Training games for an even seed, held-out ones for an odd."""
    spec = Spec(seed=seed, task_types=SMALL_TASK_TYPES)
    return [Game.parse(data, name) for name, data in (generate(spec, i) for i in range(count))]


@lru_cache(maxsize=4)
def kitchens(seed: int, count: int) -> AlfWorld:
    """The same games as a world."""
    return make("alfworld", generate=count, seed=seed)


def words(ids: list[int]) -> str:
    return " ".join(tokenizer().convert_ids_to_tokens(ids))


def turn(action: list[int]) -> Turn:
    return Turn([], action, [], "", "", "", True)


def test_an_observation_is_reduced_to_the_words_that_tell_states_apart():
    start = (
        "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
        "you see a cabinet 1, and a shelf 2.\n\n"
        "Your task is to: put a clean mug in shelf."
    )
    assert " ".join(compact(start)) == "cabinet 1 shelf 2 task put clean mug shelf"
    assert (
        " ".join(compact("You arrive at shelf 2. On the shelf 2, you see a mug 1, and a pan 1."))
        == "shelf 2 mug 1 pan 1"
    )
    assert " ".join(compact("The cabinet 1 is open. In it, you see nothing.")) == "cabinet 1 open nothing"


def test_no_word_of_heldout_games_is_unknown_even_to_a_wild_player():
    unknown = tokenizer().unk_token_id
    for game in games(1, 120):
        world, rng = FastAlfWorld(game), Random(game.task_id)
        observation = world.reset()
        for _ in range(15):
            command = rng.choice(world.admissible)
            assert unknown not in renderer().prompt([], observation, {}), observation
            assert unknown not in renderer().action(command), command
            observation, _ = world.step(command)


def test_the_vocabulary_is_a_function_of_the_games():
    shipped = tokenizer().convert_ids_to_tokens(range(len(tokenizer())))
    assert [*CONTROL, CUT, *vocabulary(games(0, 200))] == [*CONTROL, CUT, *vocabulary(games(0, 200)[::-1])] == shipped


def test_a_prompt_continues_where_the_sequence_ends():
    arrived = "You arrive at shelf 1. On the shelf 1, you see nothing."
    assert words(renderer().prompt([], arrived, {})) == f"{BOS} shelf 1 nothing {ACT}"
    finished = turn(renderer().action("go to shelf 1"))
    assert words(renderer().prompt([finished], arrived, {})) == f"shelf 1 nothing {ACT}"
    cut_off = turn(finished.action[:-1])
    assert words(renderer().prompt([cut_off], arrived, {})) == f"{EOA} shelf 1 nothing {ACT}"


def test_a_long_observation_is_cut_and_says_so():
    observation = "On the shelf 1, you see " + ", ".join(["a mug 1"] * 40) + "."
    ids = renderer().prompt([turn([])], observation, {})
    shown = [i for i in ids if i not in (tokenizer().eos_token_id, tokenizer().convert_tokens_to_ids(ACT))]
    assert len(shown) == OBSERVATION_TOKENS
    assert words(shown).endswith(f"1 mug {CUT}")
    exact = " ".join(["mug"] * OBSERVATION_TOKENS)
    assert CUT not in words(renderer().prompt([], exact, {}))


@given(st.lists(st.sampled_from([*CONTROL, CUT, "mug 1", "\n", "<ACT>", "é", "go to"])), st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_the_world_cannot_speak_in_control_tokens(parts: list[str], rest: str):
    ids = renderer().prompt([turn(renderer().action("look"))], " ".join([*parts, rest]), {})
    shown = set(tokenizer().convert_ids_to_tokens(ids[:-1]))
    assert ids[-1] == tokenizer().convert_tokens_to_ids(ACT)
    assert not shown & {PAD, ACT, EOA, BOS}
    assert CUT not in shown or len(ids) > OBSERVATION_TOKENS


def test_commands_survive_the_round_trip():
    for game in games(1, 40):
        for command in FastAlfWorld(game).admissible:
            assert renderer().parse(renderer().action(command), stopped=True, info={}) == (command, command, True)


def test_an_unfinished_or_empty_action_is_malformed():
    ids = renderer().action("go to shelf 1")
    assert renderer().parse(ids[:-1], stopped=False, info={}) == ("go to shelf 1", "go to shelf 1", False)
    assert renderer().parse(ids[-1:], stopped=True, info={}) == ("", "", False)


def test_actions_hold_words_and_their_end_and_nothing_else():
    allowed = {tokenizer().convert_ids_to_tokens(i) for i in renderer().valid_columns.nonzero().flatten().tolist()}
    assert allowed == set(tokenizer().get_vocab()) - {PAD, ACT, BOS, UNK, CUT}
    assert tokenizer().convert_ids_to_tokens(list(renderer().stop_ids)) == [EOA]


def test_the_expert_wins_every_game():
    for task in range(200):
        steps, won = trace(DIALECT, kitchens(0, 200), task, Random(0), 0.0, max_turns=20)
        assert won, task
        assert not any(step.junk for step in steps)


def test_the_expert_takes_over_in_any_state():
    for game in games(1, 60):
        world, rng = FastAlfWorld(game), Random(game.task_id)
        for _ in range(12):
            world.step(junk(world, rng))
        expert = Expert(world)
        for _ in range(30):
            if world.won:
                break
            _, admissible = world.step(expert.command())
            assert admissible
        assert world.won, game.task_id


def test_the_expert_refuses_what_it_cannot_do():
    name, data = generate(Spec(seed=0, task_types=("look_at_obj_in_light",)), 0)
    with pytest.raises(ValueError, match="look_at_obj_in_light"):
        Expert(FastAlfWorld(Game.parse(data, name)))
    assert set(SMALL_TASK_TYPES) < set(TASK_TYPES)


def test_supervision_falls_on_the_experts_actions_and_never_on_junk():
    played = (trace(DIALECT, kitchens(0, 50), task, Random(1), 0.5, 12)[0] for task in range(50))
    steps = next(steps for steps in played if any(step.junk for step in steps))
    example = build.encode(steps, renderer())
    taught = [i for i, w in zip(example.ids, example.weight, strict=True) if w == 1]
    ignored = [i for i, w in zip(example.ids, example.weight, strict=True) if w == 0]
    assert taught == [i for step in steps if not step.junk for i in renderer().action(step.command)]
    assert ignored == [i for step in steps if step.junk for i in renderer().action(step.command)]
    assert words(example.ids).count(ACT) == len(steps)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_and_know_their_tokens(name: str):
    folder = DEMO_WEIGHTS / name
    model, tokens = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokens.get_vocab() == tokenizer().get_vocab()
    assert model.config.vocab_size == len(tokens) == len(renderer().valid_columns)
    assert model.dtype == torch.float32
    assert model.config.head_dim == 32
    assert model.config.tie_word_embeddings
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(model.config, key) == getattr(model.generation_config, key) == getattr(tokens, key)
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_write_actions_and_not_control_tokens(name: str):
    model = AutoModelForCausalLM.from_pretrained(DEMO_WEIGHTS / name)
    prompt = renderer().prompt([], FastAlfWorld(games(1, 1)[0]).reset(), {})
    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=9)[0, len(prompt) :].tolist()
    command = renderer().parse(ids, stopped=ids[-1] in renderer().stop_ids, info={})
    assert command[2] and command[1] in FastAlfWorld(games(1, 1)[0]).admissible


def test_a_build_is_repeatable_and_loads(tmp_path):
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            build.build(ALFWORLD, tmp_path / name, seed=3, tasks=40, share=0.01)
    finally:
        torch.set_num_threads(threads)
    for name in SHIPPED:
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / run / name).state_dict() for run in ("one", "two")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)
        initial = build.new_model(
            AutoTokenizer.from_pretrained(tmp_path / "one" / name), ALFWORLD.recipes[name].seed + 3000
        ).state_dict()
        assert any(not torch.equal(first[key], initial[key]) for key in first)


def test_the_shipped_teacher_is_ahead_of_the_student_it_ships_with():
    teacher, student = (build.success(ALFWORLD, DEMO_WEIGHTS / name, 60, 1.0) for name in ("teacher", "student"))
    assert teacher >= student + 0.1
