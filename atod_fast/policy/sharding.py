"""Shards a policy with FSDP2, from outside: the model's own code stays as it is."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from atod_fast.policy.model import CausalPolicy

# In smaller models, gathering a block again for the backward pass costs more than keeping it.
RESHARD_PARAMETERS = 50_000_000


def shard(
    policy: CausalPolicy,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    offload: bool = False,
    gathered: bool = False,
) -> CausalPolicy:
    """Shard every block, an untied embedding and head, and the root with all other parameters, in place.

    mesh: one dimension, or two: parameters are then copies over the first and sharded over the second.
    gathered: a unit stays unsharded after its first use, until `reshard`.
    A tied embedding and head stay together in the root unit. The head's unit stays unsharded between forward and
    backward: it is used last, then first. `cast_forward_inputs` is off because FSDP would round fp32 streams to bf16.
    """
    policy.compute_dtype = compute_dtype
    parameters = sum(p.numel() for p in policy.parameters())
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if offload and mesh.device_type != "cpu" else OffloadPolicy(),
    }
    reshard = parameters > RESHARD_PARAMETERS and not gathered
    for block in policy.parts.blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    if not policy.tied:
        fully_shard(policy.parts.embedding, reshard_after_forward=reshard, **options)
        fully_shard(policy.parts.head, reshard_after_forward=False, **options)
    fully_shard(policy, reshard_after_forward=False, **options)
    return policy


def prefetch(policy: CausalPolicy) -> None:
    """Let each block's forward pass start to gather the next block, before it computes."""
    for block, following in pairwise(policy.parts.blocks):
        sharded(block).set_modules_to_forward_prefetch([sharded(following)])


def reduce_between_copies(policy: CausalPolicy, now: bool) -> None:
    """Set whether backward passes reduce gradients over the first dimension of a mesh of two.

    If not, FSDP2 adds them up in fp32, reduced over the second dimension, until a pass that does.
    """
    sharded(policy).set_requires_all_reduce(now)


def units(policy: CausalPolicy) -> list[nn.Module]:
    """Return the modules that FSDP2 gathers one at a time, in order of use, the root last."""
    ends = [[], []] if policy.tied else [[policy.parts.embedding], [policy.parts.head]]
    return [*ends[0], *policy.parts.blocks, *ends[1], policy]


def sharded(module: nn.Module) -> FSDPModule:
    """Return the module, which FSDP2 has made a unit of its own."""
    assert isinstance(module, FSDPModule)
    return module


def reshard(policy: CausalPolicy) -> None:
    """Free every unsharded parameter: after a forward pass the root and the head stay unsharded."""
    for unit in units(policy):
        sharded(unit).reshard()
