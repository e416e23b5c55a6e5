"""The order of tests/: folders that mirror the package, files that are not long and import no other test file."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from helpers.paths import ROOT

TESTS = ROOT / "tests"
LONGEST = 500
OTHERS = {  # folders that are no folder of atod_fast, and what they test
    "kernels": "kernels/atod_kernels",
    "run": "atod_fast/run.py",  # and the other files at the top of the package
    "project": "pyproject.toml",
}


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("test_*.py"))


def counterpart(folder: str) -> str:
    """Return the path in the repository that the tests of a folder of tests/ are about."""
    return OTHERS.get(folder, f"atod_fast/{folder}")


def too_long(root: Path) -> list[str]:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in root.rglob("*.py")}
    return [f"{path.relative_to(root)}: {count} lines" for path, count in lines.items() if count > LONGEST]


def without_counterpart(root: Path) -> list[str]:
    folders = {path.parent.relative_to(root).as_posix() for path in files(root)}
    return sorted(folder for folder in folders if folder == "." or not (ROOT / counterpart(folder)).exists())


def test_no_file_is_longer_than_500_lines():
    assert too_long(TESTS) == []


def test_every_folder_has_a_counterpart():
    assert len(files(TESTS)) > 50 and without_counterpart(TESTS) == []


def test_no_two_files_have_one_name():
    count = Counter(path.name for path in files(TESTS))
    assert [name for name, times in count.items() if times > 1] == [], "pytest imports them by that name"


def test_what_several_files_use_is_in_the_folder_of_helpers():
    modules = {path.stem for path in files(TESTS)}
    for path in TESTS.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not names & modules, path
    assert not files(TESTS / "helpers")


@pytest.mark.parametrize("place", ["test_a.py", "nowhere/test_a.py", "rollout/nowhere/test_a.py"])
def test_a_long_file_and_a_strange_folder_are_found(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n" * (LONGEST + 1))
    assert too_long(tmp_path) == [f"{place}: {LONGEST + 1} lines"]
    assert without_counterpart(tmp_path) == [Path(place).parent.as_posix()]
