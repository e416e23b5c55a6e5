"""The values of a configuration by key, and the line with which settings are refused."""

from __future__ import annotations

from typing import Any

import pytest

from atod_fast.cli import parse
from atod_fast.config import Config
from atod_fast.config.settings import (
    FIELDS,
    TABLES,
    section_of,
)
from atod_fast.errors import UserError

OWN = ["student.path=/models/mine", "teacher.path=/models/larger", "env.name=guess:Guess"]  # what preset `own` asks for
KEYS = [key for key, field in FIELDS.items() if not section_of(field)]


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


def flatten(table: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in table.items():
        key = prefix + name
        out |= {key: value} if key in TABLES or not isinstance(value, dict) else flatten(value, f"{key}.")
    return out
