"""What the benchmarks say of the machine and the packages they ran with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def version(package: str) -> str:
    """Of an installed package; empty for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit(*paths: str) -> tuple[str, list[str]]:
    """HEAD of this checkout, and what below `paths` differs from it or is untracked. Exits where there is none."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--", *paths).splitlines()
        return git("rev-parse", "HEAD").strip(), [line[3:] for line in changed]
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{ROOT} is no git checkout, and the result names its commit; clone the repository")


def environment() -> dict[str, str]:
    """For a process that shall import the packages of this checkout, whatever is installed; start it in ROOT."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}
