"""Rollout engines by the name that `rollout.engine` gives them.

A new engine is a `Kind` (protocol.py) in a file or folder of its own, a line in `ENGINES`, and a choice of
`rollout.engine` in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from atod_fast.config import Config
from atod_fast.models import Compute
from atod_fast.rollout.engines.protocol import Engine, Kind
from atod_fast.rollout.engines.transformers import TransformersKind
from atod_fast.rollout.engines.vllm import VllmKind

# rollout.engine=auto is the first that suits the device.
ENGINES: dict[str, Kind] = {"vllm": VllmKind(), "transformers": TransformersKind()}


def make_engine(
    config: Config,
    name: str,
    compute: Compute,
    device: torch.device,
    *,
    filled: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Returns the engine `name` for the model `compute`, with the weights of its checkpoint.

    With `filled` off it sleeps until a trainer sends its weights. `say` gets a line where a model runs slower than it
    could. Every rank must call it together, before the trainer's models are made.

    Raises:
        UserError: the engine is not installed, or cannot run this model.
    """
    return ENGINES[name].make(config, compute, device, filled=filled, say=say)
