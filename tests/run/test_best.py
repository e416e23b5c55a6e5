"""Which checkpoints are kept: the best on the tasks that choose, and the newest."""

import json

import pytest

from atod_fast import cli, export, train
from atod_fast.errors import UserError
from atod_fast.policy import checkpoint
from atod_fast.run import Run
from helpers.runs import QUICK, checkpoints


def save(folder, learned, *steps, keep=2, best=None):
    for step in steps:
        checkpoint.save(folder, step, *learned, {}, keep=keep, best=best)


def test_the_oldest_checkpoints_by_number_go(tmp_path, learned):
    save(tmp_path, learned, 5, 999_998, 999_999, 1_000_000, 1_000_001)
    assert checkpoints(tmp_path) == [1_000_000, 1_000_001]
    assert (
        checkpoint.latest(tmp_path).name == "step_1000001"
        and checkpoint.latest(tmp_path, 1_000_000).name == "step_1000000"
    )


def test_the_best_checkpoint_stays_and_is_named(tmp_path, learned):
    assert checkpoint.best(tmp_path) is None
    save(tmp_path, learned, 1)
    save(tmp_path, learned, 2, 3, 4, 5, best=checkpoint.Best(2, 0.75))
    assert checkpoints(tmp_path) == [2, 4, 5] and checkpoint.best(tmp_path) == (2, 0.75)
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"step": 2, "dev/success": 0.75}
    save(tmp_path, learned, 6, best=checkpoint.Best(6, 0.8))
    assert checkpoints(tmp_path) == [5, 6] and checkpoint.best(tmp_path) == (6, 0.8)
    (tmp_path / "checkpoints/best.json").write_text('{"step": 5, "eval/success": 0.5}')
    assert checkpoint.best(tmp_path) == (5, 0.5), "of a run whose held-out tasks chose"


def scripted(monkeypatch, *successes):
    """Make evaluations on env.dev return these results, the first before training; on env.eval each result beats the
    last."""
    left, held_out = list(successes), iter(range(99))

    def evaluate(self, engine, label, split="eval"):
        return {f"{split}/success": left.pop(0) if split == "dev" else next(held_out) / 100}

    monkeypatch.setattr(Run, "evaluate", evaluate)


def test_a_teacher_that_never_succeeds_is_refused_with_the_tasks_it_played(tmp_path, monkeypatch, capsys):
    def evaluate(self, engine, label, split="eval", teacher=False):
        return {f"{split}/{'teacher_' * teacher}success": 0.0}

    monkeypatch.setattr(Run, "evaluate", evaluate)
    settings = ["schedule.kappa.kind=adaptive", "eval.teacher=true", "eval.every=1", "eval.tasks=10"]
    assert train.main([*QUICK, *settings, "--run-dir", str(tmp_path / "run")]) == 2
    assert "whose success is 0" in (error := capsys.readouterr().err) and "; it played 10 tasks of env.dev" in error


def test_the_step_of_the_best_success_on_dev_is_kept(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    settings = [
        *QUICK,
        "eval.every=1",
        "checkpoint.every=0",
        "checkpoint.keep=1",
        "checkpoint.keep_best=true",
        "--run-dir",
        str(folder),
    ]
    scripted(monkeypatch, 0.9, 0.2, 0.5, 0.5, 0.4)
    assert train.main([*settings, "train.steps=4"]) == 0
    assert checkpoints(folder) == [2, 4], "the first of equal ones, and the newest"
    out = capsys.readouterr().out
    kept = f"{folder}/checkpoints/step_000002"
    assert f"best success on env.dev 50.0% after step 2, kept in {kept}; before training it was 90.0%" in out
    assert "student before 0.0%, student after 4.0%" in out, "what is reported is held out still"
    assert export.main([str(folder), "--best", "--out", str(tmp_path / "best")]) == 0
    assert "step_000002" in capsys.readouterr().out

    scripted(monkeypatch, 0.5, 0.6)
    assert train.main([*settings, "train.steps=5", "--resume", "auto"]) == 0
    assert checkpoints(folder) == [2, 5], "0.5 is no better than what was known"
    assert train.main([*settings, "train.steps=6", "--resume", "auto"]) == 0
    assert checkpoints(folder) == [6] and checkpoint.best(folder) == (6, 0.6)


def test_without_keep_best_only_the_newest_are_kept(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, 0.1, 0.5, 0.4, 0.3)
    settings = "eval.every=1", "checkpoint.every=1", "checkpoint.keep=1", "train.steps=3"
    assert train.main([*QUICK, *settings, "--run-dir", str(tmp_path / "run")]) == 0
    assert checkpoints(tmp_path / "run") == [3] and not (tmp_path / "run/checkpoints/best.json").exists()
    assert "env.dev" not in capsys.readouterr().out


def test_the_best_needs_evaluations():
    with pytest.raises(
        UserError, match="checkpoint.keep_best=true follows the evaluations, which eval.every=0 turns off"
    ):
        cli.parse(["checkpoint.keep_best=true", "eval.every=0"])


def test_going_back_behind_the_best_forgets_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    settings = [*QUICK, "eval.every=1", "checkpoint.every=1", "checkpoint.keep=9", "checkpoint.keep_best=true"]
    scripted(monkeypatch, 0.1, 0.3, 0.2, 0.8)
    assert train.main([*settings, "train.steps=3", "--run-dir", str(folder)]) == 0
    scripted(monkeypatch, 0.25)
    assert train.main(["--resume", str(folder / "checkpoints/step_000002"), "--set-aside", "train.steps=3"]) == 0
    assert checkpoint.best(folder) == (1, 0.3)
    aside = folder / "set-aside-1"
    assert checkpoint.best(aside) == (3, 0.8)
    assert export.main([str(aside), "--best", "--out", str(tmp_path / "model")]) == 0, (
        "what is set aside is a run like others"
    )
