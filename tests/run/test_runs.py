"""A run's folder: what is saved when it ends early, what resuming leaves unchanged, what becomes a model."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from atod_fast import rundir, train
from atod_fast.errors import UserError
from atod_fast.models import load_model, load_tokenizer, resolve
from atod_fast.observe import provenance
from atod_fast.policy.export import write
from helpers.runs import checkpoints, choose, read, tree, untimed

# Resuming destroys nothing


def test_going_back_needs_a_word(three, tmp_path):
    second = three / "checkpoints/step_000002"
    with pytest.raises(
        UserError, match=r"the run has gone on to step 3; add --set-aside .*set-aside-1, or --run-dir NEW"
    ):
        choose("--resume", second, "train.steps=9")
    with pytest.raises(UserError, match=r"train.steps=2, and .*step_000003 has 3 already"):
        choose("--resume", "auto", "--run-dir", three, "train.steps=2")
    with pytest.raises(UserError, match=r"train.steps=1, and .*step_000002 has 2 already"):
        choose("--resume", second, "--run-dir", tmp_path / "new", "train.steps=1")
    assert choose("--resume", second, "--set-aside", "train.steps=9") == (three, second, False)
    assert choose("--resume", second, "--run-dir", tmp_path / "new") == (tmp_path / "new", second, False)
    assert choose("--resume", three, "--set-aside", "train.steps=2") == (three, second, False), (
        "the newest that has not more steps"
    )
    assert choose("--resume", three, "--run-dir", tmp_path / "new", "train.steps=2") == (
        tmp_path / "new",
        second,
        False,
    )
    assert choose("--resume", three, "train.steps=4") == (three, three / "checkpoints/step_000003", False)
    assert choose("--resume", three) == (three, three / "checkpoints/step_000003", True), "nothing is left to do"
    with pytest.raises(UserError, match="--set-aside goes with --resume"):
        choose("--set-aside")
    with pytest.raises(UserError, match="already holds a run"):
        choose("--resume", second, "--run-dir", Path(shutil.copytree(three, tmp_path / "taken")))


def test_a_refused_resume_changes_no_file_and_neither_does_a_finished_run(copy, capsys):
    before = tree(copy)
    assert train.main(["--resume", str(copy / "checkpoints/step_000001"), "train.steps=2"]) == 2
    assert "add --set-aside" in capsys.readouterr().err
    assert train.main(["--resume", "auto", "--run-dir", str(copy)]) == 0
    assert f"{copy} is finished: 3 steps" in capsys.readouterr().out
    assert tree(copy) == before


def test_what_is_set_aside_is_whole(copy, three):
    before = tree(copy)
    assert (
        train.main(
            [
                "--resume",
                str(copy / "checkpoints/step_000001"),
                "--set-aside",
                "train.steps=2",
                "train.learning_rate=1e-4",
            ]
        )
        == 0
    )
    aside = tree(copy / "set-aside-1")
    same = {
        name: before[name]
        for name in before
        if name.startswith(("checkpoints/step_000002", "checkpoints/step_000003", "hf/", "curves", "config"))
    }
    same |= {
        name: before[name]
        for name in (
            "trajectories/step_000002.jsonl",
            "trajectories/step_000003.jsonl",
            "trajectories/eval_000003.jsonl",
        )
    }
    assert {name: digest for name, digest in aside.items() if name != "metrics.jsonl"} == same
    assert [line["step"] for line in read(copy / "set-aside-1")] == [2, 3]
    assert [line["step"] for line in read(copy)] == [0, 1, 2] and checkpoints(copy) == [1, 2]
    first = (three / "metrics.jsonl").read_text().splitlines()[:2]
    assert (copy / "metrics.jsonl").read_text().splitlines()[:2] == first
    assert tree(copy / "hf").keys() == tree(copy / "set-aside-1/hf").keys() and tree(copy / "hf") != tree(
        copy / "set-aside-1/hf"
    )


def test_a_new_folder_leaves_the_old_run_as_it_was(three, tmp_path):
    before = tree(three)
    assert train.main(["--resume", str(three / "checkpoints/step_000002"), "--run-dir", str(tmp_path / "new")]) == 0
    assert tree(three) == before
    assert untimed(read(tmp_path / "new"))[-1] == untimed(read(three))[-1] and checkpoints(tmp_path / "new") == [3]
    assert tree(tmp_path / "new/hf") == tree(three / "hf")


def test_a_finished_run_goes_on_with_more_steps_beside_its_old_end(copy):
    before = tree(copy)
    assert train.main(["--resume", "auto", "--run-dir", str(copy), "train.steps=4"]) == 0
    aside = tree(copy / "set-aside-1")
    assert aside == {name: before[name] for name in before if name.startswith(("hf/", "curves", "config"))}
    assert [line["step"] for line in read(copy)] == [0, 1, 2, 3, 4]
    starts = json.loads((copy / "environment.json").read_text())
    assert [start["from_step"] for start in starts] == [0, 3] and starts[1]["command"].endswith(
        f"--resume auto --run-dir {copy} train.steps=4"
    )


def test_an_interrupted_run_loses_nothing_that_lay_beyond_its_checkpoint(copy):
    """Killed in step 3: its metrics line is there, the next one is cut off, the checkpoint is half written."""
    shutil.rmtree(copy / "hf")
    (copy / "checkpoints/step_000003").rename(copy / "checkpoints/step_000003.partial")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/su')
    tail = "".join((copy / "metrics.jsonl").read_text().splitlines(keepends=True)[3:])
    assert train.main(["--resume", "auto", "--run-dir", str(copy)]) == 0
    assert [line["step"] for line in read(copy)] == [0, 1, 2, 3]
    assert (copy / "set-aside-1/metrics.jsonl").read_text() == tail
    assert (copy / "set-aside-1/checkpoints/step_000003.partial/state.json").is_file()
    assert sorted(p.name for p in (copy / "set-aside-1/trajectories").iterdir()) == [
        "eval_000003.jsonl",
        "step_000003.jsonl",
    ]


def test_nothing_is_set_aside_where_nothing_lies_beyond(three, tmp_path):
    folder = Path(shutil.copytree(three, tmp_path / "run"))
    shutil.rmtree(folder / "hf")
    before, settings = tree(folder), (folder / "config.toml").read_text()
    assert rundir.set_aside(folder, 3, settings) is None and tree(folder) == before
    assert rundir.set_aside(folder, 3, settings + "# other\n") == folder / "set-aside-1"
    assert tree(folder / "set-aside-1") == {"config.toml": before["config.toml"]}


def test_a_run_that_left_no_checkpoint_is_begun_anew_beside_what_it_wrote(copy):
    shutil.rmtree(copy / "checkpoints")
    written = (copy / "metrics.jsonl").read_text()
    assert choose("--resume", "auto", "--run-dir", copy) == (copy, None, False)
    assert rundir.set_aside(copy, -1, "") == copy / "set-aside-1"
    assert (copy / "set-aside-1/metrics.jsonl").read_text() == written and (copy / "metrics.jsonl").read_text() == ""
    assert sorted(p.name for p in copy.iterdir()) == [
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "set-aside-1",
        "trajectories",
    ]


# Where a run comes from


def test_a_run_says_what_made_it(three):
    (start,) = json.loads((three / "environment.json").read_text())
    assert start["command"].startswith("python -m atod_fast.train train.tasks_per_step=2") and start[
        "command"
    ].endswith(f"--run-dir {three}")
    assert (
        start["versions"].keys() >= {"atod_fast", "python", "torch", "transformers"}
        and start["versions"]["torch"] == torch.__version__
    )
    assert start["ranks"] == 1 and start["device"].startswith("cpu") and start["from_step"] == 0


def test_the_commit_is_that_of_the_files(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert provenance.commit(package) is None, "not of the checkout they lie in"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert provenance.commit(package) == head
    (package / "a.py").write_text("2\n")
    assert provenance.commit(package) == f"{head}+changes"


def test_shipped_models_are_found_by_name_in_an_export(tmp_path):
    """`demo:` names resolve to folders, whose generation configuration is read there."""
    student = load_model("demo:student", torch.float32)
    assert write(tmp_path / "out", student.state_dict(), "demo:student", load_tokenizer("demo:student"), None) == []
    shipped = Path(resolve("demo:student"), "generation_config.json")
    if shipped.is_file():
        assert json.loads((tmp_path / "out/generation_config.json").read_text()) == json.loads(shipped.read_text())
