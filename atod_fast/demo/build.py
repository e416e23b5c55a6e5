"""Rebuild the demo's models from nothing: python -m atod_fast.demo.build [--env NAME] [--out DIR] [--seed N]

A scripted expert plays the training tasks; two small Qwen3 models learn to predict its actions and, at a tenth of the
weight, the environment's answers. Some of the actions are replaced by bad ones, which have no weight: the models see
what follows a mistake, since a teacher that never had to recover from one cannot guide a student that makes it. The
teacher is trained on more tokens than the student.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from atod_fast.config import Env
from atod_fast.config.settings import load
from atod_fast.demo.demos import DEMOS, Demo, Recipe
from atod_fast.demo.rendering import CompactRenderer
from atod_fast.demo.tokenizer import build_tokenizer
from atod_fast.envs import make
from atod_fast.envs.dialect import Dialect, Step
from atod_fast.envs.protocol import Environment
from atod_fast.models import load_tokenizer
from atod_fast.records import Turn
from atod_fast.rollout.actor import Actor
from atod_fast.rollout.engines import make_engine
from atod_fast.runtime import Runtime

POSITIONS = 512
JUNK_RATES = (0.0, 0.15, 0.15, 0.3)  # probability of a bad action; each trace draws one of these
OBSERVATION_WEIGHT = 0.1
BATCH = 24
MUON_RATE, ADAM_RATE, WARMUP_STEPS, FINAL_RATE = 0.02, 4e-3, 20, 0.03


@dataclass(frozen=True)
class Example:
    ids: list[int]
    weight: list[float]  # loss weight of predicting ids[i]


def encode(steps: Sequence[Step], renderer: CompactRenderer) -> Example:
    """Return the tokens and loss weights of a trace, laid out as the agent loop would do it."""
    turns: list[Turn] = []
    ids: list[int] = []
    weight: list[float] = []
    for step in steps:
        prompt, action = renderer.prompt(turns, step.observation, {}), renderer.action(step.command)
        turns.append(Turn(prompt, action, [], step.observation, step.command, step.command, well_formed=not step.junk))
        ids += prompt + action
        weight += [OBSERVATION_WEIGHT] * len(prompt) + [0.0 if step.junk else 1.0] * len(action)
    return Example(ids, weight)


def trace(
    dialect: Dialect,
    env: Environment,
    task: int,
    rng: Random,
    junk_rate: float,
    max_turns: int,
) -> tuple[list[Step], bool]:
    """Let the expert play `task`, replacing each command by a bad one with probability `junk_rate`.

    Returns the steps, and whether the episode was won.
    """
    observation, info = env.reset(0, task)
    player = dialect.expert(env)
    steps: list[Step] = []
    over = False
    while len(steps) < max_turns and not over:
        wanted, bad = player(steps, observation), rng.random() < junk_rate
        command = dialect.junk(env, observation, rng) if bad else wanted
        steps.append(Step(observation, command, bad))
        observation, _, terminated, truncated, info = env.step(command)
        over = terminated or truncated
    return steps, info.get("won", False)


def examples(
    demo: Demo,
    settings: Env,
    tasks: int | None,
    renderer: CompactRenderer,
    recipe: Recipe,
) -> list[Example]:
    """Return traces of the first `tasks` training tasks (None = all) in each of the recipe's environments."""
    rng = Random(recipe.seed)
    found: list[Example] = []
    own = settings.train["seed"]
    others = (seed for seed in count() if seed not in (own, settings.eval["seed"], settings.dev["seed"]))
    for seed in [own, *islice(others, recipe.environments - 1)]:
        env = training_tasks(settings, seed=seed)
        order = [task for task in range(tasks or len(env)) for _ in range(recipe.traces)]
        for task in order:
            steps, _ = trace(demo.dialect, env, task, rng, rng.choice(JUNK_RATES), settings.max_turns)
            found.append(encode(steps, renderer))
    return found


def training_tasks(settings: Env, **options: int) -> Environment:
    """Return the environment of `settings.train`, with some of its options replaced."""
    return make(settings.name, **(settings.options | settings.train | options))


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Return an untrained Qwen3 model of about 0.2M parameters.

    Its matrices start larger than with transformers' standard deviation of 0.02, which is meant for wide models.
    """
    special: dict[str, Any] = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=32,  # vLLM's kernels take no smaller one
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        dtype="float32",
        **special,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.05 if "embed" in name else 0.6 / math.sqrt(parameter.shape[1]))
    model.generation_config = GenerationConfig(do_sample=True, **special)
    return model


def batches(data: Sequence[Example], rng: Random) -> Iterator[list[Example]]:
    """Yield batches of examples of similar length, without end; each epoch is shuffled anew."""
    while True:
        order = rng.sample(data, len(data))
        epoch: list[list[Example]] = []
        for start in range(0, len(order), 12 * BATCH):
            pool = sorted(order[start : start + 12 * BATCH], key=lambda example: len(example.ids))
            epoch += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(epoch)
        yield from epoch


def collate(batch: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Return ids [B, L] int64 and weight [B, L] fp32, right-padded with 0, the id of the tokenizer's PAD."""
    ids, weight = [torch.tensor(example.ids) for example in batch], [torch.tensor(example.weight) for example in batch]
    return pad_sequence(ids, batch_first=True), pad_sequence(weight, batch_first=True)


def supervise(model: Qwen3ForCausalLM, data: Sequence[Example], recipe: Recipe, label: str) -> None:
    """Train `model` on `recipe.tokens` tokens, with Muon for the matrices and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    seen = 0

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * max(FINAL_RATE, 1 - seen / recipe.tokens)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(batches(data, Random(recipe.seed)), 1):
        ids, weight = collate(batch)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        token_loss = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * weight[:, 1:]
        actions = weight[:, 1:] == 1
        (token_loss.sum() / actions.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        seen += sum(len(example.ids) for example in batch)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        done = seen >= recipe.tokens
        if done or step % 40 == 0:
            loss = (token_loss * actions).sum() / actions.sum()
            print(
                f"{label}: step {step}, {seen:,} of {recipe.tokens:,} tokens, action loss {loss:.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
        if done:
            return


def success(demo: Demo, folder: Path, tasks: int, temperature: float) -> float:
    """Return the success rate of the model in `folder` on `tasks` held-out tasks, drawn as in the demo's evaluation."""
    config = load(
        demo.preset, overrides=[f"student.path={folder}", f"eval.tasks={tasks}", f"eval.temperature={temperature}"]
    )
    runtime = Runtime.of(config, torch.device("cpu"))
    assert runtime.student is not None, "only a dry run may not know the student"
    engine = make_engine(config, runtime.engine, runtime.student, runtime.device, runtime.room)
    tokenizer = load_tokenizer(config.student.path)
    renderer = CompactRenderer(tokenizer, demo.dialect)
    played = Actor(config, lambda env: renderer, rank=0, ranks=1).evaluate(engine)
    return sum(trajectory.success for trajectory in played) / len(played)


def build(demo: Demo, out: Path, seed: int = 0, tasks: int | None = None, share: float = 1.0) -> None:
    """Train a demo's two models and save them as `out`/teacher and `out`/student.

    tasks: train on the first so many training tasks of the demo's preset (None = all). share: scales the number of
    training tokens. Uses one thread, so that a seed always gives the same result.
    """
    torch.set_num_threads(1)
    settings = load(demo.preset).env
    env = training_tasks(settings)
    tokenizer = build_tokenizer(demo.dialect.vocabulary(env, tasks or len(env)), POSITIONS, demo.name)
    renderer = CompactRenderer(tokenizer, demo.dialect)
    for name, recipe in demo.recipes.items():
        recipe = replace(recipe, tokens=int(recipe.tokens * share), seed=recipe.seed + 1000 * seed)
        model = new_model(tokenizer, recipe.seed)
        supervise(model, examples(demo, settings, tasks, renderer, recipe), recipe, name)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: rebuild one demo's models, then print their success rates on held-out tasks."""
    parser = argparse.ArgumentParser(
        prog="python -m atod_fast.demo.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", choices=DEMOS, default="alfworld", help="environment of the models (default alfworld)")
    parser.add_argument("--out", type=Path, help="folder for teacher/ and student/ (default: those of the package)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights, traces and order (default 0, the shipped models)"
    )
    options = parser.parse_args(arguments)
    demo = DEMOS[options.env]
    out = options.out or demo.folder
    build(demo, out, options.seed)
    for name in demo.recipes:
        shares = ", ".join(
            f"{label} {success(demo, out / name, 400, t):.3f}"
            for label, t in (("T = 1", 1.0), ("T = 0.5", 0.5), ("greedy", 0.0))
        )
        print(f"{name}: success on 400 held-out tasks: {shares}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
