"""Loads student and teacher sharded: no rank ever holds more of a model than its shards and one tensor."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from atod_fast.models import Compute, bare_model, open_weights, readable, round_buffers
from atod_fast.policy.model import CausalPolicy
from atod_fast.policy.sharding import prefetch, shard
from atod_fast.weights import make_buffers, read

VARIANTS = 64  # compiled forms of a block's code, at most


def load_student(
    compute: Compute, mesh: DeviceMesh, *, liger: bool, checkpointing: bool, compiled: bool = False
) -> CausalPolicy:
    """Load this rank's shards of the student onto its device, with fp32 masters, whatever the checkpoint's dtype.

    At a learning rate of 1e-6 AdamW leaves bf16 weights unchanged. checkpointing: recompute each block's activations in
    the backward pass. compiled: compile each block.

    Raises:
        UserError: as `bare_model`, `open_weights` and `CausalPolicy`.
    """
    model = bare_model(compute.path, torch.float32, compute.attention)
    if liger:
        apply_liger(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = _load(model, compute, mesh, compiled=compiled)
    round_buffers(model, compute.dtype)
    return policy


def load_teacher(
    compute: Compute,
    mesh: DeviceMesh,
    *,
    offload: bool,
    liger: bool = False,
    gathered: bool = False,
    compiled: bool = False,
) -> CausalPolicy:
    """Load this rank's shards of the frozen teacher onto its device, in its compute precision.

    offload: keep them in CPU memory between uses. gathered: once used, a parameter stays gathered until `reshard`;
    else each block gathers the next one before it computes. compiled: compile each block.

    Raises:
        UserError: as `bare_model`, `open_weights` and `CausalPolicy`.
    """
    model = bare_model(compute.path, compute.dtype, compute.attention)
    if liger:
        apply_liger(model)
    model.requires_grad_(False)
    policy = _load(model, compute, mesh, offload=offload, gathered=gathered, compiled=compiled)
    if not gathered:
        prefetch(policy)
    return policy


def _load(
    model: PreTrainedModel,
    compute: Compute,
    mesh: DeviceMesh,
    *,
    offload: bool = False,
    gathered: bool = False,
    compiled: bool = False,
) -> CausalPolicy:
    """Shard `model`, which is on the meta device, and read its values: parameters for this rank, buffers whole."""
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    weights = open_weights(compute.path, model)
    policy = CausalPolicy(model)
    make_buffers(model, device)
    if compiled:
        compile_blocks(policy)
    shard(policy, mesh, compute.dtype, offload=offload, gathered=gathered)
    with readable(compute.path):
        read(model, policy, weights, torch.device("cpu") if offload else device)
    for buffer in policy.buffers():  # which are not offloaded
        buffer.data = buffer.data.to(device)
    return policy


def compile_blocks(policy: CausalPolicy) -> None:
    """Compile the forward pass of every block, for any number of rows and tokens.

    Names of parameters stay as they are. A block that recomputes its activations runs the compiled pass again.
    """
    # Blocks share their code, and so its variants: with and without gradients, each kind of layer, each model.
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in policy.parts.blocks:
        block.forward = torch.compile(block.forward, dynamic=True)


def apply_liger(model: PreTrainedModel) -> None:
    """Replace transformers' RMSNorm, RoPE and SwiGLU by liger-kernel's; its loss heads are not used.

    A mixture of experts keeps its feed-forward parts: transformers' fused experts are loaded and sharded as they are.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    heads = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    gates = not getattr(model.config, "num_experts_per_tok", None)
    _apply_liger_kernel_to_instance(model=model, rope=True, rms_norm=True, swiglu=gates, geglu=gates, **heads)
