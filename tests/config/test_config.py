"""Settings: levels and their precedence, objective presets, messages for bad input, the command line."""

from __future__ import annotations

from types import UnionType
from typing import Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from atod_fast.cli import parse
from atod_fast.config import Config
from atod_fast.config.settings import (
    FIELDS,
    check_env,
    load,
    override_level,
    preset_level,
    same_tasks,
    to_toml,
)
from atod_fast.errors import UserError
from helpers.config import KEYS, message, values

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


# --- the resolved configuration

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.one_of(st.integers(0, 2**40), st.floats(0, 1e30), st.sampled_from([0, 1, 0.5, 1e-6]))
ANYTHING = st.recursive(
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
)
LEAVES = {int: st.integers(0, 1000), float: NUMBERS, bool: st.booleans(), str: TEXT}


def candidate(key: str) -> st.SearchStrategy:
    return of_type(FIELDS[key].annotation)


def of_type(annotation) -> st.SearchStrategy:
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return st.one_of(map(of_type, get_args(annotation)))
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


def test_a_date_is_written_in_one_way():
    assert Config(rollout={"date": "2026-11-27"}).rollout.date == "2026-11-27"
    for wrong in ("20261127", "27.11.2026", "2026-13-01"):
        with pytest.raises(ValueError, match="rollout.date"):
            Config(rollout={"date": wrong})
