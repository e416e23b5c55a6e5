"""Compare one training step with TRL's GRPO trainer, end to end: tokens per second, and CPU seconds per phase.

    python bench/step.py             # both models, three rounds: bench/results/step.csv and step.md
    python bench/step.py --rounds 1 --models demo

Both real trainers (`atod_fast.train.main`, `trl.GRPOTrainer`) take the same steps: 8 prompts of 62 tokens, 8 responses
to each of exactly 64 tokens (nothing may end one early), a reward computed from the words of the response, and one
AdamW update on all 64 rows with GRPO's loss, without a teacher or a reference model. One process runs at a time, the
two trainers in turn, with one thread, in fp32. The first step of a process is a warm-up and is left out. A step lasts
from the end of an update to the end of the next one, so that it includes the logging in between. Phases are in CPU
seconds, because other work on the machine stretches wall-clock time, and unevenly.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import islice, pairwise, product
from pathlib import Path
from random import Random
from statistics import median
from string import ascii_lowercase
from types import SimpleNamespace

import torch
from head import hardware
from machine import version
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from atod_fast.demo.rendering import CompactRenderer
from atod_fast.demo.tokenizer import ACT, BOS, CONTROL, build_tokenizer
from atod_fast.envs.alfworld.dialect import DIALECT, compact
from atod_fast.models import resolve
from atod_fast.observe import metrics

RESULTS = Path(__file__).resolve().parent / "results" / "step.csv"
PROMPTS, GROUP, PROMPT, RESPONSE = 8, 8, 62, 64
ROWS = PROMPTS * GROUP
RATE, BETAS, CLIP = 1e-4, (0.9, 0.95), 1.0
PHASES = ("rollout", "score", "train", "resync", "rest")
OURS, TRL = TRAINERS = ("atod_fast", "TRL")
STEPS = {"demo": 9, "larger": 4}  # steps of a process, by model, including the first

DIFFERENCES = f"""\
What is not alike, in either's favour:

- TRL does not score: with one update a batch the old log-probs are those of the update's own forward pass. atod_fast
  always takes them in a pass of its own (`score`), for the guard on the rollout engine and for importance weights.
  TRL's `score` is reward and advantages.
- TRL generates with the model it trains, by transformers' `generate` (`use_vllm=False`), and has nothing to sync;
  atod_fast's engine owns a copy. `generate` samples by `torch.multinomial`, which on a CPU draws a random number for
  every column of the vocabulary, and lengthens its cache by copying it at every token; atod_fast's engine
  `transformers` draws one number a token and writes its cache in place.
- Without Triton, TRL's fused head computes the log-probs of all {PROMPT + RESPONSE - 1} positions of a row, prompt
  included, and their logits again in the backward pass; atod_fast's those of the {RESPONSE} response tokens, once.
  On CUDA TRL leaves the prompt out too.
- atod_fast leaves the tokenizer's six control tokens out of its distributions; TRL forbids sampling the stop token, and
  none of the others.
- TRL's defaults gradient_checkpointing and bf16 are off: fp32 and no recomputation of activations on both sides, all
  rows in one micro-batch.
"""


class Recital:
    """An environment of one turn: the observation is the task's prompt, and any answer ends the episode."""

    instant = True

    def __init__(self, prompts: str) -> None:
        self.path, self.prompts = prompts, json.loads(Path(prompts).read_text())

    def __len__(self) -> int:
        return len(self.prompts)

    def clone(self) -> Recital:
        return Recital(self.path)

    def reset(self, seed: int, task: int) -> tuple[str, dict]:
        return self.prompts[task], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        return "", reward(action), True, False, {}

    def close(self) -> None:
        pass


def reward(response: str) -> float:
    """Return the share of the response's words that end in a letter from a to m."""
    return sum(word[-1] < "n" for word in response.split()) / RESPONSE


def check(tokens: float, gradient_norm: float) -> None:
    if tokens != RESPONSE or not gradient_norm > 0:
        raise SystemExit(
            f"not the step that is compared: responses of {tokens:g} tokens in place of {RESPONSE}, "
            f"gradient norm {gradient_norm:g}"
        )


def prepare(name: str, folder: Path) -> str:
    """Write a model folder with its tokenizer and the prompts of `Recital`; return a description of the model."""
    if name == "demo":
        shutil.copytree(resolve("demo:student"), folder)
    else:
        words = ("".join(letters) for letters in product(ascii_lowercase, repeat=3))
        spoken = islice((word for word in words if compact(word) == [word]), 8192 - len(CONTROL) - 1)
        build_tokenizer(list(spoken), max_length=512, environment="alfworld").save_pretrained(folder)
        sizes = {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        }
        torch.manual_seed(0)
        ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 4}
        config = Qwen3Config(
            vocab_size=8192, max_position_embeddings=512, tie_word_embeddings=True, dtype="float32", **sizes, **ids
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = sorted(word for word in tokenizer.get_vocab() if compact(word) == [word])
    prompts = [" ".join(Random(task).choices(words, k=PROMPT - 2)) for task in range(PROMPTS)]
    shown = [CompactRenderer(tokenizer, DIALECT).prompt([], prompt, {}) for prompt in prompts]
    assert shown == tokenizer([f"{BOS} {prompt} {ACT}" for prompt in prompts])["input_ids"] and {
        len(ids) for ids in shown
    } == {PROMPT}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return (
        f"Qwen3 of {(folder / 'model.safetensors').stat().st_size / 4e6:.1f}M parameters, vocabulary {len(tokenizer)}"
    )


def now() -> tuple[float, float]:
    """Return wall-clock seconds and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def steps_of(marks: list[tuple[float, float]], phases: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return each step's wall-clock and CPU seconds, and CPU seconds by phase; `rest` is in no phase. A step lasts
    from the end of one update to the end of the next."""
    rows = []
    for (before, after), phase in zip(pairwise(marks), phases[1:], strict=True):
        clock, cpu = (end - start for start, end in zip(before, after, strict=True))
        rows.append(
            {"clock": clock, "step": cpu} | dict.fromkeys(PHASES, 0.0) | phase | {"rest": cpu - sum(phase.values())}
        )
    return rows


def atod_fast_steps(folder: Path, steps: int, engine: str) -> list[dict[str, float]]:
    from atod_fast import run, train
    from atod_fast.run import Run

    marks, reported = [], Run.reported

    def endless(config, tokenizer, *others, **options):
        """Make the demo's renderer for an environment other than the demo's, and forbid its stop token in responses."""
        renderer = CompactRenderer(tokenizer, DIALECT)
        renderer.valid_columns[list(renderer.stop_ids)] = False
        return renderer

    def marked(run, *arguments, **options):
        marks.append(now())
        return reported(run, *arguments, **options)

    run.make_renderer, Run.reported = endless, marked
    settings = f"""
    student.path={folder} teacher.path={folder} student.compute_dtype=fp32
    env.name=__main__:Recital env.options.prompts={folder / "prompts.json"} env.max_turns=1
    rollout.engine={engine} rollout.context=full rollout.prompt_tokens={PROMPT + RESPONSE}
    rollout.response_tokens={RESPONSE} rollout.concurrency={ROWS} objective.preset=grpo
    train.tasks_per_step={PROMPTS} train.group_size={GROUP} train.minibatch_rows=0
    train.microbatch_tokens={ROWS * (PROMPT + RESPONSE)} train.steps={steps} train.learning_rate={RATE}
    train.betas=[{BETAS[0]},{BETAS[1]}] train.grad_clip={CLIP} train.warmup_steps=0 train.final_learning_rate=1.0
    eval.tasks=1 eval.every=0 eval.teacher=false checkpoint.every=0 observe.trajectories_every=0
    """
    scratch = Path(tempfile.mkdtemp(dir=folder))
    if code := train.main([*settings.split(), "--run-dir", str(scratch)]):
        sys.exit(code)
    lines = [json.loads(line) for line in (scratch / "metrics.jsonl").read_text().splitlines()][
        1:
    ]  # after the line of step 0
    for line in lines:
        check(line["rollout/turns"] * line["rollout/response_tokens"], line["policy/gradient_norm"])
    names = {"rollout": ["rollout"], "score": ["teacher", "score", "weigh"], "train": ["train"], "resync": ["resync"]}
    return steps_of(
        marks,
        [{phase: sum(line[f"time/{name}"] for name in parts) for phase, parts in names.items()} for line in lines],
    )


def trl_steps(folder: Path, steps: int) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import HfArgumentParser, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    begun, marks, clocks = [], [], []

    class Marks(TrainerCallback):
        def on_step_begin(self, *arguments, **named):
            begun.append(time.process_time())
            clocks.append(metrics.Clock())

        def on_step_end(self, *arguments, **named):
            marks.append(now())

    class Timed(GRPOTrainer):
        def _generate(self, *arguments):
            with clocks[-1]("rollout"):
                return super()._generate(*arguments)

        def _prepare_inputs(self, *arguments):
            with clocks[-1]("prepare"):
                return super()._prepare_inputs(*arguments)

    settings = f"""
    --output_dir {tempfile.mkdtemp(dir=folder)} --max_steps {steps} --use_cpu true --bf16 false
    --gradient_checkpointing false --loss_type grpo --per_device_train_batch_size {ROWS} --num_generations {GROUP}
    --max_completion_length {RESPONSE} --generation_kwargs {{"min_new_tokens":{RESPONSE}}}
    --learning_rate {RATE} --lr_scheduler_type constant --adam_beta1 {BETAS[0]} --adam_beta2 {BETAS[1]}
    --max_grad_norm {CLIP} --model_init_kwargs {{"dtype":"float32"}} --dataloader_pin_memory false
    --logging_steps 1 --save_strategy no --report_to none --disable_tqdm true
    """
    trainer = Timed(
        model=str(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        args=HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(settings.split())[0],
        reward_funcs=lambda completions, **columns: [reward(response) for response in completions],
        train_dataset=Dataset.from_dict(
            {"prompt": [f"{BOS} {prompt} {ACT}" for prompt in json.loads((folder / "prompts.json").read_text())]}
        ),
        callbacks=[Marks()],
    )
    trainer.train()
    for line in trainer.state.log_history[:steps]:
        check(line["completions/min_length"], line["grad_norm"])
    phases = []
    for begin, (_, end), clock in zip(begun, marks, clocks, strict=True):
        rollout, prepare = clock.seconds["time/rollout"], clock.seconds["time/prepare"]
        phases.append({"rollout": rollout, "score": prepare - rollout, "train": end - begin - prepare})
    return steps_of(marks, phases)


def table(name: str, about: str, rows: list[dict]) -> str:
    """Return a table of medians (minima) over the steps, and ratios of seconds (lowest and highest of a round), above
    1 where atod_fast is faster."""

    def seconds(trainer: str, metric: str, rounds: set[int]) -> list[float]:
        return [row[metric] for row in rows if row["trainer"] == trainer and row["round"] in rounds]

    def ratio(metric: str, rounds: set[int]) -> float:
        return median(seconds(TRL, metric, rounds)) / median(seconds(OURS, metric, rounds))

    every = {row["round"] for row in rows}
    lines = [
        f"## {name}: {about}\n",
        f"| a step, median (best) of {len(rows) // 2} | {OURS} | {TRL} | ratio (rounds) |",
        "|---|---|---|---|",
    ]
    for title, metric, tokens in (
        ("**generated tokens a CPU second**", "step", ROWS * RESPONSE),
        ("generated tokens a second by the clock", "clock", ROWS * RESPONSE),
        *((f"CPU seconds, {metric}", metric, 0) for metric in ("step", *PHASES)),
    ):
        found = [(median(taken), min(taken)) for taken in (seconds(trainer, metric, every) for trainer in TRAINERS)]
        cells = [
            f"{tokens / middle:.0f} ({tokens / best:.0f})" if tokens else f"{middle:.3f} ({best:.3f})"
            for middle, best in found
        ]
        of_rounds = [ratio(metric, {round_}) for round_ in every] if metric not in ("resync", "rest") else []
        cells.append(f"{ratio(metric, every):.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})" if of_rounds else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(name: str, rounds: int, engine: str) -> tuple[list[dict], str]:
    """Return the CSV's rows of one model, and its table."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        about = prepare(name, folder)
        for round_, trainer in product(range(1, rounds + 1), TRAINERS):
            command = [sys.executable, __file__, "--worker", trainer, str(folder), "--engine", engine]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            if done.returncode:
                sys.exit(
                    f"bench/step.py: {trainer} on {name} ended with {done.returncode}: "
                    f"{(done.stderr.strip().splitlines() or ['killed'])[-1]}"
                )
            found = json.loads(done.stdout.splitlines()[-1])
            rows += [
                {"model": name, "round": round_, "trainer": trainer, "number": number, **step}
                for number, step in enumerate(found, 2)
            ]
            print(
                f"measured: {name}, round {round_}, {trainer}: {median(step['step'] for step in found):.3f} "
                "CPU seconds a step",
                flush=True,
            )
    return rows, table(name, about, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="of atod_fast's rollouts; TRL's are by transformers",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV; the tables are written beside it")
    parser.add_argument("--worker", nargs=2, metavar=("TRAINER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if find_spec("trl") is None:
        sys.exit("bench/step.py: TRL is not installed; pip install '.[peers]'")
    torch.set_num_threads(1)
    if args.worker:
        metrics.time = SimpleNamespace(
            perf_counter=time.process_time
        )  # so that Clock, which times the phases, leaves out other processes' work
        trainer, folder, steps = args.worker[0], Path(args.worker[1]), STEPS[Path(args.worker[1]).name]
        print(json.dumps(trl_steps(folder, steps) if trainer == TRL else atod_fast_steps(folder, steps, args.engine)))
        return
    load, rows, tables = os.getloadavg()[0], [], []
    for name in args.models:
        found, text = measure(name, args.rounds, args.engine)
        rows, tables = rows + found, [*tables, text]
        print(text, flush=True)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "trl", "accelerate"))
    stack = (
        f"{hardware('cpu')}, 1 thread; {versions}; atod_fast's rollouts by {args.engine}; "
        f"load average {load:.2f} at the start."
    )
    work = f"{PROMPTS} prompts x {GROUP} responses, {PROMPT} + {RESPONSE} tokens a row, one update"
    made = f"Made by `{' '.join(['python bench/step.py', *sys.argv[1:]])}`."
    note = "With one thread, CPU seconds are what the clock shows on a machine that does nothing else."
    head = f"# One training step against TRL's GRPO trainer\n\n{work}. {made}\n{note}\n"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text("\n".join([head, *tables, DIFFERENCES, stack]) + "\n")
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.5f}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


if __name__ == "__main__":
    main()
