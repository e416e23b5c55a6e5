"""Settings that are refused, each in one line that names the remedy."""

from __future__ import annotations

import pytest

from atod_fast.cli import parse
from atod_fast.config.settings import (
    check_model,
    load,
)
from atod_fast.errors import UserError
from helpers.config import message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["train.step=3"], ["train.step ", "not a key", "train.steps?"]),
        (["trian.steps=3"], ["train.steps?"]),
        (["learning_rate=3"], ["train.learning_rate?"]),
        (["turns.normalize=rank"], ["turns.normalise?"]),
        (["train.lr=1e-6"], ["train.lr is not a key", "train.learning_rate?"]),
        (["lr=1e-6"], ["train.learning_rate?"]),
        (["env.test.seed=2"], ["env.test.seed is not a key", "did you mean env.eval.seed?"]),
        (["env.test={seed=2}"], ["did you mean env.eval?"]),
        (["env.trian.deep.er=2"], ["did you mean env.train.deep.er?"]),
        (["env.dev={seed=two}"], ["expected table {option = value, ...}; text in it needs quotes"]),
        (["train.wd=0"], ["train.weight_decay?"]),
        (["temperature=1"], ["rollout.temperature?"]),
        (["eval.temp=1"], ["eval.temperature?"]),
        (["train.batch_size=8"], ["train.tasks_per_step?"]),
        (["model=x"], ["student.path?"]),
        (["epochs=2"], ["train.epochs?"]),
        (["train.seeds=2"], ["train.seed?"]),
        (["rollout.tp=2"], ["rollout.tensor_parallel?"]),
        (["rollout.max_new_tokens=2"], ["rollout.response_tokens?"]),
        (["--lr", "3"], ["train.learning_rate=VALUE"]),
        (["student.path="], ["student.path: empty"]),
        (["teacher.path="], ["teacher.path", "objective.preset=grpo"]),
        (["train.steps=0"], ["train.steps = 0", "int >= 1"]),
        (["train.steps=ten"], ['train.steps = "ten"', "int >= 1"]),
        (["train.steps=2.0"], ["train.steps = 2.0", "int >= 1"]),
        (["train.steps=true"], ["train.steps = true", "int >= 1"]),
        (["rollout.thinking=1"], ["rollout.thinking = 1", "true | false"]),
        (["train.final_learning_rate=1.5"], ["number >= 0 and <= 1"]),
        (["train.learning_rate=nan"], ["train.learning_rate = NaN", "number >= 0"]),
        (["train.betas=[0.9]"], ["train.betas = [0.9]", "[number >= 0 and < 1, number >= 0 and < 1]"]),
        (["train.betas=[0.9, 1]"], ["train.betas = [0.9, 1]"]),
        (["objective.preset=papr"], ['objective.preset = "papr"', "sequential", "paper?"]),
        (["objective.preset=[1]"], ["objective.preset", "paper | exact"]),
        (["rollout.context=windows"], ["window?"]),
        (["env.options=train"], ['env.options = "train"', "table"]),
        (["env.train.generate.x=1"], ["env.train.generate.x", "not a table"]),
        (["train=3"], ["train = 3", "section"]),
        (["train={step=3}"], ["train.steps?"]),
        (["--preset", "alfword-4b"], ["alfword-4b", "alfworld-4b?"]),
        (["--preset"], ["--preset"]),
        (["--dryrun"], ["--dryrun", "--dry-run?"]),
        (["--train.steps=3"], ["--train.steps=3", "train.steps=VALUE"]),
        (["--steps", "3"], ["--steps", "train.steps=VALUE"]),
        (["train.steps"], ["train.steps=VALUE"]),
        (["absent.toml"], ["absent.toml", "No such file"]),
        (["a.toml", "b.toml"], ["a.toml and b.toml"]),
    ],
)
def test_bad_usage_is_one_line_that_names_the_remedy(argv, parts):
    line = message(*argv)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["schedule.rho.kind=adaptive"], ["schedule.rho.kind=adaptive", "kappa"]),
        (["schedule.kappa.kind=exponential", "schedule.kappa.end=0"], ["schedule.kappa", "cosine"]),
        (["schedule.kappa.kind=adaptive", "eval.every=0"], ["eval.every"]),
        (["schedule.kappa.kind=adaptive", "eval.teacher=false"], ["eval.teacher"]),
        (
            ["schedule.kappa.kind=adaptive", "env.dev={}"],
            ["schedule.kappa.kind=adaptive", "env.dev, which is empty", "env.dev='{...}'"],
        ),
        (
            ["checkpoint.keep_best=true", "env.name=guess:Guess"],
            ["checkpoint.keep_best=true", "env.dev, which is empty"],
        ),
        (["objective.divergence=jsd", "objective.alpha=1"], ["objective.alpha=1", "jsd"]),
        (["objective.divergence=skew_reverse_kl", "objective.alpha=1"], ["objective.alpha=1", "skew_reverse_kl"]),
        (["objective.dual_clip=0.5"], ["objective.dual_clip=0.5"]),
        (["objective.mismatch_mask=1"], ["objective.mismatch_mask=1", "more than 1, or 0"]),
        (
            ["objective.ratio=sequence", "train.minibatch_rows=0"],
            ["objective.ratio=sequence", "train.minibatch_rows=0 and train.epochs=1"],
        ),
        (
            ["objective.preset=opd", "objective.divergence=jsd", "objective.ratio=sequence"],
            ["objective.ratio=sequence", "objective.divergence=jsd", "schedule.rho"],
        ),
        (["objective.preset=opd", "train.resample_flat=2"], ["train.resample_flat=2", "schedule.rho"]),
        (["objective.advantage=rloo"], ["objective.advantage=rloo", "set objective.baseline=trajectory"]),
        (["train.group_size=1"], ["train.group_size=1", "opd"]),
        (["rollout.tensor_parallel=2"], ["rollout.tensor_parallel=2", "rollout.engine=vllm"]),
        (
            ["rollout.context=full", "rollout.prompt_tokens=100", "rollout.response_tokens=100"],
            ["rollout.response_tokens=100", "rollout.prompt_tokens"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(argv, parts):
    line = message(*argv)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "argv",
    [
        ["schedule.kappa.kind=adaptive"],
        ["env.dev={}"],
        ["checkpoint.keep_best=true", "env.name=guess:Guess", "env.dev.seed=2"],
        ["schedule.kappa.kind=exponential"],
        ["objective.divergence=skew_reverse_kl", "objective.alpha=0"],
        ["objective.dual_clip=0", "objective.tis_cap=1"],
        ["objective.mismatch_mask=1.001", "objective.clip_high=0.01"],
        ["objective.ratio=sequence", "train.minibatch_rows=0", "train.epochs=2"],
        ["objective.preset=opd", "objective.ratio=sequence"],
        ["objective.preset=sequential", "train.resample_flat=2"],
        ["train.group_size=1", "objective.preset=opd"],
        ["rollout.tensor_parallel=2", "rollout.engine=vllm"],
        ["rollout.context=window", "rollout.prompt_tokens=100", "rollout.response_tokens=100"],
    ],
)
def test_their_neighbours_are_accepted(argv):
    parse(argv)


def test_errors_in_a_file_name_the_file(write):
    assert message(write("train.steps = 0")).startswith(write("train.steps = 0") + ": train.steps = 0")
    assert "my.toml: train.stps is not a key" in message(write("[train]\nstps = 3"))
    assert "line 2" in message(write("[train]\nsteps = = 3"))
    # The level that set the value is blamed, not a file below it.
    assert "my.toml" not in message(write("train.steps = 3"), "train.steps=0")


def test_an_unreadable_file_is_one_line(tmp_path):
    assert str(tmp_path) in message(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b'student.path = "\xe9"')
    assert "latin.toml" in message(str(tmp_path / "latin.toml"))


@pytest.mark.parametrize("model", [{"max_position_embeddings": 128}, {"text_config": {"max_position_embeddings": 128}}])
@pytest.mark.parametrize(("context", "prompt"), [("full", 128), ("window", 100)])
def test_rows_longer_than_the_model_are_refused(model, context, prompt):
    def config(tokens):
        return load(
            overrides=[f"rollout.context={context}", f"rollout.prompt_tokens={tokens}", "rollout.response_tokens=28"]
        )

    check_model(config(prompt), "m", model)
    with pytest.raises(UserError, match=r"129 exceeds the 128 positions of model 'm'"):
        check_model(config(prompt + 1), "m", model)
    check_model(config(prompt + 1), "m", {})
