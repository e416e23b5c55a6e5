"""Run folders: who writes to one, where a checkpoint belongs, and damage."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from atod_fast import cli, export, files, lock, ranks, rundir, train
from atod_fast.errors import GuardError, RankLost, UserError
from atod_fast.observe import provenance
from atod_fast.policy import checkpoint
from atod_fast.run import Run
from helpers.runs import QUICK, checkpoints, choose, failing, tree


def pretend(run_dir, step=3, before=None, **state):
    """Make a run with a checkpoint that holds nothing but its state.json."""
    path = checkpoint.folder(run_dir, step)
    path.mkdir(parents=True)
    (path / "state.json").write_text(
        json.dumps({"step": step, "before": before or {"eval/success": 0.5}, "adaptive": None} | state)
    )
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    (run_dir / "config.toml").write_text('[student]\npath = "demo:student"\n')
    return path


def refused(capsys, *argv, main=train.main):
    """Return the one line with which a command is refused."""
    assert main([*map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def run_dir(tmp_path):
    pretend(tmp_path / "run")
    return tmp_path / "run"


# One writer


def test_a_folder_has_one_holder(tmp_path):
    release = lock.hold(tmp_path)
    with pytest.raises(
        UserError, match=f"{tmp_path} is being written by another process; wait for it, or give another --run-dir"
    ):
        lock.hold(tmp_path)
    release()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".lock").touch()  # of a process that was killed
    lock.hold(tmp_path)()


def test_a_lock_taken_away_while_it_is_asked_for_is_none(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(file, how):
        calls.append(1)
        real(file, how)
        if len(calls) == 1:  # its holder ended between the opening and this
            (tmp_path / ".lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    release = lock.hold(tmp_path)
    with pytest.raises(UserError, match="another process"):
        lock.hold(tmp_path)
    release()


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock.hold(tmp_path)()


def test_a_run_that_is_alive_is_not_resumed(run_dir, capsys):
    release = lock.hold(run_dir)
    before = tree(run_dir)
    assert "is being written by another process" in refused(capsys, "--resume", "auto", "--run-dir", run_dir)
    assert tree(run_dir) == before
    release()


def test_two_runs_of_one_name_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real, stale = rundir.choose, [rundir.Place(Path("runs/demo"), None)] * 2
    # Both look before either has made its folder.
    monkeypatch.setattr(rundir, "choose", lambda options: stale.pop() if stale else real(options))
    ranks.start()
    try:
        assert [str(rundir.agree(cli.parse([])).run_dir) for _ in range(2)] == ["runs/demo", "runs/demo-2"]
    finally:
        ranks.stop()
    assert not list(tmp_path.rglob("*")), "runs that wrote nothing leave nothing"


def test_a_dry_run_claims_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--dry-run"]) == 0 and not list(tmp_path.iterdir())


def test_any_name_of_a_settings_file_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my[1].toml").touch()
    Path("runs/my[1]").mkdir(parents=True)
    assert str(choose("my[1].toml").run_dir) == "runs/my[1]-2"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_run_folder_that_cannot_be_one_is_refused_first(tmp_path, capsys, below):
    (tmp_path / "file").touch()
    line = refused(capsys, "--run-dir", tmp_path / "file" / below, "--dry-run")
    assert line.endswith("file is not a folder; give another") and "--run-dir" in line


def test_a_folder_without_permission_is_refused_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: False)
    assert f"{tmp_path} cannot be written to" in refused(capsys, "--run-dir", tmp_path / "run", "--dry-run")


# Where a checkpoint belongs


def test_a_checkpoint_named_from_inside_its_folder_is_the_runs(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir / "checkpoints")
    assert choose("--resume", "step_000003", "train.steps=4").run_dir == run_dir
    monkeypatch.chdir(run_dir / "checkpoints/step_000003")
    assert choose("--resume", ".", "train.steps=4").run_dir == run_dir
    assert choose("--resume", "../step_000003", "train.steps=4").run_dir == run_dir
    monkeypatch.chdir(run_dir)
    assert choose("--resume", "checkpoints/step_000003", "train.steps=4") == (
        Path("."),
        Path("checkpoints/step_000003"),
        False,
    ), "as it was given"


def test_a_checkpoint_named_from_inside_its_folder_is_exported_with_its_runs_settings(three, tmp_path, monkeypatch):
    monkeypatch.chdir(three / "checkpoints")
    assert export.main(["step_000003", "--out", str(tmp_path / "model")]) == 0
    assert tree(tmp_path / "model") == tree(three / "hf")


def test_a_checkpoint_that_was_copied_elsewhere_needs_a_run_folder(run_dir, tmp_path, capsys):
    copied = shutil.copytree(run_dir / "checkpoints/step_000003", tmp_path / "backup/deep/step_000003")
    line = refused(capsys, "--resume", copied, "train.steps=4", "--dry-run")
    assert line == (
        f"atod_fast: --resume {copied} lies in no run's checkpoints/; "
        f"add --run-dir NEW for the run that goes on from it"
    )
    assert choose("--resume", copied, "--run-dir", tmp_path / "new", "train.steps=4") == (
        tmp_path / "new",
        copied,
        False,
    )
    assert "--student" in refused(capsys, copied, "--out", tmp_path / "model", main=export.main)


def test_files_of_others_are_not_set_aside(run_dir):
    ours = [
        "step_000004.jsonl",
        "eval_000004.jsonl",
        "eval_000004_teacher.jsonl",
        "dev_000004.jsonl",
        "step_000005.unfinished",
    ]
    others = ["20260101_notes.txt", "step_000004.txt", "mystep_000004.jsonl", "step_000003.jsonl"]
    (run_dir / "trajectories").mkdir()
    for name in [*ours, *others]:
        (run_dir / "trajectories" / name).touch()
    for name in ("download.partial", "step_000004.partial"):
        (run_dir / "checkpoints" / name).touch()
    aside = rundir.set_aside(run_dir, 3, "")
    assert sorted(os.listdir(aside / "trajectories")) == sorted(ours) and sorted(
        os.listdir(run_dir / "trajectories")
    ) == sorted(others)
    assert os.listdir(aside / "checkpoints") == ["step_000004.partial"]
    assert rundir.contents(aside, 3) == "files of later steps, the previous config.toml"
    assert rundir.contents(aside, -1) == "what a run without a checkpoint left, the previous config.toml"


# Refused before anything is changed


@pytest.mark.parametrize("mode", [[], ["--dry-run"]])
def test_adaptive_kappa_asks_for_the_evaluations_of_the_run_first(run_dir, capsys, mode):
    before = tree(run_dir)
    settings = "schedule.kappa.kind=adaptive", "eval.every=1", "train.steps=4"
    assert "did not measure its teacher on env.dev" in refused(
        capsys, "--resume", "auto", "--run-dir", run_dir, *settings, *mode
    )
    assert tree(run_dir) == before


@pytest.mark.parametrize("text", ["", "[train]\nsteps = 3\n", "student = 3\n"])
def test_settings_of_a_run_that_name_no_student_are_refused(run_dir, capsys, text):
    (run_dir / "config.toml").write_text(text)
    assert f"{run_dir}/config.toml is empty or damaged" in refused(
        capsys, "--resume", run_dir, "train.steps=4", "--dry-run"
    )
    assert choose("--resume", run_dir, "--preset", "demo").resume


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x", "before": {}}', '{"step": 3}'])
def test_a_damaged_state_is_one_line(run_dir, tmp_path, capsys, text):
    path = checkpoint.folder(run_dir, 3)
    (path / "state.json").write_text(text)
    for line in (
        refused(capsys, "--resume", run_dir, "train.steps=4", "--dry-run"),
        refused(capsys, run_dir, "--out", tmp_path / "m", main=export.main),
    ):
        assert f"{path} is no whole checkpoint (state.json is missing or damaged)" in line


@pytest.mark.parametrize("text", ["", "[1]", "{}"])
def test_a_damaged_best_is_one_line_and_nothing_is_moved(run_dir, tmp_path, capsys, text):
    (run_dir / "checkpoints/best.json").write_text(text)
    before = tree(run_dir)
    assert "best.json is damaged" in refused(capsys, run_dir, "--best", "--out", tmp_path / "model", main=export.main)
    with pytest.raises(UserError, match="best.json is damaged"):
        rundir.set_aside(run_dir, 2, "")
    assert tree(run_dir) == before


def opened(run_dir, done=2):
    """Open the folder of a run that resumes from step `done`."""
    rundir.open_folder(
        run_dir, cli.parse([]).config, done, "command", torch.device("cpu"), from_step=done, say=lambda line: None
    )


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_history_is_one_line_and_nothing_is_moved(run_dir, text):
    (run_dir / "environment.json").write_text(text)
    before = tree(run_dir)
    with pytest.raises(UserError, match=r"environment.json is damaged"):
        opened(run_dir)
    assert tree(run_dir) == before


def test_a_folder_that_cannot_be_written_is_a_line(run_dir, monkeypatch):
    def record(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(provenance, "record", record)
    with pytest.raises(UserError, match=r"--run-dir .*run cannot be written \(OSError: .*No space left"):
        opened(run_dir)


@pytest.mark.parametrize("damage", ["weights cut off", "metadata cut off", "another program's"])
def test_a_damaged_checkpoint_is_one_line_with_the_reason(tmp_path, capfd, damage):
    path, weights = tmp_path / "step", {"model.a": torch.ones(4000)}
    dcp.save(weights if damage != "another program's" else {"other": torch.ones(2)}, checkpoint_id=path, no_dist=True)
    (path / "state.json").write_text('{"step": 1, "before": {}}')
    for part in path.glob(
        "*.distcp" if damage == "weights cut off" else ".metadata" if damage == "metadata cut off" else "nothing"
    ):
        part.write_bytes(part.read_bytes()[:50])
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(checkpoint, "get_state_dict", lambda policy, optimizer: ({"a": torch.zeros(4000)}, {}))
        patch.setattr(
            checkpoint.dcp,
            "load",
            lambda state, checkpoint_id: dcp_load({"model.a": state["model"]["a"]}, checkpoint_id),
        )
        checkpoint.load(path, None, None)
    assert (
        "is damaged (rank 0: " in str(caught.value)
        and "dict_keys" not in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert "Traceback" not in "".join(capfd.readouterr())
    if damage != "another program's":
        assert "is damaged" in refused(
            capfd, path, "--student", "demo:student", "--out", tmp_path / "model", main=export.main
        )


def test_a_run_with_a_damaged_checkpoint_is_refused_in_one_line(three, tmp_path, capfd):
    folder = shutil.copytree(three, tmp_path / "run")
    for part in (folder / "checkpoints/step_000003").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    before = tree(folder)
    assert train.main(["--resume", "auto", "--run-dir", str(folder), "train.steps=4"]) == 2
    err = capfd.readouterr().err
    assert (
        "step_000003 does not fit student.path or is damaged (rank 0: " in err
        and "dict_keys" not in err
        and "Traceback" not in err
    )
    assert tree(folder) == before


def dcp_load(state, path, real=dcp.load):
    return real(state, checkpoint_id=path, no_dist=True)


# Nothing is lost on a disk that is full, or another


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a.json"
    files.write(file, "old")
    with pytest.raises(KeyError), files.replacing(file) as out:
        out.write("new")
        raise KeyError
    assert tree(tmp_path).keys() == {"a.json"} and file.read_text() == "old"
    files.write(file, "new")
    assert tree(tmp_path).keys() == {"a.json"} and file.read_text() == "new"


def test_settings_are_not_half_written(run_dir, monkeypatch):
    real = Path.replace

    def replace(self, target):
        if target.name == "config.toml":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    before = (run_dir / "config.toml").read_text()
    with pytest.raises(UserError, match="No space left"):
        opened(run_dir)
    assert (run_dir / "config.toml").read_text() == before


@pytest.mark.parametrize("works", [True, False])
def test_checkpoints_on_another_disk_are_set_aside(run_dir, monkeypatch, works):
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n{"step": 3}\n')
    metrics = (run_dir / "metrics.jsonl").read_text()

    def rename(*arguments, **options):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", rename)
    if not works:
        monkeypatch.setattr(shutil, "copytree", rename)
        with pytest.raises(OSError, match="cross-device"):
            rundir.set_aside(run_dir, 2, "")
        assert (run_dir / "metrics.jsonl").read_text() == metrics and checkpoint.latest(run_dir)
        return
    aside = rundir.set_aside(run_dir, 2, "")
    assert checkpoint.latest(aside).name == "step_000003" and checkpoint.latest(run_dir) is None
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 0}\n' and (
        aside / "metrics.jsonl"
    ).read_text() == '{"step": 3}\n'


@pytest.mark.parametrize("failing_at", ["weights", "state"])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing_half(tmp_path, monkeypatch, learned, failing_at):
    full = OSError(errno.ENOSPC, "No space left on device")

    def save(state, checkpoint_id, planner):
        (checkpoint_id / "part").write_text("x")
        if failing_at == "weights":
            raise dcp.api.CheckpointException("failed", {0: (full, None)})

    def rename(self, target):
        raise full

    monkeypatch.setattr(checkpoint.dcp, "save", save)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(GuardError, match=r"step_000001 could not be written \(.*No space left"):
        checkpoint.save(tmp_path, 1, *learned, {}, keep=1)
    assert not list((tmp_path / "checkpoints").iterdir())


# What a run goes on from


def test_a_whole_last_line_without_its_break_is_cut_off(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0}\n{"step": 1}')
    assert rundir._split(metrics, 5) == (['{"step": 0}\n'], ['{"step": 1}'])


def test_a_best_whose_checkpoint_is_gone_is_forgotten(run_dir):
    checkpoint.name_best(run_dir, checkpoint.Best(1, 0.9))
    ranks.start()
    try:
        assert checkpoint.agreed_best(run_dir, [3, 0.4]) == (3, 0.4) and checkpoint.best(run_dir) == (3, 0.4)
        assert checkpoint.agreed_best(run_dir, [1, 0.9]) is None and not (run_dir / "checkpoints/best.json").exists()
    finally:
        ranks.stop()


def test_a_rank_lost_in_an_evaluation_is_not_waited_for():
    run = object.__new__(Run)
    written = []
    run.reporter = SimpleNamespace(step=lambda *arguments: written.append(arguments))
    with pytest.raises(RankLost), run.reported({"step": 1}, [], {}):
        raise RankLost("gone")
    assert not written
    with pytest.raises(GuardError), run.reported({"step": 1}, [], {}):
        raise GuardError("stopped")
    assert len(written) == 1, "an evaluation that is stopped loses itself alone"


def test_a_run_of_its_own_saves_the_step_it_started_from(three, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, UserError("out of luck"), step=3)
    folder = tmp_path / "a new"
    assert (
        train.main(
            [*QUICK, "train.steps=3", "--resume", str(three / "checkpoints/step_000002"), "--run-dir", str(folder)]
        )
        == 2
    )
    assert checkpoints(folder) == [2]
    assert (
        f"--run-dir '{folder}' --resume auto; for a model of it: python -m atod_fast.export '{folder}' --out DIR"
        in capsys.readouterr().out
    )
