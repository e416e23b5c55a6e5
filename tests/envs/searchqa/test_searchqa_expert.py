"""Search-QA's scripted expert searches, and answers what it has read."""

from __future__ import annotations

import pytest

from atod_fast.envs.experts import Demonstrated, check_expert
from atod_fast.envs.searchqa.env import SearchQA
from atod_fast.errors import UserError
from helpers.experts import play
from helpers.paths import DATA
from helpers.searchqa import CORPUS, QUESTIONS, write


def test_generated_questions_are_answered_after_their_searches():
    env = SearchQA(generate=100)
    for task in range(len(env)):
        commands, info = play(env, task, 4)
        assert info["won"] and len(commands) == 1 + len(env.question.queries)
        assert all(command.startswith("<search>") for command in commands[:-1])


def test_a_question_is_answered_with_what_was_read_and_never_with_what_was_not(tmp_path):
    corpus = write(tmp_path / "corpus.jsonl", [{"id": one.id, "contents": one.contents} for one in CORPUS])
    unknown = {"id": "q3", "question": "who wrote Dracula", "golden_answers": ["Somebody Unread"]}
    files = write(tmp_path / "questions.jsonl", [*QUESTIONS, unknown])
    env = SearchQA(questions=str(files), retriever=str(corpus))
    assert [play(env, task, 4)[1]["won"] for task in range(3)] == [True, True, False]
    commands, _ = play(env, 2, 4)
    assert all(command.startswith("<search>") for command in commands)


def test_real_questions_are_answered():
    questions, corpus = DATA / "searchqa_hotpot_questions.jsonl", DATA / "searchqa_hotpot_corpus.jsonl"
    if not questions.exists() or not corpus.exists():
        pytest.skip("needs HotpotQA's questions and passages in shared/data")
    env = SearchQA(questions=str(questions), retriever=str(corpus))
    assert sum(play(env, task, 4)[1]["won"] for task in range(len(env))) >= 0.9 * len(env)


def test_an_environment_without_an_expert_is_refused():
    with pytest.raises(UserError, match="env.name='mine' has no expert"):
        check_expert("mine", object())


def test_an_expert_that_fails_is_named():
    env = SearchQA(generate=2)
    env.expert = lambda: type("Broken", (), {"act": lambda self, observation, info: 1 / 0})()
    with pytest.raises(RuntimeError, match="the expert fails: .*division by zero"):
        Demonstrated(env).reset(0, 0)
