"""Reward alone: no teacher where no step of the schedule looks at one."""

import pytest
from transformers import AutoTokenizer

from atod_fast import train
from atod_fast.models import resolve
from atod_fast.policy import learner
from helpers.runs import run, untimed

GRPO = "objective.preset=grpo"


def without_teacher(lines):
    return [
        {key: value for key, value in line.items() if not key.startswith("eval/teacher_")} for line in untimed(lines)
    ]


def test_a_run_without_a_teacher_is_the_run_whose_teacher_only_plays(tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "LocalTeacher", lambda *_: pytest.fail("loaded"))
    named = run(tmp_path / "named", "train.steps=2", GRPO)
    assert named[0]["eval/teacher_success"] > 0
    unnamed = run(tmp_path / "unnamed", "train.steps=2", GRPO, "teacher.path=")
    assert untimed(unnamed) == without_teacher(named) and "eval/teacher_success" not in unnamed[0]
    assert unnamed[1]["turns/disagreement"] is None and unnamed[1]["policy/gradient_norm"] > 0
    assert not list((tmp_path / "unnamed").glob("trajectories/*teacher*"))
    resumed = run(tmp_path / "unnamed", "train.steps=3", "--resume", "auto")
    assert [line["step"] for line in resumed] == [0, 1, 2, 3]


def test_a_teacher_is_compared_only_where_it_is_used(tmp_path, capfd):
    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:webshop/teacher"))
    tokenizer.save_pretrained(tmp_path / "teacher")
    settings = "train.steps=1", "eval.tasks=2", GRPO, f"teacher.path={tmp_path / 'teacher'}"
    run(tmp_path / "unused", *settings, "eval.teacher=false")
    (tmp_path / "teacher" / "config.json").write_bytes(open(f"{resolve('demo:teacher')}/config.json", "rb").read())
    run(tmp_path / "plays", *settings, code=2)
    assert "different tokenizers" in capfd.readouterr().err


def test_whatever_the_turns_ask_for_nothing_of_a_teacher_is_missed(tmp_path):
    exact = "turns.disagreement=exact", "turns.uncertainty=exact", "objective.divergence=jsd"
    loose = "turns.min_disagreement=0", "turns.fuse=softor", "turns.scope=batch", "turns.budget=mean1"
    lines = run(tmp_path, "train.steps=1", "teacher.path=", GRPO, *exact, *loose)
    assert (
        lines[1]["loss/imitation_size"] == 0
        and lines[1]["policy/gradient_norm"] > 0
        and lines[1]["turns/uncertainty"] > 0
    )


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["objective.preset=opd"],
        ["objective.preset=sequential"],
        [GRPO, "schedule.kappa.kind=linear", "schedule.kappa.end=0.1"],
        [GRPO, "schedule.kappa.kind=adaptive"],
    ],
)
def test_a_schedule_that_looks_at_a_teacher_refuses_to_go_without(capsys, settings):
    assert train.main(["teacher.path=", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert 'teacher.path=""' in line
