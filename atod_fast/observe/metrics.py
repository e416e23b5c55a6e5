"""One JSON object a step in `metrics.jsonl`, and the clock that times a step's phases."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class MetricsLog:
    """Appends to `metrics.jsonl`."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, metrics: dict[str, float]) -> None:
        """Keys sorted after `step`; a value that is not finite is written as null, which JSON has."""
        clean = {"step": metrics["step"]} | {k: _clean(v) for k, v in sorted(metrics.items()) if k != "step"}
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")

    def read(self) -> list[dict]:
        return read_lines(self.path)


def read_lines(path: Path) -> list[dict]:
    """All whole lines; a last line cut off by a crash is left out."""
    out = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return out


def _clean(value):
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return round(value, 8) if math.isfinite(value) else None
    return value


class Clock:
    """Seconds by phase of one step, as `time/<phase>`; `begin` is told each phase."""

    def __init__(self, begin: Callable[[str], object] = lambda phase: None):
        self.seconds: dict[str, float] = {}
        self.begin = begin

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.begin(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            key = f"time/{phase}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start
