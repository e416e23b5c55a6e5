"""Runs with chat models that are not the demo's, in an environment that is not built in."""

from __future__ import annotations

import json
import tomllib
from datetime import date
from pathlib import Path

import pytest

from atod_fast import evaluate, train
from atod_fast.rollout import actor
from helpers.chat_models import SHORT, always_says, save_chat_model
from helpers.chat_tokenizers import tokenizer
from helpers.gloo import run_ranks


def run(folder: Path, student: str, teacher: str, *settings: str) -> int:
    return train.main(
        [*SHORT, f"student.path={student}", f"teacher.path={teacher}", *settings, "--run-dir", str(folder)]
    )


def turns(file: Path) -> list[dict]:
    return [turn for line in file.read_text().splitlines() for turn in json.loads(line)["turns"]]


@pytest.fixture
def models(tmp_path):
    return save_chat_model(tmp_path / "student"), save_chat_model(tmp_path / "teacher", seed=1)


def test_the_tokens_that_the_generation_config_names_end_a_response(tmp_path, models):
    words = tokenizer("qwen")
    student = save_chat_model(tmp_path / "own", tie_word_embeddings=False)
    end, text = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    always_says(student, text)
    for stops, length in (([end], 6), ([end, text], 1), (text, 1)):
        (Path(student) / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        folder = tmp_path / f"run{length}{stops}"
        assert run(folder, student, models[1]) == 0
        assert {len(turn["action"]) for turn in turns(folder / "trajectories" / "step_000001.jsonl")} == {length}


def test_a_task_that_begins_with_too_many_tokens_costs_itself_alone(tmp_path, models):
    folder = tmp_path / "run"
    settings = ["env.train={tasks=4, long=2}", "train.steps=2", "rollout.context=full", "rollout.prompt_tokens=600"]
    assert run(folder, *models, *settings) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["rollout/failed_environments"] for line in lines[1:]) == [0, 2]


def test_a_run_keeps_its_date(tmp_path, models, monkeypatch):
    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date(2031, 1, 2)

    file = tmp_path / "my.toml"
    file.write_text("")
    folder = tmp_path / "run"
    arguments = [str(file), *SHORT, f"student.path={models[0]}", f"teacher.path={models[1]}", "--run-dir", str(folder)]
    assert train.main(arguments) == 0
    today = tomllib.loads((folder / "config.toml").read_text())["rollout"]["date"]
    assert date.fromisoformat(today).year < 2031
    monkeypatch.setattr(actor, "date", Tomorrow)
    assert train.main([*arguments, "train.steps=2", "--resume", "auto"]) == 0
    assert tomllib.loads((folder / "config.toml").read_text())["rollout"]["date"] == today
    assert run(tmp_path / "other", *models) == 0
    assert tomllib.loads((tmp_path / "other" / "config.toml").read_text())["rollout"]["date"] == "2031-01-02"


def test_a_tokenizer_may_have_more_tokens_than_the_head_columns(tmp_path, capsys):
    columns = len(tokenizer("qwen")) - 1
    student = save_chat_model(tmp_path / "student", columns=columns)
    teacher = save_chat_model(tmp_path / "teacher", columns=columns, seed=1)
    assert run(tmp_path / "run", student, teacher) == 0
    assert evaluate.main([student, *SHORT]) == 0
    assert all(
        i < columns for turn in turns(tmp_path / "run" / "trajectories" / "step_000001.jsonl") for i in turn["action"]
    )


def test_an_evaluation_by_two_ranks_is_the_evaluation_by_one(tmp_path):
    """Transcripts and the summary are written by the first rank, in task order."""
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        arguments = [
            "demo:student",
            "eval.tasks=10",
            "--out",
            str(out),
            "--transcripts",
            str(tmp_path / f"{world}.jsonl"),
        ]
        assert run_ranks(world, evaluate.main, arguments) == [0] * world
        found.append(json.loads(out.read_text()))
        assert len((tmp_path / f"{world}.jsonl").read_text().splitlines()) == 10
    assert found[0] == found[1]


def test_what_fails_on_one_rank_stops_an_evaluation_on_both(tmp_path, monkeypatch):
    settings = [
        *SHORT,
        "env.name=helpers.worlds:Rooms",
        "env.train={tasks=20}",
        "rollout.prompt_tokens=8",
        "rollout.response_tokens=2",
    ]
    model = save_chat_model(tmp_path / "model")
    assert run_ranks(2, evaluate.main, [model, *settings]) == [3, 3]  # no first prompt fits


@pytest.mark.parametrize(
    ("option", "path"), [("--out", "/proc/no/file.json"), ("--transcripts", "/proc/file.jsonl"), ("--out", ".")]
)
def test_a_file_that_cannot_be_written_is_said_before_episodes_are_played(option, path, capsys):
    assert evaluate.main(["demo:student", "eval.tasks=1", option, path]) == 2
    assert f"atod_fast: {option} {path}: " in capsys.readouterr().err


def test_two_outputs_of_an_evaluation_are_two_files(tmp_path, capsys):
    file = str(tmp_path / "a.json")
    assert evaluate.main(["demo:student", "eval.tasks=1", "--out", file, "--transcripts", file]) == 2
    assert "give two files" in capsys.readouterr().err
