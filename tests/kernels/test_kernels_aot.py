"""The Triton kernels as compiled without a GPU, and the table of launch configurations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which compiles without a GPU")

from atod_kernels.triton.configs import INTERPRETER, TABLE, choose

from helpers.paths import BENCH


def compiled(code: str, tmp_path: Path) -> dict:
    """Return what a script prints as JSON in a new process, since importing the kernels fixes whether they are
    interpreted."""
    path = os.pathsep.join([str(BENCH), *sys.path])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": path,
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_compile_without_spills_and_use_tensor_cores(tmp_path):
    rows = compiled(
        """
import json
from dataclasses import asdict
from aot_audit import Variant, audit
chosen = [
    Variant("tile_sums_fwd_kernel", "reverse_kl"),
    Variant("tile_gradient_bwd_kernel", "jsd", extras=True),
    Variant("combine_sums_fwd_kernel", "forward_kl"),
    Variant("fused_sums_fwd_kernel", "reverse_kl"),
    Variant("turn_reduce_fwd_kernel", "mean"),
]
print(json.dumps([asdict(row) for arch in ("sm_90", "gfx942") for row in audit(arch, chosen)]))
""",
        tmp_path,
    )
    assert len(rows) == 10
    for row in rows:
        name = f"{row['arch']} {row['kernel']} ({row['variant']})"
        assert not row["fault"], f"{name}: {row['fault']}"
        assert 0 < row["shared"] <= row["shared_limit"] or row["shared"] == 0, name
        if row["kernel"].startswith("fused"):
            assert ("HGMMA" if row["arch"] == "sm_90" else "v_mfma") in row["tensor"], name
        if row["kernel"].startswith("tile"):
            assert row["loads"] > 0 and row["per_pair"] > 8, (
                f"{name}: a pair takes more than two exponentials and their sums"
            )


def test_the_audit_finds_faults(tmp_path):
    found = compiled(
        """
import json
from aot_audit import Variant, examine
deep = {"BM": 128, "BN": 64, "BK": 128, "TMA": True, "EVEN": True, "num_warps": 8, "num_stages": 5}
variants = Variant("fused_sums_fwd_kernel", ""), Variant("combine_sums_fwd_kernel", "jsd")
configs = deep, {"BLOCK": 100}
print(json.dumps([examine(v, "sm_90", c).fault for v, c in zip(variants, configs)]))
""",
        tmp_path,
    )
    assert "shared memory" in found[0], found
    assert found[1].startswith("does not compile"), found


def test_the_tuner_keeps_clean_candidates_and_writes_the_winner(tmp_path):
    """Its filter and its ranking, with a made-up judge and clock; neither needs a GPU."""
    out = compiled(
        """
import json, types
import tune
start = {"BLOCK": 4096, "num_warps": 4}
grid = list(tune.candidates("sums", "sm_90", 16))
def judge(variant, arch, config):
    return types.SimpleNamespace(fault="spills" if config["num_warps"] == 2 and variant.extras else "")
kept = [c for c in grid if tune.faultless("sums", "sm_90", 16, c, every=True, judge=judge)]
def clock(base):
    time = lambda c: 1.0 if c == start else base + c["BLOCK"] / 1e6
    return tune.ranked(kept, start, lambda config: config, time, rounds=3)
rows = json.loads(tune.TABLE.read_text())
won = clock(0.5)[0][1]
fused = list(tune.candidates("fused", "sm_90", 16))
print(json.dumps({"grid": len(grid), "kept": kept, "won": won, "stays": clock(0.985)[0][1], "rows": rows,
    "table": json.loads(tune.dumps(tune.merged(rows, {"sums": won}, "sm_90", 16))), "fused": len(fused),
    "current": tune.choose(rows, "fused", "sm_90", 16, "3.7") in fused}))
""",
        tmp_path,
    )
    assert 0 < len(out["kept"]) < out["grid"] and all(c["num_warps"] != 2 for c in out["kept"])
    assert out["won"]["BLOCK"] == min(c["BLOCK"] for c in out["kept"])
    assert out["stays"] == {"BLOCK": 4096, "num_warps": 4}, "a gain below the margin does not change the table"
    assert choose(out["table"], "sums", "sm_90", 16, "3.7.1") == out["won"]
    for kernel, arch in (("sums", "sm_80"), ("mixture", "sm_90"), ("fused", "sm_90")):
        assert choose(out["table"], kernel, arch, 16, "3.7.1") == choose(out["rows"], kernel, arch, 16, "3.7.1")
    assert out["fused"] > 10 and out["current"]


def test_the_most_particular_row_is_chosen():
    def row(config, **keys):
        return {"kernel": "fused", "arch": "any", **keys, "config": config}

    rows = [
        row("any"),
        row("arch", arch="sm_90"),
        row("bits", arch="sm_90", bits=16),
        row("3.9", arch="sm_90", bits=16, triton="3.9"),
        row("any 32", bits=32),
    ]
    for table in (rows, rows[::-1]):
        assert choose(table, "fused", "sm_80", 16, "3.7.1") == "any"
        assert choose(table, "fused", "sm_80", 32, "3.7.1") == "any 32"
        assert choose(table, "fused", "sm_90", 32, "3.7.1") == "arch"
        assert choose(table, "fused", "sm_90", 16, "3.7.1") == "bits"
        assert choose(table, "fused", "sm_90", 16, "3.9.0") == "3.9"
        assert choose(table, "fused", "sm_90", 16, "3.90.0") == "bits", "3.9 is not the beginning of 3.90"


def test_every_kernel_has_a_configuration_on_every_architecture():
    table = json.loads(TABLE.read_text())
    for kernel, keys in INTERPRETER.items():
        for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
            for bits in (16, 32):
                assert keys.keys() <= choose(table, kernel, arch, bits, "3.7.1").keys()
