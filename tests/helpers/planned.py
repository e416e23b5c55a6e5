"""Models that are nothing but a configuration, for plans."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3Config


def qwen3(**sizes) -> Qwen3Config:
    common = {
        "head_dim": 128,
        "vocab_size": 151936,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40960,
    }
    return Qwen3Config(**common | sizes)


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 50,
}


def tiny_models(folder: Path) -> list[str]:
    """Write two folders with nothing but a config.json; return the overrides that name them."""
    overrides = []
    for role, hidden in (("student", 64), ("teacher", 96)):
        qwen3(**SMALL | {"hidden_size": hidden, "max_position_embeddings": 1024}).save_pretrained(folder / role)
        overrides.append(f"{role}.path={folder / role}")
    return overrides
