"""The backends as operators of torch.library, so that torch.compile, fake tensors and autograd treat each as one node.

`head` is differentiable; `head_backward` is its gradient; `chunk_forward` and `chunk_backward` are the two passes of
`linear_token_loss` over one chunk of tokens, between which the caller's loss is evaluated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import algebra
from .problem import Layer, Problem, compute_dtype
from .products import Gradients
from .torch import backend as torch_backend

TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? target, Tensor? temperature, Tensor? valid"
)
OPTIONS = "float softcap, float teacher_softcap, float teacher_scale, str kind, float alpha, str group, int start, bool lean, bool triton"
COMMON = f"{TENSORS}, {OPTIONS}"
WIDTH = COMMON.count(",") + 1  # how many arguments every operator shares


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
    teacher_scale: float,
    *options: Any,
) -> Problem:
    """The operators' common arguments as a `Problem`."""
    student = Layer(student_hidden, student_weight, student_bias, softcap)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Layer(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_scale)
    return Problem(student, teacher, target, temperature, valid, *options)


def compute(function: str, p: Problem, *args: Any) -> Any:
    """A function of the problem's backend, on its device: Triton launches on the current one."""
    if not p.triton:
        return getattr(torch_backend, function)(p, *args)
    from .triton import backend as triton_backend

    with torch.cuda.device_of(p.student.hidden):
        return getattr(triton_backend, function)(p, *args)


@torch.library.custom_op("atod_kernels::head", mutates_args=(), schema=f"({COMMON}) -> Tensor")
def head(*common: Any) -> Tensor:
    """Statistics [STATISTICS, T] of all tokens (`algebra` names the rows)."""
    return compute("head_statistics", problem(*common))


@head.register_fake
def _(student_hidden: Tensor, *args: Any) -> Tensor:
    return student_hidden.new_empty(algebra.STATISTICS, student_hidden.shape[0], dtype=compute_dtype(student_hidden, args[2]))


@torch.library.custom_op(
    "atod_kernels::head_backward",
    mutates_args=(),
    schema=f"({COMMON}, Tensor statistics, Tensor upstream, bool wants_hidden, bool wants_weight, bool wants_bias) -> (Tensor, Tensor, Tensor)",
)
def head_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [T, H], weight [V, H] and bias [V], each empty if not wanted; upstream [STATISTICS, T]."""
    return compute("head_gradients", problem(*args[:WIDTH]), *args[WIDTH:])


@head_backward.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    parameters = (student_hidden, student_weight, student_hidden if student_bias is None else student_bias)
    return tuple(x.new_empty(x.shape) if wanted else student_hidden.new_empty(0) for x, wanted in zip(parameters, args[-3:], strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = TENSORS.count(",") + 1
    # Autograd refuses to save tensors made under torch.inference_mode. None of them is an output, so the context may hold them.
    ctx.inference = [x if x is not None and x.is_inference() else None for x in inputs[:tensors]]
    ctx.save_for_backward(*(None if kept is not None else x for x, kept in zip(inputs, ctx.inference, strict=False)), output)
    ctx.options = inputs[tensors:]


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, output = ctx.saved_tensors
    tensors = [x if kept is None else kept for x, kept in zip(tensors, ctx.inference, strict=True)]
    wanted = ctx.needs_input_grad[:3]
    grads = head_backward(*tensors, *ctx.options, output, upstream, *wanted)
    return (*(g if wants else None for g, wants in zip(grads, wanted, strict=True)), *(None,) * (WIDTH - 3))


head.register_autograd(_backward, setup_context=_save)


# Called under no_grad alone: defined without custom_op's autograd wrapper, whose bookkeeping grows with the square of the number of arguments.
LIBRARY = torch.library.Library("atod_kernels", "FRAGMENT")
LIBRARY.define(f"chunk_forward({COMMON}, int first, int last, Tensor(a!) kept) -> Tensor")
LIBRARY.define(
    f"chunk_backward({COMMON}, int first, int last, Tensor(a!) kept, Tensor statistics, Tensor upstream, Tensor(b!) dx, Tensor(c!) dw, Tensor(d!) db) -> ()"
)


def _chunk_forward(*args: Any) -> Tensor:
    """Statistics [STATISTICS, n] of tokens first to last; leaves their logits in `kept` (`Problem.kept`)."""
    p, (first, last, kept) = problem(*args[:WIDTH]), args[WIDTH:]
    return compute("chunk_statistics", p, slice(first, last), kept)


def _chunk_backward(*args: Any) -> None:
    """Add the gradients of tokens first to last to dx, dw and db (empty = not wanted), overwriting the logits in `kept`."""
    p, (first, last, kept, statistics, upstream, dx, dw, db) = problem(*args[:WIDTH]), args[WIDTH:]
    compute("chunk_gradients", p, slice(first, last), kept, statistics, upstream, Gradients(dx, dw, db))


LIBRARY.impl("chunk_forward", _chunk_forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_backward", _chunk_backward, "CompositeExplicitAutograd")
chunk_forward, chunk_backward = torch.ops.atod_kernels.chunk_forward.default, torch.ops.atod_kernels.chunk_backward.default


@torch.library.register_fake("atod_kernels::chunk_forward")
def _(*args: Any) -> Tensor:
    first, last, kept = args[WIDTH:]
    return kept.new_empty(algebra.STATISTICS, last - first)


@torch.library.register_fake("atod_kernels::chunk_backward")
def _(*args: Any) -> None:
    return None
