"""The environment `mix`: which tasks, whose episodes, prompts and types, and what is refused."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from random import Random

import numpy as np
import pytest

from atod_fast.cli import parse
from atod_fast.config import Config
from atod_fast.config.settings import check_env, same_tasks
from atod_fast.dry_run import describe
from atod_fast.envs import find, make, usual_of
from atod_fast.envs.mix.env import Mix
from atod_fast.envs.mix.parts import shares
from atod_fast.envs.prompt import prompt_for
from atod_fast.envs.protocol import Environment, Usual
from atod_fast.errors import UserError
from atod_fast.machines import parse as machines
from atod_fast.models import load_tokenizer
from atod_fast.records import Turn
from atod_fast.renderers import make_renderer
from atod_fast.rollout.actor import held_out, open_split
from atod_fast.rollout.rendering import ChatRenderer
from helpers.chat_tokenizers import tokenizer

ROOMS, HALLS = "helpers.worlds:Rooms", "helpers.worlds:Halls"
WORLDS = {"alfworld": {}, "wiki": {"name": "searchqa", "options": {"hops": 1}}}
TASKS = {"alfworld": {"generate": 6, "seed": 2}, "wiki": {"generate": 10, "seed": 2}}


def two(sizes=(4, 6), weights=(1.0, 1.0), **settings) -> Mix:
    """A mix of two environments of one's own."""
    labels, names = ("rooms", "halls"), (ROOMS, HALLS)
    tables = {
        label: {"name": name, "weight": weight, "options": {"tasks": size}, **settings}
        for label, name, weight, size in zip(labels, names, weights, sizes, strict=True)
    }
    return make("mix", parts=tables)


def places(mix: Mix) -> Counter:
    """How often each task of each part occurs among the mix's."""
    found, env = Counter(), mix.clone()
    for task in range(len(mix)):
        observation, info = env.reset(5, task)
        assert observation.startswith(f"task {info['task_id'].removeprefix('corridor-')} seed 5 ")
        found[info["part"], info["task_id"]] += 1
    return found


@pytest.mark.parametrize("sizes", [(1, 1), (4, 6), (7, 2), (30, 1)])
@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (0.1, 0.2), (0.3, 0.7), (1, 3.5)])
def test_an_epoch_is_the_shortest_in_proportion_in_which_every_task_occurs(sizes, weights):
    mix = two(sizes, weights)
    share = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    shortest = next(n for n in range(1, 9999) if all(n * s >= size for s, size in zip(share, sizes, strict=True)))
    assert len(mix) == shortest
    found = places(mix)
    assert len(found) == sum(sizes)
    for label, part in zip(("rooms", "halls"), share, strict=True):
        times = [count for (place, _), count in found.items() if place == label]
        assert abs(sum(times) - len(mix) * part) < 1 and max(times) - min(times) <= 1


def test_shares_are_rounded_by_largest_remainders():
    assert shares(10, [Fraction(1), Fraction(1), Fraction(1)]) == [4, 3, 3]
    assert shares(7, [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]) == [4, 2, 1]
    for count in range(40):
        weights = [Fraction(Random(count).randint(1, 9)) for _ in range(4)]
        found = shares(count, weights)
        assert sum(found) == count
        assert all(abs(n - count * w / sum(weights)) < 1 for n, w in zip(found, weights, strict=True))


def test_an_evaluation_has_each_part_s_share_and_no_task_twice():
    mix = two((9, 40), (1, 3))
    drawn = {count: mix.evaluation_tasks(count, np.random.default_rng(1)) for count in (12, 24)}
    names = {count: [mix.clone().reset(0, task)[1] for task in tasks] for count, tasks in drawn.items()}
    for count, infos in names.items():
        assert Counter(info["part"] for info in infos) == {"rooms": count // 4, "halls": count * 3 // 4}
        assert len({(info["part"], info["task_id"]) for info in infos}) == count
    assert set(drawn[12]) < set(drawn[24]) and len(set(held_out(mix, "eval", 24))) == 24
    with pytest.raises(
        UserError, match="eval.tasks=40: the share of env.options.parts.rooms is 10 tasks, and it has 9"
    ):
        mix.evaluation_tasks(40, np.random.default_rng(1))
    few = ["env.name=mix", "env.options.parts={rooms={name='helpers.worlds:Rooms'}, alfworld={}}"]
    tables = ["env.train={alfworld={generate=9}}", "env.eval={alfworld={generate=90}}", "eval.tasks=50"]
    with pytest.raises(UserError, match="parts.rooms is 25 tasks, and it has 20"):
        open_split(parse([*few, *tables]).config, "eval")


def test_the_draw_of_other_environments_is_what_it_was():
    env = make("alfworld", generate=50)
    assert held_out(env, "eval", 7) == sorted(np.random.default_rng(0xE7A1).permutation(50)[:7].tolist())


def test_an_episode_is_that_of_its_part():
    """Every answer and fact, from clones that are used in turn, but for the names of part and type."""
    mix = make("mix", parts=WORLDS, **TASKS)
    assert isinstance(mix, Environment) and mix.instant and len(mix) == 20
    alone = {
        "alfworld": make("alfworld", **TASKS["alfworld"]),
        "wiki": make("searchqa", hops=1, **TASKS["wiki"]),
    }
    clones, types = [mix.clone(), mix.clone()], set()
    for task in range(len(mix)):
        env = clones[task % 2]
        observation, info = env.reset(3, task)
        single = alone[info["part"]]
        place = task % 10 % 6 if info["part"] == "alfworld" else task - 10
        same, facts = single.reset(3, place)
        types.add(info["task_type"])
        assert observation == same
        assert info == facts | {"part": info["part"], "task_type": f"{info['part']}/{facts['task_type']}"}
        for command in ("go to cabinet 1", f"<answer>{place}</answer>"):
            (*answer, info), (*right, facts) = env.step(command), single.step(command)
            assert answer == right and info["is_action_valid"] == facts["is_action_valid"]
            if answer[2]:
                break
    assert {kind.partition("/")[0] for kind in types} == {"alfworld", "wiki"} and len(types) > 2


def test_clones_are_apart_and_closing_closes_all():
    mix = two()
    one, other = mix.clone(), mix.clone()
    assert not mix.instant
    (first, _), (second, info) = one.reset(1, 0), other.reset(2, len(mix) - 1)
    assert one.step("a")[0] == first.replace("seed 1 start", "step 1 said a")
    assert other.step("b")[0] == second.replace("seed 2 start", "step 1 said b") and info["part"] == "halls"
    one.reset(1, len(mix) - 1)
    held = list(one._clones.values())
    held[0].close = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        one.close()
    assert held[1].closed and not any(env.closed for env in other._clones.values())
    with pytest.raises(RuntimeError, match="step before reset"):
        one.step("a")
    assert one.reset(1, 0)[0] == first
    with pytest.raises(IndexError):
        one.reset(0, len(mix))


def test_a_part_may_have_fewer_turns():
    env = two(max_turns=2).clone()
    env.reset(0, 3)  # five steps
    assert [env.step("look")[2:4] for _ in range(2)] == [(False, False), (False, True)]
    env.reset(0, 0)  # two steps
    assert [env.step("look")[2:4] for _ in range(2)] == [(False, False), (True, False)]


def test_a_part_of_weight_0_is_left_out():
    mix = two(weights=(1, 0))
    assert len(mix) == 4 and {part for part, _ in places(mix)} == {"rooms"}


def test_a_part_is_shown_as_by_itself():
    """Token for token, with the part's own thinking and history, prompt and parser."""
    parts = {
        "alfworld": {"thinking": True},
        "wiki": {"name": "searchqa", "history": 1},
        "halls": {"name": HALLS},
    }
    config = parse(["env.name=mix", "rollout.context=window", "rollout.prompt_tokens=3000"]).config
    mix = make("mix", parts=parts, **TASKS)
    words = tokenizer("qwen")
    shown = make_renderer(config, words, len(words), mix)
    texts = {}
    for label, thinking, history in (("alfworld", True, 2), ("wiki", False, 1), ("halls", False, 2)):
        prompt = prompt_for(label, mix.envs[label], thinking=thinking, history=history)
        own = ChatRenderer(words, prompt, context="window", thinking=thinking, prompt_tokens=3000, columns=len(words))
        info = {"part": label, "admissible_actions": ["look"]}
        for turns in ([], [Turn([], [], [], f"room {n}", "go", "go", True) for n in range(3)]):
            assert shown.prompt(turns, "A desk.", info) == own.prompt(turns, "A desk.", info)
        texts[label] = words.decode(shown.prompt(turns, "A desk.", info))
        said = words("<think>so</think><action>Look</action><answer>it</answer>")["input_ids"]
        assert shown.parse(said, False, info) == own.parse(said, False, info)
        assert shown.stop_ids == own.stop_ids
    assert "room 1" in texts["alfworld"] and "room 1" not in texts["wiki"] and texts["halls"].count("room") == 0
    assert len({shown.parse(said, False, {"part": label})[1] for label in parts}) == 3
    with pytest.raises(LookupError, match="env.eval has no part 'x', only alfworld, wiki, halls"):
        shown.prompt([], "A desk.", {"part": "x"})


def test_demo_models_are_refused():
    parts = "env.options.parts={alfworld={}, searchqa={}}"
    config = parse(["env.name=mix", parts, "env.eval={alfworld={generate=4}, searchqa={generate=4}}"]).config
    words = load_tokenizer(config.student.path)
    env = make("mix", parts={"alfworld": {}}, alfworld={"generate": 4})
    with pytest.raises(UserError, match="env.name='mix': the demo's model speaks of alfworld only; .*chat models"):
        make_renderer(config, words, len(words), env)


def test_the_usual_sizes_are_means_over_episodes_and_over_turns():
    parts = {"alfworld": {"weight": 1}, "searchqa": {"weight": 3}}
    one, other = (find(name).usual for name in parts)
    found = usual_of("mix", {"parts": parts, "alfworld": {"generate": 3}, "searchqa": {"generate": 3}})
    episodes = [one] * 1 + [other] * 3
    turns = [usual for usual in episodes for _ in range(int(usual.turns))]
    assert found == pytest.approx(
        Usual(len(turns) / 4, np.mean([u.prompt_tokens for u in turns]), np.mean([u.response_tokens for u in turns]))
    )
    cut_off = usual_of("mix", {"parts": {"alfworld": {"max_turns": 5}}, "alfworld": {"generate": 3}})
    assert cut_off == pytest.approx(one._replace(turns=5))
    assert usual_of("mix", {"parts": parts | {"halls": {"name": HALLS}}}) is None
    assert usual_of("alfworld", {}) == one
    tables = "{alfworld={generate=9}, searchqa={generate=200}}"
    settings = ["env.options.parts={alfworld={}, searchqa={}}", f"env.train={tables}", f"env.eval={tables}"]
    arguments = ["--preset", "alfworld-4b", "env.name=mix", *settings, "eval.tasks=10"]
    text = describe(parse(arguments).config, 1, on=machines("8xh100"))
    assert "usual: 19 turns of a prompt of 483" in text
    assert "env.train and env.eval are the same in part alfworld of the mix" in text


def test_parts_that_are_the_same_in_two_splits_are_told():
    settings = ["env.name=mix", "env.options.parts={alfworld={}, searchqa={}}"]
    train, held = (
        "{alfworld={generate=9}, searchqa={generate=9}}",
        "{alfworld={generate=9}, searchqa={generate=9, seed=1}}",
    )
    (line,) = same_tasks(parse([*settings, f"env.train={train}", f"env.eval={held}"]).config)
    assert line.startswith("env.train and env.eval are the same in part alfworld of the mix: held-out success")


PARTS = "env.options.parts"


@pytest.mark.parametrize(
    ("parts", "split", "line"),
    [
        ({}, {}, "env.options.parts is empty; name at least one part"),
        ({"alfwrld": {}}, {}, f"{PARTS}.alfwrld: name='alfwrld' is not known; did you mean alfworld?"),
        ({"a": {"name": "no.module:X"}}, {}, f"{PARTS}.a: name='no.module:X' cannot be loaded: No module named 'no'"),
        ({"a": {"name": 3}}, {}, f"{PARTS}.a.name=3 must be the name of an environment"),
        ({"a": {"name": "mix"}}, {}, f"{PARTS}.a: name='mix' needs the option 'parts'"),
        (
            {"a": {"name": "mix", "options": {"parts": {"alfworld": {}}}}},
            {},
            f"{PARTS}.a: a mix cannot be a part of a mix",
        ),
        ({"alfworld": {}}, {"alfworld": {"generat": 3}}, "has no option 'generat'; did you mean generate?"),
        ({"alfworld": {"options": {"generate": "x"}}}, {}, f"{PARTS}.alfworld: name='alfworld': generate='x' must be"),
        ({"alfworld": {}}, {"alfword": {}}, "env.name='mix' has no part 'alfword'; did you mean alfworld?"),
        ({"alfworld": {}}, {"alfworld": 3}, "alfworld=3 must be a table of options for the part alfworld"),
        ({"alfworld": {"wieght": 3}}, {}, f"{PARTS}.alfworld.wieght is not a setting of a part; did you mean weight?"),
        ({"alfworld": {"generate": 3}}, {}, "options of the environment go into options"),
        ({"alfworld": 3}, {}, f"{PARTS}.alfworld=3 must be a table"),
        ({"alfworld": {"options": 3}}, {}, f"{PARTS}.alfworld.options=3 must be a table"),
        ({"alfworld": {"weight": -1}}, {}, f"{PARTS}.alfworld.weight=-1 must be a number of at least 0"),
        ({"alfworld": {"weight": float("nan")}}, {}, f"{PARTS}.alfworld.weight=nan must be a number"),
        ({"alfworld": {"weight": float("inf")}}, {}, f"{PARTS}.alfworld.weight=inf must be a number"),
        ({"alfworld": {"weight": True}}, {}, f"{PARTS}.alfworld.weight=True must be a number"),
        ({"alfworld": {"weight": 0}, "b": {"weight": 0.0}}, {}, f"{PARTS}: the weights of alfworld, b sum to 0"),
        ({"alfworld": {"max_turns": 0}}, {}, f"{PARTS}.alfworld.max_turns=0 must be a whole number of at least 1"),
        ({"alfworld": {"history": -1}}, {}, f"{PARTS}.alfworld.history=-1 must be a whole number of at least 0"),
        ({"alfworld": {"thinking": 1}}, {}, f"{PARTS}.alfworld.thinking=1 must be true or false"),
        ({"a/b": {}}, {}, "the label 'a/b' cannot be used"),
        ({"parts": {"name": "alfworld"}}, {}, "the label 'parts' cannot be used"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_made(parts, split, line):
    with pytest.raises(UserError) as error:
        make("mix", parts=parts, **split)
    assert line in str(error.value) and "\n" not in str(error.value)
    config = Config()
    env = config.env.model_copy(update={"name": "mix", "options": {"parts": parts}, "train": split, "eval": split})
    with pytest.raises(UserError) as early:
        check_env(config.model_copy(update={"env": env}))
    assert str(early.value) == str(error.value)


def test_what_a_part_lacks_is_told_when_it_is_opened():
    with pytest.raises(UserError, match=f"{PARTS}.rooms: name='{ROOMS}' has no tasks with its options"):
        two(sizes=(0, 3))
    with pytest.raises(UserError, match=f"{PARTS}.alfworld: alfworld takes exactly one of generate"):
        make("mix", parts={"alfworld": {}})
    with pytest.raises(UserError, match=f"{PARTS}.halls.weight=1e-08 is so small a share .* 6 tasks has 600,000,006"):
        two(weights=(1, 1e-8))
    with pytest.raises(UserError, match=f"^env.eval: {PARTS}.alfworld: name='alfworld' has no option 'generat'"):
        parts = ["env.name=mix", "env.options.parts={alfworld={}}"]
        check_env(parse([*parts, "env.train={alfworld={generate=3}}", "env.eval={alfworld={generat=3}}"]).config)


def test_a_part_without_a_prompt_is_named():
    config = parse(["env.name=mix", "env.options.parts={c={name='helpers.worlds:Corridor'}}"]).config
    env = make("mix", parts={"c": {"name": "helpers.worlds:Corridor"}})
    words = tokenizer("qwen")
    with pytest.raises(UserError, match=f"{PARTS}.c: name='helpers.worlds:Corridor' has no prompt"):
        make_renderer(config, words, len(words), env)
