"""Each example runs, and does what it says."""

import csv
import json
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from atod_fast.api import Callback, evaluate, load_config, train
from atod_fast.config import Objective
from atod_fast.envs import make
from atod_fast.envs.protocol import Environment
from atod_fast.errors import Unexpected, UserError
from helpers.chat_models import save_chat_model
from helpers.paths import ROOT

FOLDER = ROOT / "examples"
QUICK = [
    "train.steps=2",
    "train.tasks_per_step=2",
    "train.group_size=2",
    "eval.every=1",
    "eval.tasks=3",
    "checkpoint.every=0",
    "env.max_turns=3",
]


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(FOLDER)
    return import_module


def test_all_examples_are_listed_and_tested():
    names = sorted(file.stem for file in FOLDER.glob("*.py"))
    listed = (FOLDER / "README.md").read_text()
    assert (
        all(f"({name}.py)" in listed and f'example("{name}")' in Path(__file__).read_text() for name in names)
        and len(names) == 5
    )


# Training from Python


class Told(Callback):
    def __init__(self):
        self.calls = []

    def on_step(self, metrics):
        self.calls.append(("step", metrics))

    def on_evaluation(self, metrics, trajectories):
        self.calls.append(("evaluation", metrics))
        assert len(trajectories) == 3


def test_training_from_python_gives_paths_and_numbers_and_tells_its_callbacks(tmp_path):
    told = Told()
    config = load_config(overrides=[*QUICK, "checkpoint.keep_best=true"])
    done = train(config, run_dir=tmp_path / "run", callbacks=[told])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert done.run_dir == tmp_path / "run" and (done.model / "config.json").is_file()
    assert done.metrics == lines[-1] and done.metrics["step"] == 2
    assert (
        lines[0] == pytest.approx({"step": 0, **done.before})
        and {"eval/success", "eval/teacher_success"} <= done.before.keys()
    )

    kinds = [
        (kind, metrics["step"], next(iter(metrics.keys() - {"step"})).partition("/")[0] if kind == "evaluation" else "")
        for kind, metrics in told.calls
    ]
    evaluations = [
        ("evaluation", 0, "eval"),
        ("evaluation", 0, "dev"),
        ("evaluation", 0, "eval"),
    ]  # the last one is the teacher's
    for step in (1, 2):
        evaluations += [("evaluation", step, "eval"), ("evaluation", step, "dev"), ("step", step, "")]
    assert kinds == evaluations
    assert "eval/teacher_success" in told.calls[2][1]
    assert all(
        metrics["eval/success"] == pytest.approx(lines[metrics["step"]]["eval/success"])
        for kind, metrics in told.calls
        if kind == "step"
    )

    # A finished run is left as it is.
    again = Told()
    assert train(config, run_dir=tmp_path / "run", resume="auto", callbacks=[again]) == done and not again.calls
    found = evaluate(done.model, config)
    assert found.summary["tasks"] == 3 and found.trajectories == sorted(found.trajectories, key=lambda t: t.task)
    assert found.summary["success"] == pytest.approx(done.metrics["eval/success"]), "the same episodes"


def test_what_a_callback_raises_stops_the_run_and_what_was_trained_is_saved(tmp_path, capsys):
    class Stops(Callback):
        def on_step(self, metrics):
            raise RuntimeError("out of luck")

    with pytest.raises(Unexpected, match="RuntimeError: out of luck") as stopped:
        train(load_config(overrides=QUICK), run_dir=tmp_path / "run", callbacks=[Stops()])
    assert "saved after step 1" in stopped.value.__notes__[0] and (tmp_path / "run/checkpoints/step_000001").is_dir()
    assert 'raise RuntimeError("out of luck")' in capsys.readouterr().err
    done = train(load_config(overrides=QUICK), run_dir=tmp_path / "run", resume="auto")
    assert done.metrics["step"] == 2


def test_errors_are_raised_not_printed(tmp_path):
    with pytest.raises(UserError, match="did you mean train.steps"):
        load_config(overrides=["train.stepz=3"])
    with pytest.raises(UserError, match="env.name='nowhere' is not known"):
        train(load_config(overrides=["env.name=nowhere"]), run_dir=tmp_path / "run")


def test_two_ranks_call_one_after_the_other_and_get_the_same(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, pathlib
from atod_fast.api import Callback, evaluate, load_config, train
class Count(Callback):
    steps = 0
    def on_step(self, metrics):
        self.steps += 1
config, count = load_config(overrides={QUICK!r}), Count()
done = train(config, run_dir="run", callbacks=[count])
found = evaluate(done.model, config)
pathlib.Path("rank" + os.environ["RANK"]).write_text(repr((count.steps, done, found.summary)))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in "01")
    assert first.startswith("(2, Trained(") and second == "(0" + first[2:], "callbacks run on rank 0 alone"


def test_the_example_trains_the_demo_and_writes_a_table(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    success = example("train_from_python").main(QUICK, tmp_path / "run", tmp_path / "table.csv")
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert rows[0] == ["step", "train/success", "turns/weight_mean", "loss/total"] and [row[0] for row in rows[1:]] == [
        "1",
        "2",
    ]
    assert 0 <= success <= 1


# An environment


def test_questions_to_a_database_are_answered_by_their_queries(example, capsys):
    module = example("sql_environment")
    module.main()
    assert capsys.readouterr().out.endswith("Right.\nreward 1.0, over: True\n")
    env = make("sql_environment:SqlQuestions", tasks=60, seed=3)
    assert isinstance(env, Environment)
    kinds = set()
    for task in range(60):
        question, info = env.reset(0, task)
        kinds.add(info["task_type"])
        assert (question, info) == env.clone().reset(1, task), "the task alone decides"
        shown, reward, over, _, info = env.step(env.query)
        assert (reward, over, info["is_action_valid"]) == (0.0, False, True)
        observation, reward, over, _, info = env.step(f"answer: {shown}")
        assert (observation, reward, over, info["won"]) == ("Right.", 1.0, True, True), question
    assert kinds == set(module.QUESTIONS)
    env.reset(0, 0)
    assert env.step("ANSWER nothing at all")[:3] == ("Wrong.", 0.0, True)


@pytest.mark.parametrize(
    "query",
    [
        "DROP TABLE orders",
        "ATTACH 'file' AS other",
        "PRAGMA query_only=0",
        "SELECT zeroblob(1000000000)",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n) SELECT COUNT(*) FROM n",
        "SELECT COUNT(*) FROM orders a, orders b, orders c, orders d, orders e, orders f",
        "SELECT 1; SELECT 2",
        "tea",
    ],
)
def test_a_query_can_do_no_harm(example, query, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = example("sql_environment").SqlQuestions()
    env.reset(0, 0)
    observation, reward, over, _, info = env.step(query)
    assert (
        observation.startswith("Error: ")
        and not (reward or over or info["is_action_valid"])
        and not list(tmp_path.iterdir())
    )
    assert env.step(env.query)[-1]["is_action_valid"], "the next query is answered"


def test_a_chat_model_trains_in_the_environment(example, tmp_path):
    example("sql_environment")
    student, teacher = (save_chat_model(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "teacher")))
    settings = [
        "env.name=sql_environment:SqlQuestions",
        "env.train={seed=0}",
        "env.eval={seed=1}",
        "rollout.history=6",
        "rollout.response_tokens=6",
    ]
    config = load_config(
        "own",
        overrides=[
            *settings,
            f"student.path={student}",
            f"teacher.path={teacher}",
            *QUICK,
            "train.steps=1",
            "eval.teacher=false",
        ],
    )
    done = train(config, run_dir=tmp_path / "run")
    assert done.metrics["rollout/turns"] == 3 and done.metrics["policy/gradient_norm"] > 0


# An objective


def test_an_objective_of_ones_own_has_the_gradient_of_its_formula(example):
    module = example("own_objective")
    torch.manual_seed(1)
    hidden, head = torch.randn(12, 8, dtype=torch.float64, requires_grad=True), torch.randn(20, 8, dtype=torch.float64)
    tokens, teacher_logp = torch.randint(0, 20, (12,)), -3 * torch.rand(12, dtype=torch.float64)
    reward = torch.randn(12, dtype=torch.float64)
    logp = (hidden @ head.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    streams = module.sure_streams(logp.detach(), teacher_logp, reward, kappa=0.7, floor=0.4)
    advantage = torch.where(teacher_logp.exp() >= 0.4, 0.7 * (teacher_logp - logp.detach()), 0.0) + reward
    (expected,) = torch.autograd.grad(-(advantage * logp).mean(), hidden)  # on-policy the ratio is 1
    (found,) = torch.autograd.grad(module.loss(hidden, head, tokens, streams, Objective()), hidden)
    torch.testing.assert_close(found, expected)

    sure, rise = module.main()
    assert rise[sure].mean() > 1 and rise[sure].mean() > 5 * rise[~sure].abs().mean()


# Kernels alone


def test_a_plain_loop_distils_and_its_loss_is_the_reverse_kl(example):
    module = example("kernels_in_a_training_loop")
    losses = module.main(steps=12)
    assert losses[-1] < 0.8 * losses[0]
    teacher, student = module.small_model(0, 64), module.small_model(1, 32)
    ids, mask = torch.randint(0, 1000, (2, 9)), torch.rand(2, 9) < 0.5
    q, p = (model(ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1)[mask[:, 1:]].mean()
    torch.testing.assert_close(module.distil(student, teacher, ids, mask), expected)


def test_turn_weights_are_those_of_the_formula(example):
    module = example("turn_weights_on_device")
    module.main()
    turns, trajectories = torch.tensor([0, 3, 8, 10, 14, 20, 21]), torch.tensor([0, 4, 6])
    logp, teacher = -torch.rand(21), -2 * torch.rand(21)
    parts = [slice(*pair) for pair in pairwise(turns.tolist())]
    d, h = (
        torch.stack([(logp - teacher)[part].abs().mean() for part in parts]),
        torch.stack([-logp[part].mean() for part in parts]),
    )
    d, h = ((x[:4] - x[:4].min()) / (x[:4].max() - x[:4].min()) for x in (d, h))
    weight = [*(1 - (1 - d) * (1 - h)).tolist(), 1.0, 1.0]
    expected = torch.cat([torch.full((part.stop - part.start,), w) for w, part in zip(weight, parts, strict=True)])
    torch.testing.assert_close(module.token_weights(logp, teacher, turns, trajectories), expected)

    leaf = logp.clone().requires_grad_()
    module.imitation_loss(leaf, teacher, turns, trajectories).backward()
    torch.testing.assert_close(leaf.grad, -expected * (teacher - logp) / 21)


@pytest.mark.parametrize("name", ["kernels_in_a_training_loop", "turn_weights_on_device"])
def test_the_kernels_need_no_trainer(name):
    code = (
        f"import runpy, sys; runpy.run_path({str(FOLDER / name)!r} + '.py', run_name='__main__'); "
        f"assert 'atod_fast' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on cpu" in done.stdout or "on cuda" in done.stdout
