"""Train some steps on one GPU with models of real shapes, plan against measured: the part `step` of `gpu_lane.py`.

    python bench/gpu_step.py --steps 2
    python bench/gpu_step.py --dry          # tiny models on a CPU

The models have the shapes of Qwen3 1.7B (student) and 4B (teacher) and random weights: this shows that training runs
and what it costs, not that it learns. The environment is generated ALFWorld games. Random models end hardly a response
early. The plan's memory by phase is an upper bound; its seconds are for the tokens that the step really had.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from lane import TESTS, Lane, arguments, random_model
from machine import ROOT

from atod_fast import preflight, reporting, train
from atod_fast import run as runs
from atod_fast.config.settings import load
from atod_fast.machines import parse
from atod_fast.plan.memory import memory, totals
from atod_fast.plan.seconds import seconds
from atod_fast.plan.shapes import shape_of
from atod_fast.plan.tokens import Step

SETTINGS = """
env.max_turns=4 eval.tasks=1 eval.every=0 eval.teacher=false rollout.engine=transformers rollout.context=window
rollout.history=2 train.group_size=8 train.learning_rate=1e-6 train.warmup_steps=0 observe.trajectories_every=0
checkpoint.every=0 schedule.kappa.horizon=80 schedule.rho.horizon=80
""".split()
REAL = """
rollout.prompt_tokens=1024 rollout.response_tokens=64 rollout.concurrency=64 train.tasks_per_step=8
train.minibatch_rows=128 train.microbatch_tokens=8192
""".split()
TINY = """
rollout.prompt_tokens=2048 rollout.response_tokens=4 rollout.concurrency=8 train.tasks_per_step=1
train.minibatch_rows=16
""".split()
# hidden and intermediate size, layers, heads
SHAPES = {"student": (2048, 6144, 28, 16), "teacher": (2560, 9728, 36, 32)}
DRY_SHAPES = {"student": (32, 48, 2, 2), "teacher": (48, 64, 2, 2)}
# The phases of the plan, and the phases of a step's clock that are measured for them.
MEMORY = {"rollout": ["rollout"], "score": ["teacher", "score"], "update": ["train"]}
SECONDS = {"rollout": ["rollout"], "teacher": ["teacher"], "score": ["score"], "update": ["train"]}
PLANNED = {"update": ["update", "optimiser"]}


def make_models(folder: Path, device: torch.device, dry: bool, tokenizer: str | None) -> list[str]:
    """Write both models to disk; return the settings that name them."""
    if tokenizer is None:
        sys.path.insert(0, str(TESTS))
        from helpers.chatml import make_tokenizer

        texts = [*(ROOT / "docs").glob("*.md"), *(ROOT / "atod_fast" / "envs" / "alfworld").glob("*.py")]
        tokens = make_tokenizer(corpus=[text.read_text() for text in texts], size=4000)
    else:
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(tokenizer)
    for seed, (role, (hidden, intermediate, layers, heads)) in enumerate((DRY_SHAPES if dry else SHAPES).items()):
        ids = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("eos", "pad", "bos")}
        sizes = {
            "vocab_size": len(tokens) + 3 if dry else 151936,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 1 if dry else 8,
            "head_dim": 16 if dry else 128,
        }
        model = random_model(sizes | ids, seed, device, torch.bfloat16, 3.0)
        model.save_pretrained(folder / role)
        tokens.save_pretrained(folder / role)
        del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [f"{role}.path={folder / role}" for role in SHAPES]


class Watch:
    """Records, while a run trains, the rows of each step and the peak memory of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.steps: list[Step] = []
        self.peaks: dict[str, float] = {}  # bytes by phase of the clock, the largest of all steps
        partition, watch, on_gpu = runs.Learner.partition, self, device.type == "cuda"

        def recorded(learner, rows, step):
            minibatches, turns = partition(learner, rows, step)
            total, actions = sum(len(row.ids) for row in rows), sum(row.action_tokens for row in rows)
            count = sum(len(row.turns) for row in rows)
            watch.steps.append(Step(count, count, len(rows), total, actions, len(minibatches)))
            return minibatches, turns

        class Clock(reporting.Clock):
            def __call__(self, phase):
                watch._note()
                watch._phase = phase
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                return super().__call__(phase)

        self._phase, self._on_gpu = "", on_gpu
        runs.Learner.partition, reporting.Clock = recorded, Clock

    def _note(self) -> None:
        """Note the peak of the phase that ends."""
        if self._phase:
            peak = float(torch.cuda.max_memory_allocated()) if self._on_gpu else 0.0
            self.peaks[self._phase] = max(peak, self.peaks.get(self._phase, 0.0))
        self._phase = ""


def on(device: torch.device) -> str:
    """Return the name under which `--on` knows this machine; an H100 where it does not."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    found = re.search(r"a100|h100|h200|b200", name.lower())
    return f"1x{found[0] if found else 'h100'}"


def step(lane: Lane, folder: Path, count: int, tokenizer: str | None, dry: bool, more: list[str]) -> None:
    device = lane.device
    began = time.perf_counter()
    settings = [*make_models(folder, device, dry, tokenizer), *SETTINGS, *(TINY if dry else REAL), *more]
    settings.append(f"train.steps={count}")
    print(f"models written in {time.perf_counter() - began:.1f} s", flush=True)
    config = load(None, None, settings)
    found = preflight.look(config, 1, device, offline=True)
    shapes = {role: shape_of(model.body) for role, model in found.models.items()}
    planned = totals(memory(config, shapes["student"], shapes["teacher"], found.runtime))

    watch, began = Watch(device), time.perf_counter()
    code = train.main([*settings, "--run-dir", str(folder / "run")])
    lane.check("the run ends well", code == 0, f"exit {code} after {time.perf_counter() - began:.1f} s")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "time/step" in line]
    last, sizes = measured[-1], watch.steps[-1]
    at_once = config.train.tasks_per_step * config.train.group_size
    sizes = Step(at_once, sizes.turns, sizes.rows, sizes.tokens, sizes.action_tokens, sizes.updates)
    told = seconds(config, shapes["student"], shapes["teacher"], found.runtime, parse(on(device)), sizes)
    lane.measure("step: tokens", sizes.tokens, "tokens")
    for phase, parts in SECONDS.items():
        expected = sum(told.get(part, 0.0) for part in PLANNED.get(phase, [phase]))
        taken = sum(last[f"time/{part}"] for part in parts)
        lane.measure(f"step: {phase}", taken, "s", expected, "plan/seconds.py, for these tokens")
    for phase, parts in MEMORY.items():
        peak, plan = max(watch.peaks[part] for part in parts) / 2**30, planned[phase] / 2**30
        if not dry:
            lane.measure(f"step: memory of {phase}", peak, "GiB", plan, "plan/memory.py, an upper bound")
            lane.check(f"memory of {phase} is within the plan", peak <= plan, f"{peak:.2f} of {plan:.2f} GiB")
    gap = max(line["sync/logprob_gap"] for line in measured)
    lane.check("the engine has the trainer's weights", gap < 0.05, f"log-prob gap {gap:.4f} in {len(measured)} steps")


def main() -> int:
    args = arguments(
        __doc__,
        tokenizer={"help": "a folder with a chat model's tokenizer; default: a small one made on the spot"},
        steps={"type": int, "default": 2},
        set={"action": "append", "default": [], "metavar": "KEY=VALUE", "help": "a setting of the run, repeatable"},
    )
    lane = Lane.of(args)
    with tempfile.TemporaryDirectory() as folder, lane.step("step"):
        step(lane, Path(folder), args.steps, args.tokenizer, args.dry, args.set)
    return lane.finish()


if __name__ == "__main__":
    sys.exit(main())
