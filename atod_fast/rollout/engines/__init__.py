"""The rollout engines, by their names in `rollout.engine`.

To add an engine, write a `Kind` (protocol.py) in its own file or folder, and add it to `ENGINES` and to the choices of
`rollout.engine` in the configuration.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from atod_fast.config import Config
from atod_fast.models import Compute
from atod_fast.rollout.engines.protocol import Engine, Kind, Room
from atod_fast.rollout.engines.transformers import TransformersKind
from atod_fast.rollout.engines.vllm import VllmKind

# rollout.engine=auto is the first that suits the device.
ENGINES: dict[str, Kind] = {"vllm": VllmKind(), "transformers": TransformersKind()}


def make_engine(
    config: Config,
    name: str,
    compute: Compute,
    device: torch.device,
    room: Room,
    *,
    filled: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Engine:
    """Make the engine `name` for the model `compute`, with the weights of its checkpoint.

    Without `filled` it sleeps until a trainer sends its weights. `say` gets a line if the model runs slower than it
    could. Every rank must call it, before the trainer's models are made.

    Raises:
        UserError: the engine is not installed, or cannot run this model.
    """
    return ENGINES[name].make(config, compute, device, room, filled=filled, say=say)
