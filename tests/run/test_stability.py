"""Whole runs with the switches for stability: skipped updates, dynamic sampling, and both with ranks and resumption."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from atod_fast import train
from atod_fast.policy.learner import Learner
from atod_fast.run import Run
from helpers.gloo import run_ranks
from helpers.runs import read, untimed

QUICK = [
    "train.tasks_per_step=4",
    "train.group_size=2",
    "train.minibatch_rows=4",
    "eval.tasks=4",
    "eval.every=0",
    "eval.teacher=false",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "observe.trajectories_every=1",
]


def run(folder, *settings, code=0):
    assert train.main([*QUICK, *settings, "--run-dir", str(folder)]) == code
    return untimed(read(folder))


def back_to(folder, step, new):
    """Copy a run's folder as it was after `step`."""
    shutil.copytree(folder, new)
    shutil.rmtree(new / "hf")
    for path in (new / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return new


@pytest.fixture
def poisoned(monkeypatch):
    """In step 2 both updates, in step 3 the first one have a loss that is not finite."""
    at, roll_out, update = [], Run.roll_out, Learner.update

    def watched(self, step):
        at.append(step)
        return roll_out(self, step)

    def bad(self, minibatches, streams, learning_rate):
        assert len(minibatches) == 2
        which = {2: (0, 1), 3: (0,)}.get(at[-1], ())
        streams = [
            [replace(s, weight=s.weight * (float("nan") if n in which else 1)) for s in part]
            for n, part in enumerate(streams)
        ]
        return update(self, minibatches, streams, learning_rate)

    monkeypatch.setattr(Run, "roll_out", watched)
    monkeypatch.setattr(Learner, "update", bad)


def test_skipped_updates_are_counted_over_steps_and_over_a_resumed_run(poisoned, tmp_path, capfd):
    lines = run(tmp_path / "run", "train.steps=4")
    assert [line.get("policy/skipped_updates") for line in lines] == [None, 0, 2, 1, 0]
    assert lines[2]["loss/total"] is None and lines[3]["loss/total"] is not None
    out = capfd.readouterr().out
    assert "warning: step 2: 2 updates skipped, whose gradient was not finite" in out and "step 4: " not in out
    counts = {}
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        counts[path.name] = json.loads((path / "state.json").read_text())["skipped"]
    assert counts == {"step_000001": 0, "step_000002": 2, "step_000003": 0, "step_000004": 0}

    again = back_to(tmp_path / "run", 2, tmp_path / "again")
    assert run(again, "train.steps=4", "--resume", "auto") == lines
    strict = back_to(tmp_path / "run", 2, tmp_path / "strict")
    run(strict, "train.steps=4", "guard.skipped_updates=2", "--resume", "auto", code=3)
    error = capfd.readouterr()
    assert "in update 1 of the step: the loss is not finite" in error.err and "nor were the 2 before it" in error.err
    assert "saved after step 2" in error.out


def test_a_run_that_stops_does_not_save_the_row_of_the_step_that_is_lost(poisoned, tmp_path, capfd):
    """The guard stops step 2 at its second update; a resumed run begins step 2, and its row, anew."""
    run(tmp_path / "run", "train.steps=4", "guard.skipped_updates=1", code=3)
    assert "saved after step 1" in capfd.readouterr().out
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_000001" / "state.json").read_text())
    assert (state["step"], state["skipped"]) == (1, 0)
    lines = run(tmp_path / "run", "train.steps=3", "guard.skipped_updates=3", "--resume", "auto")
    assert [line.get("policy/skipped_updates") for line in lines] == [None, 0, 2, 1]


SAMPLED = ["train.resample_flat=2", "train.steps=2", "env.train={generate=40, seed=0}"]


def played(folder, step):
    """Return (task, group, member, commands, reward) of a step's trajectories."""
    lines = (folder / "trajectories" / f"step_{step:06d}.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(t["task"], t["group"], t["member"], [u["command"] for u in t["turns"]], t["reward"]) for t in found]


def flat(trajectories):
    rewards = {}
    for _, group, _, _, reward in trajectories:
        rewards.setdefault(group, set()).add(reward)
    return {group for group, values in rewards.items() if len(values) == 1}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "run"
    return folder, run(folder, *SAMPLED)


def test_flat_groups_give_way_in_a_run(sampled, tmp_path):
    folder, lines = sampled
    run(tmp_path / "plain", *[setting for setting in SAMPLED if "resample" not in setting])
    before, after = played(tmp_path / "plain", 1), played(folder, 1)
    changed = {group for _, group in tasks_of(after) - tasks_of(before)}
    assert changed and changed <= flat(before), "only flat groups give way"
    assert not changed & flat(after), "and to groups that are not flat"
    assert [t for t in after if t[1] not in changed] == [t for t in before if t[1] not in changed]
    assert lines[1]["rollout/replaced_groups"] == len(changed)
    assert lines[1]["rollout/extra_groups"] >= len(flat(before))
    assert lines[1]["turns/flat_groups"] == len(flat(after)) / 4
    for step in (1, 2):
        assert [t[1:3] for t in played(folder, step)] == [(group, member) for group in range(4) for member in range(2)]


def tasks_of(trajectories):
    return {(task, group) for task, group, *_ in trajectories}


def on_ranks(folder):
    return train.main([*QUICK, *SAMPLED, "train.steps=1", "--run-dir", str(folder)])


def test_ranks_and_resumption_make_no_difference_to_what_is_sampled(sampled, tmp_path):
    folder, lines = sampled
    assert run_ranks(2, on_ranks, tmp_path / "two") == [0, 0]
    assert played(tmp_path / "two", 1) == played(folder, 1)
    again = back_to(folder, 1, tmp_path / "again")
    assert run(again, *SAMPLED, "--resume", "auto") == lines
    assert played(again, 2) == played(folder, 2)


def test_turns_that_are_left_out_are_counted(tmp_path):
    """At a bound of rounding's size some turns are left out by chance."""
    lines = run(tmp_path / "run", "objective.mismatch_mask=1.00000002", "train.steps=1")
    assert 0 < lines[1]["turns/masked"] < 1
    assert "turns/masked" not in run(tmp_path / "off", "train.steps=1")[1]


def test_switches_together_learn_on_any_number_of_ranks(tmp_path):
    settings = [
        "objective.ratio=sequence",
        "objective.clip=0.001",
        "objective.clip_high=0.002",
        "train.resample_flat=1",
        "train.steps=1",
    ]
    one = run(tmp_path / "one", *settings)
    assert run_ranks(2, on_ranks_with, tmp_path / "two", settings) == [0, 0]
    two = read(tmp_path / "two")
    for key in ("loss/total", "policy/gradient_norm", "policy/clip_fraction", "turns/flat_groups"):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-3, abs=1e-5), key
    assert one[1]["policy/clip_fraction"] > 0 and one[1]["rollout/extra_groups"] > 0


def on_ranks_with(folder, settings):
    return train.main([*QUICK, *settings, "--run-dir", str(folder)])
