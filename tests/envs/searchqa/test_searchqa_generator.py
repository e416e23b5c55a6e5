"""Search-QA's made-up corpora: each question can be answered, and nothing repeats between two seeds."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from atod_fast.envs.searchqa.bm25 import term
from atod_fast.envs.searchqa.generator import ADJECTIVES, ASKED, JOBS, NOUNS, PEOPLE, PLACES, generate
from helpers.searchqa import searchqa


def test_every_made_up_question_is_answered_by_looking_it_up():
    for seed in (0, 1):
        env = searchqa(generate=3000, seed=seed)
        kinds = set()
        for task in range(0, len(env), 7):
            question, info = env.reset(0, task)
            observation = question
            for query in env.question.queries:
                assert query in observation  # asked about, or told by the search before
                observation = env.step(f"<search>{query}</search>")[0].partition("Doc 2:")[0]
            assert env.question.answers[0] in observation and env.question.answers[0] not in question
            assert env.step(f"<answer>{env.question.answers[0].lower()}</answer>")[1:4] == (1.0, True, False)
            kinds.add((info["task_type"], len(env.question.queries)))
        assert kinds == {("generated-1", 1), ("generated-2", 2)}


def test_worlds_of_even_and_odd_seeds_share_no_thing_and_no_two_seeds_the_answers():
    one, other, same_things = generate(0), generate(1), generate(2)
    assert not {q.queries[0] for q in one.questions} & {q.queries[0] for q in other.questions}
    assert (
        len(one.questions) > 3000
        and len(other.questions) > 3000
        and len(set(q.id for q in one.questions)) == len(one.questions)
    )
    answers = {q.text: q.answers for q in one.questions}
    assert answers.keys() == {q.text for q in same_things.questions}
    assert sum(answers[q.text] == q.answers for q in same_things.questions) < 0.1 * len(answers)
    assert all(len(q.queries) == 1 for q in generate(0, hops=1).questions)


def test_any_first_questions_are_a_fair_sample():
    kinds = Counter(q.id.rpartition("/")[2] for q in generate(0).questions[:700])
    assert len(kinds) == len(ASKED) and min(kinds.values()) > 60


def test_the_worlds_words_are_few_and_never_mean_two_things():
    words = [term(word.lower()) for word in (*ADJECTIVES, *NOUNS, *PEOPLE, *PLACES, *JOBS)]
    assert len(set(words)) == len(words) < 180 and "" not in words


def test_a_made_up_world_is_a_function_of_its_seed():
    code = (
        "from atod_fast.envs.searchqa.generator import generate; w = generate(5); "
        "print(w.questions[:9], w.passages[:9])"
    )
    world = generate(5)
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == f"{world.questions[:9]} {world.passages[:9]}\n"
    )
