"""Sends trained weights to the rollout engine: one all-gather per FSDP unit, overlapped with the next one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from atod_fast.policy.model import CausalPolicy
from atod_fast.policy.sharding import sharded, units


@torch.no_grad()
def stream_weights(policy: CausalPolicy) -> Iterator[tuple[str, Tensor]]:
    """Yield (checkpoint name, full tensor in compute precision) for every parameter, a tied head included.

    Collective: every rank must exhaust it, and gets the names in the same order. A tensor is valid until the next is
    requested: the consumer copies it.
    """
    pending = units(policy)
    names = {module: prefix for prefix, module in policy.named_modules()}
    seen: set[str] = set()
    handle = sharded(pending[0]).unshard(async_op=True)
    for number, unit in enumerate(pending):
        if handle is not None:
            handle.wait()
        handle = sharded(pending[number + 1]).unshard(async_op=True) if number + 1 < len(pending) else None
        # remove_duplicate=False: a tied head is sent under its own name too.
        for name, parameter in unit.named_parameters(prefix=names[unit], remove_duplicate=False):
            if name not in seen and not isinstance(parameter, DTensor):
                seen.add(name)
                yield name, parameter.detach()
        sharded(unit).reshard()
