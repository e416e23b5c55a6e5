"""Launch configurations per architecture, from the table `configs.json`; nothing is searched at run time.

A row names a kernel, an architecture ("any" for all) and a configuration, and where they matter the operands' bits
and the versions of Triton ("3.9": all of 3.9). The most specific row wins. `bench/tune.py` searches on a GPU and
writes the table.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import triton

from ..validate import interpreted

TABLE = Path(__file__).with_name("configs.json")
INTERPRETER = {  # small blocks, so that the small tensors of tests have several
    "fused": {"BM": 16, "BN": 32, "BK": 16, "TMA": False, "PARTS": 4, "num_warps": 4, "num_stages": 1},
    "ragged": {"BM": 16, "BN": 32, "BK": 16, "TMA": False, "PARTS": 2, "num_warps": 4, "num_stages": 1},
    "sums": {"BLOCK": 32, "num_warps": 4},
    "mixture": {"BLOCK": 32, "num_warps": 4},
    "gradient": {"BLOCK": 32, "num_warps": 4},
}


def architecture(device: torch.device) -> str:
    """Return the table's architecture for a device: its own, or the nearest with no more shared memory."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def choose(rows: list[dict[str, Any]], kernel: str, arch: str, bits: int, version: str) -> dict[str, Any]:
    """Return the configuration of the most specific row of the table that fits."""
    fits = [
        row
        for row in rows
        if row["kernel"] == kernel
        and row["arch"] in (arch, "any")
        and row.get("bits", bits) == bits
        and (version + ".").startswith(row.get("triton", version) + ".")
    ]
    return max(fits, key=lambda row: (row["arch"] != "any", "bits" in row, row.get("triton", "")))["config"]


@functools.cache
def configuration(kernel: str, arch: str, bits: int) -> dict[str, Any]:
    """Return block sizes and launch options of a kernel.

    kernel is fused, ragged (for operands that fused cannot take), sums, mixture or gradient; bits are those of the
    operands, 16 or 32.
    """
    if arch == "interpreter":
        return INTERPRETER[kernel]
    return choose(json.loads(TABLE.read_text()), kernel, arch, bits, triton.__version__)
