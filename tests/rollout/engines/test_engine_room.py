"""What a rollout engine may hold and whether it sleeps, decided once; the options that reach vLLM; fp32 logits."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config

from atod_fast import dry_run
from atod_fast import run as running
from atod_fast import runtime as runtimes
from atod_fast.cli import parse
from atod_fast.config import Config
from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.models import load_model, skeleton
from atod_fast.plan import memory
from atod_fast.plan.choices import choose
from atod_fast.plan.room import FILLED, room_alone
from atod_fast.plan.shapes import shape_of, whole_shape_of
from atod_fast.policy import attention
from atod_fast.rollout.engines import ENGINES
from atod_fast.rollout.engines.protocol import Request, Room, Sampling
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.engines.transformers.head import compute_logits_in_fp32
from atod_fast.rollout.engines.vllm import limits, start
from atod_fast.runtime import Runtime, slow_engine
from helpers.runs import run
from helpers.tiny import VOCABULARY, save_model

CPU, CUDA, GIB = torch.device("cpu"), torch.device("cuda"), 2**30
COMMON = {"head_dim": 128, "vocab_size": 151936, "num_key_value_heads": 8, "max_position_embeddings": 40960}
SIZES = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}
QWEN = {size: Qwen3Config(**COMMON, **sizes, tie_word_embeddings=True) for size, sizes in SIZES.items()}
STUDENT, TEACHER = QWEN["1.7b"], QWEN["4b"]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(limits, "installed", lambda: "0.32.0")


def room(monkeypatch, *overrides, preset: str = "alfworld-1.7b", gib: float = 79.2, ranks: int = 8, **shapes) -> Room:
    """Return what a preset's engine gets on GPUs of so much memory."""
    monkeypatch.setattr(runtimes, "bytes_of", lambda device: int(gib * GIB))
    config = load(preset, None, overrides)
    shapes = {"student": STUDENT, "teacher": TEACHER} | shapes
    runtime = Runtime.of(config, CUDA, shapes=shapes, ranks=ranks)
    sizes = {role: shape_of(skeleton(shape)) for role, shape in shapes.items()}
    return choose(config, sizes["student"], sizes["teacher"], runtime, recomputes=True, packs=True).room


def test_an_engine_that_fits_beside_the_trainer_does_not_sleep(monkeypatch):
    assert not room(monkeypatch).sleeps
    assert room(monkeypatch, gib=20).sleeps, "on a smaller GPU it does"
    assert room(monkeypatch, "student.gradient_checkpointing=false", "train.microbatch_tokens=32768").sleeps
    assert room(monkeypatch, "rollout.sleep=on").sleeps
    assert not room(monkeypatch, "rollout.sleep=off", gib=20).sleeps


def test_the_decision_is_that_of_the_plan(monkeypatch):
    """Just below the total of the plan's fullest phase the engine sleeps, just above it does not."""
    given = "rollout.kv_cache_gib=4", "student.gradient_checkpointing=true"
    config = load("alfworld-1.7b", None, given)
    awake = room(monkeypatch, *given, gib=1000)
    runtime = Runtime.of(config, CUDA, shapes={"student": STUDENT, "teacher": TEACHER}, ranks=8)
    sizes = [shape_of(skeleton(shape)) for shape in (STUDENT, TEACHER)]
    needed = max(memory.totals(memory.memory(config, *sizes, replace(runtime, room=awake))).values())
    for part, sleeps in ((0.999, True), (1.001, False)):
        found = room(monkeypatch, *given, gib=part * needed / FILLED / GIB)
        assert found == replace(awake, sleeps=sleeps)


def test_a_cache_gets_no_more_than_the_plan_leaves_and_room_for_one_sequence(monkeypatch):
    whole = room(monkeypatch, preset="searchqa-1.7b", gib=1000)
    line = 2 * 28 * 8 * 128 * 2
    assert whole.concurrency == 128 and whole.cache_bytes == (128 * 4608 // 32 + 1) * 32 * line
    short = room(monkeypatch, "rollout.sleep=on", preset="searchqa-1.7b", gib=40)
    assert short.concurrency == 128 and short.cache_bytes < whole.cache_bytes / 2
    least = room(monkeypatch, preset="searchqa-1.7b", gib=1)
    assert least.cache_bytes == (4608 // 32 + 1) * 32 * line
    for gib in (1, 40, 1000):
        given = room(monkeypatch, "rollout.kv_cache_gib=20", preset="searchqa-1.7b", gib=gib)
        assert given.cache_bytes == 20 * GIB
    awake = room(monkeypatch, "rollout.sleep=off", preset="searchqa-1.7b", gib=40)
    assert awake.cache_bytes < short.cache_bytes, "what an engine keeps must fit beside the update too"


def test_an_engine_stays_awake_with_half_the_cache_but_not_with_less(monkeypatch):
    """Sequences that do not fit wait; typical ones are much shorter than the greatest length."""
    found = [room(monkeypatch, preset="searchqa-1.7b", gib=gib) for gib in (79.2, 33, 24, 20)]
    assert [one.sleeps for one in found] == [False, False, True, True]
    asleep = [room(monkeypatch, "rollout.sleep=on", preset="searchqa-1.7b", gib=gib) for gib in (79.2, 33, 24, 20)]
    for one, other in zip(found, asleep, strict=True):
        assert one == other if one.sleeps else other.cache_bytes > one.cache_bytes >= other.cache_bytes / 2


def test_an_evaluation_s_engine_has_the_gpu_to_itself(monkeypatch):
    monkeypatch.setattr(runtimes, "bytes_of", lambda device: 40 * GIB)
    config, model = load("searchqa-1.7b"), shape_of(skeleton(STUDENT))
    runtime = Runtime.of(config, CUDA, shapes={"student": STUDENT}, ranks=8)
    alone = room_alone(config, whole_shape_of(skeleton(STUDENT)), runtime)
    assert not alone.sleeps
    held = memory.totals(memory.engine_memory(config, model, replace(runtime, room=alone), ("rollout",)))
    assert held["rollout"] == pytest.approx(FILLED * 40 * GIB, rel=1e-6)


def test_sleep_needs_a_gpu():
    with pytest.raises(UserError, match="rollout.sleep=on frees memory of a GPU, and there is none here"):
        Runtime.of(parse(["rollout.sleep=on"]).config, CPU)
    assert not Runtime.of(Config(), CPU).room.sleeps


@pytest.mark.parametrize(
    ("preset", "ranks", "overrides", "vllm", "transformers"),
    [
        ("alfworld-1.7b", 8, [], 16, 16),
        ("alfworld-1.7b", 8, ["rollout.engine=vllm", "rollout.tensor_parallel=2"], 32, None),
        ("alfworld-1.7b", 1, [], 128, 64),
        ("searchqa-1.7b", 8, [], 128, 64),
        ("searchqa-1.7b", 8, ["rollout.concurrency=24"], 24, 24),
        (None, 1, [], 64, 64),
        (None, 2, [], 64, 64),
    ],
)
def test_an_engine_plays_its_whole_share_at_once(preset, ranks, overrides, vllm, transformers):
    config = load(preset, None, overrides)
    engines = ranks // config.rollout.tensor_parallel
    found = {name: kind.room(config, None, torch.bfloat16, CUDA, engines).concurrency for name, kind in ENGINES.items()}
    assert found["vllm"] == vllm and transformers in (None, found["transformers"])


def test_a_dry_run_says_what_the_engine_does(monkeypatch, tmp_path):
    STUDENT.save_pretrained(tmp_path)
    own = ["rollout.engine=vllm", f"student.path={tmp_path}", "objective.preset=grpo", "teacher.path="]
    config = load("alfworld-1.7b", None, [*own, "env.name=alfworld", "env.train={generate=9}", "env.eval={generate=9}"])
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": 9})})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "missing", lambda device: None)
    for gib, words in ((79.2, "the engine keeps its memory (within 85%"), (20, "the engine sleeps between rollouts")):
        monkeypatch.setattr(runtimes, "bytes_of", lambda device, gib=gib: int(gib * GIB))
        text = dry_run.describe(config, 8)
        assert "rollouts by vllm, 16 trajectories at a time; " + words in text
        assert "# rollout engine, CUDA graphs" in text and "SLOW" not in text


@pytest.mark.parametrize(
    ("found", "device", "ranks", "overrides", "warns"),
    [
        (None, CUDA, 8, [], True),
        ("0.31.0", CUDA, 2, [], True),
        ("0.32.0", CUDA, 8, [], False),
        (None, CUDA, 1, [], False),
        (None, CPU, 8, [], False),
        (None, CUDA, 8, ["rollout.engine=transformers"], False),
    ],
)
def test_several_gpus_without_vllm_are_warned_of(monkeypatch, found, device, ranks, overrides, warns):
    monkeypatch.setattr(limits, "installed", lambda: found)
    config = load(None, None, overrides)
    lines = slow_engine(config, Runtime.of(config, device, ranks=ranks))
    assert len(lines) == warns
    if warns:
        assert "ROLLOUTS WILL BE SLOW" in lines[0] and "pip install 'vllm==0.32.*'" in lines[0]


def test_a_run_begins_with_the_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(running, "slow_engine", lambda config, runtime: ["ROLLOUTS WILL BE SLOW"])
    run(tmp_path / "run", "train.steps=1", "eval.teacher=false", "eval.tasks=2")
    assert "warning: ROLLOUTS WILL BE SLOW" in capfd.readouterr().out


def test_the_warning_stands_in_a_dry_run(monkeypatch):
    monkeypatch.setattr(limits, "installed", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "missing", lambda device: None)
    monkeypatch.setattr(runtimes, "bytes_of", lambda device: 80 * GIB)
    assert "# ROLLOUTS WILL BE SLOW" in dry_run.describe(load(), 2)
    assert "SLOW" not in dry_run.describe(load(), 1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.async_scheduling=off", "rollout.async_scheduling=off is for vLLM; set rollout.engine=vllm"),
        ("rollout.sleep=maybe", 'rollout.sleep = "maybe": expected auto | on | off'),
        ("rollout.head_dtype=bf16", 'rollout.head_dtype = "bf16": expected fp32 | model'),
        ("rollout.concurrency=-1", "rollout.concurrency = -1: expected int >= 0"),
    ],
)
def test_settings_that_an_engine_cannot_have_are_refused(override, words):
    with pytest.raises(UserError) as error:
        load(None, None, [override])
    assert words in str(error.value)


def options(device: torch.device, *overrides: str, sleeps: bool = False) -> dict:
    rollout = load(None, None, ["rollout.engine=vllm", *overrides]).rollout
    given = Room(12, sleeps, 1 << 20)
    return start.engine_options("demo:student", torch.bfloat16, device, given, rollout, filled=False, rank=3)


def test_vllm_is_given_the_settings():
    cuda = options(CUDA)
    assert cuda["hf_overrides"] == {"head_dtype": "float32"} and cuda["async_scheduling"] is None
    assert (cuda["enforce_eager"], cuda["enable_sleep_mode"], cuda["enable_chunked_prefill"]) == (False, False, True)
    assert (cuda["max_num_seqs"], cuda["kv_cache_memory_bytes"], cuda["max_num_batched_tokens"]) == (12, 1 << 20, 16384)
    assert cuda["seed"] == 3 and options(CUDA, "rollout.tensor_parallel=2")["seed"] == 1
    assert options(CUDA, sleeps=True)["enable_sleep_mode"]
    assert options(CUDA, "rollout.enforce_eager=true")["enforce_eager"] and options(CPU)["enforce_eager"]
    assert options(CUDA, "rollout.head_dtype=model")["hf_overrides"] == {"head_dtype": "model"}
    for word, value in (("on", True), ("off", False)):
        assert options(CUDA, f"rollout.async_scheduling={word}")["async_scheduling"] is value


def test_fp32_on_cuda_is_not_rounded_to_tf32():
    name = "TRITON_F32_DEFAULT"
    assert start.environment(torch.float32, CUDA)[name] == "ieee"
    assert name not in start.environment(torch.bfloat16, CUDA) | start.environment(torch.float32, CPU)


# --- the transformers engine


def played(model, **more) -> list:
    engine = TransformersEngine(model, slots=4, max_model_len=64, device="cpu", **more)
    engine.begin(Sampling(0.7, 8, (1,)))
    for key in range(4):
        engine.add(Request(key, [6 + key, 9, 30, 12], seed=key))
    done: list = []
    while len(done) < 4:
        done += engine.step()
    return sorted(done, key=lambda completion: completion.key)


def test_a_head_in_fp32_is_left_as_it_is(tmp_path):
    folder = save_model(tmp_path / "model")
    plain, exact = (load_model(folder, torch.float32) for _ in range(2))
    compute_logits_in_fp32(exact)
    assert played(plain) == played(exact), "bit for bit"


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_logits_bring_bf16_log_probs_closer(tmp_path, tied):
    """The reference is the bf16 model whose head alone is computed in fp64."""
    folder, gaps = save_model(tmp_path / "model", tied=tied), {}
    reference = load_model(folder, torch.bfloat16)
    reference.lm_head.weight.data *= 8
    for kind in ("model", "fp32"):
        model = load_model(folder, torch.bfloat16)
        model.lm_head.weight.data *= 8
        if kind == "fp32":
            compute_logits_in_fp32(model)
        apart = []
        for done in played(model):
            ids = torch.tensor([[6 + done.key, 9, 30, 12, *done.ids]])
            with torch.no_grad():
                hidden = reference.model(ids).last_hidden_state[0, 3:-1]
            logits = hidden.double() @ reference.lm_head.weight.double().T / 0.7
            plain = logits.log_softmax(-1).gather(1, torch.tensor(done.ids)[:, None])[:, 0]
            apart += (plain - torch.tensor(done.logprobs).double()).abs().tolist()
        gaps[kind] = sum(apart) / len(apart)
    print(gaps)
    assert gaps["fp32"] < gaps["model"] / 2


def test_fp32_logits_of_a_wide_head_with_a_bias_are_those_of_one_product():
    """The weight is taken in parts where a product cannot accumulate into fp32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 2 * 8192 + 5, bias=True).bfloat16()
    hidden = torch.randn(2, 3, 16).bfloat16()
    compute_logits_in_fp32(SimpleNamespace(get_output_embeddings=lambda: head))
    exact = torch.nn.functional.linear(hidden.double(), head.weight.double(), head.bias.double())
    found = head(hidden)
    assert found.dtype == torch.float32 and torch.allclose(found.double(), exact, atol=1e-5)


def test_a_head_goes_with_its_model(tmp_path):
    model = load_model(save_model(tmp_path / "model"), torch.bfloat16)
    compute_logits_in_fp32(model)
    head = weakref.ref(model.lm_head)
    gc.disable()
    try:
        del model
        assert head() is None, "no cycle keeps it until the next collection"
    finally:
        gc.enable()


def test_the_engine_computes_logits_as_configured(tmp_path):
    folder = save_model(tmp_path / "model")
    for name, dtype in (("fp32", torch.float32), ("model", torch.bfloat16)):
        settings = f"rollout.head_dtype={name}", "student.compute_dtype=bf16", f"student.path={folder}"
        config = load(None, None, [*settings, f"teacher.path={folder}", "rollout.prompt_tokens=64"])
        runtime = Runtime.of(config, CPU)
        made = ENGINES["transformers"].make(config, runtime.student, CPU, runtime.room, filled=True, say=print)
        hidden = torch.zeros(1, 32, dtype=torch.bfloat16)
        assert made._model.get_output_embeddings()(hidden).dtype == dtype
        assert made._model.get_output_embeddings().weight.shape[0] == VOCABULARY


def test_an_engine_that_keeps_its_memory_keeps_its_cache(tmp_path):
    folder, freed = save_model(tmp_path / "model"), []
    for sleeps in (True, False):
        model = load_model(folder, torch.float32)
        engine = TransformersEngine(model, slots=2, max_model_len=64, device="cpu", sleeps=sleeps)
        engine._forward.free = lambda sleeps=sleeps: freed.append(sleeps)
        engine.sleep()
        with pytest.raises(RuntimeError, match="load_weights first"):
            engine.begin(Sampling(1.0, 4, (1,)))
    assert freed == [True]
