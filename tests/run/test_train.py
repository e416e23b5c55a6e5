import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atod_fast import evaluate, ranks, reporting, train
from atod_fast.errors import UserError
from atod_fast.models import resolve
from atod_fast.policy.learner import Learner
from atod_fast.policy.resync import stream_weights
from atod_fast.rollout import actor
from atod_fast.rollout.engines.vllm import limits as vllm_limits
from atod_fast.rollout.player import Player
from atod_fast.run import Run
from helpers.chatml import make_tokenizer
from helpers.gloo import run_ranks
from helpers.paths import ROOT
from helpers.runs import SMALL, read, run, torchrun, untimed
from helpers.tiny import save_model

CONTRACT = """step train/success eval/success schedule/kappa schedule/rho turns/disagreement turns/uncertainty
turns/weight_mean loss/total policy/kl policy/entropy policy/clip_fraction sync/logprob_gap time/rollout time/teacher
time/train time/resync perf/tokens_per_second memory/peak_gib""".split()


def test_a_run_leaves_what_the_contract_says(three_steps):
    folder, lines = three_steps
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "eval/teacher_success" in lines[0]
    assert set(CONTRACT) <= lines[-1].keys() and set(CONTRACT) - {"eval/success"} <= lines[1].keys()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    assert (folder / "curves.png").stat().st_size > 10_000 and (folder / "config.toml").exists()
    records = [json.loads(line) for line in (folder / "trajectories" / "step_000002.jsonl").read_text().splitlines()]
    assert len(records) == 8 and all(
        {"observation", "command", "weight", "disagreement"} <= turn.keys() for r in records for turn in r["turns"]
    )
    assert lines[-1]["sync/logprob_gap"] < 1e-5


def test_the_export_loads_with_transformers_and_evaluates(three_steps, tmp_path):
    folder, lines = three_steps
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    start = AutoModelForCausalLM.from_pretrained(resolve("demo:student"))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert (
        AutoTokenizer.from_pretrained(folder / "hf").get_vocab()
        == AutoTokenizer.from_pretrained(resolve("demo:student")).get_vocab()
    )
    out = tmp_path / "evaluation.json"
    assert evaluate.main([str(folder / "hf"), "eval.tasks=10", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["success"] == pytest.approx(lines[-1]["eval/success"]) and found["outcomes"].count("1") == round(
        10 * found["success"]
    )


def test_equal_seeds_give_equal_runs_and_another_seed_another(three_steps, tmp_path):
    _, lines = three_steps
    assert untimed(run(tmp_path / "again", "train.steps=3")) == untimed(lines)
    assert untimed(run(tmp_path / "other", "train.steps=3", "train.seed=1"))[1:] != untimed(lines)[1:]


def test_a_resumed_run_goes_on_as_if_never_stopped(three_steps, tmp_path):
    folder, lines = three_steps
    copied = tmp_path / "resumed"
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "checkpoints" / "step_000003")
    shutil.rmtree(copied / "hf")
    settings = (copied / "config.toml").read_text()
    assert train.main(["--run-dir", str(copied), "--resume", "auto"]) == 0, (
        "the run's own settings need not be given again"
    )
    assert untimed(read(copied)) == untimed(lines) and (copied / "hf" / "config.json").exists()
    assert (copied / "config.toml").read_text() == settings


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry run", "run"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["--preset", "webshop-0.6b", "env.options.attrbutes=x.json"],
            "has no option 'attrbutes'; did you mean attributes?",
        ),
        (["env.train={generate=20, sead=0}"], "has no option 'sead'; did you mean seed?"),
        (["env.name=helpers.worlds:Corridoor"], "helpers.worlds:Corridoor"),
    ],
)
def test_a_world_that_cannot_be_is_told_before_a_model_is_looked_for(settings, words, dry, tmp_path, capsys):
    assert train.main([*settings, *(dry or ["--run-dir", str(tmp_path)])]) == 2
    assert words in capsys.readouterr().err


def test_equal_splits_are_told(tmp_path, capsys):
    same = "{generate=20, seed=0}"
    run(tmp_path / "same", f"env.train={same}", f"env.eval={same}", "train.steps=1", "eval.teacher=false")
    assert "env.train and env.eval are the same" in capsys.readouterr().out
    run(
        tmp_path / "dev",
        "env.dev={generate=2400, seed=1}",
        "checkpoint.keep_best=true",
        "train.steps=1",
        "eval.teacher=false",
    )
    assert "warning: env.eval and env.dev are the same: held-out success will be that of" in capsys.readouterr().out


def test_a_training_split_that_is_wrong_is_told_before_anything_is_played(tmp_path, capsys):
    run(tmp_path / "wrong", "env.train={generate=20, seed=0, scene='tiny'}", code=2)
    out, err = capsys.readouterr()
    assert "tiny" in err and "before training" not in out


def test_without_a_learning_rate_nothing_moves(tmp_path, monkeypatch):
    played, real = [], Player.play

    def play(self, label, act):
        found = real(self, label, act)
        if label == "evaluating":
            played.append(
                [(list(turn.action), list(turn.logprobs)) for trajectory in found for turn in trajectory.turns]
            )
        return found

    monkeypatch.setattr(Player, "play", play)
    lines = run(tmp_path / "still", "train.steps=4", "train.learning_rate=0.0", "eval.temperature=0.0")
    assert len(played) == 2 and played[0] == played[1], "greedy rollouts, bit for bit"
    before = AutoModelForCausalLM.from_pretrained(resolve("demo:student"))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "still" / "hf")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert len({line["eval/success"] for line in lines if "eval/success" in line}) == 1


@pytest.mark.parametrize(
    "settings",
    [
        ["objective.preset=opd"],
        ["objective.preset=grpo"],
        ["objective.preset=exact"],
        ["objective.divergence=k3", "teacher.offload=true"],
    ],
)
def test_each_method_runs_from_the_same_command(tmp_path, settings):
    lines = run(tmp_path / "run", "train.steps=3", "eval.teacher=false", *settings)
    teacher = lines[-1]["time/teacher"]
    assert (teacher < 1e-3) == ("objective.preset=grpo" in settings), "the teacher is skipped exactly where kappa is 0"
    assert max(line["policy/gradient_norm"] for line in lines[1:]) > 0, "some group of the steps differs in its rewards"


def test_an_adaptive_kappa_follows_the_gap_to_the_teacher(tmp_path):
    keys = ["schedule.kappa.kind=adaptive", "eval.every=1", "eval.tasks=30", "train.steps=2"]
    lines = run(tmp_path / "run", *keys)
    ratio = lines[1]["dev/success"] / lines[0]["dev/teacher_success"]
    assert lines[1]["schedule/kappa"] == 1 and lines[2]["schedule/kappa"] == pytest.approx(min(1, max(1 - ratio, 0)))
    played = [(tmp_path / f"run/trajectories/{split}_000001.jsonl").read_text() for split in ("eval", "dev")]
    ids = [{json.loads(line)["task_id"] for line in text.splitlines()} for text in played]
    assert not ids[0] & ids[1], "by other tasks than the reported"


def test_what_chooses_plays_tasks_of_its_own_and_nothing_else_opens_them(tmp_path, monkeypatch, capsys):
    opened, real = [], actor.open_split
    monkeypatch.setattr(actor, "open_split", lambda config, split: opened.append(split) or real(config, split))
    lines = run(tmp_path / "best", "train.steps=2", "checkpoint.keep_best=true")
    assert sorted(opened) == ["dev", "eval", "train"]
    names = {path.name for path in (tmp_path / "best/trajectories").glob("dev_*")}
    assert names == {"dev_000000.jsonl", "dev_000002.jsonl"}, "no teacher is asked where none is measured against"
    played = [json.loads(line) for line in (tmp_path / "best/trajectories/dev_000002.jsonl").read_text().splitlines()]
    assert len(played) == 10 and all("/5-" in episode["task_id"] for episode in played), "of seed 5"
    success = sum(episode["success"] for episode in played) / 10
    assert lines[2]["dev/success"] == success and {"dev/turns", "dev/failed_environments"} <= lines[0].keys()
    assert json.loads((tmp_path / "best/checkpoints/best.json").read_text()) == {"step": 2, "dev/success": success}
    assert f"best success on env.dev {success:.1%} after step 2" in capsys.readouterr().out

    opened.clear()
    plain = run(tmp_path / "plain", "train.steps=2", "env.dev={generate=1}")
    assert sorted(opened) == ["eval", "train"] and not any(key.startswith("dev/") for line in plain for key in line)
    without_dev = [{key: value for key, value in line.items() if not key.startswith("dev/")} for line in untimed(lines)]
    assert untimed(plain) == without_dev, "to watch changes nothing"


def test_a_run_that_watches_goes_on_as_if_never_stopped(tmp_path):
    keys = "schedule.kappa.kind=adaptive", "checkpoint.keep_best=true", "eval.every=1", "checkpoint.every=1"
    whole = run(tmp_path / "run", *keys, "train.steps=3", "checkpoint.keep=3")
    copied = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    assert train.main(["--resume", str(copied / "checkpoints/step_000001"), "--set-aside", "train.steps=3"]) == 0
    assert untimed(read(copied)) == untimed(whole)
    assert (copied / "checkpoints/best.json").read_text() == (tmp_path / "run/checkpoints/best.json").read_text()
    assert {f"dev_00000{step}.jsonl" for step in (2, 3)} <= {
        p.name for p in (copied / "set-aside-1/trajectories").iterdir()
    }


def test_evaluations_tell_turns_and_success_by_type_where_types_are_few(three_steps, tmp_path, monkeypatch):
    folder, lines = three_steps
    played = [json.loads(line) for line in (folder / "trajectories/eval_000002.jsonl").read_text().splitlines()]
    assert lines[2]["eval/turns"] == pytest.approx(sum(len(episode["turns"]) for episode in played) / 10)
    kinds = {episode["task_type"] for episode in played}
    assert len(kinds) > 1 and set().union(*lines) >= {
        f"eval/{who}success/{kind}" for kind in kinds for who in ("", "teacher_")
    }
    for kind in kinds:
        won = [episode["success"] for episode in played if episode["task_type"] == kind]
        assert lines[2][f"eval/success/{kind}"] == pytest.approx(sum(won) / len(won), abs=1e-8)
    one = run(tmp_path / "one", "train.steps=1", "eval.teacher=false", 'env.eval.task_types=["pick_and_place_simple"]')
    monkeypatch.setattr(reporting, "MOST_TYPES", 1)
    many = run(tmp_path / "many", "train.steps=1", "eval.teacher=false")
    assert not [key for line in one + many for key in line if key.startswith("eval/success/")]


def test_the_most_frequent_action_is_told_of_enough_actions():
    assert reporting.same_action(["look"] * 24 + ["go"] * 8) == 0.75
    assert math.isnan(reporting.same_action(["look"] * 31))


def test_two_ranks_do_what_one_does(three_steps, tmp_path):
    _, lines = three_steps
    folder = tmp_path / "pair"
    codes = run_ranks(2, train.main, [*SMALL, "train.steps=3", "--run-dir", str(folder)])
    assert codes == [0, 0]
    pair = read(folder)
    for key in (
        "train/success",
        "turns/disagreement",
        "turns/uncertainty",
        "turns/weight_mean",
        "loss/total",
        "policy/gradient_norm",
    ):
        assert pair[1][key] == pytest.approx(lines[1][key], rel=1e-3, abs=1e-5), key


def test_torchrun_starts_it_and_speaks_once(tmp_path):
    command = torchrun(2, *SMALL, "train.steps=1", "--run-dir")
    done = subprocess.run(
        [*command, str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("held-out success") == 1 and len(read(tmp_path / "run")) == 2
    refused = subprocess.run(
        [*command, str(tmp_path / "run"), "train.stepz=3"], capture_output=True, text=True, timeout=240
    )
    assert refused.returncode != 0 and refused.stderr.count("atod_fast: ") == 1


def complain_on_the_second_rank():
    ranks.start()
    error = UserError("tasks of rank 1 are too long") if ranks.rank() == 1 else None
    with pytest.raises(UserError, match="rank 1 are too long"):
        ranks.raise_together(error)
    return True


def test_an_error_of_one_rank_stops_all():
    assert run_ranks(2, complain_on_the_second_rank) == [True, True]


def test_a_chat_model_learns_in_windows_of_the_last_turns(tmp_path):
    tokenizer = make_tokenizer()
    paths = [
        save_model(tmp_path / name, seed=seed, vocabulary=len(tokenizer) + 3, positions=4096)
        for seed, name in enumerate(("student", "teacher"))
    ]
    for path in paths:
        tokenizer.save_pretrained(path)
    keys = [
        "rollout.context=window",
        "rollout.prompt_tokens=3000",
        "rollout.response_tokens=6",
        "env.max_turns=3",
        "eval.teacher=false",
        "train.steps=1",
    ]
    lines = run(
        tmp_path / "run",
        *keys,
        *(f"{name}.path={path}" for name, path in zip(("student", "teacher"), paths, strict=True)),
        "eval.tasks=1",
    )
    assert lines[1]["rollout/turns"] == 3 and lines[1]["sync/logprob_gap"] < 1e-4
    assert lines[1]["rollout/invalid_actions"] == lines[1]["rollout/malformed_actions"] == 1
    assert lines[1]["turns/disagreement"] > 0.1 and lines[1]["policy/gradient_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.stepz=3"], ["train.stepz", "train.steps"]),
        (["student.path=/nowhere/model"], ["/nowhere/model", "does not exist"]),
        (["rollout.prompt_tokens=99999"], ["rollout.prompt_tokens", "positions"]),
        (["eval.tasks=999999"], ["eval.tasks=999999", "env.eval"]),
        (["env.name=nowhere"], ["nowhere"]),
        (["env.name=searchqa", "env.options={generate=20, topc=3}"], ["topc", "topk"]),
        (
            ["env.name=webshop", "env.options={products='/nowhere/items.json', attributes='/nowhere/ins.json'}"],
            ["/nowhere/ins.json", "WebShop"],
        ),
        (["student.path=tests/nothing"], ["tests/nothing", "does not exist"]),
        (["rollout.engine=vllm"], ["rollout.engine", "transformers"]),
        (["rollout.context=window"], ["rollout.context", "full"]),
        (["env.train={games='/nowhere/games'}"], ["/nowhere/games"]),
        (["--resume", "/nowhere/run"], ["--resume", "/nowhere/run"]),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capfd, monkeypatch, settings, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(vllm_limits, "installed", lambda: None)
    run(tmp_path / "run", *settings, code=2)
    (line,) = [text for text in capfd.readouterr().err.splitlines() if text.startswith("atod_fast:")]
    assert all(word in line for word in words), line


def test_a_run_folder_is_never_overwritten(three_steps, capfd):
    folder, lines = three_steps
    run(folder, code=2)
    assert "--resume auto" in capfd.readouterr().err
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == len(lines)


def test_a_teacher_with_other_tokens_is_refused(tmp_path, capfd):
    save_model(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(resolve("demo:student")).save_pretrained(tmp_path / "teacher")
    run(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}", code=2)
    assert "has 61 columns, too few for token 1" in capfd.readouterr().err
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    run(tmp_path / "run", f"teacher.path={tmp_path / 'teacher'}", code=2)
    assert "have different tokenizers" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capfd, monkeypatch):
    real, steps = Learner.update, []

    def poisoned(self, minibatches, streams, learning_rate):
        steps.append(1)
        if len(steps) > 2:
            streams = [[replace(stream, weight=stream.weight * float("nan")) for stream in part] for part in streams]
        return real(self, minibatches, streams, learning_rate)

    monkeypatch.setattr(Learner, "update", poisoned)
    run(tmp_path / "run", "train.steps=9", "checkpoint.every=1", "guard.skipped_updates=0", code=3)
    assert "not finite" in capfd.readouterr().err
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved
    weights = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert weights[-1]["step"] == int(saved[-1].name.removeprefix("step_"))


def test_an_engine_with_other_weights_stops_the_run(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        Run,
        "resync",
        lambda self: self.engine.load_weights((n, t * 1.05) for n, t in stream_weights(self.learner.student)),
    )
    run(tmp_path / "run", "train.steps=1", code=3)
    assert "log-probs differ" in capfd.readouterr().err


def test_an_interrupted_run_saves_and_resumes(tmp_path):
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "atod_fast.train",
        *SMALL,
        "train.steps=500",
        "eval.every=0",
        "eval.teacher=false",
        "--run-dir",
        str(folder),
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors
    (saved,) = (folder / "checkpoints").iterdir()
    done = int(saved.name.removeprefix("step_"))
    assert done >= 1 and f"after step {done}".encode() in output
    lines = run(folder, f"train.steps={done + 1}", "--resume", "auto")
    assert [line["step"] for line in lines] == list(range(done + 2))
