"""Official ALFWorld games, where they are at hand."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from helpers.alfworld import OFFICIAL


@pytest.fixture(scope="session")
def official(tmp_path_factory) -> Path:
    if not OFFICIAL.exists():
        pytest.skip(f"no official ALFWorld data at {OFFICIAL.name}")
    root = tmp_path_factory.mktemp("alfworld")
    with tarfile.open(OFFICIAL) as archive:
        for member in archive:
            if "/valid_seen/" in member.name:
                archive.extract(member, root, filter="data")
    return root
