"""The open interface for environments: the documentation's example, and the adapters for gymnasium and OpenEnv, each
in the real agent loop.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atod_fast import cli, evaluate, train
from atod_fast.config import Config
from atod_fast.config.settings import demo_values_warning
from atod_fast.envs import make
from atod_fast.envs.adapters import adapter
from atod_fast.envs.adapters.gymnasium import Gymnasium
from atod_fast.envs.adapters.openenv import OpenEnv, ServerError, at, filled
from atod_fast.envs.prompt import PlainPrompt, prompt_for
from atod_fast.envs.protocol import Environment
from atod_fast.envs.text import GAP, cut_middle
from atod_fast.errors import UserError
from atod_fast.records import Turn
from atod_fast.rollout.agent import Episode, rollout
from atod_fast.rollout.engines.protocol import Completion, Request
from atod_fast.rollout.pool import Pool
from atod_fast.rollout.rendering import ChatRenderer
from helpers.chatml import make_tokenizer
from helpers.paths import ROOT
from helpers.tiny import save_model

PAGE = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
BLOCKS = {language: re.findall(f"```{language}\n(.*?)```", PAGE, re.DOTALL) for language in ("python", "sh", "toml")}
COMMANDS = [shlex.split(line) for block in BLOCKS["sh"] for line in block.replace("\\\n", " ").splitlines()]
TOKENIZER = make_tokenizer()


@pytest.fixture
def page(tmp_path, monkeypatch) -> ModuleType:
    """The module that the documentation's page writes."""
    source, _ = BLOCKS["python"]
    (tmp_path / "guess.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "guess", raising=False)
    return __import__("guess")


def test_the_page_s_own_prompt_words_messages_and_reads_answers():
    from atod_fast.envs.prompt import MEMBERS

    names: dict = {}
    exec(BLOCKS["python"][1], names)
    prompt = names["BarePrompt"]()
    assert all(callable(getattr(prompt, member)) for member in MEMBERS)
    turn = Turn([], [], [], "Which?", "I say 7.", "7", True)
    assert prompt.message("Which?", [turn], "Higher.", []) == "Which? You said 7. Higher. Answer with a number."
    assert prompt.project("I say 12!") == ("12", True) and prompt.project("dunno") == ("dunno", False)


class Guesser:
    """An engine that plays Guess by bisection, using what the conversation in its prompt says."""

    max_model_len = 4096

    def begin(self, sampling) -> None:
        self.queue: list[Request] = []

    def add(self, request: Request) -> None:
        self.queue.append(request)

    def step(self) -> list[Completion]:
        played, self.queue = [self.answer(request) for request in self.queue], []
        return played

    def answer(self, request: Request) -> Completion:
        said = TOKENIZER.decode(request.prompt)
        low, high = 1, int(re.search(r"from 1 to (\d+)", said)[1])
        for guess, answer in re.findall(r"<action> (\d+) </action>.*?(Higher|Lower)", said, re.DOTALL):
            low, high = (int(guess) + 1, high) if answer == "Higher" else (low, int(guess) - 1)
        ids = [*TOKENIZER(f"<action> {(low + high) // 2} </action>")["input_ids"], TOKENIZER.eos_token_id]
        return Completion(request.key, ids, [-0.5] * len(ids), True)

    def release(self, key: int) -> None:
        pass

    def end(self) -> None:
        pass


def play(env: Environment, tasks: int = 12):
    config = Config.model_validate(
        {
            "rollout": {"prompt_tokens": 4000, "response_tokens": 24, "concurrency": 4},
            "env": {"max_turns": 8, "step_timeout": 20.0},
        }
    )
    prompt = prompt_for("one's own", env, thinking=False, history=2)
    renderer = ChatRenderer(TOKENIZER, prompt, context="full", thinking=False, prompt_tokens=4000)
    episodes = [Episode(task, task, 0, seed=task, env_seed=77) for task in range(tasks)]
    return rollout(Guesser(), env, renderer, episodes, config)


def won_by_halving(played) -> None:
    for number, trajectory in enumerate(played):
        assert (trajectory.task, trajectory.failure, trajectory.truncated, trajectory.success) == (
            number,
            None,
            False,
            True,
        )
        assert [turn.reward for turn in trajectory.turns] == [0.0] * (len(trajectory.turns) - 1) + [1.0]
        assert len(trajectory.turns) <= 6 and all(turn.valid for turn in trajectory.turns)
        assert trajectory.turns[0].observation == "I think of a number from 1 to 50. Which?"
        assert {turn.observation for turn in trajectory.turns[1:]} <= {"Higher.", "Lower."}
    assert len({trajectory.turns[-1].command for trajectory in played}) > 4, "the tasks differ"
    assert len({trajectory.task_id for trajectory in played}) == len(played)


# --- the page


def test_the_page_s_world_is_played_by_the_agent_loop(page):
    env = make("guess:Guess", tasks=20)
    assert isinstance(env, Environment) and len(env) == 20
    won_by_halving(play(env))
    observation, reward, over, cut, info = env.step("a word") if env.reset(0, 3) else None
    assert (observation, reward, over, cut, info["is_action_valid"]) == ("That is no number.", 0.0, False, False, False)


def test_the_page_s_commands_train_and_evaluate(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        save_model(tmp_path / name, seed=seed, vocabulary=len(tokenizer) + 3, positions=4096)
        tokenizer.save_pretrained(tmp_path / name)
    (_, _, program, *settings), (_, _, other, *arguments) = COMMANDS[:2]
    assert (program, other) == ("atod_fast.train", "atod_fast.evaluate")
    small = [
        "train.steps=1",
        "train.tasks_per_step=2",
        "train.group_size=2",
        "eval.tasks=2",
        "eval.teacher=false",
        "env.max_turns=2",
    ]
    assert (
        train.main([*settings, *small, "student.path=student", "teacher.path=teacher", "rollout.response_tokens=6"])
        == 0
    )
    (line,) = [
        line
        for line in map(json.loads, (tmp_path / "runs/guess/metrics.jsonl").read_text().splitlines())
        if line["step"] == 1
    ]
    assert line["rollout/turns"] == 2 and line["sync/logprob_gap"] < 1e-4 and line["policy/gradient_norm"] > 0
    assert evaluate.main([*arguments, "eval.tasks=3"]) == 0
    assert "on 3 tasks" in capsys.readouterr().out


def test_every_command_of_the_page_says_what_the_program_understands():
    for _, _, program, *arguments in COMMANDS:
        if program == "atod_fast.train":
            config = cli.parse(arguments).config
            assert (
                config.train.learning_rate == 1e-6
                and config.rollout.context == "window"
                and "--preset own" in " ".join(arguments)
            )
            assert demo_values_warning(config, 596_049_920) is None
            env = config.env
            options = env.options | env.train
            if env.name == "gymnasium":
                pytest.importorskip("gymnasium")
                assert len(make(env.name, **options)) == 1000
            elif env.name == "openenv":
                with socket.socket() as unused:
                    unused.bind(("127.0.0.1", 0))  # and does not listen
                    url = f"http://127.0.0.1:{unused.getsockname()[1]}"
                    with pytest.raises(UserError, match=f"url='{url}': Connection"):
                        make(env.name, **options | {"url": url})


def test_a_package_offers_its_world_by_an_entry_point(page, tmp_path, monkeypatch):
    (toml,) = BLOCKS["toml"]
    installed = tmp_path / "guess-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: guess\nVersion: 1\n")
    group, name, target = re.search(r'entry-points."([\w.]+)"\]\n(\w+) = "(.*)"', toml).groups()
    (installed / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    assert make("guess", tasks=7).tasks == 7
    with pytest.raises(UserError, match="env.name='gess' is not known; did you mean guess"):
        make("gess")
    with pytest.raises(UserError, match="no option 'task'; did you mean tasks"):
        make("guess", task=7)
    with pytest.raises(UserError, match="most=1 leaves nothing to guess"):
        make("guess", most=1)


def test_an_option_that_is_missing_is_named():
    with pytest.raises(UserError, match="env.name='gymnasium' needs the option 'id'; give it in env.options"):
        make("gymnasium", tasks=3)
    with pytest.raises(UserError, match="env.name='openenv' needs the option 'tasks'"):
        make("openenv", url="http://127.0.0.1:1")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("os:path", "is no class of environments: "),
        ("os:sep", "is no class of environments: "),
        ("collections:OrderedDict", "is no class of environments: no signature"),
        ("os:getcwd", "makes str, which lacks instant, reset, step, clone, close;"),
        ("guess:Endless", "makes Endless, which lacks __len__;"),
        (".guess:Guess", "cannot be loaded"),
        ("os:", "cannot be loaded"),
    ],
)
def test_what_makes_no_environment_is_refused(page, name, words):
    page.Endless = type(
        "Endless",
        (),
        {member: getattr(page.Guess, member) for member in ("instant", "reset", "step", "clone", "close")},
    )
    with pytest.raises(UserError, match=f"env.name='{name}' .*{words}"):
        make(name)


# --- the plain prompt


def make_turn(observation: str, command: str) -> Turn:
    return Turn([], [], [], observation, "", command, True)


def test_a_window_prompt_tells_the_beginning_once_it_has_scrolled_away():
    turns = [make_turn("START", "a"), make_turn("SECOND", "b"), make_turn("THIRD", "c")]
    for history, told in ((0, True), (1, True), (2, True), (3, False)):
        text = PlainPrompt(False, history, "RULES").message("START", turns, "NOW", ["x", "it's"])
        assert text.startswith("RULES") and "NOW" in text and "step 4" in text and ("began with: START" in text) == told
        assert [f"Action {n}: '{c}'" in text for n, c in ((1, "a"), (2, "b"), (3, "c"))] == [
            n > 3 - history for n in (1, 2, 3)
        ]
        assert "admissible actions: 'x', \"it's\"." in text and text.endswith("<action> </action> tags.")
    plain = PlainPrompt(True, 2)
    assert plain.message("START", [], "START", []) == plain.first("START", []) and "<think>" in plain.first("START", [])
    assert "admissible" not in plain.first("START", []) and plain.following("", []) != ""


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("<action> Go North </action>", False, ("Go North", True)),
        ("<Action>two\nlines</ACTION> and more <action>b</action>", False, ("two\nlines", True)),
        ("<think>say <action>a</action>?</think><action>b</action>", True, ("b", True)),
        ("<action>b</action>", True, ("b", False)),
        (" north ", False, ("north", False)),
        ("<action>north", False, ("<action>north", False)),
        ("x" * 500, False, ("x" * 100, False)),
        ("", False, ("", False)),
    ],
)
def test_projection_keeps_what_stands_between_the_tags(text, thinking, expected):
    assert PlainPrompt(thinking, 2).project(text) == expected


# --- gymnasium

FROZEN = {"id": "FrozenLake-v1", "tasks": 50, "observation": "render", "actions": ["left", "down", "right", "Up"]}


@pytest.fixture
def gymnasium() -> Iterator[ModuleType]:
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra `gym`")
    known = set(gymnasium.registry)
    yield gymnasium
    for name in set(gymnasium.registry) - known:
        del gymnasium.registry[name]


def registered(gymnasium: ModuleType, spaces: tuple | None = None, **changes) -> str:
    """A gymnasium environment that reports its seed, counts its steps and ends after three; `changes` replace what a
    step returns."""

    class Counter(gymnasium.Env):
        observation_space = gymnasium.spaces.Text(1000)
        action_space = spaces[0] if spaces else gymnasium.spaces.Text(1000)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.count = 0
            return changes.get("text", f"start {seed}"), changes.get("info", {})

        def step(self, action):
            self.count += 1
            over = self.count == 3
            text = changes.get("text", f"step {self.count} {action!r}")
            return text, changes.get("reward", np.float32(over)), np.bool_(over), False, changes.get("info", {})

        def close(self):
            changes.get("closed", []).append(self)

    gymnasium.register("Counter-v0", Counter)
    return "Counter-v0"


def test_a_gymnasium_environment_is_played_by_the_agent_loop(page, gymnasium):
    class Game(gymnasium.Env):
        action_space, observation_space = gymnasium.spaces.Text(9), gymnasium.spaces.Text(99)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.world = page.Guess(tasks=1, seed=seed)
            return self.world.reset(0, 0)

        def step(self, action):
            return self.world.step(action)

    gymnasium.register("Guess-v0", Game)
    played = play(Gymnasium(id="Guess-v0", tasks=20, seed=5, instructions="You guess."))
    won_by_halving(played)
    assert [
        t.turns for t in play(Gymnasium(id="Guess-v0", tasks=20, seed=5, instructions="You guess.", instant=False))
    ] == [t.turns for t in played]
    assert [t.turns[-1].command for t in play(Gymnasium(id="Guess-v0", tasks=20, seed=6), 11)] == [
        t.turns[-1].command for t in played[1:]
    ]


def test_frozen_lake_is_walked_by_name_and_seen_in_words(gymnasium):
    env = Gymnasium(**FROZEN, kwargs={"is_slippery": False})
    observation, info = env.reset(0, 0)
    assert observation.split() == ["[red", "S]FFF", "FHFH", "FFFH", "HFFG"]
    assert info == {
        "won": False,
        "is_action_valid": True,
        "task_id": "FrozenLake-v1/0",
        "admissible_actions": FROZEN["actions"],
    }
    assert env.step("jump") == (observation, 0.0, False, False, info | {"is_action_valid": False})
    path = [env.step(action) for action in ("down", " DOWN", "right", "right", "down", "right")]
    assert [step[1:4] for step in path] == [(0.0, False, False)] * 5 + [(1.0, True, False)]
    assert [step[4]["won"] for step in path] == [False] * 5 + [True] and "HFF[red G]" in path[-1][0]
    assert all(type(step[1]) is float and type(step[2]) is bool for step in path), (
        "numpy's own types do not become JSON"
    )


def test_a_task_is_a_seed_and_repeats_in_a_clone_whatever_the_loop_s_seed(gymnasium):
    first, second = Gymnasium(**FROZEN), Gymnasium(**FROZEN | {"seed": 3})

    def walk(env, seed, task):
        return env.reset(seed, task), [env.step(action) for action in ["right", "down"] * 6]

    assert walk(first, 1, 4) == walk(first.clone(), 2, 4)
    assert walk(first, 0, 4)[1] == [
        (*step[:4], step[4] | {"task_id": "FrozenLake-v1/4"}) for step in walk(second, 0, 1)[1]
    ]
    assert len({str(walk(first, 0, task)[1][:-1]) for task in range(6)}) > 1, "the ice is slippery by the seed"
    with pytest.raises(IndexError):
        first.reset(0, 50)
    with pytest.raises(RuntimeError, match="step before reset"):
        first.clone().step("left")


def test_the_mask_says_which_actions_there_are(gymnasium):
    env = Gymnasium(id="Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3", tasks=3, observation="render")
    observation, info = env.reset(0, 0)
    assert set(info["admissible_actions"]) < {"0", "1", "2", "3", "4", "5"} and re.search(r"\[yellow .\]", observation)
    forbidden = ({"0", "1", "2", "3"} - set(info["admissible_actions"]) or {"5"}).pop()
    assert env.step(forbidden)[4]["is_action_valid"] is False
    assert env.step(info["admissible_actions"][0])[1] == -1.0


def test_what_the_environment_tells_of_itself_goes_through(gymnasium):
    told = {
        "won": np.bool_(True),
        "score": np.float32(0.5),
        "task_type": "count",
        "admissible_actions": ("a", "b"),
        "unheard": object(),
    }
    env = Gymnasium(id=registered(gymnasium, info=told), tasks=3)
    env.reset(0, 0)
    observation, _, _, _, info = env.step("Say THIS")
    assert observation == "step 1 'Say THIS'", "commands for a Text space keep their letters"
    assert info == {
        "won": True,
        "score": 0.5,
        "task_type": "count",
        "admissible_actions": ["a", "b"],
        "is_action_valid": True,
        "task_id": "Counter-v0/0",
    }
    assert json.dumps(info)


def test_success_is_an_end_with_enough_reward(gymnasium):
    for reward, least, expected in ((5.0, 5.0, True), (5.0, 6.0, False), (-1.0, -2.0, True)):
        env = Gymnasium(id=registered(gymnasium, reward=reward), tasks=1, won=least)
        env.reset(0, 0)
        assert [env.step("x")[4]["won"] for _ in range(3)] == [False, False, expected]
        del gymnasium.registry["Counter-v0"]
    cut = Gymnasium(id=registered(gymnasium), tasks=1, max_steps=2)
    cut.reset(0, 0)
    assert [cut.step("x")[2:4] for _ in range(2)] == [(False, False), (False, True)]


def test_a_discrete_space_may_start_anywhere_and_a_function_may_tell_the_observation(gymnasium, page):
    page.told = lambda observation, info: f"told: {observation}"
    env = Gymnasium(
        id=registered(gymnasium, (gymnasium.spaces.Discrete(2, start=-1),)),
        tasks=1,
        actions=["down", "up"],
        observation="guess:told",
    )
    assert env.reset(0, 0)[0] == "told: start 0"
    assert [env.step(action)[0] for action in ("down", "up")] == ["told: step 1 -1", "told: step 2 0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"id": "FrozenLak-v1"}, "id='FrozenLak-v1' is not registered with gymnasium; did you mean FrozenLake-v1"),
        ({"id": "Zork"}, "id='Zork' is not registered with gymnasium; give module:id"),
        ({"id": "nowhere_at_all:Zork-v0"}, "cannot be made: ModuleNotFoundError"),
        ({"kwargs": {"ice": 3}}, "unexpected keyword argument 'ice'"),
        ({"observation": "text"}, "observation='text' gives int, not text; use observation=render"),
        ({"observation": "picture"}, "observation='picture' is not known; use text, render or module:function"),
        ({"observation": "os:nothing"}, "observation='os:nothing' cannot be loaded"),
        ({"observation": ".os:sep"}, "observation='.os:sep' cannot be loaded"),
        ({"observation": "os:sep"}, "observation='os:sep' is not a function"),
        (
            {"id": "Blackjack-v1", "actions": []},
            "observation='render': Blackjack-v1 draws in human, rgb_array, not in ansi",
        ),
        ({"id": "Pendulum-v1", "observation": "text"}, "actions are Box, not Text or Discrete; wrap it"),
        ({"actions": ["a", "b", "A", "c"]}, "has 3 different names; FrozenLake-v1 has 4 actions"),
        ({"tasks": 0}, "tasks=0 must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"won": "often"}, "won='often' must be a number"),
        ({"instructions": 5}, "instructions=5 must be text"),
        ({"id": 5}, "id=5 must be the name of an environment"),
        ({"kwargs": 5}, "kwargs=5 must be a table of arguments"),
        ({"observation": 5}, "observation=5 must be text, render or module:function"),
        ({"actions": "left"}, "actions='left' must be a list of names"),
        ({"instant": "no"}, "instant='no' must be true or false"),
        ({"max_steps": "many"}, "id='FrozenLake-v1' cannot be made: "),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_gymnasium_cannot_do_is_said_on_one_line(gymnasium, options, words):
    with pytest.raises(UserError) as error:
        Gymnasium(**FROZEN | options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_without_gymnasium_or_websockets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    with pytest.raises(UserError, match=r"atod_fast\[gym\]"):
        Gymnasium(**FROZEN)
    with pytest.raises(UserError, match=r"atod_fast\[openenv\]"):
        OpenEnv(url="http://127.0.0.1:1", tasks=1)


# --- what both show


@given(st.text(max_size=200), st.integers(16, 120))
def test_what_is_shown_is_bounded_and_free_of_control_characters(text, chars):
    assume(GAP not in text)
    env = adapter.Adapter(tasks=1, seed=0, won=1, instructions="", chars=chars)
    shown = env._fit(text + "\x1b[2J\x1b]0;title\x07\u202e\ud800")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", shown) and "[2J" not in shown
    assert (GAP in shown) == (len(shown) > chars) and len(shown) <= chars + len(GAP)


@given(st.text("ab", min_size=121, max_size=300), st.integers(16, 120))
def test_of_what_is_too_long_the_middle_is_left_out(text, most):
    start, end = cut_middle(text, most).split(GAP)
    assert (
        len(start) + len(end) == most
        and len(start) - len(end) in (0, 1)
        and text.startswith(start)
        and text.endswith(end)
    )


def check_shown(observation: str, info: dict, chars: int = 4000) -> None:
    """Check what an adapter makes of `HOSTILE`."""
    text = observation + "".join(map(str, info.values()))
    assert not re.search("[\x1b\u202e]", text + info.get("task_type", ""))
    assert (
        observation.startswith("seen")
        and observation.endswith("z" * (chars // 2))
        and len(observation) == chars + len(GAP)
    )
    *listed, mark = info["admissible_actions"]
    assert mark in GAP and listed[0] == "act" and listed[1].startswith("yy") and GAP in listed[1]
    assert (
        len(listed) <= adapter.MOST_ACTIONS
        and max(map(len, listed)) <= 200 + len(GAP)
        and sum(map(len, listed)) <= chars
    )


HOSTILE_TEXT = "\x1b[31mse\u202een" + "z" * 100_000
HOSTILE_ACTIONS = ["\x1b[31mact", "y" * 300_000, *map(str, range(20_000))]


def test_what_a_gymnasium_environment_tells_is_cleaned_and_cut(gymnasium):
    info = {"admissible_actions": HOSTILE_ACTIONS, "task_type": "\x1b[2J" + "t" * 500, "task_id": "\x1b[2J" + "i" * 500}
    env = Gymnasium(id=registered(gymnasium, text=HOSTILE_TEXT, info=info), tasks=1)
    for observation, *_, told in (env.reset(0, 0), env.step("x")):
        check_shown(observation, told)
        assert len(told["task_type"]) == len(told["task_id"]) == 200 + len(GAP)
    assert len(Gymnasium(id="Counter-v0", tasks=1, chars=20).reset(0, 0)[1]["admissible_actions"]) == 2, (
        "the list's characters are counted"
    )


def test_all_of_many_actions_are_accepted_though_not_all_are_listed(gymnasium):
    env = Gymnasium(id=registered(gymnasium, (gymnasium.spaces.Discrete(20_000),)), tasks=1)
    info = env.reset(0, 0)[1]
    assert info["admissible_actions"] == [*map(str, range(adapter.MOST_ACTIONS)), "[... cut ...]"]
    assert env.step("19999")[0] == "step 1 19999" and env.step("20000")[4]["is_action_valid"] is False


def test_closing_closes_the_gymnasium_environment_and_a_reset_makes_another(gymnasium):
    closed = []
    env = Gymnasium(id=registered(gymnasium, closed=closed), tasks=1)
    assert len(closed) == 1, "the first try's"
    env.reset(0, 0)
    env.close()
    env.close()
    assert len(closed) == 2 and env.reset(0, 0)[0] == "start 0"


# --- OpenEnv


class Served:
    """Guess as a server shows it: observations with fields, and a step that takes a number."""

    def __init__(self, page: ModuleType) -> None:
        self.page = page

    def reset(self, seed: int = 0, most: int = 50) -> dict:
        self.world = self.page.Guess(tasks=1, seed=seed, most=most)
        return self.told(self.world.reset(0, 0)[0])

    def step(self, number: int) -> dict:
        if number == 666:
            raise KeyError("the server's own fault")
        text, reward, done, *_ = self.world.step(str(number))
        return self.told(text, reward, done)

    def told(self, text: str, reward: float | None = None, done: bool = False) -> dict:
        turns = [{"content": "before"}, {"content": text}]
        return {"observation": {"turns": turns, "legal": [1, 2], "metadata": {}}, "reward": reward, "done": done}


@contextmanager
def replica(page: ModuleType, sessions: int = 100):
    """A server of OpenEnv's messages, as observed from openenv 0.10.0."""
    serve = pytest.importorskip("websockets.sync.server", reason="needs the extra `openenv`").serve
    free = threading.Semaphore(sessions)
    held = []

    def session(socket) -> None:
        def tell(kind: str, **data) -> None:
            socket.send(json.dumps({"type": kind, "data": data}))

        if not free.acquire(blocking=False):
            return tell("error", message="Server at capacity", code="CAPACITY_REACHED")
        held.append(socket)
        world = Served(page)
        try:
            for message in map(json.loads, socket):
                data = message.get("data", {})
                try:
                    if message["type"] == "close":
                        break
                    elif message["type"] == "reset":
                        tell("observation", **world.reset(**data))
                    elif set(data) != {"number"}:
                        problem = {"type": "missing", "loc": ["number"], "msg": "Field required"}
                        tell("error", message="Invalid message", code="VALIDATION_ERROR", errors=[problem])
                    elif not data["number"].isdecimal():
                        problem = {"type": "int_parsing", "loc": ["number"], "msg": "not an integer"}
                        tell("error", message="Invalid message", code="VALIDATION_ERROR", errors=[problem])
                    else:
                        tell("observation", **world.step(int(data["number"])))
                except Exception as error:
                    tell("error", message=str(error), code="EXECUTION_ERROR")
        finally:
            free.release()

    with serve(session, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", held
        server.shutdown()
        thread.join()


@contextmanager
def genuine(page: ModuleType, sessions: int = 100):
    """The same, served by the package openenv."""
    core = pytest.importorskip("openenv.core.env_server", reason="needs the package openenv")
    import uvicorn
    from pydantic import create_model

    action = create_model("GuessAction", __base__=core.Action, number=(int, ...))
    observation = create_model("GuessObservation", __base__=core.Observation, turns=(list, ...), legal=(list, ...))

    class World(core.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        state = core.State()

        def reset(self, seed=None, episode_id=None, most=50):
            self.world = Served(page)
            return self.seen(self.world.reset(seed, most))

        def step(self, action, timeout_s=None):
            return self.seen(self.world.step(action.number))

        def seen(self, told):
            return observation(**told["observation"] | {"reward": told["reward"], "done": told["done"]})

    app = core.create_fastapi_app(World, action, observation, max_concurrent_envs=sessions)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", None
    server.should_exit = True
    thread.join()


@pytest.fixture(params=[replica, genuine], ids=["replica", "openenv"])
def served(request, page):
    return lambda **options: request.param(page, **options)


def connect(address: str, **changes) -> OpenEnv:
    return OpenEnv(
        **{
            "url": address,
            "tasks": 20,
            "seed": 5,
            "action": {"number": "{}"},
            "observation": "turns.-1.content",
            "timeout": 20.0,
        }
        | changes
    )


def test_an_openenv_server_is_played_by_the_agent_loop(served, page):
    with served() as (url, _):
        played = play(connect(url, instructions="You guess."))
        won_by_halving(played)
        same = [page.Guess(tasks=1, seed=5 + task) for task in range(12)]
        assert all(
            world.reset(0, 0) and str(world.number) == t.turns[-1].command
            for world, t in zip(same, played, strict=True)
        )


def test_a_wrong_value_costs_the_turn_and_a_server_s_fault_the_trajectory(served):
    with served() as (url, _):
        env = connect(
            url, admissible="legal", reset={"most": 7}, observation=["turns.0.content", "turns.-1.content", "nothing"]
        )
        first, info = env.reset(0, 0)
        assert first == "before\nI think of a number from 1 to 7. Which?" and info["admissible_actions"] == ["1", "2"]
        assert env.step("three") == (first, 0.0, False, False, info | {"is_action_valid": False})
        assert env.step("0")[0] == "before\nHigher."
        with pytest.raises(Exception, match="EXECUTION_ERROR.*fault"):
            env.step("666")
        env.close()
        wrong = connect(url, action={"guess": "{}"})
        wrong.reset(0, 0)
        with pytest.raises(Exception, match="VALIDATION_ERROR.*number: Field required"):
            wrong.step("3")
        wrong.close()


def test_a_session_is_free_again_as_soon_as_it_is_closed(served):
    with served(sessions=1) as (url, _):
        env = connect(url)
        other = env.clone()
        env.reset(0, 0)
        with pytest.raises(Exception, match="CAPACITY_REACHED.*lower rollout.concurrency"):
            other.reset(0, 0)
        other.close()
        for world in (env, other, env):
            world.reset(0, 1)
            world.close()


def test_an_idle_session_that_was_ended_is_opened_again(page):
    with replica(page) as (url, held):
        env = connect(url)
        first = env.reset(0, 3)
        held[-1].close()
        assert env.reset(0, 3) == first
        held[-1].close()
        with pytest.raises(ConnectionError, match="hung up"):
            env.step("3")
        env.close()


def test_what_a_server_tells_is_cleaned_and_cut(page, monkeypatch):
    told = {
        "observation": {"turns": [{"content": HOSTILE_TEXT}], "legal": HOSTILE_ACTIONS},
        "reward": None,
        "done": False,
    }
    monkeypatch.setattr(Served, "told", lambda *_: told)
    with replica(page) as (url, _):
        env = connect(url, admissible="legal")
        for observation, *_, info in (env.reset(0, 0), env.step("3"), env.step("three")):
            check_shown(observation, info)
        told["observation"]["legal"] = "none"
        assert env.step("3")[4]["admissible_actions"] == []
        env.close()


@pytest.mark.parametrize(
    ("reward", "done", "gained", "won"), [(2.0, False, 2.0, False), (2.0, True, 2.0, True), (None, True, 0.0, False)]
)
def test_a_server_s_episode_is_won_at_its_end_and_no_reward_is_none(page, monkeypatch, reward, done, gained, won):
    monkeypatch.setattr(
        Served, "told", lambda *_: {"observation": {"turns": [{"content": "x"}]}, "reward": reward, "done": done}
    )
    with replica(page) as (url, _):
        env = connect(url)
        env.reset(0, 0)
        observation, found, terminated, _, info = env.step("3")
        assert (observation, found, terminated, info["won"]) == ("x", gained, done, won)
        env.close()


def test_a_server_s_message_has_a_longest_size(page, monkeypatch):
    monkeypatch.setattr(Served, "told", lambda *_: {"observation": {"turns": [{"content": "x" * 5_000_000}]}})
    with replica(page) as (url, _), pytest.raises(UserError, match="hung up"):
        connect(url)


@pytest.mark.parametrize(
    ("problem", "of_value", "words"),
    [
        ({"code": "VALIDATION_ERROR", "errors": [{"msg": "too low"}]}, True, "VALIDATION_ERROR; too low"),
        ({"code": "VALIDATION_ERROR", "errors": [{"type": "missing"}]}, False, "VALIDATION_ERROR"),
        (
            {"code": "VALIDATION_ERROR", "errors": [{"type": "missing", "loc": "number", "msg": 5}]},
            False,
            "VALIDATION_ERROR; number: 5",
        ),
        ({"code": "VALIDATION_ERROR", "errors": ["too low", None]}, True, "VALIDATION_ERROR; too low"),
        ({"code": "X", "errors": "its own words", "message": "m"}, False, "X; m; its own words"),
        ({"code": ["X"], "errors": {"msg": "one"}}, False, "['X']; one"),
        ({}, False, ""),
    ],
)
def test_whatever_a_server_s_error_looks_like_its_cause_is_told(problem, of_value, words):
    error = ServerError(problem)
    assert (error.of_value, str(error)) == (of_value, words)


def test_a_server_s_words_are_cleaned_and_cut_where_they_are_told(page):
    with replica(page) as (url, _):
        env = connect(url)
        pool = Pool(env, workers=1, timeout=20.0)
        pool.reset(0, 0, 0)
        assert pool.ready(wait=True)[0].failure is None
        page.Guess.step = lambda *_: (_ for _ in ()).throw(KeyError("\x1b[31m\n" + "long " * 20_000 + "end"))
        pool.step(0, "3")
        failure = pool.ready(wait=True)[0].failure
        pool.close()
    assert (
        failure.startswith("ServerError: EXECUTION_ERROR")
        and failure.endswith("long end'")
        and len(failure) < 340
        and failure.isprintable()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"observation": "turn"}, "observation=turn is not in what the server tells: turns, legal, metadata"),
        ({"admissible": "metadata"}, "admissible=metadata is not a list"),
        ({"reset": {"most": 1, "seed": 7, "x": 1}}, "EXECUTION_ERROR"),
        ({"action": {"number": 3}}, 'has no place for the command; put "{}" where it goes'),
        ({"action": "{}"}, "action='{}' must be a table"),
        ({"action": 5}, "action=5 must be a table"),
        ({"reset": 5}, "reset=5 must be a table"),
        ({"observation": 5}, "observation=5 must be a field's name, or a list of them"),
        ({"observation": ["turns", 5]}, "observation=['turns', 5] must be"),
        ({"admissible": 5}, "admissible=5 must be a field's name"),
        ({"timeout": "long"}, "timeout='long' must be a number of seconds"),
        ({"timeout": 0}, "timeout=0 must be a number of seconds above 0"),
        ({"url": 5}, "url=5 is not the address of a server"),
        ({"url": ["x"]}, "url=['x'] is not the address of a server"),
        ({"url": "127.0.0.1:80"}, "url='127.0.0.1:80' is not the address of a server"),
        ({"url": "http://127.0.0.1:1"}, "ConnectionRefusedError"),
    ],
)
def test_what_cannot_be_played_is_said_at_once_on_one_line(page, options, words):
    with replica(page) as (url, _), pytest.raises(UserError) as error:
        connect(url, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_does_not_answer_is_not_waited_for():
    serve = pytest.importorskip("websockets.sync.server", reason="needs the extra `openenv`").serve
    over = threading.Event()
    with serve(lambda socket: over.wait(20), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="no answer within timeout=0.3 s"):
            connect(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/ws", timeout=0.3)
        over.set()
        server.shutdown()


def test_templates_are_filled_and_paths_followed():
    template = {"type": "call_tool", "arguments": {"message": "{}", "to": ["{}", "all"]}}
    assert filled(template, "hi {}") == {"type": "call_tool", "arguments": {"message": "hi {}", "to": ["hi {}", "all"]}}
    value = {"a": [{"b": 1}, {"b": None}], "c": "text"}
    assert [at(value, path) for path in ("a.0.b", "a.-1.b", "a.2.b", "a.b", "c.0", "c", "d")] == [
        1,
        None,
        None,
        None,
        None,
        "text",
        None,
    ]
