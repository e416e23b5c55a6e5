"""A real vLLM engine on a CPU, what it is asked, and what it answers."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from atod_fast import ranks
from atod_fast.config.schema import Rollout
from atod_fast.rollout.engines.protocol import Completion, Engine, Request, Room, Sampling
from atod_fast.rollout.engines.vllm import start
from helpers.tiny import VOCABULARY

STOP, SIZES = 1, {"hidden": 64, "kv_heads": 2, "head_dim": 32}  # a width that vLLM's CPU attention takes


def build(folder: str, dtype: torch.dtype = torch.float32, *, filled: bool = False, **options):
    device, _ = ranks.start()
    rollout = Rollout(engine="vllm", prompt_tokens=128, **options)
    return start.build(folder, dtype, device, Room(concurrency=8, cache_bytes=1 << 22), rollout, filled=filled)


def sampling(temperature: float) -> Sampling:
    valid = torch.ones(VOCABULARY, dtype=torch.bool)
    valid[[0, 5, 60]] = False
    return Sampling(temperature, 12, (STOP,), valid)


def requests(count: int = 6) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(key, rng.integers(6, 60, 40 + key).tolist(), seed=2**62 + key) for key in range(count)]


def answer(engine: Engine, asked: list[Request]) -> dict[int, Completion]:
    """Return completions by key; the second half of the requests is added while the first is being answered."""
    done, late = {}, asked[len(asked) // 2 :]
    for request in asked[: len(asked) // 2]:
        engine.add(request)
    while len(done) < len(asked):
        done |= {c.key: c for c in engine.step()}
        for request in late:
            engine.add(request)
        late = []
    return done


def weights(folder: str) -> list:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [(name, parameter.detach()) for name, parameter in model.named_parameters(remove_duplicate=False)]
