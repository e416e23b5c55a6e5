"""Attention of packed rows: what each row gets is what it gets alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from transformers.models.qwen3 import modeling_qwen3

from atod_fast import ranks
from atod_fast.batches import Row
from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.models import Compute, skeleton
from atod_fast.policy import attention
from atod_fast.policy import model as models
from atod_fast.policy.learner import Learner
from atod_fast.policy.model import CausalPolicy, HeadJob
from atod_fast.policy.packing import collate
from atod_fast.runtime import Runtime, attention_of
from helpers.gloo import run_ranks
from helpers.tiny import VOCABULARY, random_rows, save_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
KINDS = {
    "few heads of keys": ("qwen3", {"num_key_value_heads": 1}),
    "as many heads of keys": ("llama", {"num_key_value_heads": 4}),
    "a window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "a window in some layers": (
        "gemma3_text",
        {"num_key_value_heads": 2, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "experts": ("qwen3_moe", EXPERTS | {"num_key_value_heads": 2}),
    "values of another width": (
        "minicpm3",
        LATENT | {"num_key_value_heads": 4, "head_dim": None},
    ),
}


def shape(family: str, **options):
    sizes = SIZES | {"num_key_value_heads": 2} | options
    return AutoConfig.for_model(family, **{name: value for name, value in sizes.items() if value is not None})


def made(kind: str, implementation: str, dtype: torch.dtype = torch.float32):
    family, options = KINDS[kind]
    config = shape(family, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval().to(dtype)


def rows_of(lengths, seed: int = 0) -> list[Row]:
    """Rows in which every token but the first is an action."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCABULARY, (n,), generator=draw).int().numpy() for n in lengths]
    return [Row(row, [(1, len(row))], [i], torch.zeros(len(row) - 1).numpy()) for i, row in enumerate(ids)]


def alone(model, rows: list[Row]) -> torch.Tensor:
    """Return the log-probs of the rows' actions, each row in a forward pass of its own."""
    out = []
    for row in rows:
        ids = torch.from_numpy(row.ids)[None].long()
        logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        out.append(logp.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(2, 17), min_size=1, max_size=5), packed=st.booleans())
def test_rows_score_and_teach_as_if_alone(kind, lengths, packed):
    rows = rows_of(lengths)
    plain, policy = made(kind, "sdpa"), CausalPolicy(made(kind, "varlen"))
    assert policy.packs
    weight = torch.linspace(-1, 1, sum(lengths) - len(lengths))
    expected = alone(plain, rows)
    (expected * weight).sum().backward()
    batch = collate(rows, packed=packed)
    found = policy(batch, HeadJob(batch.target, 1.0)).logp
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_outputs_do_not_change_with_its_neighbours_tokens(kind):
    policy = CausalPolicy(made(kind, "varlen"))
    one, other = rows_of((7, 12, 5)), rows_of((7, 12, 5), seed=1)
    other[1] = one[1]
    with torch.no_grad():
        hidden = [policy(collate(rows, packed=True), None).split((6, 11, 4)) for rows in (one, other)]
    # Experts multiply tokens of all rows together, which rounds differently.
    torch.testing.assert_close(hidden[0][1], hidden[1][1], atol=1e-6 if kind == "experts" else 0, rtol=0)
    assert (hidden[0][0] - hidden[1][0]).abs().max() > 1e-3 and (hidden[0][2] - hidden[1][2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_built(kind, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a mask of [T, T]")

    for name in ("sdpa", "eager", "flash_attention_2", "flex_attention"):
        monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, refuse)
    batch = collate(rows_of((7, 12, 5)), packed=True)
    CausalPolicy(made(kind, "varlen"))(batch, None)
    with pytest.raises(AssertionError, match="a mask of"):
        CausalPolicy(made(kind, "sdpa"))(batch, None)


@pytest.mark.parametrize("implementation", ["varlen", "flash_attention_2"])
def test_rows_are_packed_only_if_every_layer_is_told_where_they_begin(implementation, monkeypatch):
    def policy(kind, device="cpu"):
        model = made(kind, "sdpa").to(device)
        model.config._attn_implementation = implementation
        found = CausalPolicy(model)
        assert model.config._attn_implementation == implementation
        return found

    assert all(policy(kind, device).packs for kind in KINDS for device in ("cpu", "meta"))
    monkeypatch.setattr(attention, "reaches", lambda config: [SimpleNamespace(kind="sliding_attention", size=3)] * 2)
    assert not policy("a window").packs
    monkeypatch.undo()
    forward = modeling_qwen3.Qwen3Attention.forward

    def forgets(self, *arguments, **options):
        if self.layer_idx == 1:
            options.pop("cu_seq_lens_q")
        return forward(self, *arguments, **options)

    monkeypatch.setattr(modeling_qwen3.Qwen3Attention, "forward", forgets)
    assert not policy("few heads of keys").packs


def test_the_kernels_get_numbers_of_the_host_and_rows_of_the_batch(monkeypatch):
    told = []
    given_to = attention._row_by_row
    monkeypatch.setattr(attention, "_row_by_row", lambda *given: (told.append(given), given_to(*given))[1])
    batch = collate(rows_of((7, 12, 5)), packed=True)
    CausalPolicy(made("a window in some layers", "varlen"))(batch, None)
    assert [given[3].tolist() for given in told] == [[0, 7, 19, 24]] * 2
    assert [(type(given[4]), given[4]) for given in told] == [(int, 12)] * 2
    assert [given[6] for given in told] == [4, None]


def loops(q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn as it is documented, in plain loops."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert starts is starts_k and starts.dtype == torch.int32 and type(longest) is int and enable_gqa
    out = torch.zeros_like(q)
    left = len(q) if window_size[0] < 0 else window_size[0]
    assert window_size[1] == 0
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert last - first <= longest
        for i in range(first, last):
            seen = range(max(first, i - left), i + 1)
            for head in range(q.shape[1]):
                of = head // (q.shape[1] // k.shape[1])
                weight = (scale * (k[seen, of].float() @ q[i, head].float())).softmax(0)
                out[i, head] = (weight @ v[seen, of].float()).to(q.dtype)
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize(("dim", "width"), [(8, 8), (12, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchs_kernel_is_asked_for_what_the_reference_computes(monkeypatch, window, dim, width, dtype):
    monkeypatch.setattr(attention, "varlen_attn", loops)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(14, h, d, generator=draw).to(dtype) for h, d in ((4, dim), (2, dim), (2, width)))
    starts = torch.tensor([0, 5, 6, 14], dtype=torch.int32)
    found, expected = (
        kernel(q, k, v, starts, 8, 0.7, window) for kernel in (attention._by_flash, attention._row_by_row)
    )
    assert found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1, 2, 3, 3)}, "position_bias"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, "attention_mask"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal=False"),
        ({"key": torch.zeros(1, 2, 4, 8)}, "a cache of keys"),
    ],
)
def test_what_is_not_computed_is_refused(options, what):
    three = torch.zeros(1, 2, 3, 8)
    given = {"query": three, "key": three, "value": three, "attention_mask": None, "dropout": 0.0} | options
    with pytest.raises(UserError, match=f"student.attention='varlen' does not compute {what}"):
        attention.attend(torch.nn.Linear(1, 1), **given)


def test_auto_prefers_varlen_where_it_computes_all_of_the_attention(monkeypatch):
    monkeypatch.setattr("atod_fast.runtime.importlib.util.find_spec", lambda name: name)
    qwen3 = shape("qwen3")
    assert attention_of("auto", CUDA, torch.bfloat16, qwen3) == "varlen"
    assert attention_of("auto", CUDA, torch.float32, qwen3) == "sdpa"
    assert attention_of("auto", CPU, torch.bfloat16, qwen3) == "sdpa"
    assert attention_of("varlen", CPU, torch.float32, qwen3) == "varlen"
    assert attention_of("auto", CUDA, torch.bfloat16, shape("qwen3", head_dim=264)) == "flash_attention_2"
    assert attention_of("auto", CUDA, torch.bfloat16, shape("deepseek_v3", **LATENT)) == "varlen"
    assert attention_of("auto", CUDA, torch.bfloat16, shape("gemma2", sliding_window=4)) == "flash_attention_2"
    assert attention_of("auto", CUDA, torch.bfloat16, shape("mistral", sliding_window=4)) == "varlen"


@pytest.mark.parametrize(
    ("family", "options", "what"),
    [
        ("gemma2", {}, "softcap of scores"),
        ("gpt_oss", {}, "attention sinks"),
        ("falcon", {"alibi": True, "head_dim": None}, "ALiBi"),
        ("llama4_text", {}, "chunked attention"),
        ("stablelm", {}, "layers outside transformers' attention interface"),
        ("qwen3", {"head_dim": 264}, "heads of 264 numbers"),
        ("deepseek_v3", LATENT | {"qk_nope_head_dim": 250}, "heads of 258 numbers"),
    ],
)
def test_varlen_is_refused_for_a_model_that_needs_more(family, options, what):
    with pytest.raises(UserError, match=f"'varlen' does not compute a {family} model's {what}.*; use auto"):
        attention_of("varlen", CPU, torch.float32, shape(family, **options))


def test_what_a_machine_lacks_is_said_and_auto_does_without(monkeypatch):
    monkeypatch.setattr("atod_fast.runtime.importlib.util.find_spec", lambda name: None)

    def without(lacking: str) -> None:
        with pytest.raises(UserError, match=f"student.attention='varlen' needs {lacking}"):
            attention_of("varlen", CUDA, torch.bfloat16, shape("qwen3"))
        assert attention_of("auto", CUDA, torch.bfloat16, shape("qwen3")) == "sdpa"

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_OPTIONS", ("query", "key", "value", "is_causal"))  # of torch 2.10
        without("a newer torch")
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "7.0")
        without("CUDA")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        without("a GPU of compute capability")


def learnt(student: str, teacher: str, *options: str) -> dict:
    """Return what a step of updates of made-up rows gives, as plain numbers."""
    config = load(None, None, [f"student.path={student}", f"teacher.path={teacher}", *options])
    device, mesh = ranks.start()
    trainer = Learner(config, Runtime.of(config, device, mesh=mesh), None)
    minibatches, _ = trainer.partition(random_rows(12), step=1)
    scored = trainer.score_student(minibatches, trainer.score_teacher(minibatches))
    logp = torch.zeros(2, 24)  # of student and teacher, summed over each turn
    trainer.student.train()
    for s in (s for minibatch in scored for s in minibatch):
        logp.index_add_(1, s.batch.turn, torch.stack([s.logp, s.teacher_logp]))
        (trainer.student(s.batch, HeadJob(s.batch.target, 1.0)).logp.sum() * ranks.world_size()).backward()
    gradient = {n: p.grad.full_tensor().tolist() for n, p in trainer.student.named_parameters()}
    return {"packed": trainer.packed, "gradient": gradient, "logp": ranks.total(logp).tolist()}


def test_student_and_teacher_learn_from_packed_rows_as_from_padded_ones(tmp_path):
    """Sharded over two ranks, with recomputed blocks."""
    student = save_model(tmp_path / "student", kv_heads=1)
    teacher = save_model(tmp_path / "teacher", seed=7, hidden=48, tied=False)
    given = (student, teacher, "student.gradient_checkpointing=true")
    packed, padded = (run_ranks(2, learnt, *given, f"student.attention={name}")[0] for name in ("varlen", "sdpa"))
    assert packed["packed"] and not padded["packed"]
    torch.testing.assert_close(torch.tensor(packed["logp"]), torch.tensor(padded["logp"]), atol=1e-4, rtol=1e-5)
    for name, values in padded["gradient"].items():
        torch.testing.assert_close(
            torch.tensor(packed["gradient"][name]), torch.tensor(values), atol=1e-4, rtol=1e-4, msg=name
        )


@pytest.mark.parametrize(("unable", "packed"), [("neither", True), ("student", False), ("teacher", False)])
def test_rows_are_packed_only_if_both_models_can(tmp_path, monkeypatch, unable, packed):
    sizes = {"student": 32, "teacher": 48}
    paths = [f"{role}.path={save_model(tmp_path / role, hidden=hidden)}" for role, hidden in sizes.items()]
    config = load(None, None, [*paths, "student.attention=varlen"])
    monkeypatch.setattr(models, "told_of_rows", lambda model: model.config.hidden_size != sizes.get(unable))
    device, mesh = ranks.start()
    try:
        assert Learner(config, Runtime.of(config, device, mesh=mesh), None).packed == packed
    finally:
        ranks.stop()


def test_a_model_generates_with_sdpa_where_it_learns_with_varlen():
    assert Compute("", torch.float32, "varlen").cached_attention == "sdpa"
    assert Compute("", torch.float32, "eager").cached_attention == "eager"
    assert CausalPolicy(skeleton(shape("qwen3"), attention="varlen")).packs
