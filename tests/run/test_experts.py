"""A student with experts, from its checkpoint through rollouts and updates to its export, and on from a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from atod_fast import evaluate, train
from helpers.chat_models import SHORT, save_chat_model
from helpers.gloo import run_ranks
from helpers.runs import read, untimed

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "tie_word_embeddings": False}


def save(folder: Path, seed: int) -> str:
    return save_chat_model(folder, seed=seed, made=Qwen3MoeForCausalLM, config=Qwen3MoeConfig, **EXPERTS)


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """The settings and the folder of a run of three steps on two ranks, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("experts")
    models = [f"student.path={save(folder / 'student', 0)}", f"teacher.path={save(folder / 'teacher', 1)}"]
    rest = ["train.steps=3", "train.learning_rate=1e-2", "checkpoint.every=1", "checkpoint.keep=3"]
    settings = [*SHORT, *models, *rest, "rollout.engine=transformers"]
    assert run_ranks(2, train.main, [*settings, "--run-dir", str(folder / "run")]) == [0, 0]
    return settings, folder


def test_the_engine_has_the_experts_of_every_update(three_steps):
    _, folder = three_steps
    lines = read(folder / "run")[1:]
    assert len(lines) == 3 and all(line["sync/logprob_gap"] < 1e-5 for line in lines)


def test_the_export_has_the_names_of_the_checkpoint_and_trained_experts(three_steps):
    _, folder = three_steps
    before, after = (load_file(folder / name / "model.safetensors") for name in ("student", "run/hf"))
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 2 * 6 * 3
    assert all(not torch.equal(before[name], after[name]) for name in experts)
    whole = AutoModelForCausalLM.from_pretrained(folder / "run" / "hf")
    fused = whole.model.layers[1].mlp.experts.gate_up_proj
    one = [after[f"model.layers.1.mlp.experts.4.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(fused[4], torch.cat(one))
    assert evaluate.main([str(folder / "run" / "hf"), *SHORT]) == 0


def test_a_resumed_run_goes_on_as_if_never_stopped(three_steps, tmp_path):
    settings, folder = three_steps
    copied = shutil.copytree(folder / "run", tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(copied / "checkpoints" / f"step_00000{step}")
    shutil.rmtree(copied / "hf")
    assert run_ranks(2, train.main, [*settings, "--run-dir", str(copied), "--resume", "auto"]) == [0, 0]
    assert untimed(read(copied)) == untimed(read(folder / "run"))
    again, first = (load_file(place / "hf" / "model.safetensors") for place in (copied, folder / "run"))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
