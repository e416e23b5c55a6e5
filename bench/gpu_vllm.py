"""vLLM through the project's own engine on a GPU: the parts `vllm`, `vllm-model-logits` and `vllm-engine` of the lane.

    python bench/gpu_vllm.py --head-dtype fp32       # build, then three times: wake, load, roll out, sleep at level 2
    python bench/gpu_vllm.py --check-engine          # tests/rollout/engines/test_vllm.py's check_engine
    python bench/gpu_vllm.py --dry                   # with vLLM for a CPU, on a tiny model; nothing sleeps there

The models are random: eight layers of Qwen3 1.7B's sizes, logits of a standard deviation at which distributions are
as sharp as a trained model's. The log-prob gap is the mean |difference| between what vLLM says of the tokens it sampled
and what the trainer computes: the backbone in bf16, logits in fp32. With --head-dtype model vLLM's logits are bf16.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from atod_kernels import linear_logprob
from lane import TESTS, Lane, arguments, random_model, seconds
from torch import Tensor
from transformers import PreTrainedModel

from atod_fast import ranks
from atod_fast.config.schema import Rollout
from atod_fast.rollout.engines.protocol import Completion, Engine, Request, Room, Sampling

HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
REAL = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8, **HEADS}
TINY = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
GIB = 2**30
MOST_GAP, LEAST_GAP = 0.15, 1.0  # nats: of the weights sent; of others


Told = dict[int, tuple[list[int], Completion]]  # prompt and completion by key


def generate(engine: Engine, vocabulary: int, count: int, prompt: int, tokens: int) -> Told:
    """Sample `tokens` tokens behind each of `count` random prompts; return prompts and completions by key."""
    draw = np.random.default_rng(0)
    engine.begin(Sampling(1.0, tokens, ()))
    prompts = {key: draw.integers(0, vocabulary, prompt + key % 7).tolist() for key in range(count)}
    for key, ids in prompts.items():
        engine.add(Request(key, ids, seed=key))
    told: Told = {}
    while len(told) < count:
        told |= {done.key: (prompts[done.key], done) for done in engine.step()}
    engine.end()
    return told


@torch.no_grad()
def gap(model: PreTrainedModel, told: Told) -> float:
    """Return the mean |log-prob of the engine - log-prob of the trainer's kind of computation| of sampled tokens."""
    apart: list[Tensor] = []
    weight = model.get_output_embeddings().weight
    for prompt, done in told.values():
        ids = torch.tensor([prompt + done.ids], device=weight.device)
        hidden = model.model(ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        logp = linear_logprob(hidden.contiguous(), weight, ids[0, len(prompt) :]).logp
        apart.append((logp.cpu() - torch.tensor(done.logprobs)).abs())
    return float(torch.cat(apart).mean())


def used(device: torch.device) -> float:
    """Return the bytes in use on the device, by whomever; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return float(total - free)


def roll_out(lane: Lane, head_dtype: str, dry: bool, folder: Path) -> None:
    """Build an engine that sleeps, and three times load other weights, roll out, compare and sleep."""
    from atod_fast.rollout.engines.vllm import start

    device, _ = ranks.start()
    sizes, spread = (TINY, 2.5) if dry else (REAL, 4.3)
    count, prompt, tokens = (6, 20, 12) if dry else (64, 470, 128)
    dtype = torch.float32 if dry else torch.bfloat16
    models = [random_model(sizes, seed, device, dtype, spread) for seed in range(2)]
    models[0].save_pretrained(folder)
    room = Room(concurrency=count, sleeps=not dry, cache_bytes=(1 << 23) if dry else 4 * GIB)
    rollout = Rollout(engine="vllm", prompt_tokens=prompt + 64 + tokens, response_tokens=tokens, head_dtype=head_dtype)
    before, began = used(device), time.perf_counter()
    engine = start.build(str(folder), dtype, device, room, rollout, filled=False)
    lane.measure("vllm: build", time.perf_counter() - began, "s")
    asleep = used(device)
    if not dry:
        lane.measure("vllm: kept asleep", (asleep - before) / GIB, "GiB")
    for turn, number in enumerate((0, 1, 0)):
        name = f"turn {turn + 1}"
        weights = [(name, p.detach()) for name, p in models[number].named_parameters(remove_duplicate=False)]
        took = seconds(device, lambda weights=weights: engine.load_weights(weights))
        awake = used(device)
        began = time.perf_counter()
        told = generate(engine, sizes["vocab_size"], count, prompt, tokens)
        speed = count * tokens / (time.perf_counter() - began)
        right, wrong = (gap(models[which], told) for which in (number, 1 - number))
        engine.sleep()
        torch.cuda.empty_cache()
        slept = used(device)
        if turn == 1:  # what is not the first time
            lane.measure("vllm: load", took, "s")
            lane.measure("vllm: decode", speed, "tokens/s")
            lane.measure(f"vllm: log-prob gap, {head_dtype} logits", right, "nats")
        passed = right < MOST_GAP and wrong > LEAST_GAP
        lane.check(f"{name}: log-probs are of the weights sent", passed, f"gap {right:.4f}, to the others {wrong:.3f}")
        if not dry:
            held = sum(p.numel() for p in models[0].parameters()) * 2 + room.cache_bytes
            if turn == 1:
                lane.measure("vllm: freed by sleep", (awake - slept) / GIB, "GiB")
            detail = f"{(awake - slept) / GIB:.2f} GiB freed, weights and cache are {held / GIB:.2f}"
            lane.check(f"{name}: sleep frees weights and cache", awake - slept > 0.95 * held, detail)


def check_engine(lane: Lane, folder: Path) -> None:
    """Run the tests' check of an engine: masks, seeds, prefixes, failures, missing weights; in fp32."""
    sys.path.insert(0, str(TESTS))
    from helpers.tiny import save_model
    from helpers.vllm_engine import SIZES

    spec = importlib.util.spec_from_file_location("test_vllm", TESTS / "rollout" / "engines" / "test_vllm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ranks.start()
    module.check_engine(*(save_model(folder / str(seed), seed=seed, **SIZES) for seed in range(2)))
    lane.check("check_engine", True, "passed")


def main() -> int:
    args = arguments(
        __doc__,
        head_dtype={"choices": ("fp32", "model"), "default": "fp32"},
        check_engine={"action": "store_true", "help": "the tests' check of an engine instead"},
    )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("flashinfer") is None:  # vLLM would import it
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if importlib.util.find_spec("deep_gemm") is None:
        os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0")
    lane = Lane.of(args)
    with tempfile.TemporaryDirectory() as folder, lane.step("check_engine" if args.check_engine else "roll out"):
        if importlib.util.find_spec("vllm") is None:
            raise ImportError("vLLM is not installed")
        if args.check_engine:
            check_engine(lane, Path(folder))
        else:
            roll_out(lane, args.head_dtype, args.dry, Path(folder))
    status = lane.finish()
    ranks.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
