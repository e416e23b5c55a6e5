"""Writes a folder that transformers loads: weights, configuration, tokenizer, generation configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedTokenizerBase

from atod_fast import ranks
from atod_fast.errors import UserError
from atod_fast.models import as_saved, generation_config, load_config, skeleton
from atod_fast.policy.layout import find_layout
from atod_fast.policy.model import CausalPolicy


def export(
    path: Path, policy: CausalPolicy, source: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int] | None
) -> list[str]:
    """Gather the policy's weights and `write` them on rank 0; return its lines there. Collective."""
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    lines: list[str] = []
    with ranks.together():
        if ranks.rank() == 0:
            lines = write(path, whole, source, tokenizer, stop_ids)
    return lines


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Iterable[int] | None,
) -> list[str]:
    """Write `weights`, in the dtype of the model at `source`, with that model's configuration and `tokenizer`.

    `stop_ids` become the end-of-text ids (None: the model's own). The weights are written first; for each file after
    them that cannot be written, a line is returned. Raises UserError if the weights are not those of such a model.
    """
    config = load_config(source)
    dtype = config.dtype or torch.float32
    model = skeleton(config)
    layout = find_layout(model)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if layout.tied:
        wanted.pop(f"{layout.head}.weight", None)
    if odd := [name for name, shape in wanted.items() if name not in weights or weights[name].shape != shape]:
        raise UserError(
            f"the weights are not those of student.path={source!r}: {odd[0]} is missing or of another shape; "
            "name the model that was trained"
        )
    path.mkdir(parents=True, exist_ok=True)
    # Copies: a gathered tensor may be a view of a padded buffer, which safetensors refuses. A buffer may hold integers.
    saved = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in as_saved(model, {name: weights[name] for name in wanted}).items()
    }
    save_torch_state_dict(saved, str(path))

    def write_config() -> None:
        model.config.dtype = dtype
        model.config.save_pretrained(path)

    def write_generation_config() -> None:
        # As plain JSON: transformers may refuse to write what it reads.
        facts = generation_config(source) or model.generation_config.to_diff_dict()
        if stop_ids is not None:
            facts["eos_token_id"] = sorted(stop_ids)
        (path / "generation_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    steps: dict[str, Callable[[], object]] = {
        "config.json": write_config,
        "the tokenizer": lambda: tokenizer.save_pretrained(path),
        "generation_config.json": write_generation_config,
    }
    lines = []
    for name, step in steps.items():
        try:
            step()
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            lines.append(
                f"{name} of {path} could not be written ({type(error).__name__}: {reason}); the weights are there: "
                f"copy it from {source}"
            )
    return lines
