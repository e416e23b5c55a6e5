"""A file of settings, written on the spot."""

from __future__ import annotations

import pytest


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.toml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
