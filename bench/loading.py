"""Compare loading a model sharded with loading it whole and sharding it then: peak host memory of a rank, and time.

    python bench/loading.py --out bench/results/loading.md

Four gloo ranks on a CPU, fresh processes for every way. The models are random, saved in bf16, the experts of the
mixture one by one; they are loaded as a student (fp32 masters) and as a teacher (bf16). `whole` is `from_pretrained` on
every rank, then FSDP. Files are in the page cache. A sampling thread reads a rank's memory; `own` is its own memory,
without the pages of files that it has mapped, which the machine can take back at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import safetensors
import torch
import transformers
from machine import processor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from atod_fast import ranks
from atod_fast.models import Compute, skeleton
from atod_fast.policy.loading import load_student, load_teacher
from atod_fast.policy.model import CausalPolicy
from atod_fast.policy.sharding import shard

RANKS = 4
MIB = 2**20
SIZES = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
DENSE = SIZES | {"num_hidden_layers": 30, "intermediate_size": 4096, "vocab_size": 65536}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "num_hidden_layers": 5}
MODELS = {  # name: (model type, options, largest file)
    "dense, tied": ("qwen3", DENSE | {"tie_word_embeddings": True}, "100GB"),
    "dense, untied, 6 files": ("qwen3", DENSE | {"tie_word_embeddings": False}, "250MB"),
    "32 experts": ("qwen3_moe", SIZES | EXPERTS | {"vocab_size": 16384, "tie_word_embeddings": False}, "100GB"),
}


class Peak:
    """The most memory of this process meanwhile, beyond that before, in bytes: `own`, and `all` with mapped files."""

    def __enter__(self) -> Peak:
        self._before = self._most = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        self.own, self.all = (most - before for most, before in zip(self._most, self._before, strict=True))

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._look()

    def _look(self) -> None:
        own, both = self._now()
        self._most = max(self._most[0], own), max(self._most[1], both)

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        own, both = (1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS"))
        return own, both


def load(path: str, role: str, way: str) -> dict[str, float]:
    """Load the model at `path` on this rank; return what it took. Collective."""
    _, mesh = ranks.start()
    torch.set_num_threads(1)
    compute = Compute(path, torch.bfloat16, "sdpa")
    shard(CausalPolicy(skeleton(AutoConfig.from_pretrained(path))), mesh, torch.bfloat16)  # imports all that is needed
    ranks.barrier()
    start = time.perf_counter()
    with Peak() as peak:
        if way == "whole":
            dtype = torch.float32 if role == "student" else torch.bfloat16
            policy = shard(CausalPolicy(AutoModelForCausalLM.from_pretrained(path, dtype=dtype)), mesh, torch.bfloat16)
        elif role == "student":
            policy = load_student(compute, mesh, liger=False, checkpointing=False)
        else:
            policy = load_teacher(compute, mesh, offload=False)
    ranks.barrier()
    shards = [(p, p.to_local()) for p in policy.parameters() if isinstance(p, DTensor)]
    sizes = [(p.numel() * p.element_size(), mine.numel() * p.element_size()) for p, mine in shards]
    return {
        "seconds": time.perf_counter() - start,
        "own": peak.own,
        "all": peak.all,
        "model": sum(whole for whole, _ in sizes),
        "shard": sum(mine for _, mine in sizes),
        "tensor": max(whole for whole, _ in sizes),
    }


def save(folder: str, name: str) -> None:
    """Write a random model of `MODELS` to `folder`."""
    kind, options, largest = MODELS[name]
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options, dtype="bfloat16"))
    model.save_pretrained(folder, max_shard_size=largest)


def measure(path: str, role: str, way: str) -> dict[str, float]:
    """Return `load` in fresh processes: the largest of every number over the ranks."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), __file__, "--load", path, role, way]
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == RANKS
    return {key: max(each[key] for each in found) for key in found[0]}


def report(rows: list[tuple[str, str, str, dict[str, float]]]) -> str:
    lines = [
        "# Loading: memory and time of a rank, sharded against whole",
        "",
        "`python bench/loading.py --out bench/results/loading.md`",
        "",
        f"{RANKS} gloo ranks with one thread each on {processor()}, torch {torch.__version__},",
        f"transformers {transformers.__version__}, safetensors {safetensors.__version__}. The files are in the page",
        "cache, the machine is shared. MiB, the most over the ranks. *own*: peak of a rank's own memory beyond that",
        "before loading; *with files*: with mapped pages of files, which ranks share and the machine can take back;",
        "*shard*: what a rank keeps; *tensor*: the largest one, a layer's fused experts among them. A dense teacher of",
        "the files' dtype takes no more than its shards when loaded whole either: the rest are pages of the files.",
        "",
        "| model | role | way | model | shard | tensor | own | with files | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, role, way, found in rows:
        sizes = " | ".join(f"{found[key] / MIB:,.0f}" for key in ("model", "shard", "tensor", "own", "all"))
        lines.append(f"| {name} | {role} | {way} | {sizes} | {found['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument("--load", nargs=3, metavar=("PATH", "ROLE", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, metavar=("PATH", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save:
        save(*options.save)
        return
    if options.load:
        line = json.dumps(load(*options.load))
        ranks.stop()
        sys.stdout.write(line + "\n")
        return
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--save", folder, name], check=True)
            for role in ("student", "teacher"):
                rows += [(name, role, way, measure(folder, role, way)) for way in ("whole", "sharded")]
                print(report(rows[-2:]).splitlines()[-2:], flush=True)
    if options.out:
        options.out.write_text(report(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
