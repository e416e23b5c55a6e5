"""Compare the seconds that `--dry-run --on` predicts for the phases of a step with measured ones.

    python bench/step_seconds.py          # writes bench/results/step_seconds.md

GPU: the step of bench/results/gpu_step.json (H100). The two scoring phases are what PRODUCTS and BANDWIDTH of
atod_fast/machines.py were fitted to; the rest is predicted. CPU: real steps of two model sizes on one core, whose
products and memory are timed first, so that only the formulas are tested.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from machine import processor
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from atod_fast import run as runs
from atod_fast import train
from atod_fast.config.settings import load
from atod_fast.machines import GPU, Machines, parse
from atod_fast.models import resolve, skeleton
from atod_fast.observe import metrics
from atod_fast.plan.seconds import seconds
from atod_fast.plan.shapes import Shape, shape_of
from atod_fast.plan.tokens import Step
from atod_fast.rollout.engines.protocol import Room

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT = 279  # mean tokens of its prompts: its settings, SmolLM2's tokenizer, responses of 64 random tokens
PHASES = {"rollout": ["rollout"], "teacher": ["teacher"], "score": ["score"], "update": ["update", "optimiser"]}
MEASURED = {"update": "train"}  # phases that metrics.jsonl names otherwise
SIZES = {"4 layers of 256": (256, 4), "8 layers of 512": (512, 8)}
SETTINGS = """
env.max_turns=6 rollout.concurrency=32 train.tasks_per_step=4 train.minibatch_rows=16 train.steps=3 eval.tasks=1
eval.every=0 eval.teacher=false checkpoint.every=0 observe.trajectories_every=0 student.compute_dtype=fp32
""".split()


def lines(title: str, predicted: dict[str, float], measured: dict[str, float]) -> list[str]:
    """Return the table's lines of one step."""
    found = []
    for phase, parts in PHASES.items():
        told, seen = sum(predicted[part] for part in parts), measured[f"time/{MEASURED.get(phase, phase)}"]
        found.append(f"| {title} | {phase} | {told:.2f} | {seen:.2f} | {told / seen - 1:+.0%} |")
    return found


def runtime(engine: str, dtype: torch.dtype) -> SimpleNamespace:
    """Return what `seconds` reads of a Runtime of one rank."""
    return SimpleNamespace(
        room=Room(64, False, 0),
        compiled=False,
        gathered=False,
        joined=1,
        student_dtype=dtype,
        teacher_dtype=dtype,
        shards=1,
        ranks=1,
        liger=False,
        engine=engine,
        checkpointing=False,
    )


def gpu() -> list[str]:
    """Return the lines of the step in gpu_step.json."""
    record = json.loads((RESULTS / "gpu_step.json").read_text())
    sizes = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    shapes = [
        shape_of(
            skeleton(AutoConfig.for_model("qwen3", vocab_size=49152, hidden_size=h, intermediate_size=3 * h, **sizes))
        )
        for h in (1024, 2048)
    ]
    config = load(None, None, [s for s in record["settings"] if not s.startswith(("student.path", "teacher.path"))])
    rows = 64 * 6
    step = Step(64, rows, rows, rows * (PROMPT + 64), rows * 64, 2)
    told = seconds(config, *shapes, runtime("transformers", torch.bfloat16), parse("1xh100"), step)
    return lines("H100, 0.49B taught by 1.51B", told, record["steps"][-1])


def core() -> GPU:
    """Time this machine's products and memory on one core."""
    a = torch.randn(1024, 1024)
    big = torch.randn(32 * 2**20)
    products, bytes_ = [], []
    for _ in range(5):
        start = time.process_time()
        for _ in range(4):
            a @ a
        products.append(4 * 2 * 1024**3 / (time.process_time() - start))
        start = time.process_time()
        big.mul(2.0)
        bytes_.append(2 * big.nbytes / (time.process_time() - start))
    return GPU("one core", 0, median(products), median(bytes_), 1e12, 1e12, 4e-4)


def cpu(title: str, hidden: int, layers: int, core: GPU) -> list[str]:
    """Train three steps with a student and a teacher of this size; return the lines of their median."""
    tokens = AutoTokenizer.from_pretrained(resolve("demo:student"))
    seen: list[Step] = []
    partition = runs.Learner.partition

    def recorded(learner, rows, step):
        total, actions = sum(len(row.ids) for row in rows), sum(row.action_tokens for row in rows)
        minibatches, turns = partition(learner, rows, step)
        count = sum(len(row.turns) for row in rows)
        seen.append(Step(len(rows), count, len(rows), total, actions, len(minibatches)))
        return minibatches, turns

    runs.Learner.partition = recorded
    metrics.time = SimpleNamespace(perf_counter=time.process_time)  # other work on the machine stretches the clock
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=len(tokens),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
        )
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(Path(folder) / "model")
        tokens.save_pretrained(Path(folder) / "model")
        settings = [*SETTINGS, f"student.path={folder}/model", f"teacher.path={folder}/model"]
        if code := train.main([*settings, "--run-dir", f"{folder}/run"]):
            raise SystemExit(code)
        steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
        shape: Shape = shape_of(skeleton(config))
        measured = {key: median(step[key] for step in steps) for key in steps[0] if key.startswith("time/")}
        settled = load(None, None, settings)
    runs.Learner.partition = partition
    told = seconds(settled, shape, shape, runtime("transformers", torch.float32), Machines(core, 1, 1), seen[-1])
    return lines(f"one core, {title}", told, measured)


def main() -> None:
    torch.set_num_threads(1)
    found = ["| step | phase | predicted, s | measured, s | error |", "|---|---|---|---|---|", *gpu()]
    here = core()
    for title, (hidden, layers) in SIZES.items():
        found += cpu(title, hidden, layers, here)
    text = f"""# Predicted and measured seconds of a step

`python bench/step_seconds.py` on {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch
{torch.__version__}; one core: {here.products / 1e9:.0f} GFLOP/s, {here.bandwidth / 1e9:.1f} GB/s.

CPU seconds; the machine's other core was {"busy" if os.getloadavg()[0] > 1.5 else "idle"}.

{chr(10).join(found)}

Reading: the two scoring phases of the GPU are what was fitted, its rollout calibrates the engine's time a layer, and
its update is a prediction. On a core the formulas say too much, because the intermediate results of models as small as
these stay in its caches, which the formulas do not know.
"""
    (RESULTS / "step_seconds.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
