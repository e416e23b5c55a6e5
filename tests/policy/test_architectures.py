"""Families of models: trained, taught by and rolled out as transformers computes them, or refused in a line."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import architectures
import pytest
import torch
from architectures import FAMILIES, make
from atod_kernels import naive
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from atod_fast import preflight, train
from atod_fast.config.settings import check_model, load
from atod_fast.errors import UserError
from atod_fast.models import DEMO_WEIGHTS, Reach, as_saved, load_model, one_as_saved, skeleton
from atod_fast.plan.shapes import shape_of
from atod_fast.policy.layout import Logits, find_layout, find_logits
from atod_fast.policy.model import CausalPolicy, Comparison, Head, HeadJob, TeacherHead
from atod_fast.policy.packing import collate
from atod_fast.rollout.engines import make_engine
from atod_fast.rollout.engines.transformers import forward, tryout
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.engines.transformers.forward import AnewForward, CacheForward, SlotForward
from atod_fast.rollout.engines.vllm.limits import check_experts
from atod_fast.runtime import Runtime, attention_of
from helpers.paths import ROOT

NAMES = {family.name: family for family in FAMILIES}
CPU = torch.device("cpu")
SOME = (
    "Cohere (Command R)",
    "Gemma 2",
    "Gemma 3, text",
    "Gemma 3, with images",
    "GPT-NeoX (Pythia)",
    "gpt-oss",
    "Granite",
    "Jamba",
    "LFM2",
    "Llama 4, text",
    "Mistral, sliding window",
    "Nemotron",
    "Qwen3 MoE",
    "Qwen3-Next",
    "RecurrentGemma",
    "StableLM",
)


@pytest.mark.parametrize("name", SOME)
def test_a_family_is_as_the_documents_say(name):
    """Log-probs, gradients, streamed weights, exports and rollouts equal transformers' own: see
    bench/architectures.py."""
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    assert architectures.row(NAMES[name]) in lines


def test_no_row_of_the_documents_is_a_fault_and_none_is_missing():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert "FAILS" not in text
    assert [line.split(" | ")[0] for line in text.splitlines() if " | `" in line] == [f"| {name}" for name in NAMES]


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("Granite", "Cohere (Command R)"), ("Cohere (Command R)", "Gemma 2"), ("Gemma 2", "HyperCLOVA X")],
)
def test_the_exact_divergence_is_that_of_the_models_own_logits(student, teacher, divergence):
    """Each model has its own scale and softcap; at a temperature."""
    models = [make(NAMES[name]) for name in (student, teacher)]
    rows = architectures.batch_rows()
    batch = collate(rows, packed=False)
    with torch.no_grad():
        logits = [torch.cat([model(torch.tensor([row.ids])).logits[0, :-1] for row in rows]) for model in models]
        policy, other = map(CausalPolicy, models)
        head = other.parts.head
        whole = TeacherHead(head.weight, softcap=head.softcap, scale=head.scale)
        comparison = Comparison(other(batch, None), whole, divergence, alpha=0.3)
        found = policy(batch, HeadJob(batch.target, 0.7, teacher=comparison))
    eye = torch.eye(architectures.VOCABULARY)
    operands = logits[0], eye, logits[1], eye, batch.target
    expected = naive.linear_divergence(*operands, divergence=divergence, alpha=0.3, temperature=0.7)
    assert (policy.parts.head.scale, head.scale) != (1, 1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


def test_a_softcap_goes_over_scaled_logits():
    linear = torch.nn.Linear(4, 9)
    hidden, target = 3 * torch.randn(5, 4), torch.arange(5)
    head = Head(linear, Logits(scale=0.3, softcap=2.0))
    expected = (2 * torch.tanh(0.3 * linear(hidden) / 2) / 0.6).log_softmax(-1)
    torch.testing.assert_close(head(hidden, HeadJob(target, 0.6)).logp, expected.gather(1, target[:, None])[:, 0])


def mistral(**options) -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = MistralForCausalLM(
        MistralConfig(vocab_size=53, max_position_embeddings=256, dtype="float32", **sizes | options)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def chosen(model, length: int = 200) -> type:
    return type(TransformersEngine(model, slots=2, max_model_len=length, device="cpu")._forward)


@pytest.mark.parametrize("window", [8, 100])
def test_an_attention_that_forgets_a_window_is_found_out_and_the_models_own_cache_takes_its_place(monkeypatch, window):
    """Also where the window is longer than the try-out."""
    assert chosen(mistral(sliding_window=window)) is SlotForward
    monkeypatch.setattr(forward, "reaches", lambda config: [Reach("full_attention")] * 2)
    model = mistral(sliding_window=window)
    engine = TransformersEngine(model, slots=2, max_model_len=200, device="cpu")
    assert (
        type(engine._forward) is CacheForward
        and "mistral model generates with transformers' own cache" in engine.slower
    )
    assert model.config.sliding_window == window and model.config._attn_implementation == "sdpa"
    assert {layer.self_attn.config.sliding_window for layer in model.model.layers} == {window}


def test_a_window_that_no_sequence_reaches_is_not_tried(monkeypatch):
    monkeypatch.setattr(forward, "reaches", lambda config: [Reach("full_attention")] * 2)
    assert chosen(mistral(sliding_window=200)) is SlotForward


@pytest.mark.parametrize("length", [2, 3, 5, 12, 40])
def test_the_try_out_fits_any_length(length):
    assert chosen(mistral(sliding_window=4), length) is SlotForward


def test_a_model_that_nothing_runs_is_refused_with_the_reason_and_the_remedy(monkeypatch):
    monkeypatch.setattr(tryout, "FORWARDS", (SlotForward,))
    with pytest.raises(
        UserError,
        match=(
            r"^rollout.engine=transformers cannot run a mamba model \(.+\); use another model, or rollout.engine=vllm$"
        ),
    ):
        chosen(make(NAMES["Mamba"]), 64)
    torch.manual_seed(0)
    bert = BertLMHeadModel(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            is_decoder=False,
        )
    )
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(UserError, match="bert model .its log-probs differ from those of a plain forward pass"):
        chosen(bert.eval(), 40)


def test_what_the_trainer_cannot_take_apart_is_refused_with_its_type_and_what_is_missing():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **sizes))
    gemma = make(NAMES["Gemma 3, with images"])
    for model, reason in ((bart, "'bart' has an encoder"), (gemma, "'gemma3' holds its text decoder inside")):
        with pytest.raises(UserError, match=f"{reason}.*; use another model$"):
            CausalPolicy(model)
    with pytest.raises(UserError, match="'gemma3' holds its text decoder inside"):  # a dry run, without weights
        shape_of(skeleton(gemma.config))
    granite = make(NAMES["Granite"])
    granite.config.logits_scaling, forward_as = 1.0, granite.forward
    granite.forward = lambda **inputs: forward_as(**inputs).__class__(logits=forward_as(**inputs).logits * 3)
    with pytest.raises(UserError, match="'granite' makes its logits by more than"):
        CausalPolicy(granite)


def test_sdpa_does_not_drop_a_softcap_of_scores_silently():
    configs = {name: make(NAMES[name]).config for name in ("Gemma 2", "Qwen3", "gpt-oss", "BLOOM")}
    found = {name: attention_of("auto", CPU, torch.float32, config) for name, config in configs.items()}
    assert found == {"Gemma 2": "eager", "Qwen3": "sdpa", "gpt-oss": "eager", "BLOOM": "eager"}
    with pytest.raises(UserError, match="student.attention='sdpa' leaves out the softcap of a gemma2 model"):
        attention_of("sdpa", CPU, torch.float32, configs["Gemma 2"])


def test_flash_attention_is_taken_where_it_computes_all_of_the_attention(monkeypatch):
    monkeypatch.setattr("atod_fast.runtime.importlib.util.find_spec", lambda name: name)
    names = ("Gemma 2", "Falcon", "Falcon, ALiBi", "gpt-oss", "Qwen3")
    found = [attention_of("auto", torch.device("cuda"), torch.bfloat16, make(NAMES[name]).config) for name in names]
    assert found == ["flash_attention_2", "flash_attention_2", "sdpa", "eager", "varlen"]


@pytest.mark.parametrize("name", ["Mamba", "Mamba 2", "Falcon Mamba", "MiniMax"])
def test_students_and_teachers_compute_in_bf16(tmp_path, name):
    """Their residual stream, or some buffers, are fp32."""
    path = str(tmp_path / "model")
    make(NAMES[name]).save_pretrained(path)
    load_fp32 = lambda: load_model(path, torch.float32, "eager").eval()  # noqa: E731
    architectures.teach(path, load_fp32)
    architectures.learn(path, load_fp32)


@pytest.mark.parametrize("scale", [1.02, 1.0, 3.0])
def test_a_scale_near_one_is_found_in_16_bits(scale):
    model = make(NAMES["Granite"])
    model.config.logits_scaling = model.logits_scaling = scale
    model.to(torch.bfloat16)
    assert find_logits(model, find_layout(model)) == Logits(1 / scale)


def test_the_attentions_temperature_is_tried_where_a_sequence_outgrows_its_first_step():
    def llama(**options):
        return make(replace(NAMES["Llama 4, text"], options=NAMES["Llama 4, text"].options | options))

    assert chosen(llama(floor_scale=50, attn_scale=1.0), 120) is CacheForward
    assert chosen(llama(floor_scale=8192, attn_scale=1.0), 120) is SlotForward


def test_windows_are_narrowed_in_modules_and_configuration_alike():
    model = make(NAMES["Gemma 2"])
    layers = [layer.self_attn for layer in model.model.layers if layer.self_attn.sliding_window]
    with tryout._narrowed(model, 100):
        assert {layer.sliding_window for layer in layers} == {model.config.sliding_window} == {tryout.WINDOW}
    assert {layer.sliding_window for layer in layers} == {model.config.sliding_window} == {8}


def test_an_attention_that_forgets_a_window_is_found_out_in_16_bits_too(monkeypatch):
    monkeypatch.setattr(forward, "reaches", lambda config: [Reach("full_attention")] * 2)
    assert chosen(mistral(sliding_window=8).to(torch.bfloat16)) is CacheForward


def test_a_cache_that_keeps_a_token_of_another_prompt_is_found_out(monkeypatch):
    monkeypatch.setattr(tryout, "FORWARDS", (SlotForward,))
    monkeypatch.setattr(SlotForward, "kept", lambda self, cached, shared: min(cached, shared + 1))
    with pytest.raises(UserError, match="its log-probs differ"):
        chosen(mistral())


def test_a_layer_that_does_not_attend_in_slots_is_found_out():
    model = mistral()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **inputs: (hidden_states, None)
    model.config._attn_implementation = "eager"
    assert chosen(model) is not SlotForward


def test_a_model_that_cannot_run_is_refused_with_the_reason():
    model = mistral()
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, 5))
    with pytest.raises(UserError, match=r"cannot run a mistral model \(RuntimeError: .*; use another model"):
        chosen(model)


@pytest.mark.parametrize(("context", "most"), [("full", 64), ("window", 36)])
def test_longrope_beyond_the_original_positions_is_refused(context, most):
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    config = make(
        replace(
            NAMES["Phi-3, sliding window"], options={"rope_parameters": rope, "original_max_position_embeddings": 64}
        )
    ).config
    for facts in (config.to_dict(), {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64}):
        for tokens in (most, most + 1):
            asked = [f"rollout.context={context}", f"rollout.prompt_tokens={tokens}", "rollout.response_tokens=28"]
            if tokens == most:
                check_model(load(None, None, asked), "m", facts)
                continue
            with pytest.raises(
                UserError, match=f"rollout.prompt_tokens = {tokens}: .* of model 'm'.*to at most {most}$"
            ):
                check_model(load(None, None, asked), "m", facts)


@pytest.mark.parametrize(
    ("name", "buffer"), [("LFM2 MoE", "expert_bias"), ("DeepSeek V3", "e_score_correction_bias"), ("Qwen3", "")]
)
def test_vllm_is_not_sent_buffers_so_their_students_are_refused(name, buffer):
    model = make(NAMES[name])
    config = load(
        None,
        None,
        ["student.compute_dtype=fp32", "rollout.engine=vllm", "rollout.prompt_tokens=64", "rollout.response_tokens=8"],
    )
    with (
        pytest.raises(UserError, match=f"rollout.engine=vllm .*{buffer}.*; set rollout.engine=transformers")
        if buffer
        else nullcontext()
    ):
        runtime = Runtime.of(config, CPU, shapes={"student": model.config})
        preflight._body(config, "student", "m", model.config, runtime)


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3 MoE", "GPT-NeoX (Pythia)", "ERNIE 4.5 MoE"])
def test_weights_one_by_one_are_as_saved(name):
    """Names that differ in the checkpoint cost nothing."""
    model = make(NAMES[name])
    weights = dict(model.named_parameters(remove_duplicate=False))
    one, found = one_as_saved(skeleton(model.config)), {}
    for key, weight in weights.items():
        found |= one(key, weight)
    expected = as_saved(model, weights)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_weights_that_keep_their_names_are_not_converted(monkeypatch):
    one = one_as_saved(skeleton(make(NAMES["Qwen3"]).config))
    monkeypatch.setattr("atod_fast.models.as_saved", None)
    weight = torch.zeros(1)
    assert one("model.norm.weight", weight)["model.norm.weight"] is weight


@pytest.mark.parametrize("name", ["Mamba", "MiniMax"])
def test_a_lost_state_is_found_in_16_bits_too(name):
    model = make(NAMES[name]).to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert chosen(model, 64) is AnewForward
    assert all(
        tensor.dtype == before[key].dtype and torch.equal(tensor, before[key])
        for key, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("name", "packs"),
    [
        ("Qwen3", True),
        ("Qwen3 MoE", True),
        ("Gemma 2", True),
        ("GPT-J", False),
        ("GPT-Neo", False),
        ("GPT-BigCode", True),
        ("Nemotron", False),
        ("LFM2", False),
        ("Llama 4, text", False),
        ("Qwen3-Next", False),
        ("Mamba", False),
    ],
)
def test_rows_are_packed_only_where_every_attention_is_told_where_they_begin(name, packs):
    assert not CausalPolicy(make(NAMES[name])).packs
    model = make(NAMES[name])
    model.config._attn_implementation = "flash_attention_2"
    assert CausalPolicy(model).packs == packs
    assert model.config._attn_implementation == "flash_attention_2"


def test_vllm_refuses_to_train_experts_on_a_cpu():
    check_experts(make(NAMES["Qwen3"]).config, CPU)
    with pytest.raises(UserError, match="rollout.engine=vllm cannot train a qwen3_moe model"):
        check_experts(make(NAMES["Qwen3 MoE"]).config, CPU)


def test_a_hybrid_student_trains(tmp_path, capsys):
    """With recurrent and attention layers: rollouts with the model's own cache, weights sent back, a teacher of
    another family."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_WEIGHTS / "student")
    columns = AutoConfig.from_pretrained(DEMO_WEIGHTS / "student").vocab_size
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=columns,
        layer_types=["conv", "full_attention"],
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
        **sizes,
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    small = (
        "train.steps=2 train.tasks_per_step=2 train.group_size=2 train.minibatch_rows=0 train.learning_rate=1e-2 "
        "eval.tasks=2 eval.teacher=false"
    )
    paths = [f"student.path={tmp_path / 'student'}", "--run-dir", str(tmp_path / "run")]
    assert train.main([*small.split(), "env.max_turns=4", "objective.preset=exact", *paths]) == 0
    said = capsys.readouterr()
    assert "a lfm2 model generates with transformers' own cache" in said.out + said.err
    lines = [
        line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"sync/logprob_gap"' in line
    ]
    assert len(lines) == 2
    gaps = [json.loads(line)["sync/logprob_gap_max"] for line in lines]
    assert max(gaps) < 1e-4, "the engine computes what the trainer computes, after an update too"
    exported = Lfm2ForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    before = Lfm2ForCausalLM.from_pretrained(tmp_path / "student")
    assert not torch.equal(exported.model.layers[0].conv.conv.weight, before.model.layers[0].conv.conv.weight)
    config = load(None, None, [paths[0], "student.attention=eager"])
    runtime = Runtime.of(config, CPU)
    engine = make_engine(config, "transformers", runtime.student, CPU, runtime.room)
    assert engine._model.config._attn_implementation == "eager"
