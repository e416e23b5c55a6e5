"""Merge settings into one Config: defaults < preset < TOML file < overrides `section.key=value`.

Each level is a flat `{dotted key: value}` dict, so that merging two is a loop and every error can name its key.
`objective.preset` expands into the keys it owns (methods.py), overriding lower levels; keys set in the same or a higher
level override it.
"""

from __future__ import annotations

import difflib
import inspect
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from atod_fast.config.methods import OBJECTIVES, Level, nest
from atod_fast.config.schema import Config, Section
from atod_fast.envs import check, find, parts_of
from atod_fast.errors import UserError

LARGEST_TINY = 10_000_000  # parameters of a model that the demo's values may fit
FOLDER = Path(__file__).parents[1]

PAPER = "config/presets/paper"

# The TOML files of each preset, in the package's folder; later files override earlier ones. A preset of the paper's
# runs is made of the settings that all runs share, those of the environment, those of the models, and those of this
# pair only.
PRESETS: dict[str, tuple[str, ...]] = {
    "demo": ("envs/alfworld/demo",),
    "demo-searchqa": ("envs/searchqa/demo",),
    "demo-webshop": ("envs/webshop/demo",),
    "own": (PAPER, "config/presets/own"),
    **{
        f"{env}-{size}": (PAPER, f"envs/{env}/preset", f"config/presets/{size}")
        for env in ("alfworld", "webshop", "searchqa")
        for size in ("0.6b", "1.7b", "4b")
    },
    "alfworld-1.7b": (PAPER, "envs/alfworld/preset", "config/presets/1.7b", "envs/alfworld/preset-1.7b"),
}


def _walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := section_of(field):
            yield from _walk(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section that a field of a section holds, None for a key."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


FIELDS: dict[str, FieldInfo] = dict(_walk(Config))  # sections and keys by dotted name, in order
TABLES = [
    key for key, field in FIELDS.items() if get_origin(field.annotation) is dict
]  # free tables: any option is a key


def load(preset: str | None = None, file: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the Config of a preset, a file and overrides.

    Raises:
        UserError: one line that names the key, its value, what was expected and, for an unknown name, a similar one.
    """
    merged = defaults()
    origin: dict[str, str] = {}  # where each key's value comes from, for messages
    levels = [("", preset_level(preset))] if preset is not None else []
    if file is not None:
        levels.append((f"{file}: ", dict(_flatten(read_toml(file), f"{file}: "))))
    levels.append(("", override_level(overrides)))
    for source, level in levels:
        _lay_over(merged, level)
        origin |= dict.fromkeys(level, source)
    try:
        return Config.model_validate(nest(merged))
    except ValidationError as error:
        raise UserError(_explain(error, merged, origin)) from None


def to_toml(config: Config) -> str:
    """Return the configuration as TOML; `load(file=...)` makes an equal Config of it."""
    return tomli_w.dumps(config.model_dump())


def from_toml(text: str) -> Config:
    """Return the Config that `to_toml` made `text` of."""
    return Config.model_validate(tomllib.loads(text))


def check_ranks(config: Config, ranks: int, node: int | None = None) -> int:
    """Return the number of ranks that share one copy of the parameters: `ranks`, or `node` with train.shard=node.

    node: ranks on a node; None: all.

    Raises:
        UserError: the nodes would have different numbers of ranks, or an engine would be incomplete.
    """
    check_engines(config, ranks, node)
    if config.train.shard == "all" or node is None or node >= ranks:
        return ranks
    if ranks % node:
        raise UserError(
            f"train.shard='node' needs the same number of ranks on every node, and {node} do not divide {ranks}; "
            "start torchrun with the same --nproc_per_node everywhere, or set train.shard=all"
        )
    return node


SAME_TASKS = {
    ("train", "eval"): "held-out success will be that of training tasks",
    ("train", "dev"): "the tasks to choose by will be training tasks",
    ("eval", "dev"): "held-out success will be that of the tasks that were chosen by",
}


def same_tasks(config: Config) -> list[str]:
    """Return a warning for every two splits in use that construct the same environment, or the same part of a mix.

    Options left out count as the environment's defaults.
    """
    used = {split: _worlds(config, split) for split in ("train", *config.evaluated)}
    return [
        f"env.{one} and env.{other} are the same{f' in part {label} of the mix' if label else ''}: {meaning}"
        for (one, other), meaning in SAME_TASKS.items()
        for label, world in used.get(other, {}).items()
        if world == used[one].get(label)
    ]


def _worlds(config: Config, split: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return name and options, with defaults, of the environment of a split; of each part of a mix by its label."""
    parts = parts_of(config.env.name, config.env.options | getattr(config.env, split))
    found = {}
    for label, (name, options) in parts.items():
        parameters = inspect.signature(find(name)).parameters
        found[label] = name, {key: parameter.default for key, parameter in parameters.items()} | dict(options)
    return found


def check_env(config: Config) -> None:
    """Raise UserError for an unknown environment or option, naming its split (env.train, ...). Constructs nothing."""
    errors, splits = {}, ("train", *config.evaluated)
    for split in splits:
        try:
            check(config.env.name, config.env.options | getattr(config.env, split))
        except UserError as error:
            errors[split] = str(error)
    if len(errors) == len(splits) and len(set(errors.values())) == 1:  # env.name, or env.options of all splits
        raise UserError(errors["train"])
    for split, line in errors.items():
        raise UserError(f"env.{split}: {line}")


def check_engines(config: Config, ranks: int, node: int | None = None) -> int:
    """Return the number of rollout engines of `ranks` processes.

    node: ranks on a node; None: all. Raises UserError if an engine would be incomplete, or on more than one node.
    """
    together = config.rollout.tensor_parallel
    if node is not None and node < ranks and node % together:
        raise UserError(
            f"rollout.tensor_parallel={together} does not divide the {node} ranks of a node, within which an engine "
            "lies; use a divisor of their number"
        )
    if ranks % together:
        raise UserError(
            f"rollout.tensor_parallel={together} does not divide {ranks} {'rank' if ranks == 1 else 'ranks'}; "
            "use a divisor of their number"
        )
    return ranks // together


def check_model(config: Config, path: str, model: Mapping[str, Any]) -> None:
    """Raise UserError unless the model at `path` has a position for every token of the longest row.

    Also if it uses `longrope` and a row may exceed the original positions: all rows of its batch would then be rotated
    by other factors. model: its config.json (`text_config` of a vision-language model).
    """
    text, rollout = model.get("text_config", model), config.rollout
    positions = text.get("max_position_embeddings")
    if positions is not None and rollout.longest > positions:
        size = (
            "rollout.prompt_tokens" if rollout.context == "full" else "rollout.prompt_tokens + rollout.response_tokens"
        )
        raise UserError(
            f"{size} = {rollout.longest} exceeds the {positions} positions of model {path!r}; "
            "lower rollout.prompt_tokens or take another model"
        )
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        original = kind.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if (kind.get("rope_type") or kind.get("type")) == "longrope" and original and rollout.longest > original:
            answer = 0 if rollout.context == "full" else rollout.response_tokens
            raise UserError(
                f"rollout.prompt_tokens = {rollout.prompt_tokens}: rows of {rollout.longest} tokens exceed the "
                f"{original} original positions of model {path!r}, beyond which longrope changes every row of a batch; "
                f"lower rollout.prompt_tokens to at most {original - answer}"
            )


def demo_values_warning(config: Config, parameters: int) -> str | None:
    """Return a warning if a student of `parameters` would be trained with the tiny demo model's values, else None."""
    default = defaults()
    # Only the learning rate does harm. Other values are named with it, but alone they may be the user's choice.
    tuned = {
        "train.learning_rate": config.train.learning_rate,
        "rollout.response_tokens": config.rollout.response_tokens,
    }
    left = [f"{key}={value:g}" for key, value in tuned.items() if value == default[key]]
    if (
        config.train.learning_rate != default["train.learning_rate"]
        or parameters <= LARGEST_TINY
        or config.student.path.startswith("demo:")
    ):
        return None
    return (
        f"WARNING: {', '.join(left)}: the embedded demo's, for 0.2 million parameters; "
        f"student.path={config.student.path!r} has {parameters / 1e6:,.0f} million and is likely to lose "
        "what it knows. Start from --preset own, "
        "with train.learning_rate=1e-6 for 0.5 billion parameters and more, 1e-5 for about 135 million"
    )


def defaults() -> Level:
    """Return every key with its default value."""
    return dict(_flatten(Config().model_dump(), ""))


@cache
def preset_level(name: str) -> Level:
    """Return the keys that a preset sets. Raises UserError for an unknown preset."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} is not a preset (see --list-presets){did_you_mean(name, PRESETS)}")
    level: Level = {}
    for part in PRESETS[name]:
        level |= dict(_flatten(read_toml(FOLDER / f"{part}.toml"), f"preset {part}: "))
    return level


def preset_summary(name: str) -> str:
    """Describe a preset by the first comments of its files."""
    files = [FOLDER / f"{part}.toml" for part in PRESETS[name] if part != PAPER]
    return ", ".join(file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").rstrip(".") for file in files)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the content of a TOML file. Raises UserError if it cannot be read or parsed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a readable TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def override_level(overrides: Sequence[str]) -> Level:
    """Return the keys that overrides `section.key=value` set. A value is TOML, or else plain text."""
    level: Level = {}
    for override in overrides:
        key, _, text = override.partition("=")
        value = _parse(key, text)
        for name, given in [(key, value)] if _table_of(key) else _flatten({key: value}, ""):
            level.pop(name, None)  # the order of the keys is the order in which they were last set
            level[name] = given
    return level


def expected(field: FieldInfo) -> str:
    """Describe what a key takes, for `--help` and errors: `int >= 1`, `a | b`, `[number >= 0, number >= 0]`."""
    kind, arguments = get_origin(field.annotation) or field.annotation, get_args(field.annotation)
    if kind is Literal:
        return " | ".join(arguments)
    if kind in (Union, UnionType):
        return " | ".join(expected(FieldInfo.from_annotation(argument)) for argument in arguments)
    if kind is tuple:
        return f"[{', '.join(expected(FieldInfo.from_annotation(argument)) for argument in arguments)}]"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{signs[name]} {getattr(bound, name):g}" for bound in field.metadata for name in signs if hasattr(bound, name)
    ]
    return f"{_KINDS[kind]} {' and '.join(bounds)}".rstrip()


_KINDS = {int: "int", float: "number", bool: "true | false", str: "text", dict: "table {option = value, ...}"}


def show(value: Any) -> str:
    """Return a value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _parse(key: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed.pop("value")
    wants_text = key in FIELDS and (FIELDS[key].annotation is str or get_origin(FIELDS[key].annotation) is Literal)
    # A folder may be named 7; a line break in the text would start a second key.
    return text if parsed or (wants_text and not isinstance(value, str)) else value


def _table_of(key: str) -> str | None:
    """Return the table of options that `key` names an option of, or None."""
    return next((table for table in TABLES if key.startswith(f"{table}.")), None)


def _flatten(table: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = prefix + name
        if key not in FIELDS:
            raise UserError(f"{source}{key} is not a key (see --help){did_you_mean(key, FIELDS)}")
        if not section_of(FIELDS[key]):
            yield key, value
        elif isinstance(value, dict):
            yield from _flatten(value, source, f"{key}.")
        else:
            raise UserError(
                f"{source}{key} = {show(value)}: expected a section of keys such as "
                f"{next(k for k in FIELDS if k.startswith(f'{key}.'))}"
            )


def _lay_over(merged: Level, level: Level) -> None:
    objective = level.get("objective.preset")
    if isinstance(objective, str):
        level = OBJECTIVES.get(objective, {}) | level
    if level.get("env.name", merged["env.name"]) != merged["env.name"]:
        merged |= dict.fromkeys(TABLES, {})  # another environment has other options
    if level.keys() & {"env.train", "env.eval"}:
        merged["env.dev"] = {}  # env.dev is only known to be separate from the tasks it was chosen with
    for key, value in level.items():
        if table := _table_of(key):
            merged[table] = _with_option(merged[table], key.removeprefix(f"{table}.").split("."), value, key)
        else:
            merged[key] = value


def _with_option(table: Any, path: list[str], value: Any, key: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        parent = key.removesuffix("." + ".".join(path))
        raise UserError(f"{key} = {show(value)}: {parent} is {show(table)}, not a table of options")
    name, *rest = path
    return {**table, name: _with_option(table.get(name, {}), rest, value, key) if rest else value}


def _explain(error: ValidationError, merged: Level, origin: Mapping[str, str]) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    loc = [str(part) for part in first["loc"]]
    key = next(name for n in range(len(loc), 0, -1) if (name := ".".join(loc[:n])) in FIELDS)
    value, field = merged[key], FIELDS[key]
    near = (
        did_you_mean(value, get_args(field.annotation))
        if get_origin(field.annotation) is Literal and isinstance(value, str)
        else ""
    )
    quotes = "; text in it needs quotes" if key in TABLES and isinstance(value, str) and "{" in value else ""
    return f"{origin.get(key, '')}{key} = {show(value)}: expected {expected(field)}{near}{quotes}"


ELSEWHERE = {  # what other trainers call a key
    "batch_size": "train.tasks_per_step",
    "train_batch_size": "train.tasks_per_step",
    "num_generations": "train.group_size",
    "rollout_n": "train.group_size",
    "mini_batch_size": "train.minibatch_rows",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "max_grad_norm": "train.grad_clip",
    "model": "student.path",
    "model_path": "student.path",
    "model_name_or_path": "student.path",
    "max_new_tokens": "rollout.response_tokens",
    "max_completion_length": "rollout.response_tokens",
    "max_response_length": "rollout.response_tokens",
    "max_prompt_length": "rollout.prompt_tokens",
    "max_model_len": "rollout.prompt_tokens",
    "test": "env.eval",
    "validation": "env.dev",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the name in `known` that `name` most likely means, or None.

    Finds a wrong section, a shortened key (`lr`, `temp`), the name of a key in other trainers, and a misspelling.
    """
    known = list(known)
    section, _, leaf = name.rpartition(".")
    if section.startswith("env."):  # an option of a split that does not exist
        split = nearest(section, TABLES)
        return split and f"{split}.{leaf}"
    leaves = {other: other.rpartition(".")[2] for other in known}
    exact = [other for other in known if leaves[other] == leaf]
    short = [other for other in known if len(leaf) > 1 and _shortens(leaf.replace("_", ""), leaves[other].split("_"))]
    foreign = [other for other in known if other == ELSEWHERE.get(leaf)]
    if found := exact or foreign or short:
        sections = {other.rpartition(".")[0]: other for other in reversed(found)}
        return next((sections[near] for near in difflib.get_close_matches(section, sections, 1)), found[0])
    by_leaf = {leaf: other for other, leaf in leaves.items()}
    near = difflib.get_close_matches(name, known, 1) or [
        by_leaf[found] for found in difflib.get_close_matches(leaf, by_leaf, 1)
    ]
    return near[0] if near else None


def _shortens(short: str, words: Sequence[str]) -> bool:
    """Return whether `short` consists of a beginning of each of the `words`, in order."""
    if not words:
        return not short
    shared = len(os.path.commonprefix([short, words[0]]))
    return any(_shortens(short[letters:], words[1:]) for letters in range(1, shared + 1))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the nearest name in `known`, or "" if none is near."""
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""
