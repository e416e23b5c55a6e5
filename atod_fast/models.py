"""Checkpoints by name: what is loaded from where, in which precision. Shared by the trainer and the rollout engines."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from atod_fast.errors import UserError

logging.disable_progress_bar()  # the run has a progress bar of its own

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
DEMO_WEIGHTS = Path(__file__).resolve().parent / "demo" / "weights"


def resolve(path: str) -> str:
    """Model folder of a `student.path` or `teacher.path`: `demo:NAME` is a shipped model, others are left as they are."""
    if path.startswith("demo:"):
        folder = DEMO_WEIGHTS / path.removeprefix("demo:")
        if not (folder / "config.json").is_file():
            raise UserError(f"model path {path!r} names no shipped model; use demo:student, demo:teacher, or another world's, as demo:searchqa/student")
        return str(folder)
    local = Path(path).is_absolute() or path.startswith((".", "~")) or ("/" in path and Path(Path(path).parts[0]).is_dir())
    if local and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"model path {path!r} holds no config.json; give a Hugging Face model folder or a hub name")
    folder = str(Path(path).expanduser()) if path.startswith("~") else path
    if not Path(folder).is_dir() and not _HUB_NAME.fullmatch(folder):
        raise UserError(f"model path {path!r} is neither a folder with a config.json nor a hub name")
    return folder


def is_here(path: str, *names: str) -> bool:
    """Whether one of these files of a model is on this machine, in its folder or in the Hugging Face cache."""
    folder = resolve(path)
    if Path(folder).is_dir():
        return any((Path(folder) / name).is_file() for name in names)
    return any(isinstance(try_to_load_from_cache(folder, name), str) for name in names)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on an accelerator and fp32 on a CPU, where bf16 GEMMs are slower."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def attention_of(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """`auto` is flash-attn where it is installed and can run: on CUDA, in 16 bits."""
    if name != "auto":
        return name
    flash = device.type == "cuda" and dtype != torch.float32 and importlib.util.find_spec("flash_attn")
    return "flash_attention_2" if flash else "sdpa"


def _from_hub(loader, path: str, **options):
    """One clear line where a hub name cannot be had."""
    try:
        return loader.from_pretrained(resolve(path), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model path {path!r} cannot be loaded ({reason}); give a Hugging Face model folder or a reachable hub name") from None


def load_tokenizer(path: str, *, offline: bool = False) -> PreTrainedTokenizerBase:
    return _from_hub(AutoTokenizer, path, local_files_only=offline)


def load_model(path: str, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The checkpoint's CausalLM on the CPU, every weight in `dtype`."""
    return _from_hub(AutoModelForCausalLM, path, dtype=dtype, attn_implementation=attention)


def load_config(path: str, *, offline: bool = False):
    """The checkpoint's transformers configuration."""
    return _from_hub(AutoConfig, path, local_files_only=offline)


def skeleton(config, path: str = "", attention: str = "sdpa") -> PreTrainedModel:
    """The CausalLM of a transformers configuration, on the meta device: names and shapes, no memory.

    Raises:
        UserError: it is none, or has no such attention on this machine. `path` is named then.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model path {path!r} holds a {config.model_type!r} model; use a decoder-only causal language model")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"student.attention: {attention} is not to be had for model path {path!r} ({reason}); set student.attention=auto") from None


def weight_shapes(config) -> dict[str, torch.Size]:
    """Shape of every weight by its name in the checkpoint, a tied head included."""
    return {name: parameter.shape for name, parameter in skeleton(config).named_parameters(remove_duplicate=False)}


class Attention(NamedTuple):
    """What decides how large a key/value cache is, and over how many ranks heads can be shared."""

    layers: int
    heads: int  # of queries
    kv_heads: int
    head_dim: int


def attention_shape(config) -> Attention:
    """Of a transformers configuration's decoder."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Attention(text.num_hidden_layers, heads, getattr(text, "num_key_value_heads", None) or heads, width)


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Refuse models whose ids mean different tokens: every token of either, special ones included."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    differing = {token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)}
    if differing:
        first = min(differing, key=lambda token: ours.get(token, theirs.get(token, 0)))
        raise UserError(
            f"student.path and teacher.path have different tokenizers: {len(differing)} tokens differ, first {first!r} "
            f"(student id {ours.get(first)}, teacher id {theirs.get(first)}); use a teacher of the student's family"
        )
