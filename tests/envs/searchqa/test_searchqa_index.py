"""Search-QA's BM25 and its index on disk."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.envs.searchqa.bm25 import Bm25, term
from atod_fast.envs.searchqa.generator import generate
from atod_fast.envs.searchqa.index import main as index_main
from atod_fast.envs.searchqa.passages import Passage
from atod_fast.envs.searchqa.server import main as server_main
from atod_fast.envs.searchqa.store import build, load
from atod_fast.errors import UserError
from helpers.paths import DATA
from helpers.searchqa import CORPUS, QUESTIONS, searchqa, write

# --- BM25


def test_scores_are_lucenes_bm25():
    """score = sum over query terms of ln(1 + (N - df + 0.5) / (df + 0.5)) * tf / (tf + 0.9 * (0.6 + 0.4 * length /
    mean length))."""
    stop = (
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with"
    ).split()
    words = [
        [
            term(word)
            for word in "".join(c if c.isalnum() else " " for c in p.contents.lower()).split()
            if word not in stop
        ]
        for p in CORPUS
    ]
    mean = sum(map(len, words)) / len(words)

    def score(query: str, place: int) -> float:
        total = 0.0
        for wanted in map(term, query.split()):
            df, tf = sum(wanted in said for said in words), words[place].count(wanted)
            total += (
                math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                * tf
                / (tf + 0.9 * (0.6 + 0.4 * len(words[place]) / mean))
            )
        return total

    index = Bm25.of(CORPUS)
    for query in ("shelley novels", "london", "mary married mary", "zürich lakes novel author"):
        expected = sorted(((score(query, place), -place) for place in range(4) if score(query, place)), reverse=True)
        found = index.scored(query, 4)
        assert [passage for passage, _ in found] == [CORPUS[-place] for _, place in expected]
        assert [value for _, value in found] == pytest.approx([value for value, _ in expected], rel=1e-5)
    assert index.scored("the of and", 4) == index.scored("", 4) == index.scored("xyzzy", 4) == []


def test_words_are_found_by_their_porter_stem():
    assert [term(word) for word in ("published", "novels", "marriages", "the", "zürich", "1818")] == [
        "publish",
        "novel",
        "marriag",
        "",
        "zürich",
        "1818",
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from("red green blue lamp cup".split()), min_size=1, max_size=4), min_size=1, max_size=12
    ),
    st.integers(1, 15),
)
def test_the_best_come_first_and_equals_in_the_order_of_the_corpus(texts, topk):
    passages = [Passage(str(n), " ".join(text)) for n, text in enumerate(texts)]
    index = Bm25.of(passages)
    everything = index.scored("red lamp", len(passages))
    assert everything == sorted(everything, key=lambda hit: (-hit[1], int(hit[0].id)))
    assert {passage.id for passage, _ in everything} == {
        passage.id for passage in passages if {"red", "lamp"} & set(passage.contents.split())
    }
    assert index.scored("red lamp", topk) == everything[:topk]


# --- the index on disk


def test_an_index_on_disk_finds_what_one_in_memory_finds(tmp_path, capsys):
    world = generate(3)
    corpus = write(
        tmp_path / "corpus.jsonl", [{"id": p.id, "contents": p.contents} for p in world.passages] + ["broken"]
    )
    assert index_main([str(corpus), "--out", str(tmp_path / "deep" / "index")]) == 0
    assert f"{len(world.passages)} passages" in capsys.readouterr().out
    on_disk, in_memory = load(tmp_path / "deep" / "index"), Bm25.of(world.passages)
    assert len(on_disk) == len(world.passages)
    for question in world.questions[:40]:
        assert on_disk.scored(question.text, 5) == in_memory.scored(question.text, 5)
    assert type(on_disk._index.scores["data"]).__name__ == "memmap"
    assert load(tmp_path / "deep" / "index") is on_disk
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["index"] and not list(tmp_path.rglob("*.tmp"))


def test_an_index_is_there_whole_or_not_at_all(tmp_path, capsys):
    def passages():
        yield CORPUS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(passages(), tmp_path / "index")
    assert not list(tmp_path.iterdir())
    assert index_main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "index")]) == 2
    assert "none.jsonl' cannot be read" in capsys.readouterr().err
    assert (
        index_main(
            [str(write(tmp_path / "empty.jsonl", [{"id": 1, "contents": "the"}])), "--out", str(tmp_path / "index")]
        )
        == 2
    )
    assert "no passage with a word" in capsys.readouterr().err
    assert build(CORPUS, tmp_path / "index") == 4
    assert index_main([str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "index")]) == 2
    assert "index' exists" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "index"]


def test_an_index_is_as_open_as_any_folder(tmp_path):
    build(CORPUS, tmp_path / "index")
    (tmp_path / "folder").mkdir()
    assert (tmp_path / "index").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("out", ["file/index", "file/deep/index", "x" * 300])
def test_an_index_that_cannot_be_written_is_one_clear_line(tmp_path, capsys, out):
    corpus = write(tmp_path / "file", [{"id": 1, "contents": "word"}])
    assert index_main([str(corpus), "--out", str(tmp_path / out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"atod_fast: --out '{tmp_path / out}' cannot be written (") and error.count("\n") == 1


def test_ctrl_c_ends_indexing_without_a_word(files, tmp_path, monkeypatch, capsys):
    def broken_off(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("atod_fast.envs.searchqa.index.read_passages", broken_off)
    monkeypatch.setattr("atod_fast.envs.searchqa.server.open_local", broken_off)
    try:
        assert index_main([files[1], "--out", str(tmp_path / "index")]) == server_main([files[1]]) == 130
    except KeyboardInterrupt:  # which would end the tests
        pytest.fail("a traceback")
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_search_among_very_many_passages_is_not_instant(tmp_path, monkeypatch):
    build(CORPUS, tmp_path / "index")
    monkeypatch.setattr("atod_fast.envs.searchqa.bm25.INSTANT", 4)
    assert searchqa(questions=write(tmp_path / "q.jsonl", QUESTIONS), retriever=tmp_path / "index").instant
    monkeypatch.setattr("atod_fast.envs.searchqa.bm25.INSTANT", 3)
    build(CORPUS, tmp_path / "larger")
    assert not searchqa(questions=tmp_path / "q.jsonl", retriever=tmp_path / "larger").instant


@pytest.mark.parametrize(
    "name",
    [
        "index.json",
        "ends.npy",
        "passages.jsonl",
        "data.csc.index.npy",
        "indptr.csc.index.npy",
        "vocab.index.json",
        "params.index.json",
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path, name):
    build(CORPUS, tmp_path / "index")
    file = tmp_path / "index" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="index' is damaged .* build it again") as caught:
        load(tmp_path / "index")
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(UserError, match="is damaged|holds no index"):
        load(tmp_path / "index")


def test_real_questions_are_searched_with_sensible_recall():
    if not (DATA / "searchqa_hotpot_corpus.jsonl").exists():
        pytest.skip("no HotpotQA data at shared/data")
    env = searchqa(questions=DATA / "searchqa_hotpot_questions.jsonl", retriever=DATA / "searchqa_hotpot_corpus.jsonl")
    assert len(env) == 100
    titles = [set(json.loads(line)["gold_titles"]) for line in (DATA / "searchqa_hotpot_questions.jsonl").open()]
    found = 0
    for task in range(100):
        question, info = env.reset(0, task)
        assert info["task_type"] == "hotpotqa"
        observation = env.step(f"<search>{question}</search>")[0]
        found += any(f'"{title}"\n' in observation for title in titles[task])
    assert found >= 80
