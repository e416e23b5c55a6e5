"""Compile every Triton kernel without a GPU; report registers, spills, shared memory and tensor cores.

    python bench/aot_audit.py                                # all kernels and architectures, see below
    python bench/aot_audit.py --check --arch sm_90 --out ''  # a gate: exit 1 on a fault, write nothing

The first command compiles for sm_80, sm_90, sm_100 and gfx942 and writes bench/results/aot_audit.csv and .md.

Each kernel is compiled in representative variants of what `backend.py` launches, with the configurations of
`configs.json`. The CSV has a row per variant. Rows of other Triton versions and architectures are kept, so that
running under several versions fills one table.

A fault is a compile failure, a spill, more shared or tensor memory than the architecture has, a fused kernel of 16-bit
operands without tensor-core instructions, or an element-wise kernel that does not move logits 128 bits at a time.

Instructions per pair are static: issued instructions times lanes over logit pairs, including loop overhead and both
sides of a branch. They are counted over one pass of the kernel's loop (element-wise kernels), or of the loop over
columns without the loops of matrix products inside it (fused kernels). Fused kernels on AMD are not counted, because
the listing does not tell their loops apart.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")

import triton
from atod_kernels.names import DIVERGENCES, MIXTURES, NO_TEACHER
from atod_kernels.triton import fused, tiles, turns
from atod_kernels.triton.backend import COMBINE_BLOCK
from atod_kernels.triton.configs import TABLE, choose
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

RESULTS = Path(__file__).resolve().parent / "results" / "aot_audit.csv"
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

KINDS = (NO_TEACHER, *DIVERGENCES[:3])  # the two KLs and one mixture


@dataclass(frozen=True)
class Arch:
    target: GPUTarget
    shared: int  # bytes, the limit of a block
    tensor: re.Pattern[str]


ARCHES = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 163 * 1024, re.compile(r"HMMA")),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 227 * 1024, re.compile(r"HGMMA")),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), 227 * 1024, re.compile(r"UTC\w*MMA")),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 64 * 1024, re.compile(r"v_mfma\w*")),
}
TENSOR_MEMORY = 512  # columns, sm_100


@dataclass(frozen=True)
class Variant:
    """A variant of a kernel that the backend launches."""

    kernel: str
    kind: str  # divergence ('' for none); for the kernels over turns, reduction or budget
    target: bool = True
    extras: bool = False  # bias, softcap, temperature and valid columns, in both models
    bits: int = 16  # of an operand: 16 for bf16, 32 for fp32
    dz: str = "bf16"
    tma: bool = True  # if the configuration uses it; False: operands that no descriptor can describe
    even: bool = True  # hidden sizes are multiples of the block size; False: not even of 16

    @property
    def label(self) -> str:
        named = {
            "target": self.target,
            "bias softcap temperature valid": self.extras,
            "pointers": not self.tma,
            "odd H": not self.even,
        }
        dz = f"dz {self.dz}" if "gradient" in self.kernel else None
        operands = ("bf16" if self.bits == 16 else "fp32") if self.kernel.startswith("fused") else None
        if self.kernel.startswith("turn"):
            return self.kind
        return ", ".join(filter(None, [self.kind or "no teacher", operands, dz, *(k for k, v in named.items() if v)]))


def variants() -> Iterator[Variant]:
    yield from (Variant("tile_sums_fwd_kernel", kind, extras=extras) for kind in KINDS for extras in (False, True))
    yield from (
        Variant("tile_mixture_fwd_kernel", kind, extras=extras) for kind in MIXTURES for extras in (False, True)
    )
    every = (NO_TEACHER, *DIVERGENCES)
    yield from (Variant("tile_gradient_bwd_kernel", kind, extras=extras) for kind in every for extras in (False, True))
    yield from (Variant("tile_gradient_bwd_kernel", kind, dz="fp32") for kind in KINDS)
    for kernel in ("tile_sums_fwd", "tile_gradient_bwd", "combine_sums_fwd", "fused_sums_fwd", "fused_gradient_bwd"):
        yield Variant(f"{kernel}_kernel", "reverse_kl", target=False)
    yield from (Variant("combine_sums_fwd_kernel", kind) for kind in KINDS)
    for kernel, kinds in (
        ("fused_sums_fwd_kernel", KINDS),
        ("fused_mixture_fwd_kernel", MIXTURES),
        ("fused_gradient_bwd_kernel", every),
    ):
        yield from (Variant(kernel, kind, extras=extras) for kind in kinds for extras in (False, True))
        main = "jsd" if kernel == "fused_mixture_fwd_kernel" else "reverse_kl"
        yield Variant(kernel, main, extras=True, tma=False)
        yield Variant(kernel, main, extras=True, tma=False, even=False)
        yield Variant(kernel, main, extras=True, tma=False, bits=32, dz="fp32")
    yield Variant("fused_gradient_bwd_kernel", "reverse_kl", dz="fp32")  # fp16 operands
    for kernel in ("turn_reduce_fwd_kernel", "turn_reduce_bwd_kernel"):
        yield from (Variant(kernel, reduce) for reduce in ("mean", "max"))
    yield from (Variant("turn_weights_kernel", budget) for budget in ("raw", "mean1"))


def launch(variant: Variant, arch: str, rows: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """Return block sizes and launch options from the table; {} if it has none for the kernel."""
    if variant.kernel == "combine_sums_fwd_kernel":
        return {"BLOCK": COMBINE_BLOCK}
    if variant.kernel.startswith("turn"):
        return {"BLOCK": turns.BLOCK}
    if variant.kernel.startswith("tile"):
        _, name, *_ = variant.kernel.split("_")
        return choose(rows, name, arch, variant.bits, version)
    config = choose(rows, "fused", arch, variant.bits, version)
    if not variant.even or (config["TMA"] and not variant.tma):
        config = choose(rows, "ragged", arch, variant.bits, version)
    return config | {"EVEN": variant.even}


def source(variant: Variant, config: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """Return the kernel with a launch's types and constants, and the compiler's options. Arguments that are not
    specialised count as unaligned."""
    v = variant
    function = next(getattr(module, v.kernel) for module in (tiles, fused, turns) if hasattr(module, v.kernel))
    operand, teacher = "bf16" if v.bits == 16 else "fp32", bool(v.kind)
    constants: dict[str, Any] = {"KIND": v.kind, "A": 0.0, "B": 0.0, "CAP_S": 0.0, "CAP_T": 0.0, "SCALE_T": 1.0}
    constants |= {"PRECISION": "ieee", "PARTS": 1}
    constants |= {k: x for k, x in config.items() if k.isupper()}
    types = dict.fromkeys(("zs", "zt", "inverse", "temperature", "parts", "stats", "upstream", "look"), "*fp32")
    types |= dict.fromkeys(("xs", "ws", "xt", "wt", "bias_s", "bias_t"), f"*{operand}") | {
        "dz": f"*{v.dz}",
        "target": "*i64",
        "valid": "*u8",
    }
    if v.kind in MIXTURES:
        constants |= {"A": 0.5, "B": 0.5}
    if v.extras:
        constants |= {"CAP_S": 30.0, "CAP_T": 50.0 if teacher else 0.0, "SCALE_T": 0.5 if teacher else 1.0}
    else:
        constants |= dict.fromkeys(("bias_s", "bias_t", "valid", "inverse", "temperature"))
    if v.kernel.startswith("turn"):
        types |= dict.fromkeys(("values", "upstream", "out", "dx", "disagreement", "uncertainty", "weights"), "*fp32")
        types |= {"offsets": "*i64", "lengths": "*i64", "unweighted": "*i8", "fallback": "*i8"}
        types |= dict.fromkeys(("least", "most", "min_disagreement", "flat"), "fp32")
        constants |= {"REDUCE": v.kind, "NORMALISE": "minmax", "FUSE": "softor", "MEAN_ONE": v.kind == "mean1"} | (
            {"lengths": None} if v.kind == "raw" else {}
        )
    if not v.target:
        constants["target"] = None
    if not teacher:
        constants |= {"zt": None, "bias_t": None}
    if config.get("TMA"):
        for name in ("xs", "ws", "xt", "wt"):
            types[name] = f"tensordesc<{operand}[{config['BM' if name[0] == 'x' else 'BN']}, {config['BK']}]>"
    odd = set() if v.even else {"HS", "HT"}
    names = function.arg_names
    odd |= {x.name for x in function.params if x.do_not_specialize or x.do_not_specialize_on_alignment}
    constants = {k: x for k, x in constants.items() if k in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n not in constants and n not in odd and not signature[n].startswith("tensordesc")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    options = {k: x for k, x in config.items() if not k.isupper()} | {"enable_fp_fusion": True}
    return ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(k),): x for k, x in constants.items()},
        attrs=attributes,
    ), options


def pairs(variant: Variant, config: dict[str, Any]) -> int:
    """Return the logit pairs of one pass of the loop (logits if there is no teacher)."""
    return config["BM"] * config["BN"] if "BM" in config else config["BLOCK"]


@dataclass(frozen=True)
class Row:
    """One row of the table. `loads` and `stores` count 128-bit accesses to global memory, without TMA loads."""

    triton: str
    arch: str
    kernel: str
    variant: str
    config: str
    registers: int | str = ""
    spilled_bytes: int | str = ""  # stack (nvidia), scratch (amd)
    spill_instructions: int | str = ""
    shared: int | str = ""
    shared_limit: int | str = ""
    tensor: str = ""
    loads: int | str = ""
    stores: int | str = ""
    instructions: int | str = ""
    per_pair: float | str = ""
    seconds: float | str = ""
    fault: str = ""


@dataclass(frozen=True)
class Code:
    """A kernel's machine code: its opcodes in order, and the range [first, last) of each loop."""

    opcodes: list[str]
    loops: list[tuple[int, int]]
    registers: int
    spilled_bytes: int

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, op)) for op in self.opcodes)

    def hot(self, tensor: re.Pattern[str]) -> int:
        """Return the instructions of one pass over the tile: the largest loop less the loops inside it that hold
        matrix products, or the whole kernel if it has no loop."""
        first, last = max(self.loops, key=lambda loop: loop[1] - loop[0], default=(0, len(self.opcodes)))
        body = set(range(first, last))
        if not any(tensor.match(self.opcodes[i]) for i in body):
            return len(body)
        inner = [(a, b) for a, b in self.loops if any(tensor.match(op) for op in self.opcodes[a:b])]
        if len(inner) > 1 and all(first <= a and b <= last for a, b in inner):
            inner.remove((first, last))
        else:  # no loop over columns: the rest of the kernel is the pass
            body = set(range(len(self.opcodes)))
        return len(body.difference(*(range(a, b) for a, b in inner)))


def tool(name: str, *arguments: str) -> str:
    done = subprocess.run([NVIDIA / name, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def scan(
    lines: Iterable[str], label: re.Pattern[str], instruction: re.Pattern[str], branch: re.Pattern[str]
) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the opcodes and the loops. A loop runs from a label to the last branch back to it."""
    opcodes: list[str] = []
    at: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in lines:
        if found := label.match(line):
            at[found[1]] = len(opcodes)
        elif found := instruction.match(line):
            opcodes.append(found[1])
            jump = branch.search(line)
            if jump and jump[1] in at:
                ends[at[jump[1]]] = len(opcodes)
    loops = [
        (a, b) for a, b in ends.items() if b - a > 4
    ]  # not loops: a branch to itself pads the end, a short one waits for a barrier
    # Not a loop either: a wait that was moved out of line and returns into the middle of its loop.
    return opcodes, [(a, b) for a, b in loops if not any(c < a < d < b for c, d in loops)]


def read_nvidia(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = tool("cuobjdump", "-res-usage", file.name), tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no resources: {usage.strip()!r}")
    opcodes, loops = scan(
        text.splitlines(),
        re.compile(r"\s*\.(L_\w+):"),
        re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"),
        re.compile(r"\bBRA\S*\s.*`\(\.(L_\w+)\)"),
    )
    return Code(opcodes, loops, int(found[1]), int(found[2]))


def read_amd(text: str) -> Code:
    def last(field: str) -> int:
        found = re.findall(rf"\.{field}:\s+(\d+)", text)
        return int(found[-1]) if found else 0

    opcodes, loops = scan(
        text.splitlines(),
        re.compile(r"(\.LBB\w+):"),
        re.compile(r"\s+((?:[sv]|ds|global|buffer|scratch|flat)_\w+)\b"),
        re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)"),
    )
    return Code(opcodes, loops, last("vgpr_count"), last("private_segment_fixed_size") + 4 * last("vgpr_spill_count"))


LOADS = {"cuda": r"LDG\.E\.(\w+\.)*128", "hip": r"(global|buffer)_load_dwordx4"}
STORES = {"cuda": r"STG\.E\.(\w+\.)*128", "hip": r"(global|buffer)_store_dwordx4"}
SPILLS = {"cuda": r"STL|LDL", "hip": r"scratch_"}


def examine(variant: Variant, arch: str, config: dict[str, Any]) -> Row:
    """Compile one variant and return its row."""
    spec = ARCHES[arch]
    head = {
        "triton": triton.__version__,
        "arch": arch,
        "kernel": variant.kernel,
        "variant": variant.label,
        "shared_limit": spec.shared,
    }
    head["config"] = " ".join(f"{k}={v}" for k, v in config.items() if k != "EVEN")
    start = time.perf_counter()
    try:
        code, options = source(variant, config)
        compiled = triton.compile(code, target=spec.target, options=options)
    except Exception as error:
        while error.__cause__ is not None:  # the innermost exception names the cause
            error = error.__cause__
        lines = str(error).strip().splitlines() or [""]
        return Row(**head, fault=f"does not compile: {type(error).__name__}: {lines[-1][:200]}")
    seconds = time.perf_counter() - start
    backend = spec.target.backend
    read = read_nvidia(compiled.asm["cubin"]) if backend == "cuda" else read_amd(compiled.asm["amdgcn"])
    tensor = Counter(found[0] for op in read.opcodes if (found := spec.tensor.match(op)))
    loads, spills, shared = read.count(LOADS[backend]), read.count(SPILLS[backend]), compiled.metadata.shared
    faults = {
        f"spills {read.spilled_bytes} bytes, {spills} instructions": read.spilled_bytes or spills,
        f"shared memory {shared} of {spec.shared}": shared > spec.shared,
        f"tensor memory {getattr(compiled.metadata, 'tmem_size', 0)} of {TENSOR_MEMORY}": (
            getattr(compiled.metadata, "tmem_size", 0) or 0
        )
        > TENSOR_MEMORY,
        "no tensor-core instruction": variant.kernel.startswith("fused") and variant.bits == 16 and not tensor,
        "no 128-bit loads": variant.kernel.startswith("tile") and not loads,
    }
    lanes = compiled.metadata.num_warps * spec.target.warp_size
    countable = variant.kernel.startswith("tile") or (variant.kernel.startswith("fused") and backend == "cuda")
    # The gradient over a tile has no loop.
    passed = len(read.opcodes) if variant.kernel == "tile_gradient_bwd_kernel" else read.hot(spec.tensor)
    per_pair = round(passed * lanes / pairs(variant, config), 1) if countable else ""
    return Row(
        **head,
        registers=read.registers,
        spilled_bytes=read.spilled_bytes,
        spill_instructions=spills,
        shared=shared,
        tensor=" ".join(f"{name} {count}" for name, count in tensor.items()),
        loads=loads,
        stores=read.count(STORES[backend]),
        instructions=len(read.opcodes),
        per_pair=per_pair,
        seconds=round(seconds, 2),
        fault="; ".join(name for name, found in faults.items() if found),
    )


@functools.cache
def table() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text())


def audit(arch: str, chosen: Iterable[Variant]) -> Iterator[Row]:
    """Yield each variant's row. Compile only once what gives the same code (as with pointers where there is no TMA)."""
    seen = set()
    for variant in chosen:
        config = launch(variant, arch, table(), triton.__version__)
        code, options = source(variant, config)
        key = (variant.kernel, str((code.signature, code.constants, code.attrs, options)))
        if key not in seen:
            seen.add(key)
            yield examine(variant, arch, config)


def span(values: Iterable[str]) -> str:
    numbers = sorted({float(x) for x in values if x != ""})
    return "" if not numbers else f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"


def markdown(rows: list[dict[str, str]]) -> str:
    """Return the table as Markdown: a line per architecture, kernel and version, with ranges over variants."""
    versions = sorted({row["triton"] for row in rows})
    faults = [row for row in rows if row["fault"]]
    lines = [
        "# Ahead-of-time audit of the Triton kernels",
        "",
        f"Compiled without a GPU by Triton {', '.join(versions)}; nothing here was run. {len(rows)} compilations, "
        f"{len(faults)} with a fault.",
        "Ranges are over the variants of a kernel (`aot_audit.csv` has them one by one); spills are bytes, "
        "stack or scratch; loads and stores",
        "are those of 128 bits; instructions per pair are static counts of a pass over the tile, "
        "products' loops left out.",
        "",
        "| arch | kernel | triton | variants | registers | spills | shared KiB (limit) "
        "| tensor core | loads | stores | per pair | seconds | faults |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["arch"], row["kernel"], row["triton"]), []).append(row)
    order = list(ARCHES)
    for (arch, kernel, version), group in sorted(
        groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1:])
    ):
        kinds = sorted({name for row in group for name in row["tensor"].split() if not name.isdigit()})
        kib = span(f"{int(row['shared']) / 1024:.1f}" for row in group if row["shared"] != "")
        cells = [
            arch,
            kernel,
            version,
            str(len(group)),
            span(r["registers"] for r in group),
            span(r["spilled_bytes"] for r in group),
        ]
        cells += [
            f"{kib} ({int(group[0]['shared_limit']) // 1024})",
            " ".join(kinds),
            *(span(r[k] for r in group) for k in ("loads", "stores", "per_pair", "seconds")),
        ]
        lines.append("| " + " | ".join([*cells, str(sum(bool(r["fault"]) for r in group))]) + " |")
    lines += [
        "",
        *(f"- {row['triton']} {row['arch']} {row['kernel']} ({row['variant']}): {row['fault']}" for row in faults),
    ]
    return "\n".join(lines).rstrip() + "\n"


def store(path: Path, rows: list[Row]) -> None:
    """Write the table and the CSV, keeping the CSV's rows of other Triton versions and architectures."""
    done = {(row.triton, row.arch) for row in rows}
    kept = (
        []
        if not path.exists()
        else [r for r in csv.DictReader(path.open(newline="")) if (r["triton"], r["arch"]) not in done]
    )
    every = sorted(
        kept + [{k: str(v) for k, v in asdict(row).items()} for row in rows],
        key=lambda r: (r["triton"], list(ARCHES).index(r["arch"])),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(every)
    path.with_suffix(".md").write_text(markdown(every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 on a fault")
    parser.add_argument("--arch", nargs="+", choices=tuple(ARCHES), default=tuple(ARCHES))
    parser.add_argument(
        "--kernel", nargs="+", default=[], help="names that a kernel's must begin with one of; nothing is written then"
    )
    parser.add_argument("--out", default=str(RESULTS), help="the CSV, the table is written beside it; '' for none")
    args = parser.parse_args()
    chosen = [v for v in variants() if not args.kernel or v.kernel.startswith(tuple(args.kernel))]
    rows = []
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: every time is that of a compilation
        os.environ["TRITON_CACHE_DIR"] = cache
        for arch in args.arch:
            for row in audit(arch, chosen):
                rows.append(row)
                tensor = row.tensor or "no tensor cores"
                found = (
                    f"{row.registers} registers, {row.shared} B shared, {row.per_pair or '-'} per pair, "
                    f"{row.loads} loads {row.stores} stores, {tensor}"
                )
                print(
                    f"{'FAULT' if row.fault else 'ok   '} {arch} {row.kernel} ({row.variant}): {row.fault or found}, "
                    f"{row.seconds} s",
                    flush=True,
                )
    faults = sum(bool(row.fault) for row in rows)
    print(
        f"triton {triton.__version__}: {len(rows)} compilations, {faults} with a fault, "
        f"{sum(float(row.seconds or 0) for row in rows):.0f} s"
    )
    if args.out and not args.kernel:
        store(Path(args.out), rows)
    sys.exit(1 if args.check and faults else 0)


if __name__ == "__main__":
    main()
