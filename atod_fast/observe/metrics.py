"""The metrics log, one JSON object per step in `metrics.jsonl`, and a clock for a step's phases."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class MetricsLog:
    """Writes and reads `metrics.jsonl`."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, metrics: dict[str, float]) -> None:
        """Append a step's metrics, keys sorted after `step`; a value that is not finite becomes null."""
        clean = {"step": metrics["step"]} | {k: _clean(v) for k, v in sorted(metrics.items()) if k != "step"}
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")

    def read(self) -> list[dict]:
        """Return the metrics of all steps so far."""
        return read_lines(self.path)


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a JSONL file up to the first damaged line, as a crash may cut off the last one."""
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
    """Measures the seconds of each phase of a step, as `time/<phase>`; `begin` is called with each phase."""

    def __init__(self, begin: Callable[[str], object] = lambda phase: None):
        self.seconds: dict[str, float] = {}
        self.begin = begin

    @property
    def total(self) -> float:
        """Seconds of all phases."""
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
