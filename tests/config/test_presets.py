"""Presets: the paper's settings with their sources, the demos, and the preset for one's own model and environment."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from atod_fast.cli import parse, parse_evaluation
from atod_fast.config import Config, Env, Student, Teacher
from atod_fast.config.settings import (
    FOLDER,
    OBJECTIVES,
    PRESETS,
    demo_values_warning,
    load,
    preset_level,
    preset_summary,
    to_toml,
)
from helpers.config import KEYS, OWN, flatten, message, values
from helpers.paths import ROOT

SETTINGS = (
    "env.max_turns",
    "train.tasks_per_step",
    "eval.tasks",
    "rollout.prompt_tokens",
    "train.minibatch_rows",
    "objective.invalid_penalty",
    "rollout.history",
)
PAPER = {
    "alfworld": (50, 16, 128, 2048, 256, 0.1, 2),
    "webshop": (15, 16, 128, 4096, 64, 0.1, 2),
    "searchqa": (4, 128, 512, 4096, 256, 0.01, 4),
}
MODELS = {
    "0.6b": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B"),
    "1.7b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B"),
    "4b": ("Qwen/Qwen3-4B", "Qwen/Qwen3-30B-A3B"),
}
COMMON = {
    "train.learning_rate": 1e-6,
    "train.weight_decay": 0.01,
    "train.grad_clip": 1.0,
    "train.steps": 150,
    "train.group_size": 8,
    "train.epochs": 1,
    "train.warmup_steps": 0,
    "train.final_learning_rate": 1.0,
    "rollout.response_tokens": 512,
    "rollout.context": "window",
    "rollout.thinking": False,
    "eval.temperature": 0.4,
    "objective.preset": "paper",
    "objective.clip": 0.2,
    "objective.dual_clip": 3.0,
    "objective.entropy_bonus": 0.001,
    "schedule.kappa.horizon": 80,
    "schedule.rho.horizon": 80,
}


SCRIPTS = {  # where a launch script of the public implementation differs from the other tasks' and sizes'
    "searchqa": {"train.warmup_steps": 15, "eval.every": 15, "eval.temperature": 0.0},
    "alfworld-1.7b": {"schedule.kappa.horizon": 150, "schedule.rho.horizon": 150},
}


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("size", MODELS)
def test_presets_hold_the_papers_settings(task, size):
    config = load(f"{task}-{size}")
    found = values(config)
    common = COMMON | SCRIPTS.get(task, {}) | SCRIPTS.get(f"{task}-{size}", {})
    assert tuple(found[key] for key in SETTINGS) == PAPER[task]
    assert {key: found[key] for key in common} == common
    assert (config.student.path, config.teacher.path) == MODELS[size]
    assert config.env.name == task
    assert "generate" not in config.env.train


def sources() -> dict[str, dict[str, Any]]:
    """{part of a preset: {key: value}} of the tables in docs/paper.md; every row names a source."""
    tables: dict[str, dict[str, Any]] = {}
    part = ""
    for line in (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            part = next(iter(re.findall(r"`([^`]+)`$", line)), "").removesuffix(".toml")
        if row := re.fullmatch(r"\| (?:(\S+) \| )?`(\w+\.[\w.]+)` \| `(.+?)` \| (.+) \|", line):
            assert re.match(r"(paper|script|default|code|ours|as |your file)", row[4]), line
            tables.setdefault(row[1] or part, {})[row[2]] = tomllib.loads(f"value = {row[3]}")["value"]
    return tables


def test_the_docs_name_a_source_for_every_key_of_the_papers_presets():
    found = sources()
    parts = {part for name in PRESETS if name.split("-")[-1] in MODELS for part in PRESETS[name]}
    assert found.keys() == {"objective.preset=paper", *parts}
    assert found.pop("objective.preset=paper") == OBJECTIVES["paper"]
    for part, keys in found.items():
        assert keys == flatten(tomllib.loads((FOLDER / f"{part}.toml").read_text(encoding="utf-8"))), part


# Keys that depend on the machine or on taste, or that preset `paper` does not use.
FREE = {
    "rollout.date",
    "rollout.engine",
    "rollout.tensor_parallel",
    "rollout.kv_cache_gib",
    "rollout.sleep",
    "rollout.head_dtype",
    "rollout.enforce_eager",
    "rollout.async_scheduling",
    "rollout.concurrency",
    "train.seed",
    "train.shard",
    "objective.alpha",
    "objective.gigpo_omega",
    "objective.gigpo_gamma",
}


def test_a_presets_summary_is_one_sentence():
    summary = "ALFWorld with the paper's settings, Qwen3-1.7B taught by Qwen3-4B, annealed over all 150 steps"
    assert preset_summary("alfworld-1.7b") == summary


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("demo")])
def test_presets_state_their_method_and_inherit_no_tuning_of_the_demo(name):
    level = preset_level(name)
    stated = set(level) | set(OBJECTIVES[level["objective.preset"]])
    method = {
        key for key in KEYS if key.split(".")[0] in ("rollout", "eval", "train", "objective", "schedule", "turns")
    }
    assert method - stated == FREE & (method - stated)


@pytest.mark.parametrize("world", ["searchqa", "webshop"])
def test_the_demo_of_another_world_differs_in_the_world_its_models_and_the_size_of_a_step(world):
    found, demo = values(load(f"demo-{world}")), values(Config())
    changed = {key for key in found if found[key] != demo[key]}
    assert {"env.name", "student.path", "teacher.path"} <= changed
    assert all(
        key.startswith(("env.", "student.path", "teacher.path", "train.", "rollout.concurrency", "schedule."))
        for key in changed
    ), changed
    seeds = {found[f"env.{split}"]["seed"] for split in ("train", "eval", "dev")}
    assert found["env.name"] == world and len(seeds) == 3


# --- one's own model and environment


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_preset_of_ones_own_names_what_is_left_to_be_given(count):
    line = message("--preset", "own", *OWN[count:])
    for number, setting in enumerate(OWN):
        assert (setting.partition("=")[0] in line) == (number < count)
    assert "empty" in line


def test_the_preset_of_ones_own_needs_no_teacher_where_none_scores():
    config = parse(["--preset", "own", OWN[0], OWN[2], "objective.preset=grpo"]).config
    assert not config.teacher_scores and not config.teacher_plays


def test_the_preset_of_ones_own_holds_nothing_of_the_demo():
    found, demo = values(load("own", None, OWN)), values(Config())
    assert all(found[f"env.{name}"] == {} for name in ("options", "train", "eval", "dev"))
    assert {key: found[key] for key in COMMON if key not in ("rollout.response_tokens", "eval.temperature")} == {
        key: COMMON[key] for key in COMMON if key not in ("rollout.response_tokens", "eval.temperature")
    }
    tuned = (
        "train.learning_rate",
        "train.betas",
        "train.weight_decay",
        "rollout.context",
        "rollout.prompt_tokens",
        "rollout.response_tokens",
    )
    assert all(found[key] != demo[key] for key in tuned)
    assert found["student.compute_dtype"] == found["teacher.compute_dtype"] == "auto"


def test_the_demo_s_values_are_warned_of_where_a_real_model_meets_them():
    real = {
        "student": Student(path="/models/mine"),
        "teacher": Teacher(path="/models/larger"),
        "env": Env(name="guess:Guess"),
    }
    line = demo_values_warning(Config(**real), 135_000_000)
    assert "\n" not in line
    for part in (
        "train.learning_rate=0.0007",
        "rollout.response_tokens=9",
        "/models/mine",
        "135 million",
        "--preset own",
        "1e-6",
        "1e-5",
    ):
        assert part in line
    half = demo_values_warning(load("own", None, [*OWN, "train.learning_rate=7e-4"]), 596_000_000)
    assert "train.learning_rate=0.0007" in half and "rollout.response_tokens" not in half
    assert demo_values_warning(Config(**real), 9_000_000) is None, "tiny models of one's own"
    assert demo_values_warning(Config(), 135_000_000) is None, "the demo itself"
    assert all(
        demo_values_warning(load(name, None, OWN), 4_000_000_000) is None
        for name in PRESETS
        if not name.startswith("demo")
    )


def test_every_preset_reads_back_equal(tmp_path):
    for name in PRESETS:
        for objective in OBJECTIVES:
            config = load(name, None, [f"objective.preset={objective}", *OWN])
            (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
            assert load(file=tmp_path / "config.toml") == config


def test_an_evaluation_of_ones_own_needs_no_other_model_and_no_other_tasks(write):
    for chooser in ("checkpoint.keep_best=true", "schedule.kappa.kind='adaptive'"):
        saved = write(f"{chooser}\nenv.name='guess:Guess'")
        assert parse_evaluation(["mine", "--config", saved], None)[1].choosers == [], "an evaluation chooses nothing"
    arguments, config = parse_evaluation(["Qwen/Qwen3-0.6B", "--preset", "own", OWN[2], "eval.tasks=5"], None)
    assert (arguments.model, config.student.path, config.env.name, config.eval.tasks) == (
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-0.6B",
        "guess:Guess",
        5,
    )
