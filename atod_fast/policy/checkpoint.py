"""Saves and loads checkpoints with torch.distributed.checkpoint.

`checkpoints/best.json` names the step with the best success on env.dev, whose checkpoint is kept, and that success.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from atod_fast import files, ranks
from atod_fast.errors import GuardError, UserError
from atod_fast.policy.model import CausalPolicy


class Best(NamedTuple):
    """The step with the best success on env.dev so far; among equal ones the first."""

    step: int
    success: float


def folder(run_dir: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint was written to its end."""
    return (path / "state.json").is_file()


def placed(path: Path) -> Path:
    """Return `path`, made absolute unless it shows that it lies in a folder `checkpoints`."""
    return path if path.parent.name == "checkpoints" else Path(os.path.abspath(path))


def run_of(path: Path) -> Path | None:
    """Return the run folder of the checkpoint at `path`; None for one that was copied elsewhere."""
    path = placed(path)
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _numbered(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints' folders by step, in ascending order."""
    found = {
        int(match[1]): path
        for path in (run_dir / "checkpoints").glob("step_*")
        if (match := re.fullmatch(r"step_(\d{6,})", path.name))
    }
    return dict(sorted(found.items()))


def latest(run_dir: Path, most: float = float("inf")) -> Path | None:
    """Return the newest complete checkpoint of a run, of at most step `most`; None without one."""
    return next(
        (path for step, path in reversed(_numbered(run_dir).items()) if step <= most and is_complete(path)), None
    )


def newest_step(run_dir: Path) -> int | None:
    """Return the step of `latest`, from its name: whether it can be loaded does not matter."""
    return max((step for step, path in _numbered(run_dir).items() if is_complete(path)), default=None)


def best(run_dir: Path) -> Best | None:
    """Return what best.json names, if its checkpoint exists. Raises UserError if best.json is damaged."""
    found = _read_best(run_dir)
    return found if found and is_complete(folder(run_dir, found.step)) else None


def _read_best(run_dir: Path) -> Best | None:
    file = _best_file(run_dir)
    try:
        facts = json.loads(file.read_text())
        key = "dev/success" if "dev/success" in facts else "eval/success"  # of a run that chose by its held-out tasks
        return Best(int(facts["step"]), float(facts[key]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; delete it: the checkpoints themselves know which was the best") from None


def name_best(run_dir: Path, found: Best | None) -> None:
    """Write best.json, or delete it if `found` is None."""
    file = _best_file(run_dir)
    if found is None:
        file.unlink(missing_ok=True)
        return
    files.write(file, json.dumps({"step": found.step, "dev/success": found.success}) + "\n")


def agreed_best(run_dir: Path, told: list | None) -> Best | None:
    """Return the best step that a resumed checkpoint names (`told`), if that step's checkpoint still exists.

    best.json is rewritten to match. Returns the same on every rank. Collective.
    """
    found = Best(*told) if told else None
    if ranks.rank() == 0:
        if found and not is_complete(folder(run_dir, found.step)):
            found = None
        name_best(run_dir, found)
    told = json.loads(ranks.from_first(json.dumps(found)))
    return Best(*told) if told else None


def _best_file(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "best.json"


def beyond(run_dir: Path, step: int) -> list[Path]:
    """Return the files that a run continued from `step` must not keep.

    They are later checkpoints, half-written ones, and a best.json that names a later step.
    """
    file, named = _best_file(run_dir), _read_best(run_dir)
    later = [file] if named and named.step > step else []
    half = [
        path for path in file.parent.glob("*.partial") if re.fullmatch(r"(step_\d{6,}|best\.json)\.partial", path.name)
    ]
    return later + [path for number, path in _numbered(run_dir).items() if number > step] + half


def save(
    run_dir: Path,
    step: int,
    policy: CausalPolicy,
    optimizer: Optimizer,
    state: dict,
    *,
    keep: int,
    best: Best | None = None,
    apart: bool = False,
) -> Path:
    """Write a step's checkpoint, then delete the oldest beyond `keep`, except the best.

    It is written beside its final name and renamed when complete. `state` is JSON-serialisable. apart: this rank does
    so for its node, whose run folder is another than rank 0's. Of copies of a parameter, the one of the lowest ranks is
    written. Collective; an error on one rank is raised on all, as a GuardError if it comes from the disk.
    """
    final = folder(run_dir, step)
    partial = final.with_name(final.name + ".partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> list[int]:
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        if best:
            name_best(run_dir, best)
        found = _numbered(run_dir)
        removed = [old for old in list(found)[:-keep] if best is None or old != best.step]
        for old in removed:
            shutil.rmtree(found[old])
        return removed

    try:
        _by_the_first(final, begin)
        unused = not optimizer.state  # no update has been applied
        model, optim = get_state_dict(policy, optimizer)
        if unused:  # torch has made its state, by a step at rate 0 that must not count
            for values in optimizer.state.values():
                values["step"].zero_()
        try:
            parts = {"model": model, "optimizer": optim}
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            dcp.save(parts, checkpoint_id=partial, planner=planner)  # pyright: ignore[reportPrivateImportUsage]
        except dcp.api.CheckpointException as error:  # on every rank
            raise GuardError(f"{final} could not be written ({reason(error)})") from None
        removed = _by_the_first(final, finish)
        with ranks.together(), _written(final):
            if apart:
                _follow(run_dir, partial, final, removed)
    except BaseException:
        if ranks.rank() == 0 or apart:  # half a checkpoint is useless, and takes space that may be lacking
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def _by_the_first(final: Path, write: Callable[[], Any]) -> Any:
    def written() -> Any:
        with _written(final):
            return write()

    return ranks.by_first(written)


@contextmanager
def _written(final: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GuardError(f"{final} could not be written ({reason(error)})") from None


def _follow(run_dir: Path, partial: Path, final: Path, removed: list[int]) -> None:
    """Name this node's part of a checkpoint as rank 0 named its own, and remove the steps that rank 0 removed."""
    if (partial / "state.json").exists():  # rank 0's own: the folder is shared after all, and seen late
        return
    if partial.is_dir() and any(file.stat().st_size for file in partial.iterdir()):
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    shutil.rmtree(partial, ignore_errors=True)  # the files of a rank that wrote nothing are empty
    for step in removed:
        shutil.rmtree(folder(run_dir, step), ignore_errors=True)


def reason(error: BaseException) -> str:
    """Return an error in one line; if several ranks failed together, the error of the first that did."""
    where = ""
    if isinstance(error, dcp.api.CheckpointException):
        number, (error, _) = next(iter(error.failures.items()))
        where = f"rank {number}: "
    text = str(error).strip()
    return f"{where}{type(error).__name__}" + (f": {text.splitlines()[0][:200]}" if text else "")


def read_state(path: Path) -> dict:
    """Return the `state` given to `save`, and the step. Raises UserError if it cannot be read."""
    try:
        state = json.loads((path / "state.json").read_text())
        if isinstance(state["step"], int) and isinstance(state["before"], dict):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path} is no whole checkpoint (state.json is missing or damaged); "
        "give another folder checkpoints/step_NNNNNN of a run"
    )


def load(path: Path, policy: CausalPolicy, optimizer: Optimizer) -> dict:
    """Load a checkpoint into policy and optimiser, in place; return its `state`. Collective.

    Raises UserError if it does not fit the model, is damaged, or is not on every node.
    """
    state, names = ranks.by_first(lambda: [read_state(path), sorted(os.listdir(path))])
    with ranks.together():
        if missing := [name for name in names if not (path / name).exists()]:
            raise UserError(
                f"--resume {path}: rank {ranks.rank()} does not find {missing[0]} there; every node reads a checkpoint "
                "whole: copy the folder to the nodes that do not share it"
            )
    model, optim = get_state_dict(policy, optimizer)
    try:
        parts = {"model": model, "optimizer": optim}
        dcp.load(parts, checkpoint_id=path)  # pyright: ignore[reportPrivateImportUsage]
    except (dcp.api.CheckpointException, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"--resume {path} does not fit student.path or is damaged ({reason(error)}); "
            "resume with the run's own config.toml, or another checkpoint"
        ) from None
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return state
