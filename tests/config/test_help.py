"""What --help and --list-presets print, and what they import."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest

from atod_fast import __version__
from atod_fast.cli import WIDTH, parse
from atod_fast.config.settings import (
    FIELDS,
    PRESETS,
    TABLES,
    defaults,
)
from helpers.config import KEYS


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
    "call",
    [
        *("train --help", "train --list-presets", "train --version"),
        *("evaluate --help", "evaluate --version", "collect --help", "collect --version"),
    ],
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
