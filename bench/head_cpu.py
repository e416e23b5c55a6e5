"""Time and memory of the head operators on one CPU thread, forward and backward of a reverse KL, against naive torch.

    python bench/head_cpu.py [--tokens 512 --columns 151936 --student-hidden 512 --teacher-hidden 512] [--rounds 3] [--out bench/results/head_cpu.json]

Contenders take turns within a round, so that a busy machine is busy for all; the median over rounds is reported. Times are CPU seconds
of the process. Memory is the peak of resident memory above the inputs, the gradients [T, H] and [V, H] included, each in a process of its own.
`products` are the bare matrix products of a schedule, into buffers of 256 tokens: no implementation that makes them can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from atod_kernels import linear_divergence, linear_token_loss, naive  # noqa: E402
from torch import Tensor  # noqa: E402

ROWS = 256


def make_inputs(tokens: int, columns: int, student: int, teacher: int) -> list[Tensor]:
    """Student hidden and weight (requiring gradients), teacher hidden and weight, fp32."""
    g = torch.Generator().manual_seed(0)
    shapes = (tokens, student), (columns, student), (tokens, teacher), (columns, teacher)
    tensors = [torch.empty(shape).normal_(generator=g) for shape in shapes]
    for weight in tensors[1::2]:
        weight.mul_(2 / weight.shape[1] ** 0.5)
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


def divergence(function: Callable, **options: str) -> Callable:
    def run(inputs: list[Tensor]) -> None:
        function(*inputs, **options).divergence.sum().backward()

    return run


def token_loss(schedule: str) -> Callable:
    def run(inputs: list[Tensor]) -> None:
        linear_token_loss(lambda s: s.divergence, *inputs, schedule=schedule)[0].backward()

    return run


def products(recompute: bool) -> Callable:
    """The products of the forward (both models' logits), once more if the backward recomputes them, and of the two gradients."""

    def run(inputs: list[Tensor]) -> None:
        x, w, xt, wt = (t.detach() for t in inputs)
        logits, dx, dw = x.new_empty(ROWS, w.shape[0]), torch.empty_like(x), torch.zeros_like(w)
        for i in range(0, x.shape[0], ROWS):
            rows = slice(i, min(i + ROWS, x.shape[0]))
            z = logits[: rows.stop - i]
            for _ in range(1 + recompute):
                torch.mm(xt[rows], wt.T, out=z)
                torch.mm(x[rows], w.T, out=z)
            torch.mm(z, w, out=dx[rows])
            dw.addmm_(z.T, x[rows])

    return run


CONTENDERS = {
    "naive torch": divergence(naive.linear_divergence),
    "linear_divergence auto": divergence(linear_divergence),
    "linear_divergence fast": divergence(linear_divergence, schedule="fast"),
    "linear_token_loss fast": token_loss("fast"),
    "linear_token_loss lean": token_loss("lean"),
    "products (3+r)G": products(recompute=False),
    "products (4+2r)G": products(recompute=True),
}


def seconds(contender: Callable, inputs: list[Tensor]) -> float:
    for x in inputs:
        x.grad = None
    start = time.process_time()
    contender(inputs)
    return time.process_time() - start


def peak_kib() -> int:
    """Peak resident memory of this process (Linux). Not ru_maxrss, which a child inherits."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peak_mib(name: str, sizes: list[int]) -> float:
    """Peak resident memory above the inputs, measured in a fresh process."""
    command = [sys.executable, __file__, "--memory-of", name, *(f"--{k}={v}" for k, v in zip(SIZES, sizes, strict=True))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads_used": torch.get_num_threads(),
        "avx512": "avx512f" in flags,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


SIZES = {"tokens": 512, "columns": 151936, "student-hidden": 512, "teacher-hidden": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write or to extend by this shape")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [args.tokens, args.columns, args.student_hidden, args.teacher_hidden]
    inputs = make_inputs(*sizes)
    if args.memory_of:
        CONTENDERS[args.memory_of](make_inputs(ROWS, 512, 64, 64))  # what libraries allocate once is not the operator's
        before = peak_kib()
        CONTENDERS[args.memory_of](inputs)
        print((peak_kib() - before) / 1024)
        return

    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name, contender in CONTENDERS.items():
            times[name].append(seconds(contender, inputs))
    medians = {name: statistics.median(t) for name, t in times.items()}
    shape = f"T{args.tokens} V{args.columns} Hs{args.student_hidden} Ht{args.teacher_hidden} fp32"
    rows = {
        name: {
            "cpu_seconds_median": round(medians[name], 3),
            "cpu_seconds": [round(t, 3) for t in times[name]],
            "ratio_to_naive": round(medians[name] / medians["naive torch"], 3),
            "peak_mib_above_inputs": round(peak_mib(name, sizes)),
        }
        for name in CONTENDERS
    }
    print(f"{shape}, reverse KL, forward and backward, median of {args.rounds}")
    for name, row in rows.items():
        print(f"{name:24s} {row['cpu_seconds_median']:7.2f} s  {row['ratio_to_naive']:5.2f} of naive  {row['peak_mib_above_inputs']:6d} MiB")
    if args.out:
        results = json.loads(args.out.read_text()) if args.out.exists() else {}
        results[shape] = {"machine": machine(), "rounds": args.rounds, "contenders": rows}
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
