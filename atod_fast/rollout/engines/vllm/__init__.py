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
from atod_fast.rollout.engines.protocol import Engine, Room, may_sleep, share
from atod_fast.rollout.engines.vllm import limits, start


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
        if config.rollout.async_scheduling == "on" and device.type == "cpu":
            raise UserError("rollout.async_scheduling=on: vLLM has it on CUDA only; set rollout.async_scheduling=auto")

    def check_installed(self) -> None:
        limits.check_installed()

    def room(
        self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device, engines: int
    ) -> Room:
        together = config.rollout.concurrency or share(config, engines)
        cache = limits.cache_bytes(config, attention_shape(shape), dtype, together) if shape is not None else 0
        return Room(together, may_sleep(config, device), cache)

    def make(
        self,
        config: Config,
        compute: Compute,
        device: torch.device,
        room: Room,
        *,
        filled: bool,
        say: Callable[[str], None],
    ) -> Engine:
        path, dtype, together = compute.path, compute.dtype, config.rollout.tensor_parallel
        limits.check_installed()
        limits.check(config, attention_shape(load_config(path)), dtype)
        if filled:
            check_weights(path)
        made = start.build(path, dtype, device, room, config.rollout, filled=filled)
        return Lockstep(made, ranks.neighbours(together)) if together > 1 else made
