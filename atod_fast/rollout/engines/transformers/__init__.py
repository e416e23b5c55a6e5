"""The rollout engine for any device: a transformers model with its own decode loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from atod_fast.config import Config
from atod_fast.models import Compute, load_model
from atod_fast.rollout.engines.protocol import Room, may_sleep, share
from atod_fast.rollout.engines.transformers.captured import CudaGraphs
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.engines.transformers.head import compute_logits_in_fp32

MOST = 64  # trajectories at a time, unless rollout.concurrency says otherwise: each has a slot of the cache


class TransformersKind:
    """The `Kind` of rollout.engine=transformers."""

    def suits(self, device: torch.device) -> bool:
        return True

    def check_model(self, config: Config, body: PreTrainedModel) -> None:
        TransformersEngine(body, slots=1, max_model_len=config.rollout.longest, device="meta")

    def check(self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device) -> None:
        pass

    def check_installed(self) -> None:
        pass

    def room(
        self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device, engines: int
    ) -> Room:
        together = config.rollout.concurrency or min(MOST, share(config, engines))
        return Room(together, may_sleep(config, device))

    def make(
        self,
        config: Config,
        compute: Compute,
        device: torch.device,
        room: Room,
        *,
        filled: bool,
        say: Callable[[str], None],
    ) -> TransformersEngine:
        model = load_model(compute.path, compute.dtype, compute.cached_attention, device)
        if config.rollout.head_dtype == "fp32":
            compute_logits_in_fp32(model)
        longest = config.rollout.longest
        captures = device.type == "cuda" and not config.rollout.enforce_eager
        engine = TransformersEngine(
            model,
            slots=room.concurrency,
            max_model_len=longest,
            device=device,
            sleeps=room.sleeps,
            record=CudaGraphs if captures else None,
            say=say,
        )
        if engine.slower:
            say(engine.slower)
        if not filled:
            engine.sleep()
        return engine
