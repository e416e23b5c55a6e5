"""Tiny chat models in folders, for runs with models that are not the demo's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers.chat_tokenizers import tokenizer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
# A run of one step in the environment `helpers.worlds.Rooms`.
SHORT = """rollout.context=window rollout.prompt_tokens=600 rollout.response_tokens=6 rollout.concurrency=8
env.max_turns=3 env.name=helpers.worlds:Rooms env.train={tasks=20} env.eval={tasks=20} eval.teacher=false eval.every=0
eval.tasks=2 train.steps=1 train.tasks_per_step=2 train.group_size=2 train.minibatch_rows=0 checkpoint.every=0
observe.trajectories_every=1""".split()


def save_chat_model(
    folder: Path,
    kind: str = "qwen",
    *,
    columns: int = 0,
    seed: int = 0,
    made=Qwen3ForCausalLM,
    config=Qwen3Config,
    **changes,
) -> str:
    """Save a random model with the tokenizer `kind`; its head has `columns` columns, or six more than there are
    tokens."""
    words = tokenizer(kind)
    sizes = {"vocab_size": columns or len(words) + 6, "max_position_embeddings": 4096, "dtype": "float32"}
    torch.manual_seed(seed)
    model = made(config(**SIZES | sizes | {"eos_token_id": words.eos_token_id} | changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def always_says(folder: str, token: int) -> None:
    """Change an untied model so that it answers nothing but `token`."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if any(part in name for part in ("o_proj", "down_proj", "lm_head")):
            weights[name] = torch.zeros_like(weights[name])
        elif "embed" in name:
            weights[name] = torch.ones_like(weights[name])
    weights["lm_head.weight"][token] = 1.0
    save_file(weights, file, metadata={"format": "pt"})
