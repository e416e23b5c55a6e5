"""A run's folder: what is saved when it ends early, what resuming leaves unchanged, what becomes a model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from atod_fast import cli, export, ranks, rundir, train
from atod_fast.config import Config
from atod_fast.errors import RankLost, Unexpected, UserError
from atod_fast.models import load_model, load_tokenizer, resolve
from atod_fast.observe import provenance
from atod_fast.policy import checkpoint
from atod_fast.policy.export import write
from atod_fast.policy.learner import Learner
from atod_fast.reporting import Reporter
from atod_fast.rollout.actor import Actor
from atod_fast.rollout.duration import limit
from atod_fast.run import Run
from helpers.chatml import make_tokenizer
from helpers.gloo import run_ranks
from helpers.runs import QUICK, checkpoints, choose, failing, read, run, tree, untimed
from helpers.tiny import save_model

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
    assert train.main([*QUICK, "train.steps=3", "--run-dir", str(tmp_path / "run")]) == 3
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

    def save(state, checkpoint_id):
        if "step_000002" in str(checkpoint_id):
            raise checkpoint.dcp.api.CheckpointException("failed", {0: (OSError("no space left"), None)})
        return real(state, checkpoint_id=checkpoint_id)

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
    many = Config.model_validate(
        {"env": world, "rollout": {"response_tokens": 10, "concurrency": 16}, "eval": {"tasks": 1}}
    )
    # 64 trajectories on one engine: four waves of 16, two to a thread, 51 calls each, and 50 turns of ten tokens.
    assert limit(many, 1, instant=False) == 4 * (51 * 2 * 60 + 500)
    assert limit(many, 4, instant=False) == 51 * 2 * 60 + 500
    assert limit(many, 4, instant=True) == 1800, "half an hour at least"
    held_out = many.model_copy(update={"eval": many.eval.model_copy(update={"tasks": 640})})
    assert limit(held_out, 1, instant=False) == 10 * limit(many, 1, instant=False)
    assert (
        limit(many.model_copy(update={"guard": many.guard.model_copy(update={"wait_minutes": 5.0})}), 1, instant=False)
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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "atod_fast.train",
        *QUICK,
        "train.steps=500",
    ]
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


# Models out of checkpoints


def test_any_checkpoint_becomes_a_model(three, tmp_path, capsys):
    assert export.main([str(three), "--out", str(tmp_path / "last")]) == 0
    assert tree(tmp_path / "last") == tree(three / "hf")
    assert "checkpoints/step_000003" in capsys.readouterr().out
    assert export.main([str(three / "checkpoints/step_000002"), "--out", str(tmp_path / "second")]) == 0
    second, last = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("second", "last"))
    assert any(not torch.equal(second[name], last[name]) for name in last)
    assert AutoTokenizer.from_pretrained(tmp_path / "second").get_vocab() == load_tokenizer("demo:student").get_vocab()


def test_what_cannot_be_exported_is_one_line(three, copy, tmp_path, capsys):
    def refused(*arguments):
        assert export.main([*map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "is there already and not empty" in refused(three, "--out", three)
    assert "neither a checkpoint nor a run" in refused(tmp_path, "--out", tmp_path / "model")
    assert "checkpoint.keep_best=true" in refused(three, "--best", "--out", tmp_path / "model")
    assert "--best goes with a run" in refused(three / "checkpoints/step_000001", "--best", "--out", tmp_path / "model")
    assert "model.embed_tokens.weight is missing or of another shape" in refused(
        three, "--student", save_model(tmp_path / "s"), "--out", tmp_path / "m"
    )
    assert "required: --out" in refused(three)
    settings = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(settings.replace("demo:student", str(tmp_path / "moved")))
    assert "moved" in refused(copy, "--out", tmp_path / "model")
    assert export.main([str(copy), "--student", "demo:student", "--out", str(tmp_path / "model")]) == 0
    (copy / "config.toml").unlink()
    assert "name it with --student" in refused(copy, "--out", tmp_path / "other")
    for part in (copy / "checkpoints/step_000003").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    assert "is damaged" in refused(copy, "--student", "demo:student", "--out", tmp_path / "other")


def test_help_needs_no_torch():
    code = (
        "import sys; from atod_fast import export\ntry: export.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "False\n"
    )


@pytest.fixture
def source(tmp_path):
    save_model(tmp_path / "source", vocabulary=len(make_tokenizer()) + 3)
    make_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def written(source, out, tokenizer=None, stop_ids=(7, 1)):
    weights = load_model(str(source), torch.float32).state_dict()
    return write(out, weights, str(source), tokenizer or load_tokenizer(str(source)), stop_ids)


@pytest.mark.parametrize("given", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.6}])
def test_a_generation_config_is_copied_even_where_transformers_would_not_write_it(source, tmp_path, given):
    (source / "generation_config.json").write_text(json.dumps(given | {"eos_token_id": 5, "of its own": [1]}))
    assert written(source, tmp_path / "out") == []
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == given | {
        "eos_token_id": [1, 7],
        "of its own": [1],
    }
    assert written(source, tmp_path / "as it was", stop_ids=None) == []
    assert json.loads((tmp_path / "as it was/generation_config.json").read_text())["eos_token_id"] == 5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == [1, 7]


def test_without_a_generation_config_the_models_own_is_written(source, tmp_path):
    (source / "generation_config.json").unlink()
    assert written(source, tmp_path / "out") == []
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert found["eos_token_id"] == [1, 7] and found["bos_token_id"] == 2 and found["pad_token_id"] == 0


def test_an_optional_file_that_cannot_be_written_is_a_line_and_the_weights_are_there(source, tmp_path):
    class Broken:
        def save_pretrained(self, path):
            raise RuntimeError("no such class\nand more")

    (source / "generation_config.json").write_text("{")
    # As what made it would find it: transformers itself would not load the model.
    weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).state_dict()
    lines = write(tmp_path / "out", weights, str(source), Broken(), [1])
    assert [line.partition(" could not")[0] for line in lines] == [
        f"the tokenizer of {tmp_path}/out",
        f"generation_config.json of {tmp_path}/out",
    ]
    assert "(RuntimeError: no such class)" in lines[0] and "copy it from" in lines[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


def test_the_configuration_written_is_the_sources(tmp_path):
    save_model(tmp_path / "source")
    facts = json.loads((tmp_path / "source/config.json").read_text()) | {"attention_dropout": 0.25, "dtype": "bfloat16"}
    (tmp_path / "source/config.json").write_text(json.dumps(facts))
    model = load_model(str(tmp_path / "source"), torch.float32)
    model.config.attention_dropout = 0.0
    assert write(tmp_path / "out", model.state_dict(), str(tmp_path / "source"), make_tokenizer(), [1]) == []
    assert json.loads((tmp_path / "out/config.json").read_text()) == facts
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_curves_that_cannot_be_drawn_end_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "atod_fast.observe.curves", raising=False)
    assert train.main([*QUICK, "train.steps=1", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert (
        "curves.png could not be drawn (ModuleNotFoundError" in out
        and "held-out success" in out
        and (tmp_path / "run/hf/config.json").is_file()
    )


# The best checkpoint, and the newest


def save(folder, *steps, keep=2, best=None):
    for step in steps:
        checkpoint.save(folder, step, None, None, {}, keep=keep, best=best)


def test_the_oldest_checkpoints_by_number_go(tmp_path, empty):
    save(tmp_path, 5, 999_998, 999_999, 1_000_000, 1_000_001)
    assert checkpoints(tmp_path) == [1_000_000, 1_000_001]
    assert (
        checkpoint.latest(tmp_path).name == "step_1000001"
        and checkpoint.latest(tmp_path, 1_000_000).name == "step_1000000"
    )


def test_the_best_checkpoint_stays_and_is_named(tmp_path, empty):
    assert checkpoint.best(tmp_path) is None
    save(tmp_path, 1)
    save(tmp_path, 2, 3, 4, 5, best=checkpoint.Best(2, 0.75))
    assert checkpoints(tmp_path) == [2, 4, 5] and checkpoint.best(tmp_path) == (2, 0.75)
    assert json.loads((tmp_path / "checkpoints/best.json").read_text()) == {"step": 2, "dev/success": 0.75}
    save(tmp_path, 6, best=checkpoint.Best(6, 0.8))
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
