"""The module that docs/environments.md writes, and gymnasium with an environment registered."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from helpers.guess import BLOCKS


@pytest.fixture
def page(tmp_path, monkeypatch) -> ModuleType:
    """The module that the documentation's page writes."""
    source, _ = BLOCKS["python"]
    (tmp_path / "guess.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "guess", raising=False)
    return __import__("guess")


@pytest.fixture
def gymnasium() -> Iterator[ModuleType]:
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra `gym`")
    known = set(gymnasium.registry)
    yield gymnasium
    for name in set(gymnasium.registry) - known:
        del gymnasium.registry[name]
