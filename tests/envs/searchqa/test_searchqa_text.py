"""Search-QA's scores as published, and passages and questions cleaned, cut and counted."""

from __future__ import annotations

import json
import logging
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.envs.searchqa.questions import Question, read_questions
from atod_fast.envs.searchqa.score import exact_match, f1, normalise
from atod_fast.envs.searchqa.text import clean, information
from atod_fast.envs.text import CUT
from atod_fast.errors import UserError
from helpers.searchqa import HOSTILE, QUESTIONS, searchqa, write

# --- scores


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Beatles", "beatles"),
        ("  a   cat, an owl and the dog!  ", "cat owl and dog"),
        ("U.S.A.", "usa"),
        ("state-of-the-art", "stateoftheart"),
        ("don't", "dont"),
        ("1,000.50", "100050"),
        ("Theatre and anthem", "theatre and anthem"),
        ("The The", ""),
        ("a\tb\nc", "b c"),
        ("ZÜRICH", "zürich"),
        ("“The End”", "“ end”"),
        ("naïve — the café", "naïve — café"),
        ("İstanbul", "i̇stanbul"),
        ("東京、日本。", "東京、日本。"),
        ("$5_000 (a lot)", "5000 lot"),
        ("thé", "thé"),
        ("", ""),
    ],
)
def test_the_published_normalisation(answer, normal):
    assert normalise(answer) == normal


def by_hand(answer: str) -> str:
    kept = "".join(letter for letter in answer.lower() if letter not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    runs = ["".join(run) for _, run in groupby(kept, key=lambda letter: letter.isalnum())]
    return " ".join("".join(" " if run in ("a", "an", "the") else run for run in runs).split())


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from(
            ["the", "The", "a", "AN", "an", "and", "cat", "é", "_", "-", ".", "'", " ", "\n", "—", "\u0301", "x1", "東"]
        )
    ).map("".join)
    | st.text()
)
def test_normalisation_agrees_with_one_written_letter_by_letter(text):
    assert normalise(text) == by_hand(text)


def test_exact_match_takes_any_gold_answer_and_f1_the_best():
    assert exact_match("the United States!", ["USA", "united states"]) and not exact_match("United States", ["USA"])
    assert not exact_match("paris", []) and f1("paris", []) == 0.0
    assert f1("Mary Wollstonecraft Shelley", ["Shelley"]) == pytest.approx(0.5)
    assert f1("Mary Shelley", ["Percy Shelley", "Mary Wollstonecraft Shelley"]) == pytest.approx(0.8)
    assert f1("a b b", ["b b c"]) == 1.0 - 1 / 5  # "a" is an article: 2 of 2 words, 2 of 3
    assert f1("x y", ["z"]) == 0.0 and f1("the", ["an"]) == 1.0 and f1("the", ["dog"]) == 0.0


@given(st.text(max_size=40), st.lists(st.text(max_size=40), max_size=3))
def test_what_matches_exactly_has_f1_one(answer, gold):
    assert 0.0 <= f1(answer, gold) <= 1.0
    assert exact_match(answer, [*gold, answer]) and f1(answer, [*gold, answer]) == 1.0
    if exact_match(answer, gold):
        assert f1(answer, gold) == 1.0


# --- text


@given(
    st.lists(st.text(max_size=200) | st.sampled_from(HOSTILE), max_size=5),
    st.sampled_from(("text", "json")),
    st.integers(1, 300),
)
def test_no_passage_closes_its_block_or_brings_a_tag_of_its_own(passages, style, chars):
    shown = information(passages, chars=chars, style=style)
    assert shown.startswith("<information>") and shown.endswith("</information>")
    inside = shown.removeprefix("<information>").removesuffix("</information>")
    text = json.loads(inside)["result"] if style == "json" else inside
    for opening in ("<information", "</", "<|", "<search", "<answer", "<think", "<action", "<s", "<｜"):
        assert opening not in inside.lower()
    inside.encode()  # a lone surrogate could not be
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in inside)
    assert len(text) <= sum(min(len(passage), chars) + len(CUT) + 8 for passage in passages) + 30


@pytest.mark.parametrize("text", HOSTILE)
def test_a_mark_is_found_behind_what_nobody_sees(text):
    assert clean(text).count("<") == text.count("<<")  # the first of two opens nothing


def test_cleaning_leaves_ordinary_text_alone():
    for text in (
        "می\u200cخواهم क्\u200dष 👩\u200d🔬 ❤\ufe0f",
        "1 < 2, 3 > 2 and i <3 you",
        "naïve café 東京\n\ttab",
        "x <- y",
        'a "quoted" & <> sign',
        "f(x) = {[|x|]}",
    ):
        assert clean(text) == text
    assert clean("a <b> c </ref>") == "a ‹b> c ‹/ref>"


def test_terminal_sequences_go_as_a_whole_and_hide_no_tag():
    assert clean("\x1b[2Jgone, \x1b[1;31mred\x1b[0m") == "gone, red"
    assert clean("<\x1b[0m/information>") == "‹/information>"


def test_a_long_passage_is_cut_where_it_shows():
    shown = information(["x" * 50, "short"], chars=20)
    assert shown == f"<information>Doc 1: {'x' * 20}{CUT}\nDoc 2: short\n</information>"


def test_what_is_shown_escaped_is_measured_escaped():
    shown = information(["😀" * 1500] * 3, chars=100, style="json")
    assert json.loads(shown[13:-14])["result"] == "".join(
        f"Doc {n}: {'😀' * 8}{CUT}\n" for n in (1, 2, 3)
    )  # each is \\ud83d\\ude00
    assert information(['"' * 50, "x" * 100], chars=100, style="json").count("cut") == 0


# --- questions and other lines


def test_questions_are_read_in_order_with_their_source(files):
    first, second = read_questions([Path(files[0])])
    assert first == Question("q1", "Where was the author of Frankenstein born?", ("Somers Town", "London"), "made")
    assert (second.id, second.answers, second.source) == ("2", ("Bram Stoker",), "quiz")
    assert read_questions([Path(files[0])], sources=["made"]) == [first]


def test_an_endless_question_is_cut_where_it_shows(tmp_path):
    question = read_questions(
        [write(tmp_path / "q.jsonl", [{"id": 1, "question": "who " * 9000, "golden_answers": "x"}])]
    )[0]
    assert question.text == "who " * 500 + CUT


def test_a_limit_is_spread_over_the_files(tmp_path):
    file = write(
        tmp_path / "q.jsonl",
        [{"id": n, "question": f"q{n}", "golden_answers": ["x"], "data_source": f"s{n // 5}"} for n in range(20)],
    )
    assert [question.id for question in read_questions([file], limit=4)] == ["0", "5", "10", "15"]
    assert len(read_questions([file], limit=99)) == 20
    assert [question.id for question in read_questions([file], limit=2, sources=["s1", "s3"])] == ["5", "15"]


BAD = [
    "{",
    "[1]",
    '"text"',
    "{}",
    "[" * 100_000,
    '{"id": 1, "question": " ", "golden_answers": ["x"]}',
    '{"id": 1, "question": "x"}',
]
BAD += ['{"id": 1, "question": "x", "golden_answers": ""}', '{"id": 1, "question": "x", "golden_answers": [null, " "]}']
BAD += ['{"id": 1, "question": "x", "golden_answers": [["y"]]}']
BAD += ['{"id": null, "question": "x", "golden_answers": []}', "\udcff".encode("utf-8", "surrogateescape")]


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        (["", "Paris"], ("Paris",)),
        (["Paris", None, " "], ("Paris",)),
        ([1984, 2.5], ("1984", "2.5")),
        (42, ("42",)),
        ("Paris", ("Paris",)),
    ],
)
def test_an_empty_answer_is_left_out_and_a_number_counts_as_its_digits(tmp_path, given, answers):
    file = write(tmp_path / "q.jsonl", [{"id": 1, "question": "?", "golden_answers": given}])
    assert read_questions([file], bad_lines=0)[0].answers == answers


def test_malformed_lines_are_named_counted_and_skipped_up_to_a_limit(tmp_path, caplog):
    good = json.dumps(QUESTIONS[0]).encode()
    file = tmp_path / "q.jsonl"
    file.write_bytes(
        b"\n".join([good, b"", *(line if isinstance(line, bytes) else line.encode() for line in BAD), good])
    )
    with caplog.at_level(logging.WARNING):
        assert len(read_questions([file], bad_lines=len(BAD))) == 2
    assert f"skipped {len(BAD)} malformed lines" in caplog.text and f"{file}:3: " in caplog.text
    with pytest.raises(
        UserError,
        match=rf"{len(BAD)} malformed lines, the last .*q.jsonl:{len(BAD) + 2}: .*bad_lines is {len(BAD) - 1}",
    ) as caught:
        read_questions([file], bad_lines=len(BAD) - 1)
    assert "\n" not in str(caught.value)


def test_corpus_lines_come_whole_or_in_parts(tmp_path, caplog):
    parts = {"id": 7, "title": "Dracula", "text": "A novel by Bram Stoker."}
    file = write(tmp_path / "c.jsonl", [parts, {"id": "8", "contents": "nothing"}, {"id": "9", "text": "no title"}])
    with caplog.at_level(logging.WARNING):
        env = searchqa(questions=write(tmp_path / "q.jsonl", QUESTIONS), retriever=file)
    assert "c.jsonl:3: no title" in caplog.text
    env.reset(0, 0)
    assert (
        env.step("<search>stoker</search>")[0]
        == '<information>Doc 1: "Dracula"\nA novel by Bram Stoker.\n</information>'
    )
