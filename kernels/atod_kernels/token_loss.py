"""Compute any per-token loss and its gradient in one pass, while the logits of a chunk are in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import algebra, operators, validate
from .divergence import TokenDivergence, TokenLogprob, divergence_outputs, logprob_outputs
from .names import DIVERGENCES, IGNORE
from .problem import Problem
from .products import Gradients
from .validate import require

TokenOutputs = TokenDivergence | TokenLogprob
LossFn = Callable[..., Tensor]


def token_outputs(problem: Problem, statistics: Tensor) -> TokenOutputs:
    """Return the outputs from statistics [STATISTICS, n]: of both models, or of the student without a teacher."""
    if problem.teacher is None:
        return logprob_outputs(statistics)
    return divergence_outputs(statistics, problem.target is not None)


class TokenLoss:
    """The caller's loss: its values [n] and their gradients [3, n] with respect to divergence, entropy and logp."""

    def __init__(self, loss_fn: LossFn, inputs: Mapping[str, Any], problem: Problem):
        self.loss_fn, self.inputs, self.problem = loss_fn, inputs, problem

    def __call__(self, stats: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Evaluate the loss for statistics [STATISTICS, n] of the tokens `rows`."""
        target = self.problem.target
        inputs = {k: x[rows] if isinstance(x, Tensor) and x.dim() else x for k, x in self.inputs.items()}
        with torch.enable_grad():
            leaf = stats.detach().requires_grad_()
            losses = self.loss_fn(token_outputs(self.problem, leaf), **inputs)
            n = stats.shape[1]
            found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            require(found == [n], f"loss_fn returned {found}; expected one loss per token, [{n}]")
            if target is not None:
                losses = losses.masked_fill(target[rows] == IGNORE, 0)
            upstream = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)[0] if losses.requires_grad else None
        upstream = torch.zeros_like(stats) if upstream is None else upstream
        return losses.detach().to(stats.dtype), upstream[: algebra.LOGP + 1]

    def in_parts(self, stats: Tensor, parts: list[slice]) -> tuple[Tensor, Tensor]:
        """Evaluate the loss for all tokens, part by part."""
        losses, upstream = zip(*(self(stats[:, rows], rows) for rows in parts), strict=True)
        return torch.cat(losses), torch.cat(upstream, 1)


def assert_separable(loss: TokenLoss, stats: Tensor, losses: Tensor, upstream: Tensor, parts: list[slice]) -> None:
    """Evaluate the loss with the tokens grouped otherwise; raise ValueError if values or gradients differ."""
    tokens = stats.shape[1]
    middle = (tokens + 1) // 2
    others = [slice(0, tokens)] if len(parts) > 1 else [slice(0, middle), slice(middle, tokens)]
    same = torch.ones((), dtype=torch.bool, device=stats.device)
    for a, b in zip((losses, upstream), loss.in_parts(stats, others), strict=True):
        scale = b.nan_to_num(posinf=0, neginf=0).abs().amax() if b.numel() else b.sum()
        same = same & ((a == b) | ((a - b).abs() <= 1e-4 * b.abs() + 1e-5 * scale) | (a.isnan() & b.isnan())).all()
    message = (
        "loss_fn is not a function of one token at a time: values or gradients change with how tokens are grouped; "
        "pass normalisers and [T] tensors as inputs"
    )
    if stats.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(same), message)
    else:
        # It raises on the device, without waiting for it.
        torch._assert_async(same, message)  # pyright: ignore[reportPrivateImportUsage]


class Attach(torch.autograd.Function):
    """Autograd node that gives a loss gradients computed beforehand."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dx: Tensor,
        dw: Tensor,
        db: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(dx, dw, db)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _, *wanted, _, _, _ = ctx.needs_input_grad
        # If the upstream can be read without a sync, it is not rounded to 16 bits, and 1, the usual value, needs no
        # second [V, H].
        free = upstream.device.type == "cpu" and not torch.compiler.is_compiling()
        scale = upstream.item() if free else upstream
        saved = zip(ctx.saved_tensors, wanted, strict=True)
        grads = (None if not want else g if free and scale == 1 else g * scale for g, want in saved)
        return None, *grads, None, None, None


def linear_token_loss(
    loss_fn: LossFn,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    valid_columns: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_scale: float = 1.0,
    vocab_group: str | None = None,
    vocab_start: int = 0,
    schedule: str = "auto",
    backend: str = "auto",
    check: bool = __debug__,
) -> tuple[Tensor, TokenOutputs]:
    """Sum any per-token loss of divergence, entropy and log-probability, and compute its gradient in the same pass.

    One logits product per model, where `linear_divergence` and its backward make two. The statistics are those of
    `linear_divergence` with a teacher and of `linear_logprob` without.

    Args:
        loss_fn: called as loss_fn(stats, **inputs) on a chunk of C tokens; returns their losses [C]. stats is a
            TokenDivergence, or a TokenLogprob without a teacher, of [C] tensors; the loss is differentiated with
            respect to divergence, entropy and logp. It must treat each token by itself: a mean or a normaliser over
            the chunk is wrong; pass normalisers as inputs. It is called several times, so it must not draw random
            numbers or keep state.
        student_hidden, student_weight, teacher_hidden, teacher_weight: as in `linear_divergence`; the teacher's may be
            None, both of them.
        target: as in `linear_divergence`; needed without a teacher. A token whose target is -100 adds nothing, whatever
            loss_fn gives for it.
        inputs: by name; a tensor of one or more dimensions has a row per token and is cut to the chunk, anything else
            is passed as it is. No gradient flows to them.
        schedule: fast (auto) keeps the logits of 256 tokens (CPU; 2048 elsewhere) and computes the gradient from them;
            lean holds a tile at a time and recomputes the logits for the gradient. auto is fast, as it needs a third
            fewer products.
        check: evaluate loss_fn once more with the tokens grouped otherwise and raise if values or gradients differ. It
            costs [T]-sized work; on by default unless Python runs with -O.
        divergence, alpha, temperature, student_bias, teacher_bias, softcap, valid_columns: as in `linear_divergence`.
        teacher_softcap, teacher_scale, vocab_group, vocab_start, backend: as in `linear_divergence`.

    Returns:
        (loss, stats): the scalar sum, fp32 (fp64 if an input is), differentiable once with respect to student_hidden,
        student_weight and student_bias, and the detached statistics of all tokens. The gradients are computed here and
        held until the backward, so do not use it under activation checkpointing. If no input requires a gradient, none
        is computed.

    Raises:
        ValueError: if an argument's type, shape, dtype, device or value is wrong; the message names it. Also if check
            finds loss_fn not separable (on an accelerator a device-side assertion, which ends the CUDA context).
    """
    validate.one_of("divergence", divergence, DIVERGENCES)
    teacher = teacher_hidden is not None
    require(
        teacher == (teacher_weight is not None),
        "teacher_hidden and teacher_weight must be given together; one of them is None",
    )
    require(teacher or target is not None, "target is None; expected token ids [T] where there is no teacher")
    require(
        teacher or (teacher_bias is None and teacher_softcap is None),
        "teacher_bias and teacher_softcap need teacher_hidden, which is None",
    )
    problem = validate.problem(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        target,
        divergence=divergence,
        alpha=alpha,
        temperature=temperature,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        softcap=softcap,
        teacher_softcap=teacher_softcap,
        teacher_scale=teacher_scale,
        valid_columns=valid_columns,
        vocab_group=vocab_group,
        vocab_start=vocab_start,
        schedule=schedule,
        lean_on_cpu=False,
        backend=backend,
    )
    inputs = {} if inputs is None else inputs
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            require(
                x.dim() == 0 or x.shape[0] == problem.tokens,
                f"inputs[{name!r}] has shape {list(x.shape)}; expected [{problem.tokens}, ...] or a scalar",
            )
            require(
                not x.requires_grad,
                f"inputs[{name!r}] requires a gradient; none flows to inputs, pass {name}.detach()",
            )
    parameters = (student_hidden, student_weight, student_bias)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in parameters)
    with torch.no_grad():
        loss = TokenLoss(loss_fn, inputs, problem.detached())
        run = one_pass if any(wanted) and schedule != "lean" else two_passes
        stats, losses, gradients = run(loss, wanted, check)
        total = losses.sum()
    if gradients is not None:
        total = Attach.apply(total, *parameters, *gradients)
    return total, token_outputs(problem, stats)


Gradient = tuple[Tensor, Tensor, Tensor]  # of hidden, weight and bias; empty where not wanted


def two_passes(loss: TokenLoss, wanted: tuple[bool, ...], check: bool) -> tuple[Tensor, Tensor, Gradient | None]:
    """Compute statistics of all tokens, then the loss, then gradients from recomputed logits if any are wanted."""
    problem = loss.problem
    stats = operators.head(problem)
    parts = [slice(0, stats.shape[1])]
    losses, upstream = loss.in_parts(stats, parts)
    if check:
        assert_separable(loss, stats, losses, upstream, parts)
    return stats, losses, operators.head_backward(problem, stats, upstream, *wanted) if any(wanted) else None


def one_pass(loss: TokenLoss, wanted: tuple[bool, ...], check: bool) -> tuple[Tensor, Tensor, Gradient]:
    """Compute logits, statistics, loss and gradients, chunk by chunk."""
    problem = loss.problem
    kept = problem.kept()
    gradients = Gradients.of(problem, *wanted)
    stats = kept.new_empty(algebra.STATISTICS, problem.tokens)
    losses, upstream = kept.new_empty(problem.tokens), kept.new_empty(algebra.LOGP + 1, problem.tokens)
    parts = problem.parts()
    for rows in parts:
        stats[:, rows] = operators.chunk_forward(problem, rows, kept)
        losses[rows], upstream[:, rows] = loss(stats[:, rows], rows)
        operators.chunk_backward(problem, rows, kept, stats[:, rows], upstream[:, rows], gradients)
    if check:
        assert_separable(loss, stats, losses, upstream, parts)
    del kept  # before the results are cast, beside the sums they come from
    return stats, losses, gradients.results(problem)
