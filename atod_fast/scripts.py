"""The console scripts. Each runs a module as `python -m` does, which answers `--help` before it imports torch."""

from __future__ import annotations

import runpy


def train() -> None:
    """`atod-train`: the same as `python -m atod_fast.train`. Exits with its code."""
    runpy.run_module("atod_fast.train", run_name="__main__", alter_sys=True)


def evaluate() -> None:
    """`atod-evaluate`: the same as `python -m atod_fast.evaluate`. Exits with its code."""
    runpy.run_module("atod_fast.evaluate", run_name="__main__", alter_sys=True)


def collect() -> None:
    """`atod-collect`: the same as `python -m atod_fast.collect`. Exits with its code."""
    runpy.run_module("atod_fast.collect", run_name="__main__", alter_sys=True)


def export() -> None:
    """`atod-export`: the same as `python -m atod_fast.export`. Exits with its code."""
    runpy.run_module("atod_fast.export", run_name="__main__", alter_sys=True)
