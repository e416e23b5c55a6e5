"""Saving and resuming with torch.distributed.checkpoint. `checkpoints/best.json` names the step of the best held-out success, where it is kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from atod_fast import ranks
from atod_fast.errors import GuardError, UserError
from atod_fast.policy.model import CausalPolicy


class Best(NamedTuple):
    """The step of the best held-out success so far; of equal ones the first."""

    step: int
    success: float


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def is_complete(path: Path) -> bool:
    return (path / "state.json").is_file()


def step_of(path: Path) -> int:
    return json.loads((path / "state.json").read_text())["step"]


def _numbered(run_dir: Path) -> dict[int, Path]:
    """Folders of checkpoints by step, in order."""
    found = {int(match[1]): path for path in (run_dir / "checkpoints").glob("step_*") if (match := re.fullmatch(r"step_(\d{6,})", path.name))}
    return dict(sorted(found.items()))


def latest(run_dir: Path, most: float = float("inf")) -> Path | None:
    """The newest complete checkpoint of a run, of step `most` at most."""
    return next((path for step, path in reversed(_numbered(run_dir).items()) if step <= most and is_complete(path)), None)


def best(run_dir: Path) -> Best | None:
    """What best.json names, where its checkpoint is there."""
    try:
        facts = json.loads(_best_file(run_dir).read_text())
    except FileNotFoundError:
        return None
    return Best(facts["step"], facts["eval/success"]) if is_complete(folder(run_dir, facts["step"])) else None


def name_best(run_dir: Path, found: Best | None) -> None:
    """Write best.json, or take it away where there is none."""
    file = _best_file(run_dir)
    if found is None:
        file.unlink(missing_ok=True)
        return
    rest = file.with_suffix(".partial")
    rest.write_text(json.dumps({"step": found.step, "eval/success": found.success}) + "\n")
    rest.replace(file)


def _best_file(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "best.json"


def beyond(run_dir: Path, step: int) -> list[Path]:
    """What of a run's checkpoints is no past of one that goes on from `step`: later ones, half written ones, a later best.json."""
    named = _best_file(run_dir)
    later = [named] if named.is_file() and json.loads(named.read_text())["step"] > step else []
    return later + [path for number, path in _numbered(run_dir).items() if number > step] + list(named.parent.glob("*.partial"))


def save(run_dir: Path, step: int, policy: CausalPolicy, optimizer: Optimizer, state: dict, *, keep: int, best: Best | None = None) -> Path:
    """Write step's checkpoint beside its final name and rename it when whole; then drop the oldest beyond `keep`, but not the best.

    `state` is JSON-serialisable. Collective; what fails on one rank is raised on all.
    """
    final = folder(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    with ranks.together():
        if ranks.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    model, optim = get_state_dict(policy, optimizer)
    try:
        dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial)
    except dcp.api.CheckpointException as error:  # on every rank
        number, (reason, _) = next(iter(error.failures.items()))
        raise GuardError(f"{final} could not be written (rank {number}: {type(reason).__name__}: {reason})") from None
    with ranks.together():
        if ranks.rank() == 0:
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            if best:
                name_best(run_dir, best)
            found = _numbered(run_dir)
            for old in list(found)[:-keep]:
                if best is None or old != best.step:
                    shutil.rmtree(found[old])
    return final


def read_state(path: Path) -> dict:
    """What `save` was given as `state`, and the step. Raises UserError where the checkpoint is not whole."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"--resume {path} holds no complete checkpoint (state.json is missing or damaged); give a folder checkpoints/step_NNNNNN of a run"
        ) from None


def load(path: Path, policy: CausalPolicy, optimizer: Optimizer) -> dict:
    """Fill policy and optimiser in place; returns the saved `state`. Collective."""
    state = read_state(path)
    model, optim = get_state_dict(policy, optimizer)
    try:
        dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path)
    except (dcp.api.CheckpointException, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume {path} does not fit student.path or is damaged ({reason}); resume with the run's own config.toml") from None
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return state
