"""Measure the agent loop's overhead over its engine, and the gain if the teacher scored during rollouts.

    python bench/rollout.py --out bench/results/rollout.md         (with vLLM installed: both engines)

Efficiency: 64 episodes of the demo's games at a concurrency of 64 run once through the agent loop and once as bare
requests. Bare requests have the same prompts, seeds and keys, each turn requested as soon as the one before is
answered, with no environment, renderer or trajectory between. Efficiency is bare seconds over loop seconds: both have
the same prefixes cached and the same tail. `batch` is the engine's raw throughput: the same requests as if
independent, with the batch kept at 64 until none is left. Turns can be faster than such a batch, because they share
prefixes. Every run begins with an empty prefix cache.

Overlap: the agent loop followed by the teacher over all rows, against the teacher in a thread of its own that scores
the trajectories ended so far whenever it is free. One process, one thread a model: of two cores one is to spare.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from machine import processor, version
from transformers import Qwen3Config, Qwen3ForCausalLM

from atod_fast import ranks
from atod_fast.batches import rows
from atod_fast.config import Config
from atod_fast.models import load_config, load_tokenizer
from atod_fast.policy.loading import load_teacher
from atod_fast.policy.model import HeadJob
from atod_fast.policy.packing import collate
from atod_fast.policy.teacher.local import LocalTeacher
from atod_fast.records import Trajectory
from atod_fast.renderers import make_renderer
from atod_fast.rollout import agent
from atod_fast.rollout.actor import Actor
from atod_fast.rollout.engines import ENGINES, make_engine
from atod_fast.rollout.engines.protocol import Engine, Request, Sampling
from atod_fast.rollout.engines.vllm import limits as vllm_limits
from atod_fast.runtime import Runtime

ROUNDS = 5
LARGER = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


class Recorded:
    """An `Engine` that records its requests."""

    def __init__(self, engine: Engine):
        self.engine, self.requests = engine, defaultdict(list)
        self.max_model_len, self.concurrency = engine.max_model_len, engine.concurrency

    def add(self, request: Request) -> None:
        self.requests[request.key].append(request)
        self.engine.add(request)

    def __getattr__(self, name: str):
        return getattr(self.engine, name)


def forget(engine: Engine) -> None:
    """Empty vLLM's prefix cache, which it keeps between rollouts with the same weights; in training each rollout has
    new weights."""
    core = getattr(engine, "_engine", None)
    if core is not None:
        assert core.reset_prefix_cache()


def batch(engine: Engine, sampling: Sampling, requests: dict[int, list[Request]]) -> int:
    """Send all `requests` as if each were a trajectory, 64 at a time; return the number of tokens sampled."""
    forget(engine)
    engine.begin(sampling)
    waiting = [
        Request(number, request.prompt, request.seed)
        for number, request in enumerate(r for turns in requests.values() for r in turns)
    ]
    tokens = asked = 0
    while waiting or asked:
        while waiting and asked < 64:
            engine.add(waiting.pop())
            asked += 1
        for done in engine.step():
            engine.release(done.key)
            tokens += len(done.ids)
            asked -= 1
    engine.end()
    return tokens


def bare(engine: Engine, sampling: Sampling, requests: dict[int, list[Request]]) -> int:
    """Send `requests`, the turns of each key one after the other; return the number of tokens sampled."""
    forget(engine)
    engine.begin(sampling)
    waiting = {key: iter(turns) for key, turns in requests.items()}
    for turns in waiting.values():
        engine.add(next(turns))
    tokens = 0
    while waiting:
        for done in engine.step():
            tokens += len(done.ids)
            following = next(waiting[done.key], None)
            if following is not None:
                engine.add(following)
            else:
                engine.release(done.key)
                del waiting[done.key]
    engine.end()
    return tokens


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def loop(actor: Actor, engine: Engine) -> list[Trajectory]:
    forget(engine)
    return actor.train(engine, 1)


def efficiency(actor: Actor, engine: Engine, config: Config) -> tuple[float, ...]:
    """Return (tokens, median seconds of loop, bare and batch, efficiency). The three take turns, so that a slow minute
    slows all."""
    recorded = Recorded(engine)
    played = actor.train(recorded, 1)
    tokens = sum(len(turn.action) for trajectory in played for turn in trajectory.turns)
    sampling = Sampling(
        config.rollout.temperature,
        config.rollout.response_tokens,
        actor.renderer.stop_ids,
        actor.renderer.valid_columns,
    )
    assert abs(bare(engine, sampling, recorded.requests) - tokens) < 0.02 * tokens, (
        "bare requests sample what the loop sampled"
    )
    ways = (
        lambda: loop(actor, engine),
        lambda: bare(engine, sampling, recorded.requests),
        lambda: batch(engine, sampling, recorded.requests),
    )
    rounds = [[0.0] * 3 for _ in range(ROUNDS)]
    for number, taken in enumerate(rounds):
        for way in ((number + place) % 3 for place in range(3)):
            taken[way] = seconds(ways[way])
    return (
        tokens,
        *(statistics.median(column) for column in zip(*rounds, strict=True)),
        statistics.median(b / a for a, b, _ in rounds),
    )


class Scorer:
    """Computes the teacher's log-probs of trajectories in micro-batches."""

    def __init__(self, config: Config, mesh, device: torch.device):
        self.teacher = LocalTeacher(load_teacher(Runtime.of(config, device).teacher, mesh, offload=False))
        self.config = config

    def __call__(self, trajectories: list[Trajectory]) -> None:
        found = rows(trajectories)
        for first in range(0, len(found), 16):
            batch = collate(found[first : first + 16], packed=False)
            self.teacher.logp(batch, HeadJob(batch.target, self.config.rollout.temperature))


def overlapped(actor: Actor, engine: Engine, score: Scorer) -> None:
    """Run a rollout while a thread scores the trajectories that have ended."""
    ended: queue.SimpleQueue[Trajectory | None] = queue.SimpleQueue()
    plays: list[agent._Play] = []

    class Play(agent._Play):
        def __post_init__(self) -> None:
            super().__post_init__()
            plays.append(self)

    class Telling(Recorded):
        def release(self, key: int) -> None:
            self.engine.release(key)
            ended.put(plays[key].trajectory)

    def work() -> None:
        over = False
        while not over:
            batch = [ended.get()]
            while not ended.empty():
                batch.append(ended.get())
            over = None in batch
            score([trajectory for trajectory in batch if trajectory is not None])

    worker = threading.Thread(target=work)
    worker.start()
    given, agent._Play = agent._Play, Play
    try:
        forget(engine)
        actor.train(Telling(engine), 1)
    finally:
        agent._Play = given
        ended.put(None)
        worker.join()


def overlap(actor: Actor, engine: Engine, score: Scorer) -> tuple[float, ...]:
    """Return median seconds of the rollout, of the teacher after it and of both overlapped; and overlapped over the
    sum."""
    played = actor.train(engine, 1)
    overlapped(actor, engine, score)
    triples = [
        (
            seconds(lambda: loop(actor, engine)),
            seconds(lambda: score(played)),
            seconds(lambda: overlapped(actor, engine, score)),
        )
        for _ in range(ROUNDS)
    ]
    rollout, teacher, both = (statistics.median(column) for column in zip(*triples, strict=True))
    return rollout, teacher, both, statistics.median(c / (a + b) for a, b, c in triples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="MD", help="write the tables here")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    device, mesh = ranks.start()
    efficient, gained = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in (("demo, 0.2M", "demo:student"), ("random, 3.4M", larger(folder))):
            config = Config.model_validate({"student": {"path": path}, "env": {"options": {}}})
            renderer = partial(make_renderer, config, load_tokenizer("demo:student"), load_config(path).vocab_size)
            actor = Actor(config, renderer, rank=0, ranks=1)
            score = Scorer(Config.model_validate({"teacher": {"path": path}}), mesh, device)
            for kind in ("transformers", "vllm") if vllm_limits.supported() else ("transformers",):
                compute = Runtime.of(config, device).student
                room = ENGINES[kind].room(config, load_config(path), compute.dtype, device, 1)
                engine = make_engine(config, kind, compute, device, room)
                tokens, played, alone, raw, ratio = efficiency(actor, engine, config)
                efficient.append(
                    f"| {name} | {kind} | {tokens} | {tokens / played:.0f} | {tokens / alone:.0f} | {ratio:.2f} "
                    f"| {tokens / raw:.0f} |"
                )
                rollout, teacher, both, share = overlap(actor, engine, score)
                gained.append(f"| {name} | {kind} | {rollout:.2f} | {teacher:.2f} | {both:.2f} | {share:.2f} |")
    table = report(efficient, gained)
    print(table)
    if out:
        out.write_text(table, encoding="utf-8")
    ranks.stop()


def larger(folder: str) -> str:
    """Write a larger random model with the demo's tokenizer to a folder; return the folder."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("demo:student")
    config = Qwen3Config(
        vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, dtype="float32", **LARGER
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def report(efficient: list[str], gained: list[str]) -> str:
    versions = (
        ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
        + f", vllm {vllm_limits.installed()}"
    )
    return "\n".join(
        [
            "# Rollouts: the agent loop and its engines",
            "",
            "`python bench/rollout.py --out bench/results/rollout.md`",
            "",
            f"{processor()}, one thread, {versions}. 64 episodes, concurrency 64; "
            f"medians of {ROUNDS} alternating rounds on a",
            "shared machine. Efficiency is the loop's tokens per second by those of the same requests without worlds "
            "(goal: 0.9).",
            "",
            "| model | engine | tokens | loop, tokens/s | bare, tokens/s | efficiency | batch, tokens/s |",
            "|---|---|---|---|---|---|---|",
            *efficient,
            "",
            "Teacher after the rollout, or in a thread of its own during it (one process on two cores, "
            "the second one otherwise idle):",
            "",
            "| model | engine | rollout s | teacher s | overlapped s | overlapped by the sum |",
            "|---|---|---|---|---|---|",
            *gained,
            "",
        ]
    )


if __name__ == "__main__":
    main()
