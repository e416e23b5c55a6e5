"""Export a checkpoint as a model for transformers, on one CPU.

python -m atod_fast.export runs/demo --out model                      the newest checkpoint of a run
python -m atod_fast.export runs/demo --best --out model               the best on env.dev (checkpoint.keep_best=true)
python -m atod_fast.export runs/demo/checkpoints/step_000050 --out model
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from atod_fast.cli import Parser
from atod_fast.errors import UserError


def _chosen(given: Path, best: bool) -> Path:
    """Return the checkpoint that the arguments name. Raises UserError if there is none."""
    from atod_fast.policy import checkpoint

    if checkpoint.is_complete(given):
        if best:
            run = checkpoint.run_of(given)
            raise UserError(f"--best goes with a run, and {given} is a checkpoint; give {run or 'its run'}")
        return checkpoint.placed(given)
    newest = checkpoint.latest(given)
    if newest is None:
        raise UserError(
            f"{given} is neither a checkpoint nor a run with one; give runs/NAME or runs/NAME/checkpoints/step_NNNNNN"
        )
    if not best:
        return newest
    found = checkpoint.best(given)
    if found is None:
        raise UserError(
            f"--best: {given} names no best checkpoint, which takes checkpoint.keep_best=true; "
            "leave --best out for the newest"
        )
    return checkpoint.folder(given, found.step)


def _student(path: Path, given: str | None) -> str:
    """Return the value of --student, or else student.path of the checkpoint's run."""
    if given is not None:
        return given
    from atod_fast.policy import checkpoint

    if (run := checkpoint.run_of(path)) is None:
        raise UserError(f"{path} lies in no run's checkpoints/: name the model that was trained with --student")
    settings = run / "config.toml"
    try:
        return tomllib.loads(settings.read_text(encoding="utf-8"))["student"]["path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{settings} does not say which model was trained; name it with --student") from None


def export(path: Path, out: Path, student: str) -> list[str]:
    """Write the model of the checkpoint at `path` to `out`. Returns a line for each file that could not be written."""
    import warnings

    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    from atod_fast.models import load_tokenizer
    from atod_fast.policy import checkpoint
    from atod_fast.policy.export import write

    stop_ids = checkpoint.read_state(path).get("stop_ids")
    tokenizer = load_tokenizer(student)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the missing process group
            facts = FileSystemReader(path).read_metadata().state_dict_metadata
            weights = {
                name: torch.empty(fact.size, dtype=fact.properties.dtype)
                for name, fact in facts.items()
                if name.startswith("model.") and isinstance(fact, TensorStorageMetadata)
            }
            load(weights, checkpoint_id=path, no_dist=True)
    except (CheckpointException, Exception) as error:  # CheckpointException is no Exception
        raise UserError(
            f"{path} is damaged or another program's ({checkpoint.reason(error)}); take another checkpoint"
        ) from None
    weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    try:
        return write(out, weights, student, tokenizer, stop_ids)
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error}); give another folder, with room for the model"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code: 0 done, 2 bad usage or input."""
    parser = Parser("atod_fast.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run for its newest")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the model; it must not hold anything yet"
    )
    parser.add_argument("--best", action="store_true", help="of a run: the checkpoint with the best success on env.dev")
    parser.add_argument(
        "--student",
        metavar="PATH",
        help="folder or hub name of the model that was trained (default: student.path of the run)",
    )
    try:
        arguments = parser.parse_args(argv)
        out = arguments.out
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is there already and not empty; give a new folder")
        path = _chosen(arguments.checkpoint, arguments.best)
        student = _student(path, arguments.student)
        for line in export(path, out, student):
            print(f"atod_fast: {line}", file=sys.stderr)
    except UserError as error:
        print(f"atod_fast: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{out}: the model of {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
