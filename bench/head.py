"""Measure time and peak memory of the reverse KL: atod_kernels, its peers and the bare matrix products.

    python bench/head.py                      # the shapes of the bar: bench/results/head.csv, head.md and plots
    python bench/head.py --shapes 512,32000,256,512 --rounds 3
    python bench/head.py --sweep T V H        # one dimension at a time
    python bench/head.py --lean-memory        # only memory, up to 16k tokens

Before timing, every contender's loss and gradients are compared with the fp64 reference. A peer whose package is
missing, or that does not run here, is named once and left out. The extra `peers` of atod_fast has them.

CPU: one thread; CPU seconds of the process, contenders taking turns within a round. Memory is the peak of resident
memory in a fresh process per contender, above what is resident after a warm-up. CUDA: milliseconds between events with
a cold L2 cache, and the allocator's peak.

`forward` is without gradients; `forward+backward` ends with those of the student's hidden states and weight. 'beyond
inputs and gradients' subtracts the size of these two. Products are the bare matrix products of a schedule, over 256
tokens (CUDA: 2048) at a time: no implementation that computes them can be faster. Ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import plot_head  # noqa: E402
import torch  # noqa: E402
from atod_kernels import naive  # noqa: E402
from machine import CPUINFO, processor, version  # noqa: E402
from peers import Contender, Loss, contenders  # noqa: E402
from torch import Tensor  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "head.csv"
FORWARD, BOTH = plot_head.FORWARD, plot_head.BOTH
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    tokens: int
    columns: int
    student_hidden: int
    teacher_hidden: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        sizes = [int(x) for x in text.split(",")]
        if len(sizes) not in (3, 4) or min(sizes) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r}; expected tokens,columns,hidden or tokens,columns,student_hidden,teacher_hidden"
            )
        return cls(*sizes, *sizes[2:] * (len(sizes) == 3))

    def __str__(self) -> str:
        return f"T{self.tokens} V{self.columns} Hs{self.student_hidden} Ht{self.teacher_hidden}"


BAR = {
    "cpu": [Shape(512, 151936, 512, 512), Shape(2048, 32000, 1024, 1024), Shape(1024, 151936, 256, 512)],
    "cuda": [Shape(8192, 151936, 2048, 4096), Shape(4096, 128256, 4096, 4096)],
}
SWEEPS = {
    "cpu": {
        "T": [Shape(t, 32000, 512, 512) for t in (256, 512, 1024, 2048)],
        "V": [Shape(512, v, 512, 512) for v in (16384, 32768, 65536, 131072)],
        "H": [Shape(512, 32000, h, h) for h in (256, 512, 1024, 2048)],
    },
    "cuda": {
        "T": [Shape(t, 151936, 2048, 2048) for t in (1024, 2048, 4096, 8192, 16384)],
        "V": [Shape(4096, v, 2048, 2048) for v in (32000, 64000, 128256, 262144)],
        "H": [Shape(4096, 128256, h, h) for h in (1024, 2048, 4096, 8192)],
    },
}
LEAN_MEMORY = [Shape(t, v, 128, 128) for v in (8192, 32768, 131072) for t in (2048, 4096, 8192, 16384)]


def make_inputs(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Return student hidden and weight (requiring gradients), teacher hidden and weight; logits have standard
    deviation 2."""
    g = torch.Generator(device).manual_seed(seed)
    t, v, hs, ht = astuple(shape)
    tensors = [
        torch.empty(size, device=device, dtype=dtype).normal_(generator=g)
        for size in ((t, hs), (v, hs), (t, ht), (v, ht))
    ]
    for weight in tensors[1::2]:
        weight.mul_(2 / weight.shape[1] ** 0.5)
    return [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]


def run(loss: Loss, inputs: list[Tensor], which: str) -> None:
    with torch.set_grad_enabled(which == BOTH):
        value = loss(*inputs)
    if which == BOTH and value is not None:
        value.backward()


def clear(inputs: list[Tensor]) -> None:
    for x in inputs:
        x.grad = None


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def checked(device: str, wanted: Callable[[str], bool]) -> dict[str, tuple[Contender, Loss]]:
    """Return the wanted contenders that run here, once their loss and gradients agree with the fp64 reference on a
    small input (600 tokens: two chunks and a rest)."""
    inputs = make_inputs(Shape(600, 1000, 48, 64), device, torch.float32)
    doubles = [x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = naive.linear_divergence(*doubles).divergence.mean()
    expected.backward()
    found = {}
    for name, contender in contenders(device).items():
        if not wanted(name):
            continue
        try:
            loss = contender.load()
            clear(inputs)
            value = loss(*inputs)
            if value is not None:
                value.backward()
        except Exception as error:
            if "peer" not in contender.role:
                raise
            print(f"left out: {name}: {first_line(error)}")
            continue
        if value is not None:
            pairs = (
                (value.detach(), expected.detach()),
                *((x.grad, y.grad) for x, y in zip(inputs[:2], doubles[:2], strict=True)),
            )
            error = max(float((a.cpu().double() - b).norm() / b.norm()) for a, b in pairs)
            if not error < 1e-4:
                raise SystemExit(
                    f"{name} computes something else: its loss or gradients are {error:.1e} from the reference's"
                )
            print(f"checked: {name}: within {error:.0e} of the reference in loss and gradients")
        found[name] = contender, loss
    torch._dynamo.reset()  # compile each shape by itself, not for varying shapes
    return found


def samples(loss: Loss, inputs: list[Tensor], which: str) -> list[float]:
    """Return one turn's times: CPU seconds of one call, or milliseconds of ten CUDA calls with a cold cache."""
    if inputs[0].device.type == "cpu":
        clear(inputs)
        start = time.process_time()
        run(loss, inputs, which)
        return [time.process_time() - start]
    clear(inputs)
    torch.cuda.empty_cache()
    flush = torch.empty(256 * MIB, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(12)]
    for start, end in events:
        clear(inputs)
        flush.zero_()
        start.record()
        run(loss, inputs, which)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[2:]]  # the first two fill the allocator's cache


def peak_cuda(loss: Loss, inputs: list[Tensor], which: str) -> float:
    """Return the peak in MiB beyond the inputs, after a warm-up that allocates what libraries keep."""
    for _ in range(2):
        clear(inputs)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, inputs, which)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    return peak / MIB


def resident(field: str) -> int:
    """Return VmHWM (peak) or VmRSS of this process in bytes. Not ru_maxrss, which a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_of_this_process(name: str, shape: Shape, dtype: torch.dtype, which: str) -> float:
    """Return the peak in MiB beyond the inputs. A warm-up, after which the peak is reset, excludes what is allocated
    once (library buffers, a compiler)."""
    contender = contenders("cpu")[name]
    loss, inputs = contender.load(), make_inputs(shape, "cpu", dtype)
    run(loss, inputs if contender.compiled else make_inputs(Shape(256, 512, 64, 64), "cpu", dtype), which)
    clear(inputs)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run(loss, inputs, which)
    return (resident("VmHWM") - before) / MIB


def peak_cpu(name: str, shape: Shape, dtype: torch.dtype, which: str) -> float:
    """Return the peak in MiB beyond the inputs, in a fresh process whose allocator returns every large buffer at once,
    so that none hides in memory freed before."""
    sizes = ",".join(str(x) for x in astuple(shape))
    command = [
        sys.executable,
        __file__,
        "--peak-of",
        name,
        "--shapes",
        sizes,
        "--pass",
        which,
        "--dtype",
        str(dtype).removeprefix("torch."),
    ]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | allocator)
    if done.returncode:
        raise MemoryError(
            f"its process ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}"
        )
    return float(done.stdout.split()[-1])


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    avx512 = CPUINFO.exists() and " avx512f" in CPUINFO.read_text()
    return f"{processor()}, {os.cpu_count()} cores{', AVX-512' if avx512 else ''}"


@dataclass(frozen=True)
class Study:
    """The shapes to measure, and what to measure of them."""

    name: str
    shapes: list[Shape]
    passes: tuple[str, ...]
    only: Callable[[str], bool] = lambda name: True
    timed: bool = True


def measure(
    study: Study,
    shape: Shape,
    which: str,
    running: dict[str, tuple[Contender, Loss]],
    dtype: torch.dtype,
    device: str,
    rounds: int,
) -> Iterator[dict]:
    """Yield the CSV's rows of one shape and pass."""
    load = round(os.getloadavg()[0], 2)
    taking_part = {name: pair for name, pair in running.items() if which in pair[0].passes and study.only(name)}
    inputs = make_inputs(shape, device, dtype)
    peaks: dict[str, float] = {}
    for name, (_, loss) in list(taking_part.items()):
        try:
            peaks[name] = peak_cuda(loss, inputs, which) if device == "cuda" else peak_cpu(name, shape, dtype, which)
        except (MemoryError, torch.OutOfMemoryError) as error:
            print(f"left out at {shape}: {name}: {first_line(error)}")
            del taking_part[name]
    times: dict[str, list[list[float]]] = {name: [] for name in taking_part if study.timed}
    for contender, loss in taking_part.values():
        if times and contender.compiled:
            run(loss, inputs, which)
    for _ in range(rounds):
        for name in times:
            times[name].append(samples(taking_part[name][1], inputs, which))

    def row(name: str, metric: str, quantile: int | str, value: float, count: int) -> dict:
        stack = {
            "torch": torch.__version__,
            "triton": version("triton"),
            "liger": version("liger-kernel"),
            "trl": version("trl"),
        }
        return {
            "study": study.name,
            "tokens": shape.tokens,
            "columns": shape.columns,
            "student_hidden": shape.student_hidden,
            "teacher_hidden": shape.teacher_hidden,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "hardware": hardware(device),
            "threads": torch.get_num_threads(),
            "load_average": load,
            "pass": which,
            "role": taking_part[name][0].role,
            "provider": name,
            "metric": metric,
            "quantile": quantile,
            "value": f"{value:.5g}",
            "samples": count,
            "python": platform.python_version(),
            **stack,
        }

    def quantiles(name: str, metric: str, values: list[float]) -> Iterator[dict]:
        for q in (20, 50, 80):
            yield row(name, metric, q, float(torch.tensor(values).quantile(q / 100)), len(values))

    gradients = shape.student_hidden * (shape.tokens + shape.columns) * dtype.itemsize / MIB
    for name, peak in peaks.items():
        yield row(name, plot_head.BEYOND_INPUTS, "", peak, 1)
        if which == BOTH:
            yield row(name, plot_head.BEYOND_GRADIENTS, "", peak - gradients, 1)
    rounds_of = {name: [sorted(turn)[len(turn) // 2] for turn in turns] for name, turns in times.items()}
    against = {plot_head.TO_FLOOR: next((name for name in times if name.startswith("products (")), None)}
    chunked = [name for name in times if taking_part[name][0].role == "chunked peer"]
    against[plot_head.TO_PEER] = min(chunked, key=lambda name: sorted(rounds_of[name])[rounds // 2], default=None)
    for name, turns in times.items():
        yield from quantiles(
            name, "milliseconds" if device == "cuda" else "cpu seconds", [x for turn in turns for x in turn]
        )
        for metric, other in against.items():
            if other is not None:
                yield from quantiles(
                    name, metric, [a / b for a, b in zip(rounds_of[name], rounds_of[other], strict=True)]
                )


def store(path: Path, rows: list[dict]) -> None:
    """Write the rows, replacing those in the file of the same study, shape, pass and machine."""
    key = (
        "study",
        "tokens",
        "columns",
        "student_hidden",
        "teacher_hidden",
        "dtype",
        "device",
        "hardware",
        "threads",
        "pass",
    )
    replaced = {tuple(str(row[k]) for k in key) for row in rows}
    kept = [row for row in plot_head.read(path) if tuple(row[k] for k in key) not in replaced] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept + rows)


def studies(args: argparse.Namespace) -> Iterator[Study]:
    passes = (args.which,) if args.which else None
    if args.shapes is not None or not (args.sweep or args.lean_memory):
        given = args.shapes or ["bar"]
        for name, shapes in (
            ("bar", BAR[args.device] if "bar" in given else []),
            ("shapes", [s for s in given if s != "bar"]),
        ):
            yield Study(name, shapes, passes or (BOTH, FORWARD))
    for axis in args.sweep:
        yield Study(f"sweep {axis}", SWEEPS[args.device][axis], passes or (BOTH,))
    if args.lean_memory:
        yield Study("lean memory", LEAN_MEMORY, passes or (BOTH,), only=lambda name: " lean" in name, timed=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=lambda s: s if s == "bar" else Shape.parse(s),
        help="bar, or T,V,H or T,V,Hs,Ht, several",
    )
    parser.add_argument("--sweep", nargs="+", choices=("T", "V", "H"), default=[])
    parser.add_argument("--lean-memory", action="store_true")
    parser.add_argument(
        "--pass", dest="which", choices=(FORWARD, BOTH), help="default: both, in sweeps forward+backward"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on CUDA"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV; tables and plots are written beside it")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    if args.peak_of:
        print(peak_of_this_process(args.peak_of, args.shapes[0], dtype, args.which))
        return
    planned = list(studies(args))
    running, measured = checked(args.device, lambda name: any(study.only(name) for study in planned)), []
    for study in planned:
        for shape in study.shapes:
            for which in study.passes:
                rows = list(measure(study, shape, which, running, dtype, args.device, args.rounds))
                store(args.out, rows)
                measured += [{k: str(v) for k, v in row.items()} for row in rows]
                print(f"measured: {study.name}, {shape}, {which}", flush=True)
            torch._dynamo.reset()
    plot_head.write(args.out)
    print(plot_head.report(measured))


if __name__ == "__main__":
    main()
