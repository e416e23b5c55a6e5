"""The torch backend as operators of torch.library, so that torch.compile, fake tensors and autograd treat each as one node.

`head` is differentiable; `head_backward` is its gradient; `chunk_forward` and `chunk_backward` are the two passes of
`linear_token_loss` over one chunk of tokens, between which the caller's loss is evaluated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import tiles
from . import torch_backend as backend
from .torch_backend import Chunk, Gradients, Layer, Problem, Scratch, compute_dtype


def problem(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    temperature: Tensor | None,
    valid: Tensor | None,
    softcap: float,
    teacher_softcap: float,
    kind: str,
    alpha: float,
    group: str,
    start: int,
    lean: bool,
) -> Problem:
    """The operators' common arguments as a `Problem`."""
    student = Layer(student_hidden, student_weight, student_bias, softcap)
    teacher = None if teacher_hidden is None or teacher_weight is None else Layer(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    return Problem(student, teacher, target, temperature, valid, kind, alpha, group, start, lean)


@torch.library.custom_op("atod_kernels::head", mutates_args=())
def head(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    temperature: Tensor | None,
    valid: Tensor | None,
    softcap: float,
    teacher_softcap: float,
    kind: str,
    alpha: float,
    group: str,
    start: int,
    lean: bool,
) -> Tensor:
    """Statistics [STATISTICS, T] of all tokens (`tiles` names the rows)."""
    args = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, target, temperature, valid)
    return backend.head_statistics(problem(*args, softcap, teacher_softcap, kind, alpha, group, start, lean))


@head.register_fake
def _(student_hidden: Tensor, *args: Any) -> Tensor:
    return student_hidden.new_empty(tiles.STATISTICS, student_hidden.shape[0], dtype=compute_dtype(student_hidden, args[2]))


@torch.library.custom_op("atod_kernels::head_backward", mutates_args=())
def head_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    temperature: Tensor | None,
    valid: Tensor | None,
    softcap: float,
    teacher_softcap: float,
    kind: str,
    alpha: float,
    group: str,
    start: int,
    lean: bool,
    statistics: Tensor,
    upstream: Tensor,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [T, H], weight [V, H] and bias [V], each empty if not wanted; upstream [STATISTICS, T]."""
    args = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, target, temperature, valid)
    p = problem(*args, softcap, teacher_softcap, kind, alpha, group, start, lean)
    return backend.head_gradients(p, statistics, upstream, wants_hidden, wants_weight, wants_bias)


@head_backward.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (student_hidden, student_weight, student_hidden if student_bias is None else student_bias)
    return tuple(x.new_empty(x.shape) if wanted else student_hidden.new_empty(0) for x, wanted in zip(parameters, args[-3:], strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:9], output)
    ctx.options = inputs[9:]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = head_backward(*tensors, *ctx.options, output, upstream, *wanted)
    return (*(g if wants else None for g, wants in zip(grads, wanted, strict=True)), *(None,) * (6 + len(ctx.options)))


head.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("atod_kernels::chunk_forward", mutates_args=("kept",))
def chunk_forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    temperature: Tensor | None,
    valid: Tensor | None,
    softcap: float,
    teacher_softcap: float,
    kind: str,
    alpha: float,
    group: str,
    start: int,
    lean: bool,
    first: int,
    last: int,
    kept: Tensor,
) -> Tensor:
    """Statistics [STATISTICS, n] of tokens first to last; leaves their logits in `kept` [2, n * V]."""
    args = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, target, temperature, valid)
    p = problem(*args, softcap, teacher_softcap, kind, alpha, group, start, lean)
    return backend.chunk_statistics(Chunk(p, slice(first, last)), Scratch.of(p, 4), Scratch(kept, keep=True))


@chunk_forward.register_fake
def _(*args: Any) -> Tensor:
    first, last, kept = args[-3:]
    return kept.new_empty(tiles.STATISTICS, last - first)


@torch.library.custom_op("atod_kernels::chunk_backward", mutates_args=("kept", "dx", "dw", "db"))
def chunk_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    temperature: Tensor | None,
    valid: Tensor | None,
    softcap: float,
    teacher_softcap: float,
    kind: str,
    alpha: float,
    group: str,
    start: int,
    lean: bool,
    first: int,
    last: int,
    kept: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
) -> None:
    """Add the gradients of tokens first to last to dx, dw and db (empty = not wanted), overwriting the logits in `kept`."""
    args = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, target, temperature, valid)
    p = problem(*args, softcap, teacher_softcap, kind, alpha, group, start, lean)
    backend.kept_gradients(Chunk(p, slice(first, last)), Scratch(kept, keep=True), statistics, upstream, Gradients(dx, dw, db))


@chunk_backward.register_fake
def _(*args: Any) -> None:
    return None
