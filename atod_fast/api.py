"""Train and evaluate from Python, with the settings of the command line.

    from atod_fast.api import load_config, train, evaluate

    config = load_config(preset="own", overrides=["env.name=guess:Guess", "student.path=Qwen/Qwen3-0.6B", ...])
    done = train(config, run_dir="runs/guess")
    print(done.metrics["eval/success"], evaluate(done.model, config).summary["success"])

A script that calls these runs on several ranks by `torchrun script.py`: every rank calls them with equal arguments, and
gets equal results. They print what the commands print, and raise the errors of `atod_fast.errors` instead of exiting.
Ctrl-C and SIGTERM save first, so call these functions from the main thread.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atod_fast import evaluate as evaluation
from atod_fast import ranks
from atod_fast import train as training
from atod_fast.cli import Options
from atod_fast.config import Config, settings
from atod_fast.interrupt import Interrupt
from atod_fast.observe.console import Console
from atod_fast.observe.metrics import MetricsLog
from atod_fast.policy import checkpoint
from atod_fast.records import Trajectory
from atod_fast.reporting import Callback

__all__ = ["Callback", "Config", "Evaluated", "Trained", "evaluate", "load_config", "train"]


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run."""

    run_dir: Path  # config.toml, metrics.jsonl, checkpoints, ... lie here
    model: Path  # for transformers
    before: dict[str, Any]  # metrics of the evaluations before training: eval/success, eval/teacher_success, ...
    metrics: dict[str, Any]  # of the last step, with those of the evaluation after it: eval/success, ...


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Result of an evaluation on held-out tasks."""

    summary: dict[str, Any]  # success, success_by_type, turns, invalid_actions, episodes, ...
    trajectories: list[Trajectory]  # in task order


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the settings that the command line reads from `--preset`, CONFIG.toml and `section.key=value`.

    Raises:
        UserError: the preset, the file, a key or a value is wrong. One line.
    """
    return settings.load(preset, None if file is None else Path(file), overrides)


def train(
    config: Config,
    *,
    run_dir: str | Path | None = None,
    resume: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Trained:
    """Train to the last step and export the model.

    Args:
        run_dir: folder of the run (default: a new one, runs/run-N).
        resume: "auto", a run or a checkpoint, as in `--resume`. Training goes on with `config`, not the run's settings.
        callbacks: called after each step and each evaluation, on rank 0 only.

    Raises:
        UserError, GuardError, RankLost, Unexpected, Interrupted: the run ended early; the notes say what was saved.
    """
    options = Options(
        config=config,
        overrides=None,
        name="run",
        run_dir=None if run_dir is None else Path(run_dir),
        dry_run=False,
        on=None,
        resume=None if resume is None else str(resume),
        command=shlex.join(["python", *sys.argv]),
    )
    with _session() as interrupt:
        folder = training.train_run(options, interrupt, callbacks)
        facts = {}
        with ranks.together():
            if ranks.rank() == 0:
                facts["metrics"] = MetricsLog(folder / "metrics.jsonl").read()[-1]
                last = checkpoint.folder(folder, facts["metrics"]["step"])
                facts["before"] = checkpoint.read_state(last)["before"]
        facts = json.loads(ranks.from_first(json.dumps(facts)))
    return Trained(folder, folder / "hf", **facts)


def evaluate(model: str | Path, config: Config) -> Evaluated:
    """Play the first `eval.tasks` held-out tasks with `model`, a model folder or hub name, at `eval.temperature`.

    Raises:
        UserError, GuardError, RankLost, Interrupted: the evaluation ended early.
    """
    with _session() as interrupt:
        trajectories = evaluation.evaluate(str(model), config, Console(ranks.rank() == 0), interrupt)
    return Evaluated(evaluation.summary(trajectories), trajectories)


@contextmanager
def _session() -> Iterator[Interrupt]:
    """Turn Ctrl-C and SIGTERM into a request to stop; on exit, destroy the process groups."""
    with Interrupt() as interrupt:
        try:
            yield interrupt
        finally:
            ranks.stop()
