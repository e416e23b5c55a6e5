"""Loading checkpoints: every weight or an error, no dropout in training, and tokenizers whose ids mean the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from atod_fast import evaluate, models, train
from atod_fast.errors import UserError
from atod_fast.policy.model import CausalPolicy
from helpers.chatml import make_tokenizer
from helpers.tiny import save_model


def rewrite(folder: str, change) -> None:
    """Replace a saved model's weights by `change(weights)`."""
    file = Path(folder) / "model.safetensors"
    save_file(
        {name: tensor.clone() for name, tensor in change(load_file(file)).items()}, file, metadata={"format": "pt"}
    )


def without(name: str):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def prefixed(weights):
    return {f"_orig_mod.{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    ("tied", "change", "complaint"),
    [
        (True, without("model.norm.weight"), "lacks the weight model.norm.weight"),
        (False, without("lm_head.weight"), "lacks the weight lm_head.weight"),
        (True, prefixed, r"lacks \d+ weights \(.*model.embed_tokens.weight.*and holds \d+ weights \(_orig_mod"),
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path, tied, change, complaint):
    path = save_model(tmp_path / "model", tied=tied)
    rewrite(path, change)
    for load in (lambda path: models.load_model(path, torch.float32), models.check_weights):
        with pytest.raises(UserError, match=complaint) as error:
            load(path)
        assert "\n" not in str(error.value)


def test_a_tied_head_need_not_be_in_the_checkpoint(tmp_path):
    path = save_model(tmp_path / "model", tied=True)
    assert "lm_head.weight" not in load_file(Path(path) / "model.safetensors")
    models.load_model(path, torch.float32)
    models.check_weights(path)


def test_weights_without_a_place_are_named(tmp_path, caplog):
    path = save_model(tmp_path / "model")
    rewrite(path, lambda weights: weights | {"model.extra.weight": torch.zeros(2)})
    with caplog.at_level(logging.WARNING):
        models.load_model(path, torch.float32)
    assert "model.extra.weight" in caplog.text and path in caplog.text


def test_a_weight_of_another_shape_is_one_line(tmp_path):
    path = save_model(tmp_path / "model")
    rewrite(path, lambda weights: weights | {"model.norm.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"model.norm.weight of shape \[2\], and its config.json says \[32\]") as error:
        models.load_model(path, torch.float32)
    assert "\n" not in str(error.value)


def test_training_and_evaluation_refuse_a_checkpoint_that_lacks_a_weight(tmp_path, capsys):
    """In the demo's games, first the teacher and then the student lacks a weight."""
    for role in ("teacher", "student"):
        source = Path(models.resolve(f"demo:{role}"))
        folder = tmp_path / role
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        rewrite(str(folder), without("model.norm.weight"))
        settings = [
            f"{role}.path={folder}",
            "eval.teacher=false",
            "train.steps=1",
            "--run-dir",
            str(tmp_path / f"run-{role}"),
        ]
        assert train.main(settings) == 2
        assert "lacks the weight model.norm.weight" in capsys.readouterr().err
        assert evaluate.main([str(folder), "eval.tasks=1"]) == 2
        assert "lacks the weight model.norm.weight" in capsys.readouterr().err


def test_a_quantised_checkpoint_is_refused(tmp_path):
    path = save_model(tmp_path / "model")
    file = Path(path) / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UserError, match="quantised weights .gptq."):
        models.load_model(path, torch.float32)


def test_a_peft_folder_is_named_as_such(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="PEFT adapter.*merge_and_unload"):
        models.resolve(str(tmp_path))


COMMON = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
NOISY = {
    "dropout": (
        Starcoder2ForCausalLM,
        Starcoder2Config(**COMMON, attention_dropout=0.5, residual_dropout=0.5, embedding_dropout=0.5),
    ),
    "router": (
        MixtralForCausalLM,
        MixtralConfig(**COMMON, num_local_experts=2, attention_dropout=0.5, router_jitter_noise=0.5),
    ),
    "sampled experts": (PhimoeForCausalLM, PhimoeConfig(**COMMON, num_local_experts=4, router_jitter_noise=10.0)),
    "nested": (
        DbrxForCausalLM,
        DbrxConfig(
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=61,
            attn_config={"attn_pdrop": 0.5, "kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.1},
        ),
    ),
}


@pytest.mark.parametrize("kind", NOISY)
def test_a_forward_pass_in_training_mode_has_no_noise(tmp_path, kind):
    made, config = NOISY[kind]
    torch.manual_seed(0)
    made(config).save_pretrained(tmp_path)
    ids = torch.arange(3, 23)[None]
    noisy = made.from_pretrained(tmp_path).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    loaded = models.load_model(str(tmp_path), torch.float32)
    quiet = loaded.eval()(ids).logits
    loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = CausalPolicy(loaded).train()
    assert torch.equal(
        policy.parts.backbone(input_ids=ids, use_cache=False).last_hidden_state @ policy.parts.head.weight.T, quiet
    )
    assert any(module.training for module in policy.modules()), "blocks recompute their activations"


def test_stop_ids_are_those_of_the_generation_config(tmp_path):
    path = save_model(tmp_path / "model")
    file = Path(path) / "generation_config.json"
    for given, expected in ((5, [5]), ([5, 7], [5, 7]), (None, [])):
        file.write_text(json.dumps({"eos_token_id": given, "temperature": 0.6, "do_sample": False}))
        assert models.stop_ids(path) == expected
    file.write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match="eos_token_id = '</s>'"):
        models.stop_ids(path)
    file.write_text("{")
    with pytest.raises(UserError, match="generation_config.json: not valid JSON"):
        models.stop_ids(path)
    file.unlink()
    assert models.stop_ids(path) == [] and models.generation_config(path) == {}


def test_a_teacher_may_know_more_added_tokens():
    student, teacher = make_tokenizer(), make_tokenizer()
    teacher.add_tokens([AddedToken("<tool>", special=False), AddedToken("<|vision|>", special=True)])
    models.compare_tokenizers(student, teacher)
    with pytest.raises(UserError, match="different tokenizers: 2 tokens differ, first '<tool>'"):
        models.compare_tokenizers(teacher, student)


def test_a_teacher_that_uses_an_id_of_the_student_for_an_added_token_is_refused():
    student, teacher = make_tokenizer(), make_tokenizer()
    student.add_tokens([AddedToken("<mine>", special=False)])
    teacher.add_tokens([AddedToken("<yours>", special=False)])
    with pytest.raises(UserError, match="2 tokens differ"):
        models.compare_tokenizers(student, teacher)
