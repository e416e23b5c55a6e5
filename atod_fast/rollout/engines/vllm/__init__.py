"""The rollout engine vLLM, which is imported only when an engine is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from atod_fast import ranks
from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.models import Compute, attention_shape, check_weights, load_config, saved_buffers
from atod_fast.rollout.engines.lockstep import Lockstep
from atod_fast.rollout.engines.protocol import Engine
from atod_fast.rollout.engines.vllm import engine, limits


class VllmKind:
    """The `Kind` of rollout.engine=vllm."""

    def suits(self, device: torch.device) -> bool:
        return device.type == "cuda" and limits.supported()

    def check_model(self, config: Config, body: PreTrainedModel) -> None:
        if names := saved_buffers(body):
            model = body.config.model_type
            what = f"{names[0]}, a buffer of a {model} model"
            raise UserError(f"rollout.engine=vllm cannot be sent {what}; set rollout.engine=transformers")

    def check(self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device) -> None:
        if shape is not None:
            limits.check(config, attention_shape(shape), dtype)
            limits.check_experts(shape, device)
        limits.check_installed()

    def make(
        self,
        config: Config,
        compute: Compute,
        device: torch.device,
        *,
        filled: bool,
        say: Callable[[str], None],
    ) -> Engine:
        path, dtype, rollout = compute.path, compute.dtype, config.rollout
        shape = attention_shape(load_config(path))
        limits.check_installed()
        limits.check(config, shape, dtype)
        if filled:
            check_weights(path)
        made = engine.build(
            path,
            dtype,
            device,
            concurrency=rollout.concurrency,
            max_model_len=rollout.longest,
            tensor_parallel=rollout.tensor_parallel,
            cache_bytes=limits.cache_bytes(config, shape, dtype),
            filled=filled,
        )
        return Lockstep(made, ranks.neighbours(rollout.tensor_parallel)) if rollout.tensor_parallel > 1 else made
