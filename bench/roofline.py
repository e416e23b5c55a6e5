"""Predict times of the Triton backend's kernels and schedules on an H100, next to the bare matrix products.

    python bench/roofline.py                       # T 8192, H_s 2048, H_t 4096, V 151936: bench/results/roofline.md
    python bench/roofline.py --tokens 4096 --student 4096 --teacher 4096 --columns 128256 --out ''

Measured times are in results/gpu_lane.md. Instructions per logit pair come from compiling the kernels for sm_90 here
(`aot_audit.py`), bytes and FLOPs from the shapes, the machine's rates from the assumptions of `Machine`. An
element-wise kernel takes the longer of its memory traffic and its instructions.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import aot_audit
import triton
from atod_kernels.problem import TILE

RESULTS = Path(__file__).resolve().parent / "results" / "roofline.md"


@dataclass(frozen=True)
class Machine:
    """Rates of an H100 SXM. All but the numbers of the data sheet are assumptions."""

    units: int = 132
    clock: float = 1.70e9  # assumed, sustained under tensor load
    peak: float = 989e12  # bf16, data sheet
    products: float = 700e12  # assumed for cuBLAS at these shapes
    memory: float = 0.88 * 3.35e12  # data sheet, times the assumed share that a kernel reaches
    issue: float = 0.65  # assumed share of the issue slots that are used, 128 lanes a clock and unit
    l2: float = 5120  # bytes a clock, whole chip; A100's documented figure
    exposed: float = 0.35  # assumed share of the shorter of two overlapping streams that still costs time
    launch: float = 3e-6


@dataclass(frozen=True)
class Shape:
    tokens: int
    columns: int
    student: int
    teacher: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.columns

    @property
    def unit(self) -> float:
        """Return G, the FLOPs of one matrix product of the student."""
        return 2.0 * self.pairs * self.student

    @property
    def ratio(self) -> float:
        return self.teacher / self.student


@dataclass(frozen=True)
class Kernel:
    """A kernel's predicted time; `bytes` of main memory and lane `instructions` are per logit pair."""

    name: str
    bytes: float
    instructions: float
    seconds: float
    bound: str


def over_memory(name: str, kind: str, moved: float, shape: Shape, machine: Machine) -> Kernel:
    row = compiled(aot_audit.Variant(name, kind))
    memory, issue = (
        shape.pairs * moved / machine.memory,
        shape.pairs * row.per_pair / (128 * machine.units * machine.clock * machine.issue),
    )
    return Kernel(f"{name} {kind}", moved, row.per_pair, max(memory, issue), "memory" if memory > issue else "issue")


def fused(name: str, kind: str, moved: float, shape: Shape, machine: Machine) -> Kernel:
    """Predict a fused kernel. A unit runs one block (which fills its registers), so that nothing hides the epilogue."""
    variant = aot_audit.Variant(name, kind)
    config = aot_audit.launch(variant, "sm_90", aot_audit.table(), triton.__version__)
    row, (bm, bn) = compiled(variant), (config["BM"], config["BN"])
    depth = shape.student + shape.teacher
    products = 2 * bm * bn * depth / (machine.peak / machine.units / machine.clock)
    traffic = 2 * (bm + bn) * depth / (machine.l2 / machine.units)
    epilogue = row.per_pair * bm * bn / (128 * machine.issue)
    tiles = math.ceil(shape.tokens / bm) * math.ceil(shape.columns / bn)
    seconds = tiles / machine.units * (max(products, traffic) + epilogue) / machine.clock
    return Kernel(
        f"{name} {kind}",
        moved,
        row.per_pair,
        max(seconds, shape.pairs * moved / machine.memory),
        "tensor cores" if products >= traffic else "L2",
    )


def compiled(variant: aot_audit.Variant) -> aot_audit.Row:
    row = aot_audit.examine(variant, "sm_90", aot_audit.launch(variant, "sm_90", aot_audit.table(), triton.__version__))
    if row.fault:
        raise SystemExit(f"roofline: {variant.kernel} ({variant.label}): {row.fault}")
    return row


@dataclass(frozen=True)
class Schedule:
    name: str
    products: float  # in G, computed by the library
    fused: float  # in G, computed inside kernels
    kernels: list[Kernel]
    gradients: bool

    @property
    def work(self) -> float:
        return self.products + self.fused

    def seconds(self, shape: Shape, machine: Machine, lean: bool) -> float:
        rows, columns = TILE["accelerator"]
        chunks, slices = math.ceil(shape.tokens / rows), math.ceil(shape.columns / columns)
        total = self.products * shape.unit / machine.products + sum(kernel.seconds for kernel in self.kernels)
        if self.gradients:
            # fp32 sums are read and written again: dX for every slice of columns, dW for every chunk of tokens.
            # The lean schedule also stores each slice of dW once, when it is complete.
            touched = 8 * shape.student * (shape.tokens * slices + shape.columns * chunks) + (
                4 * shape.columns * shape.student if lean else 0
            )
            total += machine.exposed * touched / machine.memory
        return total + machine.launch * chunks * slices * (2 * math.ceil(self.products) + len(self.kernels))


def schedules(kind: str, mixture: bool, shape: Shape, machine: Machine) -> list[tuple[Schedule, bool]]:
    """Return every schedule and whether it is a lean one. The rate of products includes storing the logits."""
    r = shape.ratio
    sums = over_memory("tile_sums_fwd_kernel", kind, 8, shape, machine)
    gradient = over_memory("tile_gradient_bwd_kernel", kind, 10, shape, machine)
    look = [over_memory("tile_mixture_fwd_kernel", kind, 8, shape, machine)] if mixture else []
    lean = [fused("fused_sums_fwd_kernel", kind, 0, shape, machine)]
    lean += [fused("fused_mixture_fwd_kernel", kind, 0, shape, machine)] if mixture else []
    lean_gradient = fused("fused_gradient_bwd_kernel", kind, 2, shape, machine)
    scored = (1 + r) * len(lean)
    return [
        (Schedule("statistics, fast", 1 + r, 0, [sums, *look], False), False),
        (Schedule("statistics, lean", 0, scored, lean, False), True),
        (Schedule("linear_token_loss, fast", 3 + r, 0, [sums, *look, gradient], True), False),
        (Schedule("linear_divergence, fast", 4 + 2 * r, 0, [sums, *look, gradient], True), False),
        (Schedule("linear_divergence, lean", 2, scored + 1 + r, [*lean, lean_gradient], True), True),
    ]


def report(shape: Shape, machine: Machine) -> str:
    flops = shape.unit
    lines = [
        "# Predicted times on an H100",
        "",
        "**Predictions**, made before a kernel had run; `gpu_lane.md` has what was measured. "
        "Instruction counts are from kernels "
        f"compiled ahead of time for sm_90 by Triton {triton.__version__}, bytes and FLOPs from the shapes; "
        f"the rest is assumed:",
        "",
        f"- cuBLAS at {machine.products / 1e12:.0f} TFLOP/s (peak {machine.peak / 1e12:.0f}), "
        f"{machine.clock / 1e9:.2f} GHz under load, {machine.units} units;",
        f"- main memory at {machine.memory / 1e12:.2f} TB/s; {machine.issue:.0%} of issue slots used; "
        f"{machine.l2:.0f} B a clock from L2;",
        f"- {machine.exposed:.0%} of the traffic of fp32 gradient sums is not hidden behind products; "
        f"{machine.launch * 1e6:.0f} us a launch;",
        "- fused kernels run one block a unit, so that their epilogue is not hidden; "
        "the hidden states' blocks come from L2.",
        "",
        f"T {shape.tokens}, V {shape.columns}, H_s {shape.student}, H_t {shape.teacher}: "
        f"G = 2 T V H_s = {flops / 1e12:.2f} TFLOP, r = {shape.ratio:g}, "
        f"{shape.pairs / 1e9:.2f}e9 logit pairs. Tiles in memory are {TILE['accelerator'][0]} x "
        f"{TILE['accelerator'][1]}.",
    ]
    for kind, mixture in (("reverse_kl", False), ("jsd", True)):
        found = schedules(kind, mixture, shape, machine)
        kernels = {kernel.name: kernel for schedule, _ in found for kernel in schedule.kernels}
        lines += [
            "",
            f"## {kind}",
            "",
            "| kernel | bytes per pair | instructions per pair | ms | bound by |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {k.name} | {k.bytes:g} | {k.instructions:g} | {k.seconds * 1e3:.1f} | {k.bound} |"
            for k in kernels.values()
        ]
        lines += [
            "",
            "| schedule | products | TFLOP | their floor, ms | predicted, ms | floor / predicted |",
            "|---|---|---|---|---|---|",
        ]
        for schedule, lean in found:
            floor, seconds = schedule.work * flops / machine.products, schedule.seconds(shape, machine, lean)
            figures = (
                f"{schedule.work * flops / 1e12:.1f} | {floor * 1e3:.1f} | {seconds * 1e3:.1f} | {floor / seconds:.0%}"
            )
            lines.append(f"| {schedule.name} | {schedule.work:g} G | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=151936)
    parser.add_argument("--student", type=int, default=2048, help="hidden size")
    parser.add_argument("--teacher", type=int, default=4096, help="hidden size")
    parser.add_argument("--products", type=float, default=Machine.products / 1e12, help="TFLOP/s assumed of cuBLAS")
    parser.add_argument("--out", default=str(RESULTS), help="'' writes nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        text = report(
            Shape(args.tokens, args.columns, args.student, args.teacher), Machine(products=args.products * 1e12)
        )
    print(text, end="")
    if args.out:
        Path(args.out).write_text(text)


if __name__ == "__main__":
    main()
