"""Attention over rows packed end to end: a token sees earlier tokens of its own row, within a window if there is one.

Registered with transformers as attention "varlen". On CUDA it is torch's own `varlen_attn`, flash attention that needs
no build. Elsewhere sdpa attends the rows one by one, which is the reference for tests. Where rows begin comes with the
batch (`cu_seq_lens`, on the device) and so does the longest row's length (a number on the host): no layer waits for the
device. transformers builds no mask for an attention that it has no mask function for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from atod_fast.errors import UserError
from atod_fast.models import VARLEN, attention_shape, model_class, reaches

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

# A torch without this option takes fewer heads of keys without being told.
_OPTIONS = inspect.signature(varlen_attn).parameters.keys() if varlen_attn else ()
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}
WIDEST = 256  # numbers of a head, at most
# What an attention of transformers may be given beyond a window, and this one does not compute.
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "attention_mask", "dropout")


def lacks(config: PretrainedConfig) -> str | None:
    """Return what `varlen` does not compute of a transformers configuration's model; None if it computes all of it."""
    text = config.get_text_config(decoder=True)
    model = model_class(config)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "softcap of scores"
    if getattr(text, "alibi", False):
        return "ALiBi"
    if any(reach.kind == "chunked_attention" for reach in reaches(config)):
        return "chunked attention"
    # These models name the flash attentions that know their sinks.
    if "flash_attention_2" not in (model._compatible_flash_implementations or ["flash_attention_2"]):
        return "attention sinks"
    if not (model._supports_attention_backend and model._supports_flash_attn):
        return "layers outside transformers' attention interface"
    if (width := _head_width(config)) > WIDEST:
        return f"heads of {width} numbers (it has at most {WIDEST})"
    return None


def _head_width(config: PretrainedConfig) -> int:
    """Return how many numbers a query head has, at most."""
    text = config.get_text_config(decoder=True)
    named = {name: value for name, value in vars(text).items() if name.endswith("head_dim") and type(value) is int}
    latent = named.get("qk_nope_head_dim", 0) + named.get("qk_rope_head_dim", 0)
    return max(attention_shape(config).head_dim, latent, *named.values())


def missing(device: torch.device) -> str | None:
    """Return what this machine lacks to run `varlen` on `device`; None if it can."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "CUDA (this torch is built for ROCm)"
    if varlen_attn is None or not {"scale", "window_size"} <= set(_OPTIONS):
        return f"a newer torch (this is {torch.__version__})"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "a GPU of compute capability 8.0 or higher"
    return None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attend query [B, heads, L, dim] to key and value [B, kv_heads, L, ...]; return [B, L, heads, value dim] and None.

    cu_seq_lens_q: where rows begin in the B*L tokens, and their end, [rows + 1] int32; max_length_q: tokens of the
    longest row. Without them each of the B lines is a row. A token sees `sliding_window` tokens of its row, itself
    included.

    Raises:
        UserError: the model asks for what this attention does not compute.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked = _refused(options | {"attention_mask": attention_mask}) + ([] if causal else ["is_causal=False"])
    lines, _, length, dim = query.shape
    if asked or key.shape[2] != length:
        what = asked[0] if asked else "a cache of keys"
        raise UserError(
            f"student.attention='varlen' does not compute {what}, which {type(module).__name__} asks for; "
            "set student.attention=sdpa or eager"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, lines * length + 1, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    scale = dim**-0.5 if scaling is None else scaling
    kernel = _by_flash if query.is_cuda else _row_by_row
    given = q, k, v, cu_seq_lens_q, max_length_q, scale, sliding_window
    out = kernel(*given)  # pyright: ignore[reportCallIssue] (torch types what `disable` returns as a decorator)
    return out.unflatten(0, (lines, length)), None


def _refused(options: dict[str, object]) -> list[str]:
    """Return the names of the options of an attention that are set and that `attend` does not compute."""
    given = {name: options.get(name) for name in _NOT_COMPUTED}
    return [name for name, value in given.items() if isinstance(value, Tensor) or value]


def _by_flash(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Attend [T, heads, dim] by torch's `varlen_attn`: in 16 bits, with heads widened to a multiple of 8 numbers."""
    assert varlen_attn is not None, "see `missing`"
    given, size = value.dtype, value.shape[-1]
    dtype = torch.bfloat16 if given == torch.float32 else given
    width = -(-max(query.shape[-1], size) // 8) * 8
    q, k, v = (F.pad(tensor, (0, width - tensor.shape[-1])).to(dtype) for tensor in (query, key, value))
    # Bounds are inclusive; (-1, 0) is all of the past.
    bounds = (-1 if window is None else window - 1, 0)
    out = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=bounds, **_GROUPED)
    return cast(Tensor, out)[..., :size].to(given)


@torch.compiler.disable  # it would be compiled anew for every number of rows
def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Attend [T, heads, dim] as `_by_flash` does, on any device and in any precision, with one call for each row."""
    out = []
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (tensor[start:stop].transpose(0, 1)[None] for tensor in (query, key, value))
        seen = None
        if window is not None and window < stop - start:
            place = torch.arange(stop - start, device=query.device)
            seen = (place <= place[:, None]) & (place > place[:, None] - window)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale, enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


AttentionInterface.register(VARLEN, attend)


@torch.no_grad()
def told_of_rows(model: PreTrainedModel) -> bool:
    """Return whether every layer of `model` is an attention that is told where rows begin and what its window is.

    The model, which may be on the meta device, is run on two tokens with an attention that looks at what it is given.
    """
    config, device = model.config, model.device
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    told: list[bool] = []
    windows = [reach.size if reach.kind == "sliding_attention" else None for reach in reaches(config)]

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: object):
        layer = getattr(module, "layer_idx", len(told))
        rows = options.get("cu_seq_lens_q") is starts and options.get("max_length_q") == 1
        told.append(rows and options.get("sliding_window") == windows[layer])
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("atod_probe", look)
    meanwhile: dict[str, object] = {"_attn_implementation": "atod_probe"}
    if device.type == "meta":  # other ways to compute experts look at values, and so does a warning of padding
        meanwhile |= {"_experts_implementation": "batched_mm", "pad_token_id": None}
    try:
        with _set(config, meanwhile):
            model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False, **row_options(starts, 1))
    except Exception:  # the model's code may raise anything
        return False
    return len(told) == config.num_hidden_layers and all(told)


@contextmanager
def _set(config: PretrainedConfig, values: dict[str, object]) -> Iterator[None]:
    given = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(config, name, value)


def row_options(starts: Tensor, longest: int) -> dict[str, Tensor | int]:
    """Return what a transformers backbone hands on to its attention about packed rows, for flash_attention_2 too."""
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
