"""Search-QA as an environment: transcripts, the reading of actions, clones, and mistakes in its options."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.envs.protocol import Environment
from atod_fast.envs.searchqa.env import parse_command
from atod_fast.errors import UserError
from helpers.searchqa import quiz, searchqa


def test_a_transcript(files):
    env = searchqa(questions=files[0], retriever=files[1], topk=2)
    assert isinstance(env, Environment) and env.instant and len(env) == 2
    facts = {
        "won": False,
        "admissible_actions": [],
        "is_action_valid": True,
        "task_type": "made",
        "task_id": "q1",
        "score": 0.0,
    }
    assert env.reset(0, 0) == ("Where was the author of Frankenstein born?", facts)
    assert env.step("<search> Frankenstein </search>") == (
        '<information>Doc 1: "Frankenstein"\nFrankenstein is a novel by Mary Shelley, '
        "first published in London in 1818.\n</information>",
        0.0,
        False,
        False,
        facts,
    )
    assert env.step("I think it was London.") == ("", 0.0, False, False, facts | {"is_action_valid": False})
    assert env.step("<search>Mary Shelley's birth</search>")[0] == (
        '<information>Doc 1: "Mary Shelley"\nMary Shelley was born in Somers Town, London. '
        "She married Percy Bysshe Shelley.\n"
        'Doc 2: "Frankenstein"\nFrankenstein is a novel by Mary Shelley, first published in London in 1818.\n'
        "</information>"
    )
    assert env.step("<answer>Somers Town.</answer>") == ("", 1.0, True, False, facts | {"won": True, "score": 1.0})
    with pytest.raises(RuntimeError, match="after the end"):
        env.step("<answer>again</answer>")
    env.reset(0, 0)
    observation, reward, terminated, truncated, info = env.step("<answer>Somers in London Town</answer>")
    assert (
        (observation, reward, terminated, truncated) == ("", 0.0, True, False)
        and info["score"] == pytest.approx(2 / 3)
        and not info["won"]
    )


def test_the_wording_of_verl_agent(files):
    env = searchqa(questions=files[0], retriever=files[1], results="json")
    env.reset(0, 1)
    assert env.step("<search>zürich</search>")[0] == (
        r'<information>{"result": "Doc 1: \"Z\u00fcrich\"\n'
        r'Z\u00fcrich lies at the lake of the same name \u2014 \u6771\u4eac does not.\n"}</information>'
    )
    assert env.step("<search>xyzzy</search>")[0] == '<information>{"result": "No search results found."}</information>'


@pytest.mark.parametrize(
    ("action", "command"),
    [
        ("<search>q</search>", ("search", "q")),
        (" <SEARCH>\n two words </Search>\n", ("search", "two words")),
        ("<answer>The <b>B</b></answer>", ("answer", "The <b>B</b>")),
        ("<search></search>", ("search", "")),
        ("<search>q</answer></search>", ("search", "q</answer>")),
        ("<search>q</search></search>", None),
        ("", None),
        ("q", None),
        ("<search>q", None),
        ("<search>q</answer>", None),
        ("<search>q</search><answer>a</answer>", None),
        ("<search>q</search><search>r</search>", None),
        ("<search><search>q</search></search>", None),
        ("<answer>a<search></answer>", None),
        ("well: <answer>a</answer>", None),
        ("<answer>a</answer>.", None),
    ],
)
def test_an_action_is_one_block_and_nothing_else(action, command):
    assert parse_command(action) == command


pieces = st.sampled_from(
    [
        "<search>",
        "</search>",
        "<answer>",
        "</answer>",
        "<SEARCH>",
        "<information>",
        "shelley",
        " ",
        "\n",
        "\x00",
        "\ud800",
        "<",
        "zürich",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(pieces, max_size=5).map("".join) | st.text(max_size=30), min_size=1, max_size=6))
def test_no_action_ever_raises_and_every_turn_keeps_the_rules(files, actions):
    env = quiz(*files)
    env.reset(0, 1)
    for action in actions:
        command = parse_command(action)
        observation, reward, terminated, truncated, info = env.step(action)
        assert (
            info["is_action_valid"] == (command is not None)
            and info["admissible_actions"] == []
            and info["task_id"] == "2"
        )
        assert terminated == (command is not None and command[0] == "answer") and not truncated
        assert info["won"] == (reward == 1.0) and (terminated or (reward == 0.0 and info["score"] == 0.0))
        shown = command is not None and command[0] == "search"
        assert (
            observation.startswith("<information>") and observation.endswith("</information>")
            if shown
            else observation == ""
        )
        if terminated:
            with pytest.raises(RuntimeError):
                env.step(action)
            break


def test_clones_are_independent_and_share_the_index(files):
    env = searchqa(generate=20, reward=7)
    clones = [env.clone() for _ in range(5)]
    assert all(clone._retriever is env._retriever and clone._questions is env._questions for clone in clones)

    def play(world, task):
        return [
            world.reset(0, task),
            *(
                world.step(action)
                for action in ("<search>red lamp</search>", "x", f"<answer>{world.question.answers[0]}</answer>")
            ),
        ]

    alone = [play(env, task) for task in range(5)]
    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(play, clones, range(5))) == alone
    assert alone[0][-1][1] == 7.0
    clones[0].close()
    with pytest.raises(RuntimeError, match="before reset"):
        clones[0].step("x")
    with pytest.raises(IndexError):
        env.reset(0, 20)


def test_one_corpus_is_indexed_once(files):
    assert (
        searchqa(questions=files[0], retriever=files[1])._retriever
        is searchqa(questions=files[0], retriever=Path(files[1]), topk=1)._retriever
    )


def test_environments_need_neither_torch_nor_what_they_do_not_use(files):
    code = (
        "import sys\nfrom atod_fast.envs.searchqa.env import SearchQA\n"
        "first = {'torch', 'bm25s', 'urllib3'} & set(sys.modules)\n"
        "SearchQA(generate=2).reset(0, 0)\nprint(first, {'torch', 'urllib3', 'tenacity'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "set() set()\n"
    )


def test_a_missing_library_is_said_with_the_remedy(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(UserError, match=r"retriever='http://x' needs urllib3 .*pip install 'atod_fast\[search\]'"):
        searchqa(questions=files[0], retriever="http://x")
    code = (
        "import sys\nsys.modules['Stemmer'] = None\nfrom atod_fast.envs.searchqa.env import SearchQA\n"
        "SearchQA(generate=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        "UserError: retriever: search in this process needs bm25s and PyStemmer" in done.stderr
        and "pip install 'atod_fast[search]'" in done.stderr
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "either questions=<files> with retriever="),
        ({"generate": 3, "questions": "q"}, "either questions=<files> with retriever="),
        ({"questions": "q"}, "needs retriever="),
        ({"retriever": "r"}, "needs questions="),
        ({"generate": 0}, "generate=0 must be"),
        ({"generate": 10**6}, "generate=1000000 is too many"),
        ({"generate": 3, "hops": 3}, "hops=3 is too many"),
        ({"generate": 3, "seed": -1}, "seed=-1 must be"),
        ({"generate": 3, "timeout": 5}, "timeout=5 goes with questions="),
        ({"generate": 3, "limit": 5}, "limit=5 goes with questions="),
        ({"generate": 3, "topk": 0}, "topk=0 must be"),
        ({"generate": 3, "topk": True}, "topk=True must be"),
        ({"generate": 3, "max_turns": 4}, "has no option 'max_turns'"),
        *(({"generate": 3, "reward": reward}, f"reward={reward!r} must be a number") for reward in ("x", None, True)),
        *(
            ({"generate": 3, "reward": reward}, f"reward={reward!r} must be a finite number")
            for reward in (math.nan, math.inf)
        ),
        *(
            ({"questions": value, "retriever": "C"}, f"questions={value!r} must be a JSON-lines file or a list")
            for value in (5, [5], b"Q")
        ),
        *(
            ({"questions": "Q", "retriever": value}, f"retriever={value!r} must be an index folder")
            for value in (5, ["a"])
        ),
        *(
            ({"questions": "Q", "retriever": "C", "sources": value}, f"sources={value!r} must be a data_source")
            for value in (5, [["made"]])
        ),
        *(
            ({"questions": "Q", "retriever": value, "retries": 0}, f"retriever={value!r} is no index")
            for value in ("127.0.0.1:8000", "ftp://x")
        ),
        ({"questions": "Q", "retriever": "ftp://me:secret@x"}, "retriever='ftp://x' is no index"),
        ({"questions": "Q", "retriever": "HTTP://x", "timeout": True}, "timeout=True must be"),
        ({"questions": "Q", "retriever": "http://x", "timeout": math.nan}, "timeout=nan must be"),
        ({"generate": 3, "results": "jsn"}, "did you mean json?"),
        ({"generate": 3, "retreiver": "x"}, "did you mean retriever?"),
        ({"questions": "Q", "retriever": "C", "seed": 3}, "seed=3 goes with generate=N"),
        ({"questions": "Q", "retriever": "C", "retries": 1}, "retries=1 goes with retriever=<URL>"),
        (
            {"questions": "Q", "retriever": "C", "sources": ["nq"]},
            "sources='nq' occurs in no question; the files have made, quiz",
        ),
        ({"questions": "Q", "retriever": "C", "limit": 0}, "limit=0 must be"),
        (
            {"questions": "Q", "retriever": "nowhere"},
            "retriever='nowhere' is no index folder, no corpus .jsonl and no http(s) URL",
        ),
        ({"questions": "nowhere.jsonl", "retriever": "C"}, "questions='nowhere.jsonl' cannot be read"),
        ({"questions": "Q", "retriever": "."}, "python -m atod_fast.envs.searchqa.index"),
        ({"questions": "Q", "retriever": "http://"}, "is not a URL"),
        ({"questions": "Q", "retriever": "http://x:99999"}, "is not a URL"),
        ({"questions": "Q", "retriever": "http://me:secret@x:99999?secret"}, "retriever='http://x:99999' is not a URL"),
        ({"questions": "Q", "retriever": "http://x", "timeout": 0}, "timeout=0 must be"),
        ({"questions": "Q", "retriever": "http://x", "concurrency": 0}, "concurrency=0 must be"),
    ],
)
def test_mistakes_get_one_clear_line(files, options, complaint):
    names = {"Q": files[0], "C": files[1]}
    with pytest.raises(UserError) as caught:
        searchqa(
            **{key: names.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
        )
    assert complaint in str(caught.value) and "\n" not in str(caught.value)
