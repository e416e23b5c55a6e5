"""A tiny model playing tiny environments in the agent loop."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from atod_fast.config import Config
from atod_fast.records import Trajectory
from atod_fast.rollout.agent import Episode, rollout
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from helpers.worlds import VOCABULARY, Letters


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCABULARY, max_position_embeddings=1024, dtype="float32", **sizes)
    ).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_config(context: str = "full", **changes: dict) -> Config:
    how = {"context": context, "prompt_tokens": 400, "response_tokens": 6} | changes.pop("rollout", {})
    return Config.model_validate({"rollout": how, "env": {"step_timeout": 20.0} | changes.pop("env", {})})


def episodes(tasks) -> list[Episode]:
    return [
        Episode(task, group=number, member=number % 2, seed=1000 + number, env_seed=task)
        for number, task in enumerate(tasks)
    ]


def play(
    env, tasks=range(10), config: Config | None = None, slots: int = 4, renderer: Letters | None = None, **options
) -> list[Trajectory]:
    config = config or make_config()
    tasks = episodes(tasks) if isinstance(tasks[0], int) else tasks
    engine = TransformersEngine(make_model(), slots=slots, max_model_len=config.rollout.longest, device="cpu")
    return rollout(engine, env, renderer or Letters(config.rollout.context), tasks, config, **options)
