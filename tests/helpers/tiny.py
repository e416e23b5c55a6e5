"""Tiny models and rows made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from atod_fast.batches import Row

VOCABULARY = 61


def save_model(
    folder: Path,
    *,
    family: str = "qwen3",
    tied: bool = True,
    seed: int = 0,
    hidden: int = 32,
    kv_heads: int = 1,
    head_dim: int = 16,
    vocabulary: int = VOCABULARY,
    positions: int = 512,
) -> str:
    """A random model with weights large enough that its distributions are far from uniform."""
    kind, model = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}[family]
    config = kind(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        dtype="float32",
        eos_token_id=1,
        bos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    made = model(config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)
    return str(folder)


def random_rows(count: int, seed: int = 0, longest: int = 40) -> list[Row]:
    """Rows of several turns each, turns numbered from 0 over all rows, log-probs made up."""
    rng = np.random.default_rng(seed)
    out, number = [], 0
    for _ in range(count):
        ids = rng.integers(3, VOCABULARY, int(rng.integers(8, longest))).tolist()
        cuts = np.sort(rng.choice(np.arange(1, len(ids)), size=4, replace=False)).tolist()
        spans = [(cuts[0], cuts[1]), (cuts[2], cuts[3])]
        tokens = sum(b - a for a, b in spans)
        out.append(Row(ids, spans, [number, number + 1], rng.uniform(-3, -0.1, tokens).astype(np.float32).tolist()))
        number += 2
    return out
