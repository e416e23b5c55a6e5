"""The rollout engine for any device: a transformers model with its own decode loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from atod_fast.config import Config
from atod_fast.models import Compute, load_model
from atod_fast.rollout.engines.transformers.engine import TransformersEngine


class TransformersKind:
    """The `Kind` of rollout.engine=transformers."""

    def suits(self, device: torch.device) -> bool:
        return True

    def check_model(self, config: Config, body: PreTrainedModel) -> None:
        TransformersEngine(body, slots=1, max_model_len=config.rollout.longest, device="meta")

    def check(self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device) -> None:
        pass

    def make(
        self,
        config: Config,
        compute: Compute,
        device: torch.device,
        *,
        filled: bool,
        say: Callable[[str], None],
    ) -> TransformersEngine:
        model = load_model(compute.path, compute.dtype, compute.cached_attention)
        longest = config.rollout.longest
        engine = TransformersEngine(model, slots=config.rollout.concurrency, max_model_len=longest, device=device)
        if engine.slower:
            say(engine.slower)
        if not filled:
            engine.sleep()
        return engine
