"""Predicted seconds of a step: what they scale with, and against estimates and measurements made elsewhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from atod_fast.config.settings import load
from atod_fast.envs.protocol import Usual
from atod_fast.errors import UserError
from atod_fast.machines import GPUS, Machines, parse
from atod_fast.models import skeleton
from atod_fast.plan.seconds import seconds
from atod_fast.plan.shapes import Shape, shape_of
from atod_fast.plan.tokens import Step, step_bounds, usual_step
from atod_fast.published import CONFIGS
from atod_fast.rollout.engines.protocol import Room

GPU_STEP = Path(__file__).resolve().parents[2] / "bench" / "results" / "gpu_step.json"
USUAL = Step(128, 4480, 4480, 4480 * 470, 4480 * 60, 18)


def published(name: str) -> Shape:
    return shape_of(skeleton(AutoConfig.for_model(**CONFIGS[name])))


def runtime(machines: Machines, **changes) -> SimpleNamespace:
    common = {"student_dtype": torch.bfloat16, "teacher_dtype": torch.bfloat16, "liger": False, "engine": "vllm"}
    common |= {
        "room": Room(changes.pop("at_once", 64), False, 0),
        "compiled": False,
        "checkpointing": True,
        "gathered": False,
        "joined": 1,
    }
    return SimpleNamespace(**common | {"shards": machines.per_node, "ranks": machines.ranks} | changes)


def predicted(preset: str, *overrides: str, on: str = "8xh100", step: Step = USUAL, **changes) -> dict[str, float]:
    config, machines = load(preset, None, overrides), parse(on)
    models = published(config.student.path), published(config.teacher.path)
    return seconds(config, *models, runtime(machines, **changes), machines, step)


@pytest.mark.parametrize(("preset", "expected"), [("alfworld-1.7b", 37), ("alfworld-4b", 68)])
def test_a_usual_step_takes_what_an_independent_estimate_says(preset, expected):
    assert sum(predicted(preset).values()) == pytest.approx(expected, rel=0.15)


def test_the_measured_step_of_one_gpu():
    """Scoring is fitted, so it says only that the formulas are those of the fit; the update is predicted."""
    measured = json.loads(GPU_STEP.read_text())["steps"][-1]
    sizes = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    student, teacher = (
        shape_of(
            skeleton(AutoConfig.for_model("qwen3", vocab_size=49152, hidden_size=h, intermediate_size=3 * h, **sizes))
        )
        for h in (1024, 2048)
    )
    config = load("alfworld-0.6b", None, ["rollout.concurrency=64"])
    machines = parse("1xh100")
    step = Step(64, 384, 384, 384 * 343, 384 * 64, 2)
    told = seconds(
        config, student, teacher, runtime(machines, engine="transformers", checkpointing=False), machines, step
    )
    assert told["teacher"] == pytest.approx(measured["time/teacher"], rel=0.1)
    assert told["score"] == pytest.approx(measured["time/score"], rel=0.1)
    assert told["update"] == pytest.approx(measured["time/train"], rel=0.35)
    assert told["rollout"] == pytest.approx(measured["time/rollout"], rel=0.15)


def test_what_each_phase_grows_with():
    base = predicted("alfworld-1.7b")
    twice = replace(USUAL, rows=2 * USUAL.rows, tokens=2 * USUAL.tokens, action_tokens=2 * USUAL.action_tokens)
    more = predicted("alfworld-1.7b", step=twice)
    for phase in ("teacher", "score", "update", "host"):
        assert more[phase] == pytest.approx(2 * base[phase], rel=0.05), phase
    assert predicted("alfworld-1.7b", checkpointing=False)["update"] < base["update"]
    for faster in ("liger", "compiled"):
        quick = predicted("alfworld-1.7b", **{faster: True})
        assert all(quick[phase] < base[phase] for phase in ("teacher", "score", "update")), faster
    assert predicted("alfworld-1.7b", on="4xh100")["teacher"] == pytest.approx(2 * base["teacher"], rel=0.05)
    assert (
        predicted("alfworld-1.7b", on="8xb200")["update"]
        < base["update"]
        < predicted("alfworld-1.7b", on="8xa100")["update"]
    )
    assert predicted("alfworld-1.7b", at_once=4)["rollout"] > 3 * base["rollout"]
    assert predicted("alfworld-1.7b", engine="transformers")["rollout"] > 5 * base["rollout"]
    exact = predicted("alfworld-1.7b", "objective.preset=exact")
    assert exact["score"] > base["score"] and exact["update"] > base["update"]


def test_epochs_and_a_sequence_s_ratio_cost_passes_of_the_update_alone():
    base, step = predicted("alfworld-1.7b"), replace(USUAL, updates=3 * USUAL.updates)
    thrice = predicted("alfworld-1.7b", "train.epochs=3", step=step)
    assert thrice["update"] == pytest.approx(3 * base["update"], rel=0.01)
    assert thrice["teacher"] == pytest.approx(base["teacher"], rel=0.01)
    sequence = predicted("alfworld-1.7b", "objective.ratio=sequence")
    assert sequence["update"] == pytest.approx(base["update"] + base["score"] * (1 - 1 / USUAL.updates), rel=0.01)


def test_vllm_s_own_kernels_do_not_depend_on_liger():
    on, off = (predicted("alfworld-1.7b", liger=liger)["rollout"] for liger in (True, False))
    assert on == off


def test_a_teacher_is_gathered_for_every_micro_batch_and_nodes_reduce_once_an_update():
    """30B parameters in bf16 cross the links once a micro-batch: with small ones, that is what takes the time."""
    small = predicted("alfworld-4b", "train.microbatch_tokens=2560")
    assert small["teacher"] > 1.8 * predicted("alfworld-4b")["teacher"]
    passes = -(-USUAL.tokens // 8 // 2560)
    sent = 2 * published("Qwen/Qwen3-30B-A3B").parameters * 7 / 8 * passes / GPUS["h100"].link
    assert small["teacher"] >= sent
    assert predicted("alfworld-4b", "train.microbatch_tokens=2560", gathered=True)["teacher"] < sent
    joined = predicted("alfworld-4b", "train.microbatch_tokens=2560", joined=4)["teacher"]
    assert joined < 0.6 * small["teacher"]
    twice = replace(USUAL, rows=2 * USUAL.rows, tokens=2 * USUAL.tokens, action_tokens=2 * USUAL.action_tokens)
    one, two = predicted("alfworld-4b")["update"], predicted("alfworld-4b", on="2x8xh100", step=twice)["update"]
    extra = USUAL.updates * 8 * published("Qwen/Qwen3-4B").parameters / 8 / GPUS["h100"].network
    assert two - one == pytest.approx(extra, rel=0.1)


def test_a_usual_step_is_that_of_the_environment_within_the_bounds_of_the_settings():
    usual = Usual(turns=35, prompt_tokens=410, response_tokens=60)
    step = usual_step(load("alfworld-1.7b"), usual)
    assert step == USUAL
    short = usual_step(load("alfworld-1.7b", None, ["env.max_turns=10", "rollout.response_tokens=20"]), usual)
    assert short == Step(128, 1280, 1280, 1280 * 430, 1280 * 20, 5)
    assert usual_step(load("alfworld-1.7b", None, ["rollout.context=full"]), usual) is None
    most = step_bounds(load("alfworld-1.7b"))
    assert step.tokens < most.tokens and step.updates < most.updates


def test_machines_by_name():
    assert parse("8xH100") == Machines(GPUS["h100"], 1, 8)
    assert (parse("2x8xa100").ranks, str(parse("2x8xa100"))) == (16, "2 nodes of 8 x A100 80GB")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8xh10", "h10 is not a GPU known here .*; did you mean h100"),
        ("h100", r"write \[NODESx\]COUNTxGPU"),
        ("0xh100", "at least 1"),
        ("8x h100", "write"),
    ],
)
def test_machines_that_are_none(text, reason):
    with pytest.raises(UserError, match=reason):
        parse(text)
