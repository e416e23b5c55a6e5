"""Terminal output: one line per step, and a progress bar during rollouts. Only rank 0 prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

COLUMNS = (  # heading, metric, format
    ("step", "step", "{:>5d}"),
    ("success", "train/success", "{:>7.1%}"),
    ("held-out", "eval/success", "{:>8.1%}"),
    ("dev", "dev/success", "{:>7.1%}"),
    ("invalid", "rollout/invalid_actions", "{:>7.0%}"),
    ("flat", "turns/flat_groups", "{:>4.0%}"),
    ("kappa", "schedule/kappa", "{:>6.3f}"),
    ("rho", "schedule/rho", "{:>5.2f}"),
    ("d", "turns/disagreement", "{:>6.3f}"),
    ("h", "turns/uncertainty", "{:>6.3f}"),
    ("w", "turns/weight_mean", "{:>5.2f}"),
    ("loss", "loss/total", "{:>8.4f}"),
    ("entropy", "policy/entropy", "{:>7.3f}"),
    ("gap", "sync/logprob_gap", "{:>7.0e}"),
    ("tok/s", "perf/tokens_per_second", "{:>6.0f}"),
    ("s", "time/step", "{:>5.2f}"),
)


class Console:
    """Prints steps, messages and progress; silent unless `speaks`."""

    def __init__(self, speaks: bool):
        self.rich = RichConsole(quiet=not speaks, highlight=False, emoji=False)
        self.speaks = speaks
        self.splits: Sequence[str] = ("eval",)  # those whose success has a column
        self.lines = 0

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line, unwrapped."""
        self.rich.print(text, style=style, markup=False, soft_wrap=True)

    def step(self, metrics: dict[str, float]) -> None:
        """Print a step's line, with a heading every 20 lines."""
        columns = [column for column in COLUMNS if column[0] != "dev" or "dev" in self.splits]
        if self.lines % 20 == 0:
            self.say(" ".join(heading.rjust(_width(form)) for heading, _, form in columns), style="dim")
        self.lines += 1
        # A value that was not measured is missing (held-out success) or NaN (d in a step without the teacher).
        self.say(" ".join(_cell(metrics.get(key, math.nan), form) for _, key, form in columns))

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int, int, int], None]]:
        """Show a bar that vanishes when done, on a terminal only; yields `update(finished, total, turns, tokens)`."""
        if not (self.speaks and self.rich.is_terminal):
            yield lambda finished, total, turns, tokens: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.rich, transient=True) as bar:
            task = bar.add_task(label, total=None, detail="")

            def update(finished: int, total: int, turns: int, tokens: int) -> None:
                bar.update(task, completed=finished, total=total, detail=f"{turns} turns, {tokens} tokens")

            yield update


def _cell(value: float, form: str) -> str:
    return "-".rjust(_width(form)) if math.isnan(value) else form.format(value)


def _width(form: str) -> int:
    return len(form.format(0)) if "d" in form else len(form.format(0.0))
