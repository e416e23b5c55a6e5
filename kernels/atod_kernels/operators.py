"""Register the head's operators with torch.library, so that torch.compile and autograd treat each as one node.

`head` is differentiable; `head_backward` is its gradient; `chunk_forward` and `chunk_backward` are the two passes of
`linear_token_loss` over one chunk of tokens, between which the caller's loss is evaluated.

A schema cannot contain a dataclass: the operators `*_op` take the fields of a problem, the functions a `Problem`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import algebra
from .problem import FIELDS, OPTIONS, PARAMETERS, SCHEMA, TENSORS, Problem
from .products import Gradients
from .torch import backend as torch_backend


def compute(function: str, problem: Problem, *args: Any) -> Any:
    """Call a function of the problem's backend, with the problem's device as the current one for Triton."""
    if not problem.triton:
        return getattr(torch_backend, function)(problem, *args)
    from .triton import backend as triton_backend

    with torch.cuda.device_of(problem.student_hidden):
        return getattr(triton_backend, function)(problem, *args)


def head(problem: Problem) -> Tensor:
    """Return the statistics [STATISTICS, T] of all tokens, differentiable with respect to the student's tensors.

    `algebra` names the rows.
    """
    return head_op(*problem.flat())


def head_backward(
    problem: Problem, statistics: Tensor, upstream: Tensor, hidden: bool, weight: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of hidden [T, H], weight [V, H] and bias [V], empty if not wanted, for upstream [>= 3, T]."""
    return head_backward_op(statistics, upstream, hidden, weight, bias, *problem.flat())


def chunk_forward(problem: Problem, rows: slice, kept: Tensor) -> Tensor:
    """Return the statistics [STATISTICS, n] of the tokens `rows`; leaves their logits in `kept` (`Problem.kept`)."""
    return chunk_forward_op(rows.start, rows.stop, kept, *problem.flat())


def chunk_backward(
    problem: Problem, rows: slice, kept: Tensor, statistics: Tensor, upstream: Tensor, gradients: Gradients
) -> None:
    """Add the gradients of the tokens `rows` to `gradients`, overwriting the logits in `kept`.

    statistics [STATISTICS, n] and upstream [>= 3, n] are those of the chunk.
    """
    sums = gradients.dx, gradients.dw, gradients.db
    chunk_backward_op(rows.start, rows.stop, kept, statistics, upstream, *sums, *problem.flat())


@torch.library.custom_op("atod_kernels::head", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def head_op(*problem: Any) -> Tensor:
    """`head` as an operator."""
    return compute("head_statistics", Problem(*problem))


@head_op.register_fake
def _(*problem: Any) -> Tensor:
    p = Problem(*problem)
    return p.student_hidden.new_empty(algebra.STATISTICS, p.tokens, dtype=p.dtype)


@torch.library.custom_op(
    "atod_kernels::head_backward",
    mutates_args=(),
    schema=(
        "(Tensor statistics, Tensor upstream, bool wants_hidden, bool wants_weight, bool wants_bias, "
        f"{SCHEMA}) -> (Tensor, Tensor, Tensor)"
    ),
)
def head_backward_op(
    statistics: Tensor, upstream: Tensor, wants_hidden: bool, wants_weight: bool, wants_bias: bool, *problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_backward` as an operator."""
    wanted = wants_hidden, wants_weight, wants_bias
    return compute("head_gradients", Problem(*problem), statistics, upstream, *wanted)


@head_backward_op.register_fake
def _(
    statistics: Tensor, upstream: Tensor, wants_hidden: bool, wants_weight: bool, wants_bias: bool, *problem: Any
) -> tuple[Tensor, Tensor, Tensor]:
    p = Problem(*problem)

    def gradient(parameter: Tensor | None, wanted: bool) -> Tensor:
        return (
            parameter.new_empty(parameter.shape) if wanted and parameter is not None else p.student_hidden.new_empty(0)
        )

    return (
        gradient(p.student_hidden, wants_hidden),
        gradient(p.student_weight, wants_weight),
        gradient(p.student_bias, wants_bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values = dict(zip(FIELDS, inputs, strict=True))
    tensors = [values[name] for name in TENSORS]
    # Autograd refuses to save tensors made under torch.inference_mode. None of them is an output, so ctx may hold them.
    ctx.inference = [x if x is not None and x.is_inference() else None for x in tensors]
    saved = (None if kept is not None else x for x, kept in zip(tensors, ctx.inference, strict=True))
    ctx.save_for_backward(*saved, output)
    ctx.options = {name: values[name] for name in OPTIONS}


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *saved, statistics = ctx.saved_tensors
    tensors = [x if kept is None else kept for x, kept in zip(saved, ctx.inference, strict=True)]
    problem = Problem(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
    needed = dict(zip(FIELDS, ctx.needs_input_grad, strict=True))
    wanted = [needed[name] for name in PARAMETERS]
    found = zip(PARAMETERS, head_backward(problem, statistics, upstream, *wanted), strict=True)
    gradients = {name: gradient for name, gradient in found if needed[name]}
    return tuple(gradients.get(name) for name in FIELDS)


head_op.register_autograd(_backward, setup_context=_save)


# Only called under no_grad, so defined without custom_op's autograd wrapper, whose cost grows with the square of the
# number of arguments.
LIBRARY = torch.library.Library("atod_kernels", "FRAGMENT")
LIBRARY.define(f"chunk_forward(int first, int last, Tensor(a!) kept, {SCHEMA}) -> Tensor")
LIBRARY.define(
    "chunk_backward(int first, int last, Tensor(a!) kept, Tensor statistics, Tensor upstream, "
    f"Tensor(b!) dx, Tensor(c!) dw, Tensor(d!) db, {SCHEMA}) -> ()"
)


def _chunk_forward(first: int, last: int, kept: Tensor, *problem: Any) -> Tensor:
    return compute("chunk_statistics", Problem(*problem), slice(first, last), kept)


def _chunk_backward(
    first: int,
    last: int,
    kept: Tensor,
    statistics: Tensor,
    upstream: Tensor,
    dx: Tensor,
    dw: Tensor,
    db: Tensor,
    *problem: Any,
) -> None:
    rows, gradients = slice(first, last), Gradients(dx, dw, db)
    compute("chunk_gradients", Problem(*problem), rows, kept, statistics, upstream, gradients)


LIBRARY.impl("chunk_forward", _chunk_forward, "CompositeExplicitAutograd")
LIBRARY.impl("chunk_backward", _chunk_backward, "CompositeExplicitAutograd")
chunk_forward_op = torch.ops.atod_kernels.chunk_forward.default
chunk_backward_op = torch.ops.atod_kernels.chunk_backward.default


@torch.library.register_fake("atod_kernels::chunk_forward")
def _(first: int, last: int, kept: Tensor, *problem: Any) -> Tensor:
    return kept.new_empty(algebra.STATISTICS, last - first)


@torch.library.register_fake("atod_kernels::chunk_backward")
def _(*args: Any) -> None:
    return None
