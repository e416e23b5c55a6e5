"""Saving and resuming with torch.distributed.checkpoint, and the final Hugging Face export."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from atod_fast import ranks
from atod_fast.errors import UserError
from atod_fast.models import as_saved, skeleton
from atod_fast.policy.model import CausalPolicy


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name) and (p / "state.json").is_file()]
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def set_aside_after(run_dir: Path, step: int) -> None:
    """Rename the checkpoints of later steps to `*.abandoned`: the run goes on from `step`, and they are no longer its future."""
    for path in (run_dir / "checkpoints").glob("step_*"):
        if re.fullmatch(r"step_\d{6,}", path.name) and int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path.with_suffix(".abandoned"), ignore_errors=True)
            path.rename(path.with_suffix(".abandoned"))


def save(run_dir: Path, step: int, policy: CausalPolicy, optimizer: Optimizer, state: dict, *, keep: int) -> Path:
    """Write step's checkpoint beside its final name and rename it when whole; then drop the oldest beyond `keep`.

    `state` is JSON-serialisable. Collective.
    """
    final = folder(run_dir, step)
    partial = final.with_name(final.name + ".partial")
    if ranks.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    model, optim = get_state_dict(policy, optimizer)
    dcp.save({"model": model, "optimizer": optim}, checkpoint_id=partial)
    if ranks.rank() == 0:
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        complete = [p for p in final.parent.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)]
        for old in sorted(complete, key=lambda p: int(p.name.removeprefix("step_")))[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def read_state(path: Path) -> dict:
    """What `save` was given as `state`, and the step. Raises UserError where the checkpoint is not whole."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"--resume {path} holds no complete checkpoint (state.json is missing or damaged); give a folder checkpoints/step_NNNNNN of a run"
        ) from None


def load(path: Path, policy: CausalPolicy, optimizer: Optimizer) -> dict:
    """Fill policy and optimiser in place; returns the saved `state`. Collective."""
    state = read_state(path)
    model, optim = get_state_dict(policy, optimizer)
    try:
        dcp.load({"model": model, "optimizer": optim}, checkpoint_id=path)
    except (dcp.api.CheckpointException, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(f"--resume {path} does not fit student.path or is damaged ({reason}); resume with the run's own config.toml") from None
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=optim)
    return state


def export(path: Path, policy: CausalPolicy, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> None:
    """A folder that transformers loads: safetensors in `dtype`, config, tokenizer. Collective."""
    whole = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if ranks.rank() == 0:
        policy.config.dtype = dtype
        weights = {name: tensor for name, tensor in whole.items() if not (policy.tied and name == f"{policy.layout.head}.weight")}
        # A gathered tensor may be a view of a padded buffer, which safetensors refuses; a buffer may hold integers.
        weights = {
            name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
            for name, tensor in as_saved(skeleton(policy.config), weights).items()
        }
        path.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(weights, str(path))
        policy.config.save_pretrained(path)
        tokenizer.save_pretrained(path)
        if policy.generation_config is not None:
            policy.generation_config.save_pretrained(path)
    ranks.barrier()
