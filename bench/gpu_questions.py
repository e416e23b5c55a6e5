"""Two open questions about the head's kernels on a GPU: the part `questions` of `gpu_lane.py`.

    python bench/gpu_questions.py
    python bench/gpu_questions.py --dry     # the torch backend on a CPU, without graphs

Do chunks of 1,024 tokens take less memory than Liger's compiled JSD (2,106 MiB at T 8192), and at what time? Do tiles
that stay in the L2 cache, without the time of their many launches under a CUDA graph, bring the head below 1.25 times
the bare products? `problem.TILE` is the size of a tile, rows x columns; the defaults stay as they are.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import head
import torch
from atod_kernels import problem
from lane import Lane, arguments
from peers import contenders, divergence, token_loss
from torch import Tensor

LIGER_MIB, TARGET = 2106, 1.25  # bench/results/gpu_lane.md
# (operator, rows and columns of a tile, under a CUDA graph)
VARIANTS = [
    ("token loss", (2048, 8192), False),
    ("token loss", (1024, 8192), False),
    ("token loss", (512, 8192), False),
    ("token loss", (2048, 8192), True),
    ("token loss", (2048, 1536), True),
    ("token loss", (1024, 2048), True),
    ("divergence", (2048, 8192), False),
    ("divergence", (2048, 8192), True),
    ("divergence", (2048, 1536), True),
    ("divergence", (1024, 2048), True),
]


@contextmanager
def tile(kind: str, size: tuple[int, int]) -> Iterator[None]:
    """Set the size of a tile within the context."""
    before = problem.TILE[kind]
    problem.TILE[kind] = size
    try:
        yield
    finally:
        problem.TILE[kind] = before


def captured(loss: head.Loss, inputs: list[Tensor]) -> Callable[[], None]:
    """Return what repeats the loss and its gradients from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and makes what libraries keep
            head.clear(inputs)
            head.run(loss, inputs, head.BOTH)
    torch.cuda.current_stream().wait_stream(stream)
    head.clear(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        head.run(loss, inputs, head.BOTH)
    return graph.replay


def milliseconds(work: Callable[[], None], device: torch.device, rounds: int) -> float:
    """Return the median of some rounds, on a GPU with a cold L2 cache."""
    if device.type == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(2**28, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds + 2)]
    for start, end in events:
        flush.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events[2:])[rounds // 2]


def measure(lane: Lane, shape: head.Shape, dry: bool) -> dict[str, float]:
    """Measure all variants; return milliseconds by name, and MiB by name and ', memory'."""
    device, kind = lane.device, "cpu" if dry else "accelerator"
    inputs = head.make_inputs(shape, device.type, torch.float32 if dry else torch.bfloat16)
    backend = "torch" if dry else "triton"
    losses = {"token loss": token_loss("fast", backend), "divergence": divergence("fast", backend)}
    found: dict[str, float] = {}

    def told(name: str, value: float, unit: str) -> None:
        found[name] = value
        lane.measure(f"questions: {name}", value, unit)

    def eager(loss: head.Loss) -> Callable[[], None]:
        def work() -> None:
            head.clear(inputs)
            head.run(loss, inputs, head.BOTH)

        return work

    floor = contenders(device.type)["products (3+r)G"].load()
    told("products", milliseconds(eager(floor), device, 10), "ms")
    right: dict[str, list[Tensor]] = {}
    for operator, size, graph in VARIANTS:
        loss, name = losses[operator], f"{operator}, {size[0]} x {size[1]}{', captured' if graph else ''}"
        if not lane.ready(name):
            continue
        with lane.step(name), tile(kind, (size[0] // 256, size[1] // 256) if dry else size):
            work = captured(loss, inputs) if graph and not dry else eager(loss)
            told(name, milliseconds(work, device, 10), "ms")
            gradients = [x.grad.float() for x in inputs[:2] if x.grad is not None]
            first = right.setdefault(operator, gradients)
            pairs = zip(gradients, first, strict=True)
            apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
            lane.check(f"{name}: gradients", apart < 5e-3, f"{apart:.1e} from those of the first tiles")
            if not graph and operator == "token loss" and not dry:
                told(f"{name}, memory", head.peak_cuda(loss, inputs, head.BOTH), "MiB")
            del work
            head.clear(inputs)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def main() -> int:
    args = arguments(__doc__)
    lane = Lane.of(args)
    shape = head.Shape(16, 96, 24, 32) if args.dry else head.Shape(8192, 151936, 2048, 4096)
    with lane.step("questions"):
        found = measure(lane, shape, args.dry)
        if not args.dry:
            memory = {name: value for name, value in found.items() if name.endswith(", memory")}
            best = min((value / found["products"], name) for name, value in found.items() if "captured" in name)
            print(f"below Liger's {LIGER_MIB} MiB: {[name for name, value in memory.items() if value < LIGER_MIB]}")
            print(f"best of the captured: {best[1]}, {best[0]:.2f} times the products (wanted: below {TARGET})")
    return lane.finish()


if __name__ == "__main__":
    sys.exit(main())
