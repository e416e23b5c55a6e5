"""Rollout engines by the name that `rollout.engine` gives them.

A new engine is a `Kind` (protocol.py) in a file or folder of its own, a line in `ENGINES`, and a choice of
`rollout.engine` in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from atod_fast.config import Config
from atod_fast.models import attention_of, dtype_of, load_config
from atod_fast.rollout.engines.protocol import Engine, Kind
from atod_fast.rollout.engines.transformers import TransformersKind
from atod_fast.rollout.engines.vllm import VllmKind

# `auto` takes the first that suits the device.
ENGINES: dict[str, Kind] = {"vllm": VllmKind(), "transformers": TransformersKind()}


def engine_kind(config: Config, device: torch.device) -> str:
    """Returns the name of the engine that `rollout.engine` means on this device."""
    if config.rollout.engine != "auto":
        return config.rollout.engine
    return next(name for name, kind in ENGINES.items() if kind.suits(device))


def make_engine(
    config: Config,
    model_path: str,
    device: torch.device,
    kind: str | None = None,
    *,
    filled: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Returns the engine of `rollout.engine` (or of `kind`), with the weights of the checkpoint at `model_path`.

    With `filled` off it sleeps until a trainer sends its weights. `say` gets a line where a model runs slower than it
    could. Every rank must call it together, before the trainer's models are made.

    Raises:
        UserError: the engine is not installed, or cannot run this model.
    """
    dtype = dtype_of(config.student.compute_dtype, device)
    attention = attention_of(config.student.attention, device, dtype, load_config(model_path))
    maker = ENGINES[kind or engine_kind(config, device)]
    return maker.make(config, model_path, dtype=dtype, attention=attention, device=device, filled=filled, say=say)
