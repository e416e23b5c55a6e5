"""Time ATOD's steps on one GPU with models of real shapes; compare the memory peak with the plan of `--dry-run`.

    python bench/gpu_step.py TOKENIZER --out bench/results/gpu_step.json

TOKENIZER is a folder with a chat model's tokenizer. The models have the shapes of Qwen3 0.6B and 1.7B with a smaller
vocabulary, and random weights: this shows that training runs and what it costs, not that it learns. The environment is
generated ALFWorld games. Random models end no trajectory early, so that every step is as large as its bounds allow.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from atod_fast import train

SETTINGS = """
env.max_turns=6 eval.tasks=1 eval.every=0 eval.teacher=false rollout.engine=transformers rollout.context=window
rollout.prompt_tokens=1024 rollout.response_tokens=64 rollout.history=2 rollout.concurrency=64 train.tasks_per_step=8
train.group_size=8 train.minibatch_rows=192 train.learning_rate=1e-6 train.warmup_steps=0 observe.trajectories_every=0
checkpoint.every=0 schedule.kappa.horizon=80 schedule.rho.horizon=80
""".split()
SHAPES = {"student": (1024, 3072), "teacher": (2048, 6144)}  # hidden and intermediate sizes


def make_models(tokenizer: str, folder: Path) -> list[str]:
    """Write both models to disk; return the settings that name them."""
    tokens = AutoTokenizer.from_pretrained(tokenizer)
    for seed, (role, (hidden, intermediate)) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=len(tokens),
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
            bos_token_id=tokens.bos_token_id,
        )
        with torch.device("cuda"):
            Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / role)
        tokens.save_pretrained(folder / role)
    torch.cuda.empty_cache()
    return [f"{role}.path={folder / role}" for role in SHAPES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--microbatch-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step: no GPU that this torch can use")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [
            *make_models(args.tokenizer, Path(folder)),
            *SETTINGS,
            f"train.steps={args.steps}",
            f"train.microbatch_tokens={args.microbatch_tokens}",
        ]
        plan = io.StringIO()
        with contextlib.redirect_stdout(plan):
            train.main([*settings, "--dry-run"])
        planned = [line for line in plan.getvalue().splitlines() if line.startswith("# ")]
        print("\n".join(planned), flush=True)
        if code := train.main([*settings, "--run-dir", str(run)]):
            return code
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = re.compile("step$|time/|memory/|perf/|sync/|rollout/")
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": settings[2:],
        "plan": planned,
        "steps": [{k: v for k, v in step.items() if kept.match(k)} for step in steps if "time/step" in step],
    }
    print(json.dumps(record["steps"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
