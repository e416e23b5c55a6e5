"""Loads student and teacher sharded: no rank ever holds more of a model than its shards and one tensor."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from atod_fast.models import Compute, bare_model, open_weights, round_buffers
from atod_fast.policy.layout import refuse
from atod_fast.policy.model import CausalPolicy
from atod_fast.policy.sharding import shard
from atod_fast.weights import make_buffers, read


def load_student(compute: Compute, mesh: DeviceMesh, *, liger: bool, checkpointing: bool) -> CausalPolicy:
    """Load this rank's shards of the student onto its device, with fp32 masters, whatever the checkpoint's dtype.

    At a learning rate of 1e-6 AdamW leaves bf16 weights unchanged. checkpointing: recompute each block's activations in
    the backward pass.

    Raises:
        UserError: as `bare_model`, `open_weights` and `CausalPolicy`, or the model cannot recompute its activations.
    """
    model = bare_model(compute.path, torch.float32, compute.attention)
    if liger:
        apply_liger(model)
    if checkpointing:
        if not model.supports_gradient_checkpointing:
            refuse(model.config, "has no gradient checkpointing (set student.gradient_checkpointing=false)")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = _load(model, compute, mesh)
    round_buffers(model, compute.dtype)
    return policy


def load_teacher(compute: Compute, mesh: DeviceMesh, *, offload: bool) -> CausalPolicy:
    """Load this rank's shards of the frozen teacher onto its device, in its compute precision.

    offload: keep them in CPU memory between uses.

    Raises:
        UserError: as `bare_model`, `open_weights` and `CausalPolicy`.
    """
    model = bare_model(compute.path, compute.dtype, compute.attention)
    return _load(model.requires_grad_(False), compute, mesh, offload=offload)


def _load(model: PreTrainedModel, compute: Compute, mesh: DeviceMesh, *, offload: bool = False) -> CausalPolicy:
    """Shard `model`, which is on the meta device, and read its values: parameters for this rank, buffers whole."""
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    weights = open_weights(compute.path, model)
    policy = CausalPolicy(model)
    make_buffers(model, device)
    shard(policy, mesh, compute.dtype, offload=offload)
    read(model, policy, weights, torch.device("cpu") if offload else device)
    for buffer in policy.buffers():  # which are not offloaded
        buffer.data = buffer.data.to(device)
    return policy


def apply_liger(model: PreTrainedModel) -> None:
    """Replace transformers' RMSNorm, RoPE and SwiGLU by liger-kernel's; its loss heads are not used."""
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    heads = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=model, rope=True, rms_norm=True, swiglu=True, **heads)
