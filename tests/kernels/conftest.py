"""Small tiles for the head."""

import pytest
from atod_kernels import problem
from atod_kernels.torch import backend as torch_backend


@pytest.fixture
def small_tiles(monkeypatch):
    """Use tiles of 7 tokens and 16 columns, 2 tokens a group, so that small problems have many tiles, some of them
    ragged."""
    monkeypatch.setitem(problem.TILE, "cpu", (7, 16))
    monkeypatch.setattr(torch_backend, "GROUP", 32)
