"""`--dry-run --on`: the plan for other machines."""

from __future__ import annotations

import re

import pytest

from atod_fast import train
from atod_fast.cli import parse
from atod_fast.dry_run import describe
from atod_fast.errors import UserError
from atod_fast.machines import parse as machines

TASKS = ["env.train={generate=9}", "env.eval={generate=200}", "env.dev={}"]


def told(*arguments: str, on: str = "8xh100") -> str:
    return describe(parse(["--preset", "alfworld-4b", *TASKS, *arguments]).config, 1, on=machines(on))


def column(text: str, name: str) -> list[float]:
    """Return the numbers of the line `name` of the last table that has one."""
    line = re.findall(rf"^# {name} {{2,}}(.*)$", text, re.MULTILINE)[-1]
    return [float(word) for word in line.split()]


def test_eight_gpus_are_planned_as_if_all_were_installed_there():
    text = told()
    assert "# plan for 8 x H100 80GB, at most:" in text
    assert "rollouts by vllm, 16 trajectories at a time" in text and "student varlen and teacher varlen" in text
    assert "can be up to 40,448 (the models' positions)" in text, "40,960 less a response of 512"
    phases = ("rollout", "teacher", "score", "update", "optimiser", "resync", "host")
    usual, largest = zip(*(column(text, phase) for phase in phases), strict=True)
    assert column(text, "total") == pytest.approx([sum(usual), sum(largest)], abs=0.5)
    assert all(one <= most for one, most in zip(usual, largest, strict=True))
    assert "usual: 35 turns of a prompt of 454 tokens and a response of 60" in text


def test_several_nodes_shard_within_a_node():
    text = told(on="2x8xh100")
    assert "# plan for 2 nodes of 8 x H100 80GB, at most:" in text
    assert "sharded over the 8 ranks of a node, a copy on each of 2" in text
    halved = [one / two for one, two in zip(column(told(), "score"), column(text, "score"), strict=True)]
    assert halved == pytest.approx([2, 2], rel=0.1)


def test_without_a_teacher_and_in_an_environment_without_usual_sizes():
    tasks = ["env.name=helpers.worlds:Corridor", "env.eval={}", "env.train={}", "eval.tasks=1"]
    text = told("objective.preset=grpo", "teacher.path=", *tasks)
    assert not re.search("^# teacher {2,}", text, re.MULTILINE)
    assert len(column(text, "rollout")) == 1 and "usual:" not in text


def test_what_does_not_fit_is_refused_with_the_key_that_makes_it_fit():
    wide = ["student.gradient_checkpointing=false", "train.microbatch_tokens=32768"]
    with pytest.raises(UserError, match=r"needs \d+\.\d GiB \(update; the largest part is activations, ") as error:
        told(*wide)
    keys = re.search("; set (.*)$", str(error.value))[1].split()
    assert keys and told(*wide, *keys)
    with pytest.raises(UserError, match="use more GPUs, larger ones, or smaller models"):
        told("rollout.kv_cache_gib=70", on="1xh100")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--on", "8xh100"], "--on goes with --dry-run"),
        (["--dry-run", "--on", "8xh10"], "h10 is not a GPU known here"),
        (["--dry-run", "--on", "eight"], r"write \[NODESx\]COUNTxGPU"),
    ],
)
def test_a_wrong_use_is_one_line(arguments, reason):
    with pytest.raises(UserError, match=reason):
        parse(arguments)


def test_world_size_must_agree(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.main(["--dry-run", "--on", "8xh100"]) == 2
    assert "has 8 GPUs, and WORLD_SIZE=4; leave WORLD_SIZE out" in capsys.readouterr().err
