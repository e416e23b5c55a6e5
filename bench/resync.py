"""Compare ways to send trained weights to a rollout engine: by FSDP unit, or `full_tensor()` by parameter.

    torchrun --nproc_per_node 2 bench/resync.py --out bench/results/resync.md

The model is a random Qwen3 of about 100M parameters with fp32 masters sharded over the ranks and bf16 compute, on a
CPU over gloo. The consumer copies each tensor into a bf16 replica. `stream` is the trainer's way: by unit, prefetching
the next one. `units` is the same without prefetch, `rounded` rounds each parameter's shard and gathers the result, and
`parameters` is the usual way elsewhere: gather each parameter's fp32 master, then round. Every round runs all ways,
each time starting with another one. Bytes are those that a rank receives over the wire, computed from the shapes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from machine import processor
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from atod_fast import ranks
from atod_fast.policy.model import CausalPolicy
from atod_fast.policy.resync import stream_weights
from atod_fast.policy.sharding import shard, units

SIZES = {
    "hidden_size": 640,
    "intermediate_size": 2560,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 64,
}
ROUNDS = 8


@torch.no_grad()
def per_unit(policy: CausalPolicy) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights as `stream_weights` does, but without prefetch."""
    names = {module: prefix for prefix, module in policy.named_modules()}
    for unit in units(policy):
        unit.unshard()
        yield from (
            (n, p.detach())
            for n, p in unit.named_parameters(prefix=names[unit], remove_duplicate=False)
            if not isinstance(p, DTensor)
        )
        unit.reshard()


@torch.no_grad()
def per_parameter(policy: CausalPolicy) -> Iterator[tuple[str, Tensor]]:
    yield from _gathered(policy, torch.float32)


@torch.no_grad()
def rounded(policy: CausalPolicy) -> Iterator[tuple[str, Tensor]]:
    yield from _gathered(policy, torch.bfloat16)


def _gathered(policy: CausalPolicy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in policy.named_parameters():
        weight = parameter.to(dtype).full_tensor()
        yield name, weight
        if policy.tied and parameter is policy.lm_head.weight:  # tied: gathered once, sent under both names
            yield "lm_head.weight", weight


WAYS: dict[str, tuple[Callable[[CausalPolicy], Iterator[tuple[str, Tensor]]], int]] = {
    "stream": (stream_weights, 2),
    "units": (per_unit, 2),
    "rounded": (rounded, 2),
    "parameters": (per_parameter, 4),
}  # way: (function, bytes of an element on the wire)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="MD", help="write the table here")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    device, mesh = ranks.start()
    torch.manual_seed(0)
    rows = [line for tied in (True, False) for line in measure(tied, device, mesh)]
    if ranks.rank() == 0:
        table = report(rows)
        print(table)
        if out:
            out.write_text(table, encoding="utf-8")
    ranks.stop()


def measure(tied: bool, device: torch.device, mesh) -> list[tuple]:
    config = Qwen3Config(vocab_size=32_000, tie_word_embeddings=tied, dtype="float32", **SIZES)
    model = Qwen3ForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    policy = shard(CausalPolicy(model), mesh, torch.bfloat16)
    replica = {
        name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in policy.named_parameters(remove_duplicate=False)
    }
    whole = {name: p.full_tensor().bfloat16() for name, p in policy.named_parameters(remove_duplicate=False)}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(ROUNDS + 1):
        for way, (stream, _) in sorted(WAYS.items(), key=lambda item: (list(WAYS).index(item[0]) + turn) % len(WAYS)):
            ranks.barrier()
            start = time.perf_counter()
            for name, weight in stream(policy):
                replica[name].copy_(weight)
            ranks.barrier()
            if turn:  # the first is a warm-up
                seconds[way].append(time.perf_counter() - start)
            assert all(torch.equal(replica[name], whole[name]) for name in whole), way
    base = statistics.median(seconds["parameters"])
    mib = {way: count * size * (ranks.world_size() - 1) / ranks.world_size() / 2**20 for way, (_, size) in WAYS.items()}
    return [
        (
            f"{count / 1e6:.0f}M, {'tied' if tied else 'untied'}",
            way,
            statistics.median(s),
            min(s),
            max(s),
            statistics.median(s) / base,
            mib[way],
        )
        for way, s in seconds.items()
    ]


def report(rows: list[tuple]) -> str:
    lines = [
        "# Resync: seconds to bring all weights from the trainer to a rollout engine",
        "",
        "`torchrun --nproc_per_node 2 bench/resync.py --out bench/results/resync.md`",
        "",
        f"{ranks.world_size()} gloo ranks with one thread each on {processor()}, torch {torch.__version__}. "
        f"Median (minimum to maximum) of {ROUNDS}",
        "alternating rounds on a shared machine. Every way leaves the replica bit for bit the same.",
        "",
        "| model | way | seconds | of `parameters` | MiB received by a rank |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {model} | {way} | {mid:.3f} ({low:.3f} to {high:.3f}) | {ratio:.2f} | {mib:.0f} |"
        for model, way, mid, low, high, ratio, mib in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
