"""What ends a run early: what is saved, what is said, and who waits for whom."""

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from atod_fast import export, ranks, train
from atod_fast.config import Config
from atod_fast.errors import RankLost, Unexpected, UserError
from atod_fast.policy import checkpoint
from atod_fast.policy.learner import Learner
from atod_fast.reporting import Reporter
from atod_fast.rollout.actor import Actor
from atod_fast.rollout.duration import limit
from helpers.gloo import run_ranks
from helpers.runs import QUICK, checkpoints, failing, read, run, torchrun

# What ends a run early


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("rollout.prompt_tokens=8: too few"), 2, "atod_fast: rollout.prompt_tokens=8: too few"),
        (KeyError("colour"), 1, "atod_fast: KeyError: 'colour'"),
    ],
    ids=["user's", "bug"],
)
def test_whatever_stops_a_rollout_is_saved_before(tmp_path, monkeypatch, capfd, error, code, said):
    folder = tmp_path / "run"
    failing(monkeypatch, error)
    assert train.main([*QUICK, "train.steps=3", "--run-dir", str(folder)]) == code
    out, err = capfd.readouterr()
    assert err.splitlines()[-1] == said and ("Traceback" in err) == (code == 1)
    last = (
        f"saved after step 1; go on with --run-dir {folder} --resume auto; for a model of it: "
        f"python -m atod_fast.export {folder} --out DIR"
    )
    assert out.splitlines()[-1] == last
    assert checkpoints(folder) == [1] and (folder / "curves.png").stat().st_size > 10_000
    monkeypatch.undo()
    assert [line["step"] for line in run(folder, "--resume", "auto", "train.steps=2")] == [0, 1, 2]


def test_a_stopped_evaluation_loses_itself_only(tmp_path, monkeypatch, capfd):
    real, calls = Actor.evaluate, []

    def evaluate(self, engine, split, progress=None):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("the disk is gone")
        return real(self, engine, split, progress)

    monkeypatch.setattr(Actor, "evaluate", evaluate)
    assert train.main([*QUICK, "train.steps=2", "eval.every=1", "--run-dir", str(tmp_path / "run")]) == 1
    assert "atod_fast: OSError: the disk is gone" in capfd.readouterr().err
    assert [line["step"] for line in read(tmp_path / "run")] == [0, 1] and checkpoints(tmp_path / "run") == [1]


@pytest.mark.parametrize(("minibatch", "kept"), [(1, [1]), (2, [])], ids=["before the update", "in its midst"])
def test_half_an_update_is_not_saved_as_a_step(tmp_path, monkeypatch, capfd, minibatch, kept):
    real = Learner.update

    def poisoned(self, minibatches, streams, learning_rate):
        if self.updates:
            part = streams[minibatch - 1]
            streams[minibatch - 1] = [replace(stream, weight=stream.weight * float("nan")) for stream in part]
        return real(self, minibatches, streams, learning_rate)

    monkeypatch.setattr(Learner, "update", poisoned)
    assert train.main([*QUICK, "train.steps=3", "guard.skipped_updates=0", "--run-dir", str(tmp_path / "run")]) == 3
    out = capfd.readouterr().out.splitlines()[-1]
    assert checkpoints(tmp_path / "run") == kept
    assert out.startswith(
        "saved after step 1; go on"
        if kept
        else "stopped after step 1; step 2's update was only half done and is discarded; "
    )
    assert out.endswith("--out DIR") if kept else out.endswith("there is no checkpoint")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stands(tmp_path, monkeypatch, capfd):
    real, folder = checkpoint.dcp.save, tmp_path / "run"

    def save(state, checkpoint_id, **options):
        if "step_000002" in str(checkpoint_id):
            raise checkpoint.dcp.api.CheckpointException("failed", {0: (OSError("no space left"), None)})
        return real(state, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    assert train.main([*QUICK, "train.steps=3", "checkpoint.every=1", "--run-dir", str(folder)]) == 3
    out, err = capfd.readouterr()
    assert (
        f"atod_fast: {folder}/checkpoints/step_000002 could not be written (rank 0: OSError: no space left)" in err
        and "Traceback" not in err
    )
    assert "the last checkpoint is of step 1; go on with" in out and checkpoint.latest(folder).name == "step_000001"


def on_one_rank(folder, phase, alone):
    """Train on two ranks, of which the second or both fail in a phase of step 2."""
    ranks.STOPPING = timedelta(seconds=2)
    wrong = ranks.rank() == 1 or not alone
    owner, name = {"rollout": (Actor, "train"), "score": (Learner, "score_student"), "write": (Reporter, "write")}[
        phase
    ]
    real, calls = getattr(owner, name), []

    def fails(self, *arguments, **options):
        calls.append(1)
        if len(calls) == (3 if phase == "write" else 2) and wrong:
            raise RuntimeError("out of luck")
        return real(self, *arguments, **options)

    setattr(owner, name, fails)
    return train.main([*QUICK, "train.steps=3", "--run-dir", str(folder)])


@pytest.mark.parametrize(
    ("phase", "alone", "codes", "kept"),
    [
        ("rollout", True, [1, 1], [1]),
        ("write", True, [1, 1], [2]),
        ("score", False, [1, 1], [1]),
        ("score", True, [3, 1], []),
    ],
    ids=["a rollout's", "a file's", "all ranks'", "one in the midst of a collective"],
)
def test_ranks_save_together_where_they_can_and_wait_for_nobody(tmp_path, phase, alone, codes, kept):
    start = time.monotonic()
    assert run_ranks(2, on_one_rank, tmp_path / "run", phase, alone) == codes
    assert checkpoints(tmp_path / "run") == kept and time.monotonic() - start < 60


# Waiting for other ranks


def wait_in_vain(late):
    ranks.start()
    ranks.be_patient(1.0)
    ranks.doing("rollout of step 3")
    ranks.wait()  # all are here
    if ranks.rank() == late:
        time.sleep(3)
        return None
    ranks.STOPPING = timedelta(0)
    with pytest.raises(RankLost) as caught:
        ranks.wait()
    return str(caught.value)


def test_the_rank_that_does_not_come_is_named_with_what_is_done():
    lines = run_ranks(3, wait_in_vain, 1)
    assert re.sub(r"0\.0\d+", "0.02", lines[0]) == (
        "rank 0 waited 0.02 min for rank 1 in 'rollout of step 3': see what holds it up there, "
        "or raise guard.wait_minutes"
    )
    assert lines[2] == "rank 0 is gone (seen by rank 2 in 'rollout of step 3'); what it last said tells why"


def test_a_legal_rollout_is_waited_for():
    world = {"max_turns": 50, "step_timeout": 60.0, "workers": 8}
    many = Config.model_validate({"env": world, "rollout": {"response_tokens": 10}, "eval": {"tasks": 1}})
    # 64 trajectories on one engine: four waves of 16, two to a thread, 51 calls each, and 50 turns of ten tokens.
    assert limit(many, 1, 16, instant=False) == 4 * (51 * 2 * 60 + 500)
    assert limit(many, 4, 16, instant=False) == 51 * 2 * 60 + 500
    assert limit(many, 4, 16, instant=True) == 1800, "half an hour at least"
    held_out = many.model_copy(update={"eval": many.eval.model_copy(update={"tasks": 640})})
    assert limit(held_out, 1, 16, instant=False) == 10 * limit(many, 1, 16, instant=False)
    assert (
        limit(
            many.model_copy(update={"guard": many.guard.model_copy(update={"wait_minutes": 5.0})}), 1, 16, instant=False
        )
        == 300
    )


def test_errors_that_are_none_of_ours_end_in_a_line(capfd):
    assert str(ranks.understood(ValueError("a\nb"))) == "ValueError: a" and "Traceback" not in capfd.readouterr().out
    assert isinstance(ranks.understood(ValueError()), Unexpected)
    timed_out = RuntimeError("[third_party/gloo/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv")
    closed = RuntimeError("[third_party/gloo/pair.cc:553] Connection closed by peer")
    ranks.doing("train of step 4")
    assert str(ranks.understood(timed_out)) == "rank 0 waited in vain for another rank in 'train of step 4'"
    assert "another rank is gone" in str(ranks.understood(closed)) and isinstance(ranks.understood(closed), RankLost)


# The last line


def test_ctrl_c_under_torchrun_ends_with_our_line(tmp_path):
    folder = tmp_path / "run"
    command = torchrun(2, *QUICK, "train.steps=500")
    process = subprocess.Popen(
        [*command, "--run-dir", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    (step,) = checkpoints(folder)
    assert output.splitlines()[-1].startswith(
        f"interrupted after step {step}; go on with --run-dir {folder} --resume auto; "
    )
    assert output.count(f"interrupted after step {step};") == 2, "once when it is so, once below torchrun's report"
    assert "KeyboardInterrupt" not in output and (folder / "curves.png").is_file()
    assert (
        export.main([str(folder), "--out", str(tmp_path / "model")]) == 0
        and (tmp_path / "model/model.safetensors").is_file()
    )
