"""What the benchmarks say of the machine and the packages they ran with."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def version(package: str) -> str:
    """Of an installed package; empty for one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
