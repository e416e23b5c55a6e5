"""Search this machine's GPU for launch configurations of the Triton kernels; write them into `configs.json`.

    python bench/tune.py                                 # all kernels at T 4096, H_s 2048, H_t 4096, V 32768, bf16
    python bench/tune.py --kernels fused --shape 8192,151936,2048,4096 --table ''
    python bench/tune.py --tile                          # also time tiles of rows x columns for `problem.TILE`

Before anything runs, `aot_audit.py` drops candidates that spill, do not fit in shared memory or do not compile for
this architecture. It looks at each kernel's most demanding variant for every candidate, and at every variant for the
winner. The others are timed with CUDA events and a cold cache, taking turns, and the best median wins. The
configuration in the table is among them and stays unless another is faster by more than 2 percent.

Kernels of a family share a configuration and are timed together: `fused` serves its sums, second look and gradient,
whose logits must be the same to the last bit. Exit 2 without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from aot_audit import ARCHES, Variant, examine, variants
from atod_kernels import algebra, linear_token_loss, problem
from atod_kernels.triton import backend, configs
from atod_kernels.triton.configs import TABLE, architecture, choose
from torch import Tensor

Config = dict[str, Any]
Timer = Callable[[Callable[[], Any]], float]  # milliseconds of one call

FAMILIES = {
    "sums": ("tile_sums_fwd_kernel",),
    "mixture": ("tile_mixture_fwd_kernel",),
    "gradient": ("tile_gradient_bwd_kernel",),
    "fused": ("fused_sums_fwd_kernel", "fused_mixture_fwd_kernel", "fused_gradient_bwd_kernel"),
}
MARGIN = 0.98  # a candidate must beat the table's configuration by 2 percent
TILES = ((1024, 8192), (2048, 4096), (2048, 8192), (2048, 16384), (4096, 4096), (4096, 8192), (8192, 4096))


def candidates(family: str, arch: str, bits: int) -> Iterator[Config]:
    """Yield the grid of configurations that can fit: both models' accumulators in half of a thread's registers, the
    stages in shared memory."""
    spec = ARCHES[arch]
    lanes = spec.target.warp_size
    if family != "fused":
        for block, warps in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8, 16)):
            if 8 <= block // (warps * lanes) <= 64:  # elements a thread: at least two 128-bit loads
                yield {"BLOCK": block, "num_warps": warps}
        return
    tma = arch in ("sm_90", "sm_100") and bits == 16
    blocks = ((64, 64), (64, 128), (128, 64), (128, 128), (64, 256), (256, 64), (128, 256))
    for (bm, bn), bk, parts, warps, stages in itertools.product(blocks, (32, 64), (1, 4), (4, 8), (2, 3, 4)):
        if 2 * bm * bn <= 128 * warps * lanes and (bm + bn) * bk * bits // 8 * stages <= spec.shared:
            yield {"BM": bm, "BN": bn, "BK": bk, "TMA": tma, "PARTS": parts, "num_warps": warps, "num_stages": stages}


def faultless(
    family: str,
    arch: str,
    bits: int,
    config: Config,
    every: bool,
    judge: Callable[[Variant, str, Config], Any] = examine,
) -> bool:
    """Return whether a configuration compiles without a fault, in every variant of the family's kernels or only in
    each kernel's most demanding one."""
    judged = [
        v for v in variants() if v.kernel in FAMILIES[family] and (family != "fused" or (v.bits == bits and v.even))
    ]
    if not every:
        judged = list({v.kernel: v for v in judged if v.extras and v.kind in ("jsd", "reverse_kl")}.values())
    launched = (
        (v, config | {"TMA": config["TMA"] and v.tma, "EVEN": v.even} if family == "fused" else config) for v in judged
    )
    return not any(judge(v, arch, c).fault for v, c in launched)


def ranked(
    configs: list[Config], start: Config, call: Callable[[Config], Callable[[], Any]], timer: Timer, rounds: int
) -> list[tuple[float, Config]]:
    """Return median milliseconds over rounds in which the candidates take turns, best first. `start` stays first
    unless beaten by the margin."""
    configs = [start, *(c for c in configs if c != start)]
    times: list[list[float]] = [[] for _ in configs]
    for _ in range(rounds):
        for config, values in zip(configs, times, strict=True):
            if math.inf not in values:
                try:
                    values.append(timer(call(config)))
                except (RuntimeError, triton.runtime.OutOfResources) as error:
                    print(f"  dropped {json.dumps(config)}: {(str(error).strip().splitlines() or [''])[0]}", flush=True)
                    values.append(math.inf)
    medians = [math.inf if math.inf in values else sorted(values)[len(values) // 2] for values in times]
    order = sorted(range(len(configs)), key=lambda i: medians[i] * (MARGIN if i == 0 else 1))
    return [(medians[i], configs[i]) for i in order if medians[i] < math.inf]


def merged(
    rows: list[dict[str, Any]], found: dict[str, Config], arch: str, bits: int, version: str = triton.__version__
) -> list[dict[str, Any]]:
    """Return the table with this architecture's rows replaced by `found`, also rows for this Triton version only.
    `fused` has a row per operand size."""
    new = [
        {"kernel": k, "arch": arch} | ({"bits": bits} if k == "fused" else {}) | {"config": c} for k, c in found.items()
    ]

    def replaced(row: dict[str, Any]) -> bool:
        key = {k: v for k, v in row.items() if k not in ("config", "triton")}
        of_this = "triton" not in row or (version + ".").startswith(row["triton"] + ".")
        return of_this and key in [{k: v for k, v in x.items() if k != "config"} for x in new]

    order = [*FAMILIES, "ragged"]
    return sorted([row for row in rows if not replaced(row)] + new, key=lambda row: order.index(row["kernel"]))


def dumps(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"


def cold(flush: Tensor, call: Callable[[], Any]) -> float:
    """Return milliseconds of a call with a cold L2 cache."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def make_problem(shape: tuple[int, ...], dtype: torch.dtype, kind: str, lean: bool) -> problem.Problem:
    """Return a problem with both models, whose logits have standard deviation 2, and a target for each token."""
    t, v, hs, ht = shape
    g = torch.Generator("cuda").manual_seed(0)

    def layer(h: int) -> tuple[Tensor, Tensor]:
        hidden, weight = (torch.randn(n, h, generator=g, device="cuda").to(dtype) for n in (t, v))
        return hidden, weight.mul_(2 / h**0.5)

    (student_hidden, student_weight), (teacher_hidden, teacher_weight) = layer(hs), layer(ht)
    return problem.Problem(
        student_hidden,
        student_weight,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        target=torch.randint(0, v, (t,), generator=g, device="cuda"),
        kind=kind,
        lean=lean,
        triton=True,
    )


def workload(family: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[Config], Callable[[], Any]]:
    """Return what to time for a family: its kernels on one tile of logits; for `fused`, a pass of statistics and one
    tile of the gradient."""
    kind = "jsd" if family == "mixture" else "reverse_kl"
    p = make_problem(shape, dtype, kind, family == "fused")
    rows, columns = p.parts()[0], p.slices()[0]
    n, w = rows.stop, columns.stop
    stats = torch.rand(algebra.STATISTICS, p.tokens, device="cuda")
    upstream = torch.randn(3, p.tokens, device="cuda")
    dz = torch.empty(p.tile[0], p.stride, device="cuda", dtype=backend.gradient_dtype(p))[:n, :w]
    if family == "fused":

        def fused(config: Config) -> Callable[[], Any]:
            with_config(family, config)
            launches = backend.Fused(p)
            return lambda: (launches.statistics(), launches.gradient(rows, columns, dz, stats, upstream))

        return fused
    logits = backend.Tiles.of(p)
    zs, zt = logits.make(rows, columns)

    def over_memory(config: Config) -> Callable[[], Any]:
        with_config(family, config)
        if family == "gradient":
            return lambda: backend.tile_gradient(p, rows, columns, zs, zt, dz, stats[:, rows], upstream[:, rows])
        one = replace(p, student_weight=p.student_weight[columns], teacher_weight=p.teacher_weight[columns])
        made = Made(one, logits.buffer)
        return lambda: backend.tile_statistics(one, rows, made)

    return over_memory


class Made(backend.Tiles):
    """A tile whose logits exist already, so that their products are not timed."""

    def __init__(self, p: problem.Problem, buffer: Tensor):
        super().__init__(p, buffer, keep=True)

    def make(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        return self.pair(rows.stop - rows.start, columns)


def with_config(family: str, config: Config) -> None:
    """Make the backend launch one family with a configuration."""
    backend.configuration = lambda kernel, arch, bits: (
        config if kernel == family else configs.configuration(kernel, arch, bits)
    )


def tune_tile(shape: tuple[int, ...], dtype: torch.dtype, timer: Timer, rounds: int) -> dict[tuple[int, int], float]:
    """Return median milliseconds of `linear_token_loss` with its gradients for every tile size."""
    p = make_problem(shape, dtype, "reverse_kl", lean=False)
    x, w = (t.requires_grad_() for t in (p.student_hidden, p.student_weight))

    def call() -> None:
        x.grad = w.grad = None
        linear_token_loss(lambda s: s.divergence, x, w, p.teacher_hidden, p.teacher_weight, p.target, backend="triton")[
            0
        ].backward()

    before, times = problem.TILE["accelerator"], {tile: [] for tile in TILES}
    try:
        for _ in range(rounds + 1):
            for tile, values in times.items():
                problem.TILE["accelerator"] = tile
                values.append(timer(call))
    finally:
        problem.TILE["accelerator"] = before
    return {tile: sorted(values[1:])[rounds // 2] for tile, values in times.items()}  # the first round compiles


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--shape", default="4096,32768,2048,4096", help="tokens,columns,student_hidden,teacher_hidden")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tile",
        action="store_true",
        help="also time tile sizes; the best goes into problem.TILE by hand, as it changes chunking",
    )
    parser.add_argument("--table", default=str(TABLE), help="the JSON that is read and written; '' writes nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: no GPU that this torch can use; configurations are searched on the machine that they are for")
        return 2
    shape, dtype = tuple(int(x) for x in args.shape.split(",")), getattr(torch, args.dtype)
    arch, bits = architecture(torch.device("cuda")), dtype.itemsize * 8
    path = Path(args.table or TABLE)
    rows = json.loads(path.read_text())
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    found = {}

    def timer(call: Callable[[], Any]) -> float:
        call()  # compiles, and fills the allocator's cache
        return cold(flush, call)

    for family in args.kernels:
        start = choose(rows, family, arch, bits, triton.__version__)
        configs = [c for c in candidates(family, arch, bits) if faultless(family, arch, bits, c, every=False)]
        print(f"{family}: {len(configs)} configurations compile without a fault for {arch}", flush=True)
        order = ranked(configs, start, workload(family, shape, dtype), timer, args.rounds)
        for milliseconds, config in order[:5]:
            print(f"  {milliseconds:8.3f} ms {json.dumps(config)}{' (table)' if config == start else ''}")
        best = next((config for _, config in order if faultless(family, arch, bits, config, every=True)), None)
        if best is None:
            print("  none of them is without a fault in every variant; the table's is kept")
        else:
            found[family] = best
            print(f"  chosen: {json.dumps(best)}", flush=True)
        torch.cuda.empty_cache()
    if args.table:
        path.write_text(dumps(merged(rows, found, arch, bits)))
        print(f"wrote {len(found)} rows for {arch} into the table")
    if args.tile:
        times = tune_tile(shape, dtype, timer, args.rounds)
        for tile, milliseconds in sorted(times.items(), key=lambda item: item[1]):
            print(
                f"tile {tile[0]} x {tile[1]}: "
                f"{milliseconds:.2f} ms{' (problem.TILE)' if tile == problem.TILE['accelerator'] else ''}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
