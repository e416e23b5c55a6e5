"""Episodes whose environment failed are left out and counted; a run that loses most of them stops."""

import json

import pytest

from atod_fast import evaluate, train
from helpers.runs import read, run

FLAKY = """
from atod_fast.envs.alfworld.env import AlfWorld

class Flaky(AlfWorld):
    def __init__(self, *, failing=0, lasts=1000, **options):
        super().__init__(**options)
        self.failing = failing  # tenths of the tasks that fail
        self.left = [lasts]  # episodes until every task fails, counted by all clones together

    def reset(self, seed, task):
        self.left[0] -= 1
        if task % 10 < self.failing or self.left[0] < 0:
            raise ConnectionError("the retriever is down")
        return super().reset(seed, task)
"""


@pytest.fixture
def flaky(tmp_path, monkeypatch):
    """Settings of a world that fails as told, in training and in the ten held-out tasks."""
    (tmp_path / "flaky.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(tmp_path)

    def settings(training="failing=0", held_out="failing=0"):
        splits = f"env.train={{generate=200, seed=0, {training}}}", f"env.eval={{generate=10, seed=1, {held_out}}}"
        return ["env.name=flaky:Flaky", "eval.teacher=false", *splits]

    return settings


def test_trajectories_of_failed_environments_are_left_out_and_marked(tmp_path, flaky, caplog):
    settings = (
        flaky("failing=3", "failing=1"),
        "train.steps=1",
        "train.tasks_per_step=8",
        "train.group_size=2",
        "observe.trajectories_every=1",
    )
    lines = run(tmp_path / "some", *settings[0], *settings[1:])
    assert 0 < lines[1]["rollout/failed_environments"] <= 8
    assert lines[0]["eval/failed_environments"] == lines[1]["eval/failed_environments"] == 1
    records = [json.loads(line) for line in (tmp_path / "some/trajectories/step_000001.jsonl").read_text().splitlines()]
    failed = [record for record in records if record["failure"]]
    assert (
        len(records) == 16
        and len(failed) == lines[1]["rollout/failed_environments"]
        and all(r["turns"] == [] for r in failed)
    )
    assert all("weight" in turn for r in records if not r["failure"] for turn in r["turns"])
    assert caplog.text.count("the retriever is down") == 3, "once a rollout"


def test_a_step_most_of_which_is_lost_stops_the_run_and_loses_nothing_else(tmp_path, flaky, capsys):
    lost = [*flaky("lasts=11"), "train.steps=2"]
    run(tmp_path / "step", *lost, code=3)
    out, err = capsys.readouterr()
    assert (
        "step 2: 5 of 8 environments failed, first with: ConnectionError: the retriever is down (flaky.py:" in err
        and "; correct the environment or its options (env.*)" in err
    )
    assert "saved after step 1; go on with" in out and (tmp_path / "step/checkpoints/step_000001").is_dir()
    run(tmp_path / "tolerant", *lost, "guard.failed_environments=0.7")
    run(tmp_path / "all", *flaky("lasts=0"), "train.steps=1", "guard.failed_environments=1", code=3)
    assert "step 1: 8 of 8 environments failed" in capsys.readouterr().err


def test_an_evaluation_most_of_which_is_lost_stops_the_run_and_loses_nothing_else(tmp_path, flaky, capsys):
    run(tmp_path / "before", *flaky(held_out="failing=6"), "train.steps=1", code=3)
    assert "evaluating the student: 6 of 10 environments failed" in capsys.readouterr().err
    run(tmp_path / "after", *flaky(held_out="lasts=14"), "train.steps=2", code=3)
    assert "evaluating: 6 of 10 environments failed" in capsys.readouterr().err
    assert [line["step"] for line in read(tmp_path / "after")] == [0, 1, 2] and (
        tmp_path / "after/checkpoints/step_000002"
    ).is_dir()
    assert train.main(["--run-dir", str(tmp_path / "after"), "--resume", "auto"]) == 0, "the world is up again"
    assert (tmp_path / "after/hf/config.json").is_file()
    assert evaluate.main(["demo:student", *flaky(held_out="failing=6"), "eval.tasks=10"]) == 3
    assert "evaluating: 6 of 10 environments failed" in capsys.readouterr().err
    assert (
        evaluate.main(["demo:student", *flaky(held_out="failing=6"), "eval.tasks=10", "guard.failed_environments=0.6"])
        == 0
    )
