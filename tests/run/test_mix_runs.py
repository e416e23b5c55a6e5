"""Training and evaluating on a mix of environments: the page's example, environments of one's own, several ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atod_fast import evaluate, train
from helpers.chat_models import SHORT, save_chat_model
from helpers.gloo import run_ranks
from helpers.guess import BLOCKS

OWN = [
    *SHORT,
    "env.name=mix",
    "env.options.parts={rooms={name='helpers.worlds:Rooms', weight=2}, halls={name='helpers.worlds:Halls'}}",
    "env.train={rooms={tasks=30}, halls={tasks=10}}",
    "env.eval={rooms={tasks=20}, halls={tasks=8}}",
    "eval.tasks=6",
    "train.tasks_per_step=6",
]
SMALL = """rollout.prompt_tokens=700 rollout.response_tokens=6 rollout.concurrency=8 eval.tasks=6 eval.teacher=false
eval.every=0 train.steps=1 train.tasks_per_step=6 train.group_size=2 train.minibatch_rows=0 checkpoint.every=0
observe.trajectories_every=1 env.max_turns=3 env.options.parts.wiki.max_turns=2""".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Settings of a student and a teacher, both tiny chat models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    return [
        f"{role}.path={save_chat_model(folder / role, seed=seed)}" for seed, role in enumerate(("student", "teacher"))
    ]


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_page_s_mix_trains_and_evaluates(tmp_path, models, monkeypatch, capsys):
    pytest.importorskip("bm25s")
    (tmp_path / "mix.toml").write_text(next(block for block in BLOCKS["toml"] if "mix.toml" in block))
    monkeypatch.chdir(tmp_path)
    assert train.main(["mix.toml", "--preset", "own", *SMALL, *models, "--run-dir", "run"]) == 0
    before, after = records(Path("run/metrics.jsonl"))
    parts = {"alfworld", "wiki"}
    assert {key.removeprefix("eval/success/") for key in before if key.startswith("eval/success/")} >= parts
    assert any(key.startswith("eval/success/alfworld/") for key in before)
    assert {f"train/success/{part}" for part in parts} == {key for key in after if key.startswith("train/success/")}
    assert after["rollout/failed_environments"] == 0 and after["policy/gradient_norm"] > 0
    played = records(Path("run/trajectories/eval_000000.jsonl"))
    kinds = [record["task_type"].partition("/")[0] for record in played]
    assert (kinds.count("alfworld"), kinds.count("wiki")) == (4, 2), "by weights of 2 and 1"
    for record, kind in zip(played, kinds, strict=True):
        assert len(record["turns"]) == {"alfworld": 3, "wiki": 2}[kind] and record["truncated"]
        for turn in record["turns"]:
            assert ("ALFRED" in turn["prompt"]) == (kind == "alfworld") and ("<search>" in turn["prompt"]) != (
                kind == "alfworld"
            )
    out = ["--config", "run/config.toml", "--out", "out.json"]
    capsys.readouterr()
    assert evaluate.main(["run/hf", *out]) == 0
    summary, text = json.loads(Path("out.json").read_text()), capsys.readouterr().out
    assert summary["success_by_part"].keys() == parts
    assert all(f"  {name}: {rate:.1%}\n" in text for name, rate in summary["success_by_part"].items())
    assert all(f"  {name}: {rate:.1%}\n" in text for name, rate in summary["success_by_type"].items())


def play(folder: str, settings: list[str]) -> int:
    return train.main([*settings, "--run-dir", folder])


def test_one_rank_and_two_play_the_same_mix(tmp_path, models):
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        assert run_ranks(world, play, str(folder), [*OWN, *models, "rollout.context=full"]) == [0] * world
        before, after = records(folder / "metrics.jsonl")
        step = records(folder / "trajectories/step_000001.jsonl")
        said = [(r["task"], r["task_type"], [(t["action"], t["command"]) for t in r["turns"]]) for r in step]
        counts = {key: value for key, value in (before | after).items() if "/success" in key or "turns" in key}
        found.append((said, counts))
    assert found[0] == found[1]
    said, counts = found[0]
    assert {kind for _, kind, _ in said} == {"rooms/walk", "halls/walk"} and len(said) == 12
    for split, file in (("train", "step_000001"), ("eval", "eval_000000")):
        played = records(folder / f"trajectories/{file}.jsonl")
        for part in ("rooms", "halls"):
            won = [record["success"] for record in played if record["task_type"] == f"{part}/walk"]
            assert counts[f"{split}/success/{part}"] == pytest.approx(sum(won) / len(won))
    assert 0 < counts["eval/success"] < 1 and {"eval/success/rooms/walk", "eval/success/halls/walk"} < counts.keys()
    shown = {r["task_type"]: r["turns"][0]["prompt"] for r in step}
    assert "Say something." in shown["rooms/walk"] and "Say something." not in shown["halls/walk"]
    commands = {r["task_type"]: r["turns"][0]["command"] for r in step}
    assert commands["halls/walk"].startswith("[") and not commands["rooms/walk"].startswith("[")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("env.options.parts.rooms.weight=-1", "env.options.parts.rooms.weight=-1 must be a number of at least 0"),
        ("env.options.parts={halls={name='helpers.worlds:Halls'}}", "env.name='mix' has no part 'rooms'"),
        ("eval.tasks=25", "eval.tasks=25: the share of env.options.parts.halls is 8 tasks, and it has 6"),
    ],
)
def test_a_wrong_mix_is_one_line_before_the_run_begins(tmp_path, models, setting, line, capsys):
    settings = [*OWN, "env.eval.halls.tasks=6", *models, setting]
    for arguments in (["--dry-run"], ["--run-dir", str(tmp_path / "run")]):
        assert train.main([*settings, *arguments]) == 2
        told = capsys.readouterr().err
        assert line in told and "Traceback" not in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
