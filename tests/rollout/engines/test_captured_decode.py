"""Decode steps that are recorded and repeated, against the eager engine. The recorder stands in for CUDA's graphs."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from atod_fast.config.settings import load
from atod_fast.models import Compute, resolve
from atod_fast.rollout.engines.protocol import Completion, Request, Room, Sampling
from atod_fast.rollout.engines.transformers import TransformersKind, captured
from atod_fast.rollout.engines.transformers import engine as engines
from atod_fast.rollout.engines.transformers.captured import CapturedForward
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.engines.transformers.forward import CacheForward
from helpers.tape import Tape

VOCABULARY, STOPS = 53, (1, 2, 3, 4)
SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
COMMON = {"vocab_size": VOCABULARY, "max_position_embeddings": 192, "num_key_value_heads": 2, "dtype": "float32"}


def qwen3(seed: int = 0):
    return sharp(Qwen3ForCausalLM, Qwen3Config(**SIZES, **COMMON, tie_word_embeddings=True), seed)


def gemma3(seed: int = 0):
    """Layers with a sliding window and without."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
    return sharp(Gemma3ForCausalLM, Gemma3TextConfig(**SIZES, **COMMON, **kinds), seed)


def sharp(kind, config, seed: int):
    """A random model in fp64, whose distributions are far from uniform, so that no rounding hides a wrong column."""
    torch.manual_seed(seed)
    model = kind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Graphs of several sizes in short sequences."""
    monkeypatch.setattr(captured, "ROWS", 2)
    monkeypatch.setattr(captured, "COLUMNS", 24)
    monkeypatch.setattr(captured, "LENGTHS", 1000)
    monkeypatch.setattr(captured, "PATIENCE", 4)


def make(model, *, slots: int = 8, record=Tape, **options) -> TransformersEngine:
    return TransformersEngine(
        copy.deepcopy(model), slots=slots, max_model_len=96, device="cpu", record=record, pass_tokens=64, **options
    )


def play(engine: TransformersEngine, trajectories: int = 10, turns: int = 3) -> dict[tuple[int, int], Completion]:
    """Play trajectories of several turns, the first of many more; return the completions by key and turn."""
    rng = np.random.default_rng(0)
    prompts = {key: rng.integers(5, VOCABULARY, int(rng.integers(1, 30))).tolist() for key in range(trajectories)}
    prompts[0] = [7]
    engine.begin(Sampling(1.0, 14, STOPS))
    turn = dict.fromkeys(prompts, 0)
    for key, prompt in prompts.items():
        engine.add(Request(key, prompt, seed=100 * key))
    told = {}
    while turn:
        for done in engine.step():
            key = done.key
            told[key, turn[key]] = done
            turn[key] += 1
            prompts[key] = [*prompts[key], *done.ids, *range(5, 9)]
            if turn[key] == turns * (1 + 3 * (key == 0)) or len(prompts[key]) > 96 - 14:
                engine.release(key)
                del turn[key]
            else:
                engine.add(Request(key, prompts[key], seed=100 * key + turn[key]))
    engine.end()
    return told


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for at in one:
        assert one[at].ids == other[at].ids and one[at].stopped == other[at].stopped, at
        np.testing.assert_allclose(one[at].logprobs, other[at].logprobs, atol=1e-6)


def forward_of(engine: TransformersEngine) -> CapturedForward:
    assert isinstance(engine._forward, CapturedForward)
    return engine._forward


@pytest.mark.parametrize("model", [qwen3, gemma3])
def test_repeated_steps_compute_what_eager_ones_do(model):
    said: list[str] = []
    engine = make(model(), say=said.append)
    expected = play(make(model(), record=None))
    assert_same(play(engine), expected)
    forward = forward_of(engine)
    assert said == [] and forward.replays > 30
    assert len({rows for rows, _ in forward._graphs}) > 1 and len({length for _, length in forward._graphs}) > 1
    before = len(forward._graphs)
    assert_same(play(engine), expected)
    assert len(forward._graphs) == before, "a second rollout needs no further graph"


def test_new_weights_reach_the_recorded_steps():
    first, second = qwen3(0), qwen3(7)
    engine = make(first)
    play(engine)
    replays, graphs = forward_of(engine).replays, dict(forward_of(engine)._graphs)
    engine.load_weights((name, weight.detach()) for name, weight in second.named_parameters(remove_duplicate=False))
    got = play(engine)
    assert_same(got, play(make(second, record=None)))
    assert got[0, 0].logprobs != play(make(first, record=None))[0, 0].logprobs
    kept = forward_of(engine)._graphs
    assert forward_of(engine).replays > replays and all(kept[size] is graph for size, graph in graphs.items())


def test_an_engine_that_slept_records_anew():
    model = qwen3()
    engine = make(model, sleeps=True)
    expected = play(engine)
    engine.sleep()
    assert not forward_of(engine)._graphs and forward_of(engine)._inputs is None
    engine.load_weights((name, weight.detach()) for name, weight in model.named_parameters(remove_duplicate=False))
    assert_same(play(engine), expected)
    assert forward_of(engine)._graphs


def test_an_idle_slot_keeps_its_cache():
    model = qwen3()
    engine, plain = make(model, slots=3), make(model, slots=3, record=None)
    told = []
    for one in (engine, plain):
        one.begin(Sampling(1.0, 20, ()))
        for key in range(3):
            one.add(Request(key, [6 + key] * 5, seed=key))
        one.release(1)
        done = {}
        while len(done) < 2:
            done |= {completion.key: completion for completion in one.step()}
        one.add(Request(2, [*[8] * 5, *done[2].ids, 9, 9], seed=5))  # while slot 0 is idle, slot 2 goes on
        while one._busy or one._waiting:
            done |= {completion.key: completion for completion in one.step()}
        one.add(Request(0, [*[6] * 5, *done[0].ids, 7], seed=6))  # behind what slot 0 has held since
        shared = int(one._cached[one._slot_of[0]])
        while one._busy or one._waiting:
            done |= {completion.key: completion for completion in one.step()}
        assert shared == 24
        told.append(done)
    assert forward_of(engine).replays > 20
    for key in (0, 2):
        assert told[0][key].ids == told[1][key].ids
        np.testing.assert_allclose(told[0][key].logprobs, told[1][key].logprobs, atol=1e-6)


class Stale(Tape):
    """A recorder whose graph does nothing when it is repeated."""

    def __call__(self, work):
        return lambda: None


class Refused(Tape):
    def __call__(self, work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "why"),
    [(Stale, "it computes other log-probs"), (Refused, "RuntimeError: operation not permitted when stream")],
)
def test_a_wrong_or_refused_recording_ends_it_with_one_line(record, why):
    said: list[str] = []
    engine = make(qwen3(), record=record, say=said.append)
    assert_same(play(engine), play(make(qwen3(), record=None)))
    assert len(said) == 1 and said[0].startswith("warning: the rollout engine decodes without CUDA graphs")
    assert why in said[0] and forward_of(engine).replays == 0 and forward_of(engine).patience == 0


def test_a_model_that_reads_on_the_host_is_not_recorded():
    model = qwen3()
    plain = model.model.norm.forward
    said: list[str] = []
    engine = make(model, say=said.append)
    inner = engine._model.model.norm
    inner.forward = lambda x: plain(x) * (2.0 if x.sum().item() > 1e9 else 1.0)
    assert_same(play(engine), play(make(model, record=None)))
    assert len(said) == 1 and "not permitted" in said[0]


def test_a_forward_with_the_model_s_own_cache_is_not_recorded():
    engine = make(qwen3(), forward=CacheForward)
    assert isinstance(engine._forward, CacheForward)
    assert_same(play(engine), play(make(qwen3(), record=None)))


def test_prompts_wait_for_others_only_while_more_rows_decode():
    engine = make(qwen3(), slots=6)
    engine.begin(Sampling(1.0, 14, ()))
    for key in range(5):
        engine.add(Request(key, [7] * 4, seed=key))
    engine.step()
    assert not engine._filling, "nothing decodes yet, so the first prompts do not wait"
    engine.add(Request(9, [8] * 4, seed=9))
    waited = 0
    while engine._waiting or engine._filling or 9 not in engine._slot_of:
        engine.step()
        waited += 1
    assert waited == captured.PATIENCE + 1
    eager = make(qwen3(), slots=6, record=None)
    assert eager._forward.patience == 0


class FakeGraph:
    def __init__(self, log: list) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")


def test_cuda_is_asked_for_a_warm_up_that_must_not_wait_then_for_a_capture_into_one_pool(monkeypatch):
    log: list = []
    mode = [0]

    @contextmanager
    def capture(graph, pool=None, stream=None, capture_error_mode="global"):
        log.append(("capture", pool, capture_error_mode))
        yield

    fakes = {
        "graph_pool_handle": lambda: "pool",
        "CUDAGraph": lambda: FakeGraph(log),
        "graph": capture,
        "current_stream": lambda: "stream",
        "stream": lambda stream: nullcontext(log.append(stream)),
        "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": lambda value: mode.__setitem__(0, value),
    }
    for name, fake in fakes.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, fake)
    record = captured.CudaGraphs()
    for _ in range(2):
        record(lambda: log.append(("work", mode[0])))()
    once = [("work", "error"), "stream", ("capture", "pool", "thread_local"), ("work", 0), "replay"]
    assert log == 2 * once and mode == [0]
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0)
    assert mode == [0]


@pytest.mark.parametrize(
    ("device", "override", "captures"),
    [
        ("cuda", "rollout.enforce_eager=false", True),
        ("cuda", "rollout.enforce_eager=true", False),
        ("cpu", "rollout.enforce_eager=false", False),
    ],
)
def test_enforce_eager_leaves_graphs_out(monkeypatch, device, override, captures):
    given = {}

    def make_engine(model, **options):
        given.update(options)
        return partial(TransformersEngine, record=None)(model, slots=1, max_model_len=64, device="cpu")

    from atod_fast.rollout.engines import transformers as package

    monkeypatch.setattr(package, "TransformersEngine", make_engine)
    monkeypatch.setattr(package, "load_model", lambda path, dtype, attention, device: qwen3().float())
    config = load(None, None, [override])
    compute = Compute(resolve("demo:student"), torch.float32, "sdpa")
    TransformersKind().make(config, compute, torch.device(device), Room(1), filled=True, say=lambda line: None)
    assert (given["record"] is captured.CudaGraphs) == captures and engines.CapturedForward is CapturedForward
