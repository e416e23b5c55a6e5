"""Which folder a run writes to, and which checkpoint it goes on from. No run is ever overwritten.

A run that goes on from one of its checkpoints first moves what lies beyond it into `set-aside-N` beside it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from atod_fast import ranks
from atod_fast.cli import Options
from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.policy import checkpoint
from atod_fast.settings import load

ROOT = Path("runs")
_NUMBER = re.compile(r"(?<!\d)\d{6,}(?!\d)")  # of a step, in a file's name


class Finished(Exception):
    """Nothing is left to do for the run that was to be resumed."""

    exit_code = 0


class Place(NamedTuple):
    """Where a run stands."""

    run_dir: Path
    resume: Path | None  # checkpoint to go on from
    finished: bool = False  # every step is done and exported: nothing is left to do


def agree(options: Options) -> Place:
    """`choose` on rank 0, its answer (or its UserError) on every rank."""
    answer = ""
    with ranks.together():
        if ranks.rank() == 0:
            run_dir, resume, finished = choose(options)
            answer = json.dumps([str(run_dir), str(resume) if resume else None, finished])
    run_dir, resume, finished = json.loads(ranks.from_first(answer))
    return Place(Path(run_dir), Path(resume) if resume else None, finished)


def resumed_config(options: Options, resume: Path | None) -> Config:
    """The settings of the run that is resumed, under those of the command line; with a preset or a file, just those."""
    saved = resume.parent.parent / "config.toml" if resume else None
    if saved is None or options.overrides is None or not saved.is_file():
        return options.config
    return load(None, saved, options.overrides)


def choose(options: Options) -> Place:
    """Reads the disk only; call it on one rank and share the answer.

    Raises:
        UserError: the folder is taken, there is no such checkpoint, or going on would leave later steps behind unasked.
    """
    run_dir, resume = options.run_dir, options.resume
    if run_dir is None and resume in (None, "auto"):
        runs = {
            int(match[1] or 1): path for path in ROOT.glob(f"{options.name}*") if (match := re.fullmatch(re.escape(options.name) + r"(?:-(\d+))?", path.name))
        }
        newest = max(runs, default=0)
        if resume is None or not runs:
            return Place(ROOT / (f"{options.name}-{newest + 1}" if runs else options.name), None)
        run_dir = runs[newest]
    if resume is None:
        _refuse_taken(run_dir)
        return Place(run_dir, None)
    source = run_dir if resume == "auto" else Path(resume)
    if checkpoint.is_complete(source):
        run, path = source.parent.parent, source
    else:
        run, path = source, checkpoint.latest(source)
        if path is None and resume == "auto":
            return Place(run_dir, None)
        if path is None:
            raise UserError(f"--resume {resume} is neither a checkpoint nor a run with one; give runs/NAME or runs/NAME/checkpoints/step_NNNNNN")
    run_dir = run_dir or run
    here = run_dir.resolve() == run.resolve()
    if not here:
        _refuse_taken(run_dir)
    steps = resumed_config(options, path).train.steps
    if path is not source and (options.set_aside or not here):
        path = checkpoint.latest(source, steps) or path
    step, newest = checkpoint.step_of(path), checkpoint.step_of(checkpoint.latest(run) or path)
    if step > steps:
        raise UserError(
            f"train.steps={steps}, and {path} has {step} already; give more steps, or go back to a checkpoint before it with --set-aside or --run-dir NEW"
        )
    if here and step < newest and not options.set_aside:
        raise UserError(
            f"--resume {path}: the run has gone on to step {newest}; add --set-aside to move what came after step {step} "
            f"into {_free(run)}, or --run-dir NEW for a run of its own"
        )
    return Place(run_dir, path, finished=here and step == newest == steps and (run / "hf" / "config.json").is_file())


def _refuse_taken(run_dir: Path) -> None:
    if (run_dir / "metrics.jsonl").exists():
        raise UserError(f"--run-dir {run_dir} already holds a run; add --resume auto to go on with it, or give another folder")


def set_aside(run_dir: Path, done: int, config: str) -> Path | None:
    """Move what lies beyond step `done` into a new `set-aside-N`, and copy there the config.toml that made it; None if there is nothing.

    That is: later checkpoints, half written ones, lines of metrics.jsonl and trajectories, the exported model and the
    curves of an earlier end, a config.toml other than `config`. With `done` -1 it is all of an earlier run that left no checkpoint.
    """
    metrics, settings = run_dir / "metrics.jsonl", run_dir / "config.toml"
    kept, beyond = _split(metrics, done)
    moved = checkpoint.beyond(run_dir, done)
    moved += [path for path in (run_dir / "trajectories").glob("*") if (found := _NUMBER.search(path.name)) and int(found[0]) > done]
    moved += [path for path in (run_dir / "hf",) if path.exists()]
    if moved or beyond:
        moved += run_dir.glob("curves.png")
    other = settings.is_file() and settings.read_text(encoding="utf-8") != config
    if not (moved or beyond or other):
        return None
    folder = _free(run_dir)
    folder.mkdir()
    if settings.is_file():
        shutil.copy2(settings, folder)
    if beyond:
        (folder / "metrics.jsonl").write_text("".join(beyond), encoding="utf-8")
        rest = metrics.with_suffix(".partial")
        rest.write_text("".join(kept), encoding="utf-8")
        rest.replace(metrics)
    for path in moved:
        target = folder / path.relative_to(run_dir)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    return folder


def _free(run_dir: Path) -> Path:
    taken = [int(path.name.rpartition("-")[2]) for path in run_dir.glob("set-aside-*") if path.name.rpartition("-")[2].isdecimal()]
    return run_dir / f"set-aside-{max(taken, default=0) + 1}"


def _split(metrics: Path, done: int) -> tuple[list[str], list[str]]:
    """Lines of metrics.jsonl up to step `done`, and the rest: from the first that is later, or that a crash cut off."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    for number, line in enumerate(lines):
        try:
            if json.loads(line)["step"] > done or not line.endswith("\n"):
                return lines[:number], lines[number:]
        except json.JSONDecodeError:
            return lines[:number], lines[number:]
    return lines, []
