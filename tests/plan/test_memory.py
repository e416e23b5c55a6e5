"""Sizes from config.json alone, and formulas of memory that agree with what models really hold."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from atod_fast.cli import parse
from atod_fast.config.settings import load
from atod_fast.models import load_config, skeleton
from atod_fast.plan import memory, shapes, tokens
from atod_fast.rollout.engines.vllm.limits import BLOCK
from atod_fast.runtime import Runtime
from helpers.planned import SMALL, qwen3, tiny_models

CPU = torch.device("cpu")
GIB = 2**30


PUBLISHED = {  # total parameters of the published checkpoints
    596_049_920: qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    4_022_468_096: qwen3(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    30_532_122_624: Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
    ),
}


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    return tiny_models(tmp_path)


def shape_of(config) -> shapes.Shape:
    return shapes.shape_of(skeleton(config))


def held(config, phase: str, ranks: int = 1, device=CPU) -> dict[str, float]:
    shapes = [model.path and shape_of(load_config(model.path)) for model in (config.student, config.teacher)]
    return {
        item.name: item.size
        for item in memory.memory(config, *shapes, Runtime.of(config, device, ranks=ranks))
        if phase in item.phases
    }


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoints(parameters):
    shape = shape_of(PUBLISHED[parameters])
    assert shape.parameters == parameters
    assert shape.root + shape.layers * shape.block == parameters


def saved_bytes(model, tokens: int) -> int:
    """What the backbone's forward pass keeps for the backward pass, each storage once, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model(
            input_ids=torch.zeros(1, tokens, dtype=torch.int64),
            position_ids=torch.arange(tokens)[None],
            use_cache=False,
        ).last_hidden_state
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [Qwen3Config, LlamaConfig])
def test_activations_are_what_a_forward_pass_keeps(dtype, family):
    config, tokens = family(**SMALL), 64
    shape = shape_of(config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    ratio = saved_bytes(model, tokens) / (tokens * shapes.activations(shape, dtype.itemsize, False))
    # Llama has no query and key norms: the formula is an upper bound for it.
    assert 0.97 < ratio < 1.03 if family is Qwen3Config else 0.6 < ratio < 1.0

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept = shapes.activations(shape, dtype.itemsize, True) - shapes.block_activations(shape, dtype.itemsize)
    assert saved_bytes(model, tokens) / (tokens * kept) == pytest.approx(1, abs=0.03)


def test_cache_bytes_are_those_of_a_real_cache():
    config, tokens = qwen3(**SMALL), 10
    model = AutoModelForCausalLM.from_config(config)
    cache = model(torch.zeros(1, tokens, dtype=torch.int64), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert tokens * shapes.cache_line(shape_of(config), 4) == real


def test_training_state_is_sixteen_bytes_a_parameter_over_the_ranks(tiny):
    config = parse(tiny).config
    parameters = shape_of(load_config(config.student.path)).parameters
    for ranks in (1, 2, 8):
        update = held(config, "update", ranks)
        assert sum(
            update[f"student, {name}"] for name in ("fp32 masters", "AdamW moments", "gradients")
        ) == pytest.approx(16 * parameters / ranks)


def test_checkpointing_and_offload_save_what_they_promise(tiny):
    base, config = (
        held(parse([*tiny, *more]).config, "update")
        for more in ([], ["student.gradient_checkpointing=true", "teacher.offload=true"])
    )
    assert config["activations"] < base["activations"]
    assert "teacher, shard" in base and "teacher, shard" not in config


def test_an_engine_holds_on_cuda_only_what_it_cannot_give_back_between_rollouts(tiny):
    cuda = torch.device("cuda")
    names = {"rollout engine, weights", "rollout engine, KV cache"}
    for kind, kept in (("vllm", set()), ("transformers", {"rollout engine, weights"})):
        config = parse([*tiny, f"rollout.engine={kind}", "student.compute_dtype=bf16"]).config
        assert names <= held(config, "rollout", device=cuda).keys()
        assert names & held(config, "update", device=cuda).keys() == kept
        assert names <= held(config, "update", device=CPU).keys()


def test_ranks_that_are_one_engine_share_its_memory(tiny):
    one, two = (
        held(parse([*tiny, "rollout.engine=vllm", f"rollout.tensor_parallel={n}"]).config, "rollout", ranks=2)
        for n in (1, 2)
    )
    for name in ("rollout engine, weights", "rollout engine, KV cache"):
        assert one[name] == 2 * two[name] > 0
    bounded = held(parse([*tiny, "rollout.engine=vllm", "rollout.kv_cache_gib=1.5"]).config, "rollout")
    assert bounded["rollout engine, KV cache"] == 1.5 * GIB


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_vllm_cache_is_planned_as_it_is_asked_for(tiny, together):
    """In whole blocks and one to spare; key/value heads that cannot be split further are held by more than one rank."""
    config, model = parse([*tiny, "rollout.engine=vllm", f"rollout.tensor_parallel={together}"]).config, qwen3(**SMALL)
    runtime = Runtime.of(config, CPU, ranks=together)
    asked, at_once = runtime.room.cache_bytes, runtime.room.concurrency
    line = shapes.cache_line(shape_of(model), 4) / min(together, model.num_key_value_heads)
    least = at_once * config.rollout.longest * line
    assert least < asked <= least + (at_once + 1) * BLOCK * line


@pytest.mark.parametrize(
    ("overrides", "scoring", "updating"),
    [
        (["objective.preset=paper"], False, False),
        (["objective.preset=exact"], True, True),
        (["turns.disagreement=exact"], True, False),
    ],
)
def test_teacher_hidden_states_are_kept_where_its_whole_distribution_is_needed(tiny, overrides, scoring, updating):
    config = parse([*tiny, *overrides]).config
    name = "teacher, final hidden states"
    assert (name in held(config, "score"), name in held(config, "update")) == (scoring, updating)
    if scoring:
        assert held(config, "score", 2)[name] == tokens.step_bounds(config).action_tokens / 2 * 96 * 4


def test_half_precision_halves_what_is_computed_in_it(tiny):
    fp32, bf16 = (held(parse([*tiny, f"teacher.compute_dtype={name}"]).config, "score") for name in ("fp32", "bf16"))
    assert bf16["teacher, shard"] == fp32["teacher, shard"] / 2
    assert bf16["student, fp32 masters"] == fp32["student, fp32 masters"]


def test_whole_rows_of_logits_are_kept_where_they_are_needed_twice(tiny):
    """A mixture looks at both models' twice; the update at what its divergence reads, unless the head is lean."""

    def logits(phase, *overrides):
        return held(parse([*tiny, *overrides]).config, phase)["head, logit tiles"]

    k1, kl, jsd = (f"objective.divergence={name}" for name in ("k1", "reverse_kl", "jsd"))
    assert logits("score", jsd) > logits("score", kl) == logits("score", k1)
    assert (
        logits("update", jsd)
        == logits("update", kl)
        > logits("update", k1)
        > logits("update", jsd, "student.head=lean")
    )


def test_tokens_of_a_step_are_bounds():
    window = load("alfworld-1.7b")
    step = tokens.step_bounds(window)
    assert (step.trajectories, step.turns, step.rows) == (128, 6400, 6400)
    assert (step.tokens, step.action_tokens, step.updates) == (6400 * 2560, 6400 * 512, 25)
    full = load(
        "alfworld-1.7b",
        None,
        ["rollout.context=full", "rollout.prompt_tokens=9000", "train.minibatch_rows=0", "train.epochs=2"],
    )
    step = tokens.step_bounds(full)
    assert (step.rows, step.tokens, step.action_tokens, step.updates) == (128, 128 * 9000, 128 * 9000, 2)
