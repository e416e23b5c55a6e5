"""Settings: levels and their precedence, objective presets, messages for bad input, the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from atod_fast import __version__
from atod_fast.cli import WIDTH, parse, parse_evaluation
from atod_fast.config import Config, Env, Objective, Schedule, Slide, Student, Teacher, Train, Turns
from atod_fast.config.settings import (
    FIELDS,
    FOLDER,
    OBJECTIVES,
    PRESETS,
    TABLES,
    check_env,
    check_model,
    check_ranks,
    defaults,
    demo_values_warning,
    is_section,
    load,
    override_level,
    preset_level,
    preset_summary,
    same_tasks,
    to_toml,
)
from atod_fast.errors import UserError
from helpers.paths import ROOT

OWN = ["student.path=/models/mine", "teacher.path=/models/larger", "env.name=guess:Guess"]  # what preset `own` asks for
KEYS = [key for key, field in FIELDS.items() if not is_section(field)]


def values(config: Config) -> dict[str, Any]:
    """{dotted key: value} of every key."""
    out = {}
    for key in KEYS:
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        out[key] = value
    return out


def message(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(argv)
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- precedence


def test_later_levels_win(write):
    file = write("train.steps = 7\ntrain.seed = 7\n[eval]\nevery = 7")
    config = parse([file, "--preset", "alfworld-0.6b", "train.seed=8"]).config
    assert config.train.seed == 8  # override over file
    assert config.train.steps == 7  # file over preset
    assert config.eval.every == 7
    assert config.train.learning_rate == preset_level("alfworld-0.6b")["train.learning_rate"]  # preset over default
    assert config.guard == Config().guard  # default


def test_nothing_given_is_the_demo_and_the_defaults():
    assert parse([]).config == parse(["--preset", "demo"]).config == Config()


def test_arguments_come_in_any_order(write):
    file = write("train.steps = 7")
    options = parse(
        [
            "train.seed=3",
            "--preset",
            "demo",
            file,
            "--dry-run",
            "eval.every=9",
            "--run-dir",
            "runs/x",
            "--resume",
            "auto",
        ]
    )
    assert (options.config.train.seed, options.config.train.steps, options.config.eval.every) == (3, 7, 9)
    assert (options.name, str(options.run_dir), options.resume, options.dry_run) == ("my", "runs/x", "auto", True)


def test_a_run_is_named_after_its_file_or_its_preset(write):
    assert parse([]).name == "demo"
    assert parse(["--preset", "webshop-4b"]).name == "webshop-4b"
    assert parse(["--preset", "webshop-4b", write("", "tuned.toml")]).name == "tuned"


def test_a_file_whose_path_holds_an_equals_sign_is_a_file(tmp_path, write):
    (tmp_path / "lr=1").mkdir()
    assert parse([write("train.steps = 5", "lr=1/a.toml")]).config.train.steps == 5


# --- objective presets


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_preset_replaces_any_other(name, write):
    for other in OBJECTIVES:
        found = values(parse([write(f'objective.preset = "{other}"'), f"objective.preset={name}"]).config)
        assert {key: found[key] for key in OBJECTIVES[name]} == OBJECTIVES[name]
        assert found["objective.preset"] == name


def test_objective_presets_own_the_same_keys_and_no_horizon():
    assert len({frozenset(level) for level in OBJECTIVES.values()}) == 1
    assert not {key for key in OBJECTIVES["paper"] if key.endswith(("horizon", "hold"))}
    assert set(OBJECTIVES["paper"]) <= set(KEYS)


def test_the_default_objective_is_what_its_preset_says():
    assert values(load(overrides=[f"objective.preset={Config().objective.preset}"])) == values(Config())


def test_objective_preset_in_an_override_replaces_lower_levels(write):
    file = write('turns.fuse = "max"\nobjective.divergence = "jsd"\nschedule.kappa = { kind = "cosine", horizon = 33 }')
    config = parse([file, "objective.preset=opd"]).config
    assert {key: values(config)[key] for key in OBJECTIVES["opd"]} == OBJECTIVES["opd"]
    assert config.schedule.kappa.horizon == 33  # not a key that objective presets own


def test_an_explicit_key_beside_or_after_the_objective_preset_wins(write):
    file = write('[objective]\npreset = "opd"\n[turns]\nfuse = "max"')
    assert parse([file]).config.turns.fuse == "max"
    assert parse([file, "turns.fuse=mean"]).config.turns.fuse == "mean"
    assert parse(["turns.fuse=max", "objective.preset=opd"]).config.turns.fuse == "max"
    assert parse([file, "objective.preset=fixed"]).config.turns.fuse == OBJECTIVES["fixed"]["turns.fuse"]


def test_the_family_of_objectives():
    def ends(name):
        schedule = load(overrides=[f"objective.preset={name}"]).schedule
        return [(s.kind, s.start, s.end) for s in (schedule.kappa, schedule.rho)]

    assert ends("paper") == ends("exact") == [("linear", 1, 0.1), ("linear", 1, 2)]
    assert ends("opd") == [("constant", 1, 1), ("constant", 0, 0)]
    assert ends("grpo") == [("constant", 0, 0), ("constant", 1, 1)]
    assert ends("fixed") == [("constant", 1, 1), ("constant", 1, 1)]
    assert ends("sequential") == [("step", 1, 0), ("step", 0, 1)]
    exact = load(overrides=["objective.preset=exact"])
    correction = {name: load(overrides=[f"objective.preset={name}"]).objective.tis_cap for name in OBJECTIVES}
    assert correction == dict.fromkeys(OBJECTIVES, 2.0) | {"paper": 0.0}
    assert (exact.objective.divergence, exact.turns.disagreement, exact.turns.uncertainty, exact.turns.budget) == (
        "reverse_kl",
        "exact",
        "exact",
        "mean1",
    )


# --- the same from Python


def same(*configs: Config) -> bool:
    return all(values(config) == values(configs[0]) for config in configs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_preset_expands_however_a_config_is_made(name):
    chosen = {"preset": name}
    start = load(
        overrides=["objective.preset=fixed", "objective.divergence=k2", "turns.fuse=max", "schedule.rho.end=7"]
    )
    assert same(
        load(overrides=[f"objective.preset={name}"]),
        Config(objective=chosen),
        Config(objective=Objective(preset=name)),
        Config(objective=Objective(preset=name), schedule={}, turns=Turns()),
        Config.model_validate({"objective": chosen}),
        Config.model_validate_json(f'{{"objective": {{"preset": "{name}"}}}}'),
        Config().model_copy(update={"objective": chosen}),
        start.model_copy(update={"objective": Objective(preset=name)}),
    )


def test_keys_given_beside_the_preset_win_and_the_rest_is_the_presets():
    tables = {
        "objective": {"preset": "grpo", "clip": 0.3},
        "schedule": {"kappa": {"horizon": 10}},
        "turns": {"fuse": "max"},
    }
    models = {
        "objective": Objective(preset="grpo", clip=0.3),
        "schedule": Schedule(kappa=Slide(horizon=10)),
        "turns": Turns(fuse="max"),
    }
    wanted = load(
        overrides=["objective.preset=grpo", "objective.clip=0.3", "schedule.kappa.horizon=10", "turns.fuse=max"]
    )
    assert same(
        wanted, Config(**tables), Config(**models), Config(**models | {"schedule": {"kappa": Slide(horizon=10)}})
    )
    assert (wanted.schedule.kappa.start, wanted.schedule.kappa.horizon, wanted.turns.fuse) == (0.0, 10, "max")
    assert Config(schedule={"rho": {"horizon": 10}}) == load(overrides=["schedule.rho.horizon=10"]), (
        "a slide is filled up with its own ends"
    )


def test_a_copy_is_a_checked_config_that_differs_in_what_was_asked_for():
    start = load(overrides=["objective.preset=opd", "train.seed=3", "schedule.kappa.horizon=9"])
    copy = start.model_copy(update={"train": Train(steps=7)})
    assert values(copy) == values(start) | {"train.steps": 7, "train.seed": 0}, (
        "a section is replaced, others are left as they are"
    )
    assert start.model_copy() == start
    moved = start.model_copy(update={"objective": {"preset": "sequential"}})
    assert moved.schedule.kappa == Slide(kind="step", start=1.0, end=0.0, horizon=9)
    with pytest.raises(ValidationError, match="train.steps"):
        start.model_copy(update={"train": {"steps": 0}})


@pytest.mark.parametrize("objective", ["grpo", {"preset": "grop"}, {"preset": 3}, 3])
def test_what_is_no_objective_is_refused(objective):
    with pytest.raises(ValidationError, match="objective"):
        Config(objective=objective)


# --- presets of the paper's runs

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


def flatten(table: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in table.items():
        key = prefix + name
        out |= {key: value} if key in TABLES or not isinstance(value, dict) else flatten(value, f"{key}.")
    return out


# Keys that depend on the machine or on taste, or that preset `paper` does not use.
FREE = {
    "rollout.date",
    "rollout.engine",
    "rollout.tensor_parallel",
    "rollout.kv_cache_gib",
    "eval.teacher",
    "train.seed",
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


# --- free tables


def test_a_table_in_a_file_replaces_and_a_dotted_option_adds(write):
    start = write('[env]\nname = "alfworld"\ntrain = { generate = 5, seed = 6 }')
    assert parse([start]).config.env.train == {"generate": 5, "seed": 6}
    assert parse([start, "env.train.generate=50"]).config.env.train == {"generate": 50, "seed": 6}
    assert parse([start, 'env.train={split="train"}']).config.env.train == {"split": "train"}
    assert parse([start, "env.train={}", "env.train.split=train", "env.train.deep.er=[1, 2]"]).config.env.train == {
        "split": "train",
        "deep": {"er": [1, 2]},
    }


def test_another_environment_drops_the_options_of_the_one_before():
    env = parse(["env.name=my_worlds:World", "env.options.level=3"]).config.env
    assert (env.options, env.train, env.eval, env.dev) == ({"level": 3}, {}, {}, {})


@pytest.mark.parametrize(("one", "other"), [("train", "eval"), ("train", "dev"), ("eval", "dev")])
def test_equal_splits_are_said_where_both_are_used(one, other):
    same = ["env.dev={seed=5}", f"env.{one}={{seed=9}}", f"env.{other}={{seed=9}}"]
    lines = same_tasks(parse([*same, "checkpoint.keep_best=true"]).config)
    assert len(lines) == 1 and lines[0].startswith(f"env.{one} and env.{other} are the same: ")
    assert len(same_tasks(parse(same).config)) == (other != "dev")
    assert same_tasks(parse(["checkpoint.keep_best=true"]).config) == []


def test_splits_are_equal_where_one_leaves_out_the_default_of_the_other():
    given = ["env.options={generate=40}", "env.train={seed=9}", 'env.eval={seed=9, scene="small"}']
    assert len(same_tasks(parse(given).config)) == 1
    assert same_tasks(parse([*given, 'env.eval.scene="full"']).config) == []


def test_an_error_in_the_options_names_the_split_they_are_of():
    def line(*argv):
        with pytest.raises(UserError) as error:
            check_env(parse(argv).config)
        return str(error.value)

    assert line("checkpoint.keep_best=true", "env.dev={sead=1}").startswith(
        "env.dev: env.name='alfworld' has no option"
    )
    assert line("env.eval.sead=1").startswith("env.eval: env.name='alfworld' has no option 'sead'")
    assert line("env.options.sead=1").startswith("env.name='alfworld' has no option"), "the option of all splits"
    assert line("env.name=alfword").startswith("env.name='alfword' is not known")


def test_tasks_to_choose_by_go_with_the_tasks_they_are_apart_from(write):
    official = write('[env]\ntrain = { split = "train" }\neval = { split = "valid_seen" }')
    assert parse([official]).config.env.dev == Config(env={"train": {"split": "train"}}).env.dev == {}
    assert "env.dev, which is empty" in message(official, "checkpoint.keep_best=true")
    assert parse([official, "env.dev={split='valid_unseen'}"]).config.env.dev == {"split": "valid_unseen"}
    assert parse(["--preset", "alfworld-1.7b", "env.eval={generate=9}"]).config.env.dev == {}
    assert parse(["env.eval.seed=3"]).config.env.dev == Config().env.dev, "an option more is no other table"


# --- values


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=3", "train.steps", 3),
        ("train.grad_clip=2", "train.grad_clip", 2.0),
        ("train.learning_rate=1e-6", "train.learning_rate", 1e-6),
        ("train.betas=[0, 0.99]", "train.betas", (0.0, 0.99)),
        ("student.path=/models/x y", "student.path", "/models/x y"),
        ('student.path="/models/x"', "student.path", "/models/x"),
        ("student.path=2024", "student.path", "2024"),
        ("student.path=a=b", "student.path", "a=b"),
        ("rollout.thinking=true", "rollout.thinking", True),
        ("student.liger=on", "student.liger", "on"),
        ("schedule.kappa={start=2, horizon=10}", "schedule.kappa.horizon", 10),
    ],
)
def test_override_values_are_toml_or_else_text(override, key, value):
    assert values(parse([override]).config)[key] == value


@given(st.text().filter(lambda text: not text.lstrip().startswith(("'", '"'))))
def test_any_unquoted_text_is_a_path(text):
    assert override_level([f"student.path={text}"]) == {"student.path": text}


def test_a_line_break_in_a_value_is_no_second_key():
    assert override_level(['env.options.note="a"\ntrain.steps = 1']) == {"env.options.note": '"a"\ntrain.steps = 1'}


def test_the_last_of_equal_overrides_wins():
    assert parse(["train.steps=3", "train.steps=4"]).config.train.steps == 4
    again = parse(["env.train={a=1}", "env.train.b=2", "env.train={c=3}"]).config.env.train
    assert again == {"c": 3}


# --- bad input


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


@pytest.mark.parametrize(("tasks", "ranks", "remedy"), [(8, 3, "6 or 9"), (4, 8, "use 8")])
def test_ranks_that_cannot_share_the_tasks_are_refused(tasks, ranks, remedy):
    config = load(overrides=[f"train.tasks_per_step={tasks}"])
    with pytest.raises(UserError, match=remedy):
        check_ranks(config, ranks)
    check_ranks(config, 4)


def test_engines_of_several_ranks_are_whole_and_share_the_tasks():
    config = load(overrides=["rollout.engine=vllm", "rollout.tensor_parallel=4", "train.tasks_per_step=2"])
    check_ranks(config, 8)
    for ranks, line in (
        (6, "rollout.tensor_parallel=4 does not divide 6 ranks"),
        (12, "train.tasks_per_step=2 cannot .* 3 engines of 12 ranks; use 3"),
    ):
        with pytest.raises(UserError, match=line):
            check_ranks(config, ranks)


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


# --- the resolved configuration

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.one_of(st.integers(0, 2**40), st.floats(0, 1e30), st.sampled_from([0, 1, 0.5, 1e-6]))
ANYTHING = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)
LEAVES = {int: st.integers(0, 1000), float: NUMBERS, bool: st.booleans(), str: TEXT}


def candidate(key: str) -> st.SearchStrategy:
    annotation = FIELDS[key].annotation
    kind = get_origin(annotation) or annotation
    if kind is Literal:
        return st.sampled_from(get_args(annotation))
    if kind is tuple:
        return st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))
    return st.dictionaries(TEXT, ANYTHING, max_size=3) if kind is dict else LEAVES[kind]


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much, HealthCheck.too_slow],
    deadline=None,
)
@given(data=st.data())
def test_the_resolved_configuration_reads_back_equal(tmp_path, data):
    nested = Config().model_dump()
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=8, unique=True)):
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table[section]
        table[name] = data.draw(candidate(key), label=key)
    try:
        config = Config.model_validate(nested)
    except ValidationError:
        assume(False)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8", newline="")
    assert load(file=file) == config
    # Lower levels do not matter: a resolved file states every key.
    assert load("webshop-4b", file) == config


def test_every_preset_reads_back_equal(tmp_path):
    for name in PRESETS:
        for objective in OBJECTIVES:
            config = load(name, None, [f"objective.preset={objective}", *OWN])
            (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
            assert load(file=tmp_path / "config.toml") == config


# --- help


def test_help_documents_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH
    flat = " ".join(text.split())
    for key, default in defaults().items():
        assert f"\n  {key} = " in text, key
        assert FIELDS[key].description and " ".join(FIELDS[key].description.split()) in flat, key
        if isinstance(default, int | float | str):
            assert (
                f"{key} = "
                + (
                    str(default).lower()
                    if isinstance(default, bool)
                    else f'"{default}"'
                    if isinstance(default, str)
                    else str(default)
                )
                in text
            )
    for key in KEYS:
        for choice in get_args(FIELDS[key].annotation) if get_origin(FIELDS[key].annotation) is Literal else ():
            assert choice in flat
    for table in TABLES:
        assert f"{table} = {{" in text


def test_list_presets_names_each(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--list-presets"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert all(len(line.split()) > 3 for line in lines)


@pytest.mark.parametrize(
    "call", ["train --help", "train --list-presets", "train --version", "evaluate --help", "evaluate --version"]
)
def test_what_only_prints_imports_neither_torch_nor_transformers(call):
    program, flag = call.split()
    code = f"""
import runpy, sys
sys.argv = [{program!r}, {flag!r}]
try:
    runpy.run_module("atod_fast.{program}", run_name="__main__", alter_sys=True)
finally:
    print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert {"--help": "usage: ", "--list-presets": "own ", "--version": f"atod_fast {__version__}\n"}[
        flag
    ] in done.stdout


def test_a_rank_other_than_the_first_prints_no_help():
    found = [
        subprocess.run(
            [sys.executable, "-m", "atod_fast.train", "--version"],
            capture_output=True,
            text=True,
            env=os.environ | {"RANK": rank},
        )
        for rank in "01"
    ]
    assert [(done.returncode, bool(done.stdout)) for done in found] == [(0, True), (0, False)]


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


def test_a_copied_section_with_another_preset_is_that_preset():
    config = Config(objective={"entropy_bonus": 0.3})
    copied = config.model_copy(update={"objective": config.objective.model_copy(update={"preset": "exact"})})
    assert values(copied) == values(Config(objective={"preset": "exact", "entropy_bonus": 0.3}))


def test_a_date_is_written_in_one_way():
    assert Config(rollout={"date": "2026-11-27"}).rollout.date == "2026-11-27"
    for wrong in ("20261127", "27.11.2026", "2026-13-01"):
        with pytest.raises(ValueError, match="rollout.date"):
            Config(rollout={"date": wrong})
