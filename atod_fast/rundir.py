"""Which folder a run writes to, and which checkpoint it goes on from. No run is ever overwritten."""

from __future__ import annotations

import json
import re
from pathlib import Path

from atod_fast import ranks
from atod_fast.cli import Options
from atod_fast.errors import UserError
from atod_fast.policy import checkpoint

ROOT = Path("runs")


def agree(options: Options) -> tuple[Path, Path | None]:
    """`choose` on rank 0, its answer (or its UserError) on every rank."""
    answer: dict[str, str | None] = {}
    if ranks.rank() == 0:
        try:
            run_dir, resume = choose(options.name, options.run_dir, options.resume)
            answer = {"run_dir": str(run_dir), "resume": str(resume) if resume else None}
        except UserError as error:
            answer = {"error": str(error)}
    answer = json.loads(ranks.from_first(json.dumps(answer)))
    if "error" in answer:
        raise UserError(answer["error"])
    return Path(answer["run_dir"]), Path(answer["resume"]) if answer["resume"] else None


def choose(name: str, run_dir: Path | None, resume: str | None) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None). Reads the disk only; call it on one rank and share the answer."""
    if resume not in (None, "auto"):
        path = Path(resume)
        if not (path / "state.json").is_file():
            newest = checkpoint.latest(path)
            if newest is None:
                raise UserError(f"--resume {resume} is neither a checkpoint nor a run with one; give runs/NAME or runs/NAME/checkpoints/step_NNNNNN")
            path = newest
        own = path.parent.parent
        if run_dir is not None and run_dir.resolve() != own.resolve():
            _refuse_taken(run_dir)
        return run_dir or own, path
    if run_dir is None:
        runs = {int(match[1] or 1): path for path in ROOT.glob(f"{name}*") if (match := re.fullmatch(re.escape(name) + r"(?:-(\d+))?", path.name))}
        newest = max(runs, default=0)
        if resume != "auto" or not runs:
            return ROOT / (f"{name}-{newest + 1}" if runs else name), None
        run_dir = runs[newest]
    if resume == "auto":
        return run_dir, checkpoint.latest(run_dir)
    _refuse_taken(run_dir)
    return run_dir, None


def _refuse_taken(run_dir: Path) -> None:
    if (run_dir / "metrics.jsonl").exists():
        raise UserError(f"--run-dir {run_dir} already holds a run; add --resume auto to go on with it, or give another folder")
