"""What the parts of `gpu_lane.py` share: their arguments, their results, and what is expected of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"


class Expected(NamedTuple):
    """A number stated before it was measured."""

    value: float
    unit: str
    why: str


# By the names under which parts report them, on one H100 80GB. Nothing here has been measured at this code.
EXPECTED: dict[str, Expected] = {
    "vllm: build": Expected(45, "s", "compilation and CUDA graphs of 8 layers"),
    "vllm: freed by sleep": Expected(5.2, "GiB", "weights and cache, both freed at level 2"),
    "vllm: load": Expected(0.6, "s", "wake, copies of 0.71e9 parameters, layerwise reload"),
    "vllm: decode": Expected(16000, "tokens/s", "64 rows; 4 ms a step"),
    "vllm: log-prob gap, fp32 logits": Expected(0.02, "nats", "bf16 backbones with different kernels, logits exact"),
    "vllm: log-prob gap, model logits": Expected(0.04, "nats", "the same, and logits of about 20 in steps of 0.125"),
    "varlen: forward, varlen": Expected(0.16, "ms", "16,384 tokens, 16 heads of 128: 31 GFLOP and launch"),
    "varlen: forward, sdpa": Expected(0.22, "ms", "35 padded rows by flash attention, with its copies"),
    "varlen: forward+backward, varlen": Expected(0.7, "ms", "backward 2.5 times the products, transposes"),
    "varlen: forward+backward, sdpa": Expected(0.9, "ms", "padded to 470 tokens, keys repeated for 16 heads"),
    "decode: in step, eager": Expected(1450, "tokens/s", "44 ms a step of 28 layers (gpu_step.json), 64 rows"),
    "decode: in step, captured": Expected(6000, "tokens/s", "11 ms: weights 1.7, cache 2, 1,500 kernels 5, sampling 2"),
    "decode: turns, eager": Expected(1000, "tokens/s", "a pass in most steps also fills a prompt"),
    "decode: turns, captured": Expected(3000, "tokens/s", "fills every 16 steps, rows idle meanwhile"),
    "decode: capture": Expected(0.4, "s", "a graph of 28 layers, with its eager steps"),
    "questions: products": Expected(36.1, "ms", "gpu_kernels.json"),
    "questions: token loss, 2048 x 8192": Expected(51.2, "ms", "gpu_kernels.json"),
    "questions: token loss, 2048 x 8192, memory": Expected(3717, "MiB", "gpu_kernels.json"),
    "questions: token loss, 1024 x 8192": Expected(53, "ms", "twice the fp32 gradient sums: 1.2 GiB more traffic each"),
    "questions: token loss, 1024 x 8192, memory": Expected(
        2530, "MiB", "kept logits 2374 -> 1187; the weight's fp32 gradient, 1187, stays: above Liger's 2,106"
    ),
    "questions: token loss, 512 x 8192": Expected(57, "ms", "products of 512 rows run slower, more sums"),
    "questions: token loss, 512 x 8192, memory": Expected(1940, "MiB", "kept logits 594: below Liger's 2,106"),
    "questions: divergence, 2048 x 8192": Expected(74.4, "ms", "gpu_kernels.json"),
    "questions: divergence, 2048 x 1536, captured": Expected(68, "ms", "tiles of 12 MiB are read from L2: 6 ms less"),
    "questions: token loss, 2048 x 1536, captured": Expected(
        48, "ms", "sums from L2 and no launches, gradients from memory as before: 1.33 of the products, not 1.25"
    ),
    "questions: token loss, 1024 x 2048, captured": Expected(50, "ms", "tiles of 8 MiB, but twice the gradient sums"),
}


def arguments(doc: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line of a part; `more` are options of its own, by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the results as JSON")
    parser.add_argument("--dry", action="store_true", help="the same code on a CPU, on small tensors")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no further step after this")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).stem}: no GPU that this torch can use; run it where there is one, or with --dry")
        raise SystemExit(2)
    return args


@dataclass
class Lane:
    """The results of a part so far, written to `out` after each, and the time left."""

    device: torch.device
    deadline: float
    out: Path | None = None
    dry: bool = False  # sizes are not those that numbers are expected of
    checks: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    lost: bool = False  # a kernel's error stays with the process: later results cannot be trusted

    @staticmethod
    def of(args: argparse.Namespace) -> Lane:
        device = torch.device("cpu" if args.dry else "cuda")
        return Lane(device, time.monotonic() + args.seconds, args.out, args.dry)

    def ready(self, name: str) -> bool:
        """Return whether a step may begin; report it as skipped if not."""
        reason = "the device is lost" if self.lost else "no time left" if time.monotonic() > self.deadline else ""
        if reason:
            self._skip(f"{name}: {reason}")
        return not reason

    def _skip(self, text: str) -> None:
        self.skipped.append(text)
        print(f"skipped {text}", flush=True)
        self.save()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Report an error inside the block and continue."""
        try:
            yield
        except ImportError as error:
            self._skip(f"{name}: {error}")
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.failures.append(f"{name}: {type(error).__name__}: {lines[-1]}")
            print(f"FAILED  {self.failures[-1]}", flush=True)
            print("".join(traceback.format_tb(error.__traceback__)[-3:]), flush=True)
            self.lost = self.device.type == "cuda" and not responds()
            self.save()

    def check(self, name: str, passed: bool, detail: str) -> None:
        self.checks.append({"check": name, "passed": bool(passed), "detail": detail})
        if not passed:
            self.failures.append(f"{name}: {detail}")
        print(f"{'ok     ' if passed else 'FAILED '} {name}: {detail}", flush=True)
        self.save()

    def measure(self, name: str, value: float, unit: str, expected: float | None = None, why: str = "") -> None:
        """Record a measured number; what was expected stands in `EXPECTED`, or is computed from the run's plan."""
        known = None if self.dry else EXPECTED.get(name)
        if known is not None and known.unit != unit:
            raise ValueError(f"{name} is expected in {known.unit}, measured in {unit}")
        if known is not None:
            expected, why = known.value, known.why
        if self.dry:
            expected, why = None, ""
        self.measures.append({"name": name, "value": value, "unit": unit, "expected": expected, "why": why})
        told = "" if expected is None else f" (expected {expected:.4g})"
        print(f"measured {name}: {value:.4g} {unit}{told}", flush=True)
        self.save()

    def save(self) -> None:
        if self.out:
            record = {k: v for k, v in asdict(self).items() if k not in ("device", "deadline", "out", "lost")}
            partial = self.out.with_suffix(".partial")
            partial.write_text(json.dumps(record, indent=1) + "\n")
            partial.replace(self.out)

    def finish(self) -> int:
        """Save, and return the exit status: 1 after a failure."""
        self.save()
        return 1 if self.failures else 0


def responds() -> bool:
    """Return whether the GPU still answers."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def seconds(device: torch.device, work, rounds: int = 1) -> float:
    """Return the mean seconds of `work()`, the device's included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / rounds


def random_model(sizes: dict[str, Any], seed: int, device: torch.device, dtype: torch.dtype, spread: float) -> Any:
    """Return a random Qwen3 whose logits have about the standard deviation `spread`, and depend on all its layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(**{"max_position_embeddings": 4096, "tie_word_embeddings": True} | sizes)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight.normal_(std=weight.shape[1] ** -0.5)
        model.model.norm.weight.fill_(spread / (config.initializer_range * config.hidden_size**0.5))
    return model
