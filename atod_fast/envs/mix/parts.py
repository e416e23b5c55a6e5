"""The parts of a mix as the configuration describes them, and how many of its tasks each part has."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

from atod_fast.envs import check, make
from atod_fast.envs.options import require
from atod_fast.envs.protocol import Environment
from atod_fast.envs.text import one_line
from atod_fast.errors import UserError

KEYS = ("name", "options", "weight", "max_turns", "thinking", "history")
AT = "env.options.parts"
LONGEST = 10_000_000  # tasks of a mix; the order of an epoch is held in memory


@dataclass(frozen=True, slots=True)
class Part:
    """One environment of a mix: its `name` as env.name takes it, all its options, and its own settings.

    None stands for the run's setting: env.max_turns, rollout.thinking, rollout.history.
    """

    label: str
    name: str
    options: Mapping[str, Any]
    weight: Fraction
    max_turns: int | None
    thinking: bool | None
    history: int | None

    def check(self) -> Any:
        """Return the class of the environment, without calling it. Raises UserError as `envs.check`."""
        with self.named():
            return check(self.name, self.options)

    def open(self) -> tuple[Environment, int]:
        """Construct the environment; return it and its number of tasks. Raises UserError as `make`, or without any."""
        with self.named():
            env = make(self.name, **self.options)
        try:
            count = len(env)
        except Exception as error:
            raise UserError(f"{AT}.{self.label}: __len__ of name={self.name!r} fails: {one_line(error)}") from error
        if not count:
            raise UserError(
                f"{AT}.{self.label}: name={self.name!r} has no tasks with its options; give it some, or weight=0"
            )
        return env, count

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the part before the message of a UserError that the block raises."""
        try:
            yield
        except UserError as error:
            raise type(error)(f"{AT}.{self.label}: {str(error).replace('env.name=', 'name=', 1)}") from error


def read_parts(tables: Mapping[str, Any], split: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a mix, in the order of `tables`, those of weight 0 too.

    tables: {label: settings of the part}. split: {label: options of the part in this split}.

    Raises:
        UserError: there is no part, a label or a setting is unknown or has a wrong value, or no weight is above 0.
    """
    if not tables:
        raise UserError(f"{AT} is empty; name at least one part, such as {AT}='{{alfworld={{}}, searchqa={{}}}}'")
    for label in split:
        if label not in tables:
            raise UserError(f"env.name='mix' has no part {label!r}; {_nearest(label, tables)}")
    parts = [_part(label, table, split.get(label, {})) for label, table in tables.items()]
    if not any(part.weight for part in parts):
        raise UserError(f"{AT}: the weights of {', '.join(tables)} sum to 0; give one a weight above 0")
    return parts


def _part(label: str, table: Any, split: Any) -> Part:
    if label == "parts" or not re.fullmatch(r"[^\s/]+", label):
        raise UserError(f"{AT}: the label {label!r} cannot be used; take one without spaces and slashes, not 'parts'")
    require(f"{AT}.{label}", table, isinstance(table, Mapping), "a table such as {weight=2.0}")
    for key in table:
        if key not in KEYS:
            where = "; options of the environment go into options, or into env.train, env.eval and env.dev"
            raise UserError(f"{AT}.{label}.{key} is not a setting of a part; {_nearest(key, KEYS)}{where}")
    name, options, weight = table.get("name", label), table.get("options", {}), table.get("weight", 1.0)
    most, thinking, history = table.get("max_turns"), table.get("thinking"), table.get("history")
    for key, right, what in (
        ("name", isinstance(name, str), "the name of an environment, as env.name takes it"),
        ("options", isinstance(options, Mapping), "a table of the environment's options"),
        ("weight", _number(weight) and 0 <= weight < math.inf, "a number of at least 0"),
        ("max_turns", most is None or _whole(most, 1), "a whole number of at least 1"),
        ("thinking", thinking is None or isinstance(thinking, bool), "true or false"),
        ("history", history is None or _whole(history, 0), "a whole number of at least 0"),
    ):
        require(f"{AT}.{label}.{key}", table.get(key), right, what)
    require(label, split, isinstance(split, Mapping), f"a table of options for the part {label} of the mix")
    # As it is written: 0.1 means one tenth.
    return Part(label, name, {**options, **split}, Fraction(str(weight)), most, thinking, history)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def epoch(sizes: Sequence[int], parts: Sequence[Part]) -> list[int]:
    """Return how many tasks of an epoch each part has, in proportion to the weights.

    The epoch is the shortest in which every part's tasks (`sizes`) all occur. Raises UserError if it is above LONGEST.
    """
    weights = [part.weight for part in parts]
    lengths = [math.ceil(size * sum(weights) / weight) for size, weight in zip(sizes, weights, strict=True)]
    length = max(lengths)
    if length > LONGEST:
        scarce = parts[lengths.index(length)]
        raise UserError(
            f"{AT}.{scarce.label}.weight={float(scarce.weight):g} is so small a share that an epoch with all its "
            f"{sizes[lengths.index(length)]} tasks has {length:,}, more than {LONGEST:,}; raise it"
        )
    return shares(length, weights)


def shares(count: int, weights: Sequence[Fraction]) -> list[int]:
    """Divide `count` in proportion to the weights, by largest remainders; of equal ones the first gets more."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [math.floor(share) for share in exact]
    for place in sorted(range(len(whole)), key=lambda place: whole[place] - exact[place])[: count - sum(whole)]:
        whole[place] += 1
    return whole
