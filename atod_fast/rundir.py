"""Choose the folder that a run writes to and the checkpoint that it resumes. No run is ever overwritten.

A run that resumes one of its checkpoints first moves everything later than it into `set-aside-N`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from atod_fast import files, lock, ranks
from atod_fast.cli import Options
from atod_fast.config import Config
from atod_fast.config.settings import from_toml, load, read_toml, to_toml
from atod_fast.errors import UserError
from atod_fast.observe import provenance
from atod_fast.policy import checkpoint

ROOT = Path("runs")
SEEN_WITHIN = 5.0  # seconds until a file that rank 0 wrote is seen on the nodes that share its folder
_TRAJECTORIES = re.compile(r"(?:step|eval|dev)_(\d{6,})(?:_teacher)?\.(?:jsonl|unfinished)(?:\.partial)?")


class Finished(Exception):
    """Nothing is left to do for the run that was to be resumed."""

    exit_code = 0

    def __init__(self, run_dir: Path, line: str):
        super().__init__(line)
        self.run_dir = run_dir


class Place(NamedTuple):
    """The folder of a run, and where the run resumes."""

    run_dir: Path
    resume: Path | None  # checkpoint to resume
    finished: bool = False  # every step is done and exported: nothing is left to do

    @property
    def here(self) -> bool:
        """Whether the checkpoint lies in the run folder."""
        run = checkpoint.run_of(self.resume) if self.resume else None
        return run is not None and run.resolve() == self.run_dir.resolve()


def agree(options: Options) -> Place:
    """Call `choose` on rank 0, which locks the folder. Returns its Place, or raises its UserError, on every rank."""

    def claim() -> list:
        run_dir, resume, finished = _claim(options)
        return [str(run_dir), str(resume) if resume else None, finished]

    run_dir, resume, finished = ranks.by_first(claim)
    return Place(Path(run_dir), Path(resume) if resume else None, finished)


def apart(run_dir: Path) -> list[int]:
    """Return the first ranks of the nodes on which `run_dir` is another folder than on rank 0's. Collective."""
    leads = ranks.leads_node()
    if not ranks.where(leads and ranks.rank() > 0):
        return []
    probe = run_dir / ranks.by_first(lambda: f".seen-{os.getpid()}-{time.time_ns()}")

    def write() -> None:
        try:
            probe.touch()
        except OSError as error:
            raise UserError(f"--run-dir {run_dir} cannot be written ({checkpoint.reason(error)})") from None

    ranks.by_first(write)
    missing = ranks.where(leads and not _appears(probe))
    if ranks.rank() == 0:
        probe.unlink(missing_ok=True)
    return missing


def _appears(file: Path) -> bool:
    """Return whether its folder lists `file` within `SEEN_WITHIN`; network file systems may show new files late."""
    late = time.monotonic() + SEEN_WITHIN
    while True:
        with suppress(OSError):
            if file.name in os.listdir(file.parent):
                return True
        if time.monotonic() > late:
            return False
        time.sleep(0.1)


def _claim(options: Options) -> Place:
    """Call `choose` and lock the folder until `ranks.stop`. If a default folder was taken meanwhile, take the next."""
    named = options.run_dir is not None or options.resume is not None
    place = choose(options)
    while not place.finished:
        made = [folder for folder in (place.run_dir, *place.run_dir.parents) if not folder.exists()]
        try:
            place.run_dir.mkdir(parents=True, exist_ok=named)
            release = lock.hold(place.run_dir)
            break
        except OSError as error:
            taken, place = place, choose(options)
            if place == taken:
                raise UserError(
                    f"--run-dir {place.run_dir} cannot be written ({checkpoint.reason(error)}); give another folder"
                ) from None

    def leave() -> None:
        release()
        for folder in made:  # if the run left them empty
            folder.rmdir()

    if not place.finished:
        ranks.before_stop(leave)
    return place


def agreed_config(options: Options, resume: Path | None) -> Config:
    """Return rank 0's `resumed_config` on every rank: the run folder may not be on every node. Collective."""
    return from_toml(ranks.by_first(lambda: to_toml(resumed_config(options, resume))))


def resumed_config(options: Options, resume: Path | None) -> Config:
    """Return the resumed run's settings with the overrides on top; with a preset or a file, only the command line's.

    Raises:
        UserError: the run's config.toml cannot be read, or does not say which model was trained.
    """
    run = checkpoint.run_of(resume) if resume else None
    if run is None or options.overrides is None or not (saved := run / "config.toml").is_file():
        return options.config
    student = read_toml(saved).get("student")
    if not isinstance(student, dict) or "path" not in student:
        raise UserError(
            f"{saved} is empty or damaged: it does not say student.path; "
            "give the run's settings with CONFIG.toml or --preset"
        )
    return load(None, saved, options.overrides)


def choose(options: Options) -> Place:
    """Return the run folder and checkpoint that the options mean. Writes nothing; call it on one rank.

    Raises:
        UserError: the folder is taken or is no folder, the checkpoint is missing or does not fit the settings, or
            resuming would move later steps away and --set-aside is not given.
    """
    place = _find(options)
    if not place.finished:
        _refuse_unusable(place.run_dir)
    return place


def _find(options: Options) -> Place:
    run_dir, resume = options.run_dir, options.resume
    if resume is None or resume == "auto":
        if run_dir is None:
            runs = {
                int(match[1] or 1): path
                for path in ROOT.glob("*")
                if (match := re.fullmatch(re.escape(options.name) + r"(?:-(\d+))?", path.name))
            }
            newest = max(runs, default=0)
            if resume is None or not runs:
                return Place(ROOT / (f"{options.name}-{newest + 1}" if runs else options.name), None)
            run_dir = runs[newest]
        if resume is None:
            _refuse_taken(run_dir)
            return Place(run_dir, None)
        source = run_dir
    else:
        source = Path(resume)
    if checkpoint.is_complete(source):
        source = path = checkpoint.placed(source)
        run = checkpoint.run_of(path)
    else:
        run, path = source, checkpoint.latest(source)
        if path is None and resume == "auto":
            return Place(source, None)
        if path is None:
            raise UserError(
                f"--resume {resume} is neither a checkpoint nor a run with one; "
                "give runs/NAME or runs/NAME/checkpoints/step_NNNNNN"
            )
    run_dir = run_dir or run
    if run_dir is None:
        raise UserError(
            f"--resume {resume} lies in no run's checkpoints/; add --run-dir NEW for the run that goes on from it"
        )
    here = Place(run_dir, path).here
    if not here:
        _refuse_taken(run_dir)
    config = resumed_config(options, path)
    steps = config.train.steps
    if path is not source and (options.set_aside or not here):
        path = checkpoint.latest(source, steps) or path
    state = checkpoint.read_state(path)
    step = state["step"]
    newest = (checkpoint.newest_step(run) if run else None) or step
    if step > steps:
        raise UserError(
            f"train.steps={steps}, and {path} has {step} already; "
            "give more steps, or go back to a checkpoint before it with --set-aside or --run-dir NEW"
        )
    if here and step < newest and not options.set_aside:
        raise UserError(
            f"--resume {path}: the run has gone on to step {newest}; "
            f"add --set-aside to move what came after step {step} into {_free(run_dir)}, "
            "or --run-dir NEW for a run of its own"
        )
    if config.schedule.kappa.kind == "adaptive" and (
        state.get("adaptive") is None or "dev/teacher_success" not in state["before"]
    ):
        raise UserError(
            f"schedule.kappa.kind=adaptive: the run of {path} did not measure its teacher on env.dev; "
            "start a run of its own"
        )
    exported = (run_dir / "hf" / "config.json").is_file()
    return Place(run_dir, path, finished=here and step == newest == steps and exported)


def _refuse_unusable(run_dir: Path) -> None:
    """Raise UserError unless `run_dir` can be written to, or can be made."""
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise UserError(f"--run-dir {run_dir}: {there} is not a folder; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--run-dir {run_dir}: {there} cannot be written to; give another folder")


def _refuse_taken(run_dir: Path) -> None:
    if (run_dir / "metrics.jsonl").exists():
        raise UserError(
            f"--run-dir {run_dir} already holds a run; add --resume auto to go on with it, or give another folder"
        )


def open_folder(
    run_dir: Path,
    config: Config,
    done: int,
    command: str,
    device: torch.device,
    *,
    from_step: int,
    say: Callable[[str], None],
) -> None:
    """Set aside what is later than step `done`, write config.toml, and add an entry to environment.json.

    command: the command that started the run. from_step: the step that the run resumes. say: prints a line.

    Raises:
        UserError: the folder cannot be written, or a file there that has to be read is damaged.
    """
    settings, history = to_toml(config), run_dir / "environment.json"
    try:
        starts = provenance.entries(history)  # where it is damaged, before anything is moved
        run_dir.mkdir(parents=True, exist_ok=True)
        if aside := set_aside(run_dir, done, settings):
            say(f"moved to {aside}: {contents(aside, done)}")
        files.write(run_dir / "config.toml", settings)
        provenance.record(history, starts, command, ranks.world_size(), device, from_step)
    except OSError as error:
        raise UserError(
            f"--run-dir {run_dir} cannot be written ({checkpoint.reason(error)}); "
            "make room there, or give another folder"
        ) from None


def set_aside(run_dir: Path, done: int, config: str) -> Path | None:
    """Move what is later than step `done` into a new folder `set-aside-N`, and copy config.toml there.

    Returns the folder, or None if there is nothing to move. What is moved: later and incomplete
    checkpoints, later lines of metrics.jsonl and trajectories, the exported model and curves of an earlier end, a
    config.toml other than `config`. `done` = -1 moves everything that a run without a checkpoint left behind. The lines
    of metrics.jsonl go last: after an error everything is in one of the two folders.
    """
    metrics, settings = run_dir / "metrics.jsonl", run_dir / "config.toml"
    kept, beyond = _split(metrics, done)
    moved = checkpoint.beyond(run_dir, done)
    moved += [
        path
        for path in (run_dir / "trajectories").glob("*")
        if (found := _TRAJECTORIES.fullmatch(path.name)) and int(found[1]) > done
    ]
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
    for path in moved:
        target = folder / path.relative_to(run_dir)
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)  # checkpoints may be on another disk
    if beyond:
        files.write(folder / "metrics.jsonl", "".join(beyond))
        files.write(metrics, "".join(kept))
    return folder


def contents(folder: Path, done: int) -> str:
    """Describe what `set_aside` moved into `folder`."""
    words = {
        "files of later steps" if done >= 0 else "what a run without a checkpoint left": (
            "metrics.jsonl",
            "checkpoints",
            "trajectories",
        ),
        "the model of an earlier end": ("hf",),
        "the previous config.toml": ("config.toml",),
    }
    return ", ".join(what for what, names in words.items() if any((folder / name).exists() for name in names))


def _free(run_dir: Path) -> Path:
    taken = [
        int(path.name.rpartition("-")[2])
        for path in run_dir.glob("set-aside-*")
        if path.name.rpartition("-")[2].isdecimal()
    ]
    return run_dir / f"set-aside-{max(taken, default=0) + 1}"


def _split(metrics: Path, done: int) -> tuple[list[str], list[str]]:
    """Return the lines of metrics.jsonl up to step `done`, and the rest: from the first later or incomplete one."""
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.is_file() else []
    for number, line in enumerate(lines):
        try:
            if json.loads(line)["step"] > done or not line.endswith("\n"):
                return lines[:number], lines[number:]
        except json.JSONDecodeError:
            return lines[:number], lines[number:]
    return lines, []
