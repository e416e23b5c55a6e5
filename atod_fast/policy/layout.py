"""Finds the parts of a transformers causal language model: backbone, decoder blocks, embedding, head and logits.

All code that treats these parts apart (the fused head, sharding, weight streams, the memory plan) finds them here, by
what transformers says of a model and not by one family's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atod_fast.errors import UserError

# Configuration attributes that scale logits; some families divide by theirs, some multiply.
SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
COLUMNS = 64  # of the head, when logits are compared


Head = TypeVar("Head", bound=nn.Module)


class Parts(NamedTuple, Generic[Head]):
    """The modules that a `ModelLayout` names. A tuple, so that a module may hold it without registering them again."""

    backbone: nn.Module
    blocks: nn.ModuleList
    embedding: nn.Embedding
    head: Head


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Names of a model's parts, as `get_submodule` takes them."""

    backbone: str  # its forward returns the last hidden states, after the last norm
    blocks: str  # a ModuleList with one entry per layer
    embedding: str
    head: str  # a linear layer
    tied: bool  # the head's weight is the embedding's

    def parts(self, model: nn.Module, head_type: type[Head] = nn.Linear) -> Parts[Head]:
        """Return the modules themselves, of `model` or of a module with the same names and a head of another type."""
        names = self.backbone, self.blocks, self.embedding, self.head
        backbone, blocks, embedding, head = map(model.get_submodule, names)
        assert isinstance(blocks, nn.ModuleList) and isinstance(embedding, nn.Embedding) and isinstance(head, head_type)
        return Parts(backbone, blocks, embedding, head)


def refuse(config, what: str) -> NoReturn:
    """Raise UserError: a model of this configuration's type `what`."""
    raise UserError(f"a model of type {config.model_type!r} {what}; use another model")


def find_layout(model: PreTrainedModel) -> ModelLayout:
    """Return the layout of a decoder-only causal language model, with real weights or on the meta device.

    Raises:
        UserError: a part is missing or not of the expected kind, or the model is more than a text decoder.
    """
    config = model.config
    if config.is_encoder_decoder:
        refuse(config, "has an encoder beside its decoder")
    if config.get_text_config(decoder=True) is not config:
        refuse(config, "holds its text decoder inside a larger model (of images, sound or text)")
    names = {module: name for name, module in model.named_modules()}
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stacks = [stack for stack in stacks if len(stack) == config.num_hidden_layers]
    if not stacks:
        refuse(config, "has no list of num_hidden_layers blocks")
    blocks = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
    backbone = names[blocks].rpartition(".")[0]
    if not backbone:
        refuse(config, "has no backbone apart from its head")
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        embedding = head = None
    if not isinstance(embedding, nn.Embedding) or not names[embedding].startswith(f"{backbone}."):
        refuse(config, "has no token embedding in its backbone")
    if not isinstance(head, nn.Linear) or "." in names[head]:
        refuse(config, "has no linear head on its backbone")
    apart = sum(len(list(block.parameters())) for block in blocks)
    if apart != len(list(blocks.parameters())) or any(p is embedding.weight for p in blocks.parameters()):
        refuse(config, "shares parameters between its blocks")
    tied = head.weight is embedding.weight
    return ModelLayout(backbone, names[blocks], names[embedding], names[head], tied)


class _Hidden:
    """A stand-in for a backbone's output that holds the last hidden states alone."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index):
        return (self.last_hidden_state,)[index]


class Logits(NamedTuple):
    """How a head's products become logits: softcap * tanh(scale * product / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


@torch.no_grad()
def find_logits(model: PreTrainedModel, layout: ModelLayout) -> Logits:
    """Return the scale (1, or as one of `SCALES` says) and softcap with which the head gives the model's own logits.

    They are found by comparison on random hidden states and a few random columns, so that the model may be on the meta
    device.

    Raises:
        UserError: no scale and softcap give the model's logits.
    """
    config, parts = model.config, layout.parts(model)
    head, backbone = parts.head, parts.backbone
    softcap = next((value for key in SOFTCAPS if (value := getattr(config, key, None)) is not None), None)
    told = [value for key in SCALES if isinstance(value := getattr(config, key, None), int | float) and value > 0]
    generator, dtype = torch.Generator().manual_seed(0), head.weight.dtype
    hidden = torch.randn(1, 3, head.in_features, generator=generator) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    hidden = hidden.to(dtype)
    columns = {"weight": torch.randn(COLUMNS, head.in_features, generator=generator) / head.in_features**0.5}
    if head.bias is not None:
        columns["bias"] = torch.randn(COLUMNS, generator=generator)
    columns = {name: nn.Parameter(value.to(dtype)) for name, value in columns.items()}
    raw = nn.functional.linear(hidden, columns["weight"], columns.get("bias"))[0].float()
    given = dict(head._parameters)
    head._parameters.update(columns)
    backbone.forward = lambda *args, **kwargs: _Hidden(hidden)  # an instance's attribute precedes its class's method
    try:
        logits = model.forward(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits[0].float()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        logits = hidden.new_empty(0)  # it needs more than the last hidden states
    finally:
        del backbone.forward
        head._parameters.update(given)
    near: list[tuple[float, float]] = []  # (mean error, scale): in 16 bits several may be near
    for scale in (1.0, *told, *(1 / value for value in told)):
        expected = raw * scale
        if softcap is not None:
            expected = softcap * torch.tanh(expected / softcap)
        bound = TOLERANCE.get(dtype, 1e-4) * expected.abs().amax(-1, keepdim=True)
        if logits.shape == raw.shape and not logits.is_meta and bool(((logits - expected).abs() <= bound).all()):
            near.append(((logits - expected).abs().mean().item(), float(scale)))
    if near:
        return Logits(min(near, key=lambda found: found[0])[1], softcap)
    refuse(config, "makes its logits by more than a linear head, a constant factor and a softcap")
