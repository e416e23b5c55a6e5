"""The built-in engine's decode steps, eager and from CUDA graphs: the part `decode` of `gpu_lane.py`.

    python bench/gpu_decode.py
    python bench/gpu_decode.py --dry     # a recorder of tensor operations stands in for CUDA graphs

A random model of Qwen3 1.7B's sizes and 64 slots. `in step`: 64 rows that all decode the same number of tokens.
`turns`: trajectories of three turns whose responses end at random, so that prompts join all the time. Log-probs are
compared with plain forward passes, also after the engine was sent other weights, on which its graphs were not made.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from gpu_vllm import HEADS, gap
from lane import TESTS, Lane, arguments, random_model, seconds

from atod_fast.rollout.engines.protocol import Completion, Request, Sampling
from atod_fast.rollout.engines.transformers import captured
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.engines.transformers.forward import SlotForward
from atod_fast.rollout.engines.transformers.head import compute_logits_in_fp32

REAL = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, **HEADS}
TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
MOST_GAP, LEAST_GAP = 0.15, 1.0  # nats: of the weights sent; of others


def play(
    engine: TransformersEngine, vocabulary: int, prompt: int, tokens: int, turns: int, stops: tuple[int, ...]
) -> list[tuple[list[int], Completion]]:
    """Play a trajectory of some turns in every slot; return prompts and completions."""
    draw = np.random.default_rng(0)
    engine.begin(Sampling(1.0, tokens, stops))
    prompts = {key: draw.integers(0, vocabulary, prompt).tolist() for key in range(engine.concurrency)}
    left = dict.fromkeys(prompts, turns)
    for key, ids in prompts.items():
        engine.add(Request(key, ids, seed=key))
    told = []
    while left:
        for done in engine.step():
            told.append((prompts[done.key], done))
            left[done.key] -= 1
            if not left[done.key]:
                engine.release(done.key)
                del left[done.key]
                continue
            observed = draw.integers(0, vocabulary, prompt // 4).tolist()
            prompts[done.key] = [*prompts[done.key], *done.ids, *observed]
            engine.add(Request(done.key, prompts[done.key], seed=done.key + 1000 * left[done.key]))
    engine.end()
    return told


def speed(lane: Lane, engine: TransformersEngine, name: str, *workload) -> list[tuple[list[int], Completion]]:
    """Measure tokens a second of a second rollout, whose graphs are made; return what it sampled."""
    told: list[tuple[list[int], Completion]] = []
    first = seconds(lane.device, lambda: told.extend(play(engine, *workload)))
    told.clear()
    second = seconds(lane.device, lambda: told.extend(play(engine, *workload)))
    lane.measure(f"decode: {name}", sum(len(done.ids) for _, done in told) / second, "tokens/s")
    print(f"        first rollout {first:.2f} s, second {second:.2f} s", flush=True)
    return told


def main() -> int:
    args = arguments(__doc__)
    lane = Lane.of(args)
    record = captured.CudaGraphs
    if args.dry:
        sys.path.insert(0, str(TESTS))
        from helpers.tape import Tape as record
    sizes, slots, prompt, tokens = (TINY, 6, 40, 16) if args.dry else (REAL, 64, 470, 64)
    vocabulary = sizes["vocab_size"]
    # A response ends after about as many tokens as it may have.
    stops = tuple(range(0, vocabulary, tokens))
    workloads = {"in step": (vocabulary, prompt, tokens, 1, ()), "turns": (vocabulary, prompt, tokens, 3, stops)}
    longest = prompt + 3 * tokens + 2 * (prompt // 4) + 2
    with lane.step("decode"), torch.inference_mode():
        model = random_model(sizes, 0, lane.device, torch.bfloat16, 2.5 if args.dry else 4.3)
        compute_logits_in_fp32(model)
        said: list[str] = []

        def make(**options) -> TransformersEngine:
            model.set_attn_implementation("sdpa")
            shape = {"slots": slots, "max_model_len": longest, "device": lane.device}
            return TransformersEngine(model, forward=SlotForward, say=said.append, **shape, **options)

        engine = make()
        for name in workloads:
            speed(lane, engine, f"{name}, eager", *workloads[name])
        engine._forward.free()
        engine = make(record=record)
        for name in workloads:
            speed(lane, engine, f"{name}, captured", *workloads[name])
        forward = engine._forward
        assert isinstance(forward, captured.CapturedForward)
        lane.check("decode steps are captured", not said and forward.replays > 0, said[0] if said else "no warning")
        count = len(forward._graphs)
        lane.measure("decode: graphs", count, "graphs")
        old = [(name, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
        for name, weights in (
            ("the first weights", old),
            ("other weights", [(name, p.flip(0)) for name, p in old]),
        ):
            engine.load_weights(weights)
            replays = forward.replays
            told = play(engine, *workloads["in step"])
            replays = forward.replays - replays
            model.set_attn_implementation("sdpa")
            sample = dict(enumerate(told[:: max(1, slots // 16)]))
            right = gap(model, sample)
            engine.load_weights(old if weights is not old else [(name, p.flip(0)) for name, p in old])
            wrong = gap(model, sample)
            model.set_attn_implementation("atod_slots")
            passed = right < MOST_GAP and wrong > LEAST_GAP and replays > 0
            detail = f"gap {right:.4f}, to weights not sent {wrong:.3f}, {replays} steps replayed"
            lane.check(f"replayed log-probs are of {name}", passed, detail)
        lane.check("a sync needs no further graph", len(forward._graphs) == count, f"{count} graphs")
        engine._forward.free()
        engine.begin(Sampling(1.0, tokens, ()))
        engine.add(Request(0, [1] * prompt, seed=0))
        engine.step()
        eager = seconds(lane.device, lambda: engine.step())  # makes a graph
        lane.measure("decode: capture", eager, "s")
        engine.end()
    return lane.finish()


if __name__ == "__main__":
    sys.exit(main())
