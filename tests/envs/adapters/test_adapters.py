"""The open interface for environments: the documentation's example, and the adapters for gymnasium and OpenEnv, each
in the real agent loop.
"""

from __future__ import annotations

import json
import re
import socket

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atod_fast import cli, evaluate, train
from atod_fast.config.settings import demo_values_warning
from atod_fast.envs import make
from atod_fast.envs.adapters import adapter
from atod_fast.envs.prompt import PlainPrompt
from atod_fast.envs.protocol import Environment
from atod_fast.envs.text import GAP, cut_middle
from atod_fast.errors import UserError
from atod_fast.records import Turn
from helpers.chatml import make_tokenizer
from helpers.guess import BLOCKS, COMMANDS, play, won_by_halving
from helpers.tiny import save_model


def test_the_page_s_own_prompt_words_messages_and_reads_answers():
    from atod_fast.envs.prompt import MEMBERS

    names: dict = {}
    exec(BLOCKS["python"][1], names)
    prompt = names["BarePrompt"]()
    assert all(callable(getattr(prompt, member)) for member in MEMBERS)
    turn = Turn([], [], [], "Which?", "I say 7.", "7", True)
    assert prompt.message("Which?", [turn], "Higher.", []) == "Which? You said 7. Higher. Answer with a number."
    assert prompt.project("I say 12!") == ("12", True) and prompt.project("dunno") == ("dunno", False)


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
    toml = BLOCKS["toml"][0]
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
