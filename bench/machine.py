"""Facts about the machine and the packages that a benchmark ran with."""

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
    """Return the version of an installed package, or ''."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit(*paths: str) -> tuple[str, list[str]]:
    """Return HEAD of this checkout, and the files below `paths` that are changed or untracked. Exit outside a
    checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--", *paths).splitlines()
        return git("rev-parse", "HEAD").strip(), [line[3:] for line in changed]
    except (OSError, subprocess.CalledProcessError):
        sys.exit(f"{ROOT} is no git checkout, and the result names its commit; clone the repository")


def environment() -> dict[str, str]:
    """Return the environment of a process that is to import this checkout's packages. Start it in ROOT."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path}
