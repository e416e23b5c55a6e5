"""Sizes of a causal language model, and the bytes that its parts hold."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from atod_fast.models import attention_shape
from atod_fast.policy.layout import find_layout
from atod_fast.policy.sharding import RESHARD_PARAMETERS


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one causal language model. Parameters are counted once where they are shared."""

    parameters: int
    block: int  # parameters of the largest block
    active: int  # parameters of a block that one token passes through: of experts, those that are chosen for it
    root: int  # parameters outside the blocks: embedding, last norm, head
    layers: int
    hidden: int
    intermediate: int  # of the feed-forward parts one token passes through
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    routed: int  # experts of a block that one token passes through; 0: no mixture


def shape_of(model: PreTrainedModel) -> Shape:
    """Return the sizes of a model, which may be on the meta device. Raises UserError if its layout is unknown."""
    blocks = find_layout(model).parts(model).blocks
    return _shape(model, [sum(p.numel() for p in block.parameters()) for block in blocks])


def whole_shape_of(model: PreTrainedModel) -> Shape:
    """Return the sizes of a model that is not trained and may have any layout: all parameters count as its root."""
    return _shape(model, [0])


def _shape(model: PreTrainedModel, blocks: list[int]) -> Shape:
    config = model.config
    text = config.get_text_config(decoder=True)
    parameters = sum(p.numel() for p in model.parameters())
    return Shape(
        parameters=parameters,
        block=max(blocks),
        active=_active(text, max(blocks)),
        root=parameters - sum(blocks),
        hidden=text.hidden_size,
        intermediate=_intermediate(text),
        **attention_shape(config)._asdict(),
        vocabulary=text.vocab_size,
        routed=getattr(text, "num_experts_per_tok", None) or 0,
    )


def _active(text, block: int) -> int:
    """Return how many of a block's parameters one token passes through: all, but for the experts not chosen for it."""
    if not getattr(text, "num_experts_per_tok", None):
        return block
    shape = attention_shape(text)
    attention = 2 * text.hidden_size * shape.head_dim * (shape.heads + shape.kv_heads)
    return min(block, attention + 3 * text.hidden_size * _intermediate(text))


def _intermediate(text) -> int:
    """Return the width of the feed-forward parts that one token passes through: all its experts, or the only one.

    Four times the hidden size if the configuration does not say.
    """
    names = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    width = next((value for name in names if (value := getattr(text, name, None)) is not None), 4 * text.hidden_size)
    experts = getattr(text, "num_experts_per_tok", None)
    if experts:
        return experts * (getattr(text, "moe_intermediate_size", None) or width)
    return max(width) if isinstance(width, list | tuple) else width


def block_activations(shape: Shape, bytes_: int) -> int:
    """Return the bytes per token that a block keeps for its backward pass: transformers' Qwen3 block without liger.

    With c bytes an element, H hidden, I intermediate, N + K query and key heads of D:

        2 H (4 + 2c)          two RMSNorms: input in fp32, normalised, scaled
        (N + K) D (4 + 3c)    query and key norm likewise, rotated; attention's output and value
        4 c I                 gate, its SiLU, up, their product
        4 (2N + K + 2)        the norms' and the softmax's fp32 normalisers
        2 c R H               input and output of each of the R experts that a token passes through
    """
    heads, kv = shape.heads, shape.kv_heads
    return (
        2 * shape.hidden * (4 + 2 * bytes_)
        + (heads + kv) * shape.head_dim * (4 + 3 * bytes_)
        + 4 * bytes_ * shape.intermediate
        + 4 * (2 * heads + kv + 2)
        + 2 * bytes_ * shape.routed * shape.hidden
    )


def activations(shape: Shape, bytes_: int, checkpointing: bool) -> int:
    """Return the bytes per token that a forward pass keeps: the last norm and all blocks.

    With checkpointing: the last norm, every block's input and one block.
    """
    block = block_activations(shape, bytes_)
    kept = shape.layers * bytes_ * shape.hidden + block if checkpointing else shape.layers * block
    return kept + shape.hidden * (4 + bytes_)


def gathered(shape: Shape, bytes_: int) -> int:
    """Return the bytes of the parameters that FSDP2 gathers: root and two blocks, or all of a small model."""
    whole = (
        shape.parameters
        if shape.parameters <= RESHARD_PARAMETERS
        else min(shape.parameters, shape.root + 2 * shape.block)
    )
    return whole * bytes_


def cache_line(shape: Shape, bytes_: int) -> int:
    """Return the bytes of key/value cache per token: key and value of every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_
