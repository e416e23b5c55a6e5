"""Show all that only a GPU can show, unattended: one command, which ends within --minutes (8) on one H100.

    python bench/gpu_lane.py --out bench/results/gpu_lane.json
    python bench/gpu_lane.py --out lane.json --parts vllm,decode
    python bench/gpu_lane.py --dry                # every part on a CPU, on small tensors
    python bench/gpu_lane.py --list               # the parts, and what is expected of them

What is not proven yet comes first. Each part is a process of its own with a limit of time, so that one that crashes or
hangs loses only itself; what it found until then counts. Results are written after each part. `lane_table.py` puts
them into bench/results/gpu_lane.md, beside the numbers that were expected (`lane.py`).

Exit 0 if every part ended and passed its checks, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lane import EXPECTED
from machine import ROOT, environment, processor, version

BENCH = ROOT / "bench"
PACKAGES = ("torch", "triton", "transformers", "vllm", "liger-kernel", "trl", "numpy")
RESERVE = 5  # seconds of the whole, to write results
DRY = 600  # seconds of a part on a CPU


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]  # a file of bench/, and its options
    limit: float  # seconds on a GPU
    what: str


PARTS = (
    Part("vllm", ("gpu_vllm.py", "--head-dtype", "fp32"), 110, "vLLM: build, sleep at level 2, wake, load, roll out"),
    Part("vllm-model-logits", ("gpu_vllm.py", "--head-dtype", "model"), 75, "the same with vLLM's own logits"),
    Part("vllm-engine", ("gpu_vllm.py", "--check-engine"), 75, "the tests' check of the vLLM engine"),
    Part("kernels", ("gpu_kernels.py", "--only", "checks"), 100, "the kernels against fp64"),
    Part("varlen", ("gpu_varlen.py",), 40, "packed attention against sdpa"),
    Part("decode", ("gpu_decode.py",), 75, "the built-in engine's decode steps, eager and captured"),
    Part("step", ("gpu_step.py",), 110, "a training step, plan against measured"),
    Part("questions", ("gpu_questions.py",), 50, "smaller tiles of the head"),
    Part("times", ("gpu_kernels.py", "--only", "times"), 170, "the head's kernels against peers and bare products"),
)


def machine(dry: bool) -> dict[str, Any]:
    """Return facts about the machine and its packages. No CUDA context is made: the parts need the memory."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()
    except (OSError, subprocess.TimeoutExpired):
        gpus = []
    try:
        head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "dry": dry,
        "gpus": gpus,
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "commit": commit,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def stop(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(part: Part, limit: float, dry: bool, folder: Path) -> dict[str, Any]:
    """Run a part for at most `limit` seconds; return how it ended and what it found."""
    out, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    command = [sys.executable, str(BENCH / part.command[0]), *part.command[1:], "--out", str(out)]
    command += ["--seconds", str(max(1.0, limit - 5)), *(["--dry"] if dry else [])]
    began, status = time.monotonic(), "timed out"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            status = {0: "passed", 1: "failed"}.get(code, f"ended with {code}")
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(process)
    try:
        found = json.loads(out.read_text())
    except (OSError, ValueError):
        found = {}
        status = "failed" if status == "passed" else status
    text = log.read_text(errors="replace")
    print(text, end="", flush=True)
    ended = {"status": status, "seconds": round(time.monotonic() - began, 1)} | found
    return ended if status == "passed" else ended | {"tail": text[-2000:]}


class Audit:
    """`aot_audit.py --check` for a Hopper GPU, on a CPU core beside the parts."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "audit.log"
        command = [sys.executable, str(BENCH / "aot_audit.py"), "--check", "--arch", "sm_90", "--out", ""]
        self.process = subprocess.Popen(
            ["nice", "-n", "19", *command],
            cwd=ROOT,
            env=environment(),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.began = time.monotonic()

    def result(self, wait: float) -> dict[str, Any]:
        """Return how it ended; it is stopped if it has not within `wait` seconds."""
        try:
            code = self.process.wait(max(0.0, wait))
            status = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        stop(self.process)
        tail = self.log.read_text(errors="replace")[-2000:]
        found = {"status": status, "seconds": round(time.monotonic() - self.began, 1)}
        return found if status == "passed" else found | {"tail": tail}


def save(out: Path | None, record: dict[str, Any]) -> None:
    if out:
        partial = out.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(out)


def chosen(names: str) -> list[Part]:
    """Return the parts of a comma-separated list, in the lane's order."""
    wanted = [name.strip() for name in names.split(",")]
    known = [part.name for part in PARTS]
    if unknown := [name for name in wanted if name not in known]:
        raise SystemExit(f"--parts: {unknown[0]!r} is none of {', '.join(known)}")
    return [part for part in PARTS if part.name in wanted]


def summary(record: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in record["parts"].items():
        checks = part.get("checks", [])
        good = sum(check["passed"] for check in checks)
        lines.append(f"{name:20} {part['status']:12} {part['seconds']:7.1f} s  {good} of {len(checks)} checks")
        lines += [f"  FAILED {text}" for text in part.get("failures", [])]
        lines += [f"  skipped {text}" for text in part.get("skipped", [])]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the results as JSON, written after each part")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="some of: %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="all of it ends within this")
    parser.add_argument("--dry", action="store_true", help="every part on a CPU, on small tensors")
    parser.add_argument("--list", action="store_true", help="show parts and expected numbers, run nothing")
    args = parser.parse_args()
    parts = chosen(args.parts)
    if args.list:
        print("\n".join(f"{part.name:20} {part.limit:4.0f} s  {part.what}" for part in parts))
        print("\n".join(f"{name:48} {e.value:>8g} {e.unit:9} {e.why}" for name, e in EXPECTED.items()))
        return 0
    if not args.dry and not torch.cuda.is_available():
        print("gpu_lane: no GPU that this torch can use; run it on a machine with one, or with --dry")
        return 2
    end = time.monotonic() + (60 * args.minutes if not args.dry else DRY * len(parts)) - RESERVE
    record: dict[str, Any] = {"machine": machine(args.dry), "minutes": args.minutes, "parts": {}}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audited = not args.dry and "kernels" in [part.name for part in parts]
        audit = Audit(folder) if audited else None
        try:
            for part in parts:
                limit = min(DRY if args.dry else part.limit, end - time.monotonic())
                print(f"== {part.name}: {part.what}, at most {max(0.0, limit):.0f} s", flush=True)
                if limit < 10:
                    record["parts"][part.name] = {"status": "no time left", "seconds": 0.0}
                else:
                    record["parts"][part.name] = run(part, limit, args.dry, folder)
                record["seconds"] = round(time.monotonic() - began, 1)
                save(args.out, record)
        finally:
            if audit is not None:
                record["parts"]["aot_audit"] = audit.result(end - time.monotonic())
        record["seconds"] = round(time.monotonic() - began, 1)
        save(args.out, record)
    print("\n".join([*summary(record), f"all: {record['seconds']:.0f} s"]), flush=True)
    return int(any(part["status"] != "passed" for part in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
