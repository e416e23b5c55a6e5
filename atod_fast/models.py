"""Loads checkpoints and what is known of them, for the trainer and the rollout engines."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging
from transformers.utils.hub import cached_file

from atod_fast.errors import NotHere, UserError
from atod_fast.weights import Weights, inspect, keep_dtypes, make_buffers, read, weight_files

logger = getLogger(__name__)
logging.disable_progress_bar()  # the run has a progress bar of its own

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
VARLEN = "varlen"  # the attention that policy/attention.py registers
DEMO_WEIGHTS = Path(__file__).resolve().parent / "demo" / "weights"


def resolve(path: str) -> str:
    """Return the model folder of a `student.path` or `teacher.path`.

    `demo:NAME` is a shipped model; other paths stay as they are. Raises UserError for a path that holds no model, and
    NotHere for one that does not exist.
    """
    if path.startswith("demo:"):
        folder = DEMO_WEIGHTS / path.removeprefix("demo:")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model path {path!r} names no shipped model; use demo:student, demo:teacher, or another demo's, "
                "as demo:searchqa/student"
            )
        return str(folder)
    local = (
        Path(path).is_absolute() or path.startswith((".", "~")) or ("/" in path and Path(Path(path).parts[0]).is_dir())
    )
    if (Path(path).expanduser() / "adapter_config.json").is_file():
        raise UserError(
            f"model path {path!r} holds a PEFT adapter, which is no whole model; merge it into its base with peft's "
            "merge_and_unload() and give the folder that save_pretrained() writes then"
        )
    if local and not Path(path).expanduser().exists():
        raise NotHere(f"model path {path!r} does not exist here; give a Hugging Face model folder or a hub name")
    if local and not (Path(path).expanduser() / "config.json").is_file():
        run = (Path(path).expanduser() / "checkpoints").is_dir()
        hint = (
            f"a run's model is {path}/hf, or what python -m atod_fast.export {path} makes"
            if run
            else "give a Hugging Face model folder or a hub name"
        )
        raise UserError(f"model path {path!r} holds no config.json; {hint}")
    folder = str(Path(path).expanduser()) if path.startswith("~") else path
    if not Path(folder).is_dir() and not _HUB_NAME.fullmatch(folder):
        raise UserError(f"model path {path!r} is neither a folder with a config.json nor a hub name")
    return folder


@dataclass(frozen=True, slots=True)
class Compute:
    """A checkpoint, and the dtype and attention in which its model is computed."""

    path: str  # as student.path or teacher.path
    dtype: torch.dtype
    attention: str  # varlen (policy/attention.py), or transformers' flash_attention_2, sdpa or eager

    @property
    def cached_attention(self) -> str:
        """The attention of a model that generates with a key/value cache, which varlen knows nothing of."""
        return "sdpa" if self.attention == VARLEN else self.attention


def is_here(path: str, *names: str) -> bool:
    """Return whether a model has one of these files on this machine, in its folder or the Hugging Face cache."""
    folder = resolve(path)
    if Path(folder).is_dir():
        return any((Path(folder) / name).is_file() for name in names)
    return any(isinstance(try_to_load_from_cache(folder, name), str) for name in names)


class Reach(NamedTuple):
    """How far back a token sees in a layer's attention."""

    # As transformers names it: full_attention, sliding_attention, chunked_attention; or a layer that is none of them.
    kind: str
    size: int | None = None  # of the window or the chunks


def reaches(config) -> list[Reach]:
    """Return the reach of every decoder layer of a transformers configuration, by the rule of transformers' caches."""
    text = config.get_text_config(decoder=True)
    sizes = {
        "sliding_attention": getattr(text, "sliding_window", None),
        "chunked_attention": getattr(text, "attention_chunk_size", None),
    }
    usual = next((kind for kind, size in sizes.items() if size is not None), "full_attention")
    kinds = getattr(text, "layer_types", None) or [usual] * text.num_hidden_layers
    return [Reach(kind, sizes.get(kind)) for kind in kinds]


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Raise UserError, in one line, for what the block raises because a model path cannot be loaded."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model path {path!r} cannot be loaded ({reason}); give a Hugging Face model folder or a reachable hub name"
        ) from None


def _from_pretrained(loader, path: str, **options):
    """Return `loader.from_pretrained` of a model path. Raises UserError, in one line, if it cannot be loaded."""
    with readable(path):
        return loader.from_pretrained(resolve(path), **options)


def load_tokenizer(path: str, *, offline: bool = False) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer. Raises UserError if it cannot be loaded."""
    return _from_pretrained(AutoTokenizer, path, local_files_only=offline)


def load_model(
    path: str, dtype: torch.dtype, attention: str = "sdpa", device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load the checkpoint's CausalLM onto `device`, with every weight in `dtype` and without dropout.

    Raises:
        UserError: as `bare_model` and `open_weights`.
    """
    model = bare_model(path, dtype, attention)
    weights = open_weights(path, model)
    make_buffers(model, device)
    with readable(path):
        read(model, model, weights, device)
    return model


def bare_model(path: str, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Make the checkpoint's CausalLM on the meta device, in evaluation mode and without dropout.

    Parameters have the dtypes that they have in a model computed in `dtype`.

    Raises:
        UserError: it is no CausalLM, its weights are quantised, or this machine lacks the attention.
    """
    config = load_config(path)
    check_quantised(path, config)
    _without_dropout(config)
    model = skeleton(config, path, attention, dtype).eval().requires_grad_(True)
    keep_dtypes(model, dtype)
    return model


def _without_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability in `config` to 0, in nested configurations too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _without_dropout(value)
        elif _DROPOUT.search(name) and type(value) in (int, float):
            setattr(config, name, type(value)(0))


def check_weights(path: str) -> None:
    """Raise UserError if the checkpoint does not fit its configuration, as `open_weights`.

    For an engine that loads weights itself and might not report it.
    """
    open_weights(path, skeleton(load_config(path), path))


def open_weights(path: str, model: PreTrainedModel, *, offline: bool = False) -> Weights:
    """Return the checkpoint's weights, of which names and shapes have been read, and log those without a place.

    model: the CausalLM of its configuration, on the meta device. offline: fetch nothing.

    Raises:
        UserError: a file is missing or damaged, or the model lacks a weight or has one of another shape.
    """
    folder = resolve(path)
    with readable(path):
        weights = Weights(weight_files(folder, getattr(model.config, "transformers_weights", None), offline=offline))
    found = inspect(model, weights)
    kind = model.config.model_type
    if found.missing:
        holds = f", and holds {_some(found.unexpected)}, which the model has no place for" if found.unexpected else ""
        raise UserError(
            f"model path {path!r} lacks {_some(found.missing)}{holds}; "
            f"give a folder whose weights have the names of transformers' {kind}"
        )
    for name, (held, expected) in found.misshapen.items():
        raise UserError(
            f"model path {path!r} holds {name} of shape {list(held)}, and its config.json says {list(expected)}; "
            "give the configuration and the weights of one model"
        )
    for name, reason in found.failed.items():
        raise UserError(
            f"model path {path!r}: no {name} can be made of the weights it holds ({reason}); "
            f"give a folder whose weights have the names and shapes of transformers' {kind}"
        )
    for name, other in found.untied:
        raise UserError(
            f"model path {path!r} holds two different weights {name} and {other}, and its config.json says that they "
            "are one; set tie_word_embeddings to false there"
        )
    if found.unexpected:
        unplaced = _some(found.unexpected)
        logger.warning("model path %r holds %s, which the model has no place for: left out", path, unplaced)
    return weights


def check_quantised(path: str, config) -> None:
    """Raise UserError if a transformers configuration says that the weights are quantised."""
    if quantised := getattr(config, "quantization_config", None):
        method = (
            quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else type(quantised).__name__
        )
        raise UserError(
            f"model path {path!r} holds quantised weights ({method}); "
            "give a folder of its weights in bf16, fp16 or fp32"
        )


def recurrent(model: PreTrainedModel) -> bool:
    """Return whether a model keeps more than tokens' keys and values: a state that cannot be cut back to a prefix."""
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    return model._is_stateful or not {reach.kind for reach in reaches(model.config)} <= attention


_DROPOUT = re.compile("drop")  # names of dropout probabilities in a configuration


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return (
        f"the weight {shown}"
        if len(names) == 1
        else f"{len(names)} weights ({shown}{', ...' if len(names) > 3 else ''})"
    )


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' CausalLM of a configuration; the base of all models if it has none."""
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel))


def load_config(path: str, *, offline: bool = False):
    """Load the checkpoint's transformers configuration. Raises UserError if it cannot be loaded."""
    return _from_pretrained(AutoConfig, path, local_files_only=offline)


def generation_config(path: str, *, offline: bool = False) -> dict[str, Any]:
    """Return the contents of the checkpoint's generation_config.json; empty without one.

    Raises:
        UserError: the file is not a JSON object.
    """
    folder = resolve(path)
    name = "generation_config.json"
    try:
        options = {"local_files_only": offline, "_raise_exceptions_for_missing_entries": False}
        file = Path(folder) / name if Path(folder).is_dir() else cached_file(folder, name, **options)
    except OSError:
        file = None
    if file is None or not Path(file).is_file():
        return {}
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); mend or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object; mend or remove it")
    return found


def stop_ids(path: str, *, offline: bool = False) -> list[int]:
    """Return the end-of-text tokens of the checkpoint's generation_config.json. Raises UserError for an invalid id."""
    found = generation_config(path, offline=offline).get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise UserError(
            f"generation_config.json of model path {path!r}: eos_token_id = {found!r}: expected an id or a list of ids"
        )
    return ids


def skeleton(config, path: str = "", attention: str = "eager", dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the CausalLM of a transformers configuration on the meta device: names and shapes, no memory.

    dtype: of its parameters; None: the configuration's.

    Raises:
        UserError: it is not a CausalLM, or this machine lacks the attention. The message names `path`.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"model path {path!r} holds a {config.model_type!r} model; use a decoder-only causal language model"
        )
    options = {"attn_implementation": attention} | ({"dtype": dtype} if dtype else {})
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **options)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"student.attention: {attention} is not to be had for model path {path!r} ({reason}); "
            "set student.attention=auto"
        ) from None


def weight_shapes(config) -> dict[str, torch.Size]:
    """Return the shape of every weight by its name in the checkpoint, a tied head included."""
    return {name: parameter.shape for name, parameter in skeleton(config).named_parameters(remove_duplicate=False)}


def saved_buffers(model: PreTrainedModel) -> list[str]:
    """Return the names of a checkpoint's buffers, which have no gradient and are not in a stream of weights."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    return [name for name in model.state_dict() if name not in weights]


@torch.no_grad()
def round_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round an fp32 model's checkpoint buffers to the values that `load_model` in `dtype` gives a replica."""
    kept = model._keep_in_fp32_modules_strict or ()
    for name in saved_buffers(model):
        buffer = model.get_buffer(name)
        if buffer.dtype == torch.float32 and not set(kept) & set(name.split(".")):
            buffer.data = buffer.data.to(dtype)


def as_saved(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights of `model`, which may be a skeleton, with the names and shapes of its checkpoint.

    transformers loads some under other names, and merges a layer's experts into one tensor. One weight may become
    several, each made from it alone.
    """
    return revert_weight_conversion(model, weights)


def one_as_saved(model: PreTrainedModel) -> Callable[[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return `as_saved` for one weight at a time; weights that a checkpoint holds as the model does cost nothing."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    changed = {name for name, weight in weights.items() if as_saved(model, {name: weight}).get(name) is not weight}
    return lambda name, weight: as_saved(model, {name: weight}) if name in changed else {name: weight}


class Attention(NamedTuple):
    """The sizes that determine a key/value cache, and over how many ranks heads can be shared."""

    layers: int
    heads: int  # of queries
    kv_heads: int
    head_dim: int


def attention_shape(config) -> Attention:
    """Return the attention sizes of a transformers configuration's decoder."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1  # a model without attention has no key/value cache
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Attention(text.num_hidden_layers, heads, getattr(text, "num_key_value_heads", None) or heads, width)


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless every token of the student, special ones included, has the same id in the teacher.

    The teacher may have further added tokens: it gets the student's ids, which never include them.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    added = {token.content for token in teacher.added_tokens_decoder.values()}
    taken = set(ours.values())
    differing = {token for token in ours.keys() | (theirs.keys() - added) if ours.get(token) != theirs.get(token)}
    differing |= {token for token in added - ours.keys() if theirs.get(token) in taken}
    if differing:
        first = min(differing, key=lambda token: ours.get(token, theirs.get(token, 0)))
        raise UserError(
            f"student.path and teacher.path have different tokenizers: {len(differing)} tokens differ, first {first!r} "
            f"(student id {ours.get(first)}, teacher id {theirs.get(first)}); use a teacher of the student's family"
        )
