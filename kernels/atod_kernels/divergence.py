"""Compute exact divergence, entropy and log-probability per token from hidden states and head weights.

No [T, V] matrix is made.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import algebra, operators, validate
from .names import FORWARD_KL, REVERSE_KL
from .validate import require


class TokenDivergence(NamedTuple):
    """Divergence, entropies and log-probabilities per token: [T] each, fp32 (fp64 if an input is fp64).

    All are 0 for an ignored token.

    Attributes:
        divergence: of the two distributions; negative only by rounding.
        entropy: the student's, in nats.
        logp: the student's log-probability of the target; None without a target.
        teacher_logp: the teacher's log-probability of the target; None without a target.
        teacher_entropy: the teacher's, in nats.
    """

    divergence: Tensor
    entropy: Tensor
    logp: Tensor | None
    teacher_logp: Tensor | None
    teacher_entropy: Tensor


class TokenLogprob(NamedTuple):
    """Log-probability and entropy per token of one model: [T] each, fp32 (fp64 if an input is fp64).

    Both are 0 for an ignored token.

    Attributes:
        logp: log-probability of the target.
        entropy: in nats.
    """

    logp: Tensor
    entropy: Tensor


def divergence_outputs(statistics: Tensor, target: bool) -> TokenDivergence:
    """Return both models' outputs from statistics [STATISTICS, T]; the teacher's are detached."""
    return TokenDivergence(
        statistics[algebra.DIVERGENCE],
        statistics[algebra.ENTROPY],
        statistics[algebra.LOGP] if target else None,
        statistics[algebra.TEACHER_LOGP].detach() if target else None,
        statistics[algebra.TEACHER_ENTROPY].detach(),
    )


def logprob_outputs(statistics: Tensor) -> TokenLogprob:
    """Return one model's outputs from statistics [STATISTICS, T]."""
    return TokenLogprob(statistics[algebra.LOGP], statistics[algebra.ENTROPY])


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
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
) -> TokenDivergence:
    """Compute the divergence of two models' next-token distributions, with entropy and log-probabilities, per token.

    The results are exact, over the full vocabulary. They are differentiable once with respect to student_hidden,
    student_weight and student_bias, for any upstream gradient per token of divergence, entropy and logp; the backward
    recomputes the logits bit for bit. The teacher's side never gets a gradient.

    Args:
        student_hidden: [T, H_s], floating.
        student_weight: [V_s, H_s], of the dtype of student_hidden. Logits are fp32 whatever it is; the products of fp32
            inputs on a GPU are as exact as torch.backends.cuda.matmul allows (TF32 off by default).
        teacher_hidden: [T, H_t]. H and V may differ between the models, either way round.
        teacher_weight: [V_t, H_t]. Columns beyond the smaller V belong to neither softmax.
        target: [T] int64 or int32, the sampled tokens; -100 means ignored: 0 in every output, no gradient.
        divergence: with p the student's and q the teacher's softmax, one of
            reverse_kl: KL(p || q);
            forward_kl: KL(q || p);
            jsd: alpha KL(q || m) + (1 - alpha) KL(p || m), m = alpha q + (1 - alpha) p (GKD, arXiv 2306.13649; its beta
            is alpha). At alpha 0 or 1 it is 0 everywhere, where some libraries switch to a KL;
            skew_reverse_kl: KL(p || alpha p + (1 - alpha) q), and
            skew_forward_kl: KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898).
        alpha: a number in [0, 1]; the two KLs do not use it.
        temperature: a positive number or [T]. All outputs are of logits divided by it.
        student_bias: [V_s]. A bias of -inf is a probability of 0 (without softcap); a target there gives NaN.
        teacher_bias: [V_t].
        softcap: z = softcap * tanh(raw / softcap) of the student, after the bias and before the temperature.
        valid_columns: bool [V] of either model; False columns are left out of both softmaxes.
        teacher_softcap: the teacher's softcap.
        teacher_scale: factor of the teacher's logits after its softcap. A model whose own logits are
            cap * tanh(s * raw / cap) has the softcap cap / s and the factor s; a student's factor is its temperature
            divided by s, and the teacher's then relative to it.
        vocab_group: the name of a process group over which both weights are sharded by rows. Hidden states and targets
            are the same on every rank; so are the outputs and the gradient of student_hidden. A target that no shard
            holds gives NaN in the outputs of its token.
        vocab_start: the first column of this rank's shard.
        schedule: fast makes tiles of logits with the vendor's products and sums the weight's gradient in one fp32
            [V, H]; a mixture keeps the logits of a chunk of tokens, as it needs them twice. lean holds less: torch one
            tile at a time, a mixture recomputing its logits; Triton no logits at all (they live in registers); either
            finishes the gradient of a 16-bit weight slice by slice. auto: on torch lean for the KLs, where both do the
            same products, and fast for the mixtures, which save a quarter of them; on Triton fast, as the vendor's
            products are the faster ones.
        backend: torch, triton, or auto: triton for tensors on a GPU where it is installed and no input is float64.

    Returns:
        TokenDivergence of [T] values.

    Raises:
        ValueError: if an argument's type, shape, dtype, device or value is wrong; the message names it. Values (target
            range, temperature) are read on the CPU only. On an accelerator a target that is out of range or left out
            gives NaN in the outputs of its token and no gradient, without a device sync.
    """
    require(
        isinstance(teacher_hidden, Tensor),
        f"teacher_hidden is {type(teacher_hidden).__name__}; expected a tensor (without one: linear_logprob)",
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
        lean_on_cpu=divergence in (REVERSE_KL, FORWARD_KL),
        backend=backend,
    )
    return divergence_outputs(operators.head(problem), target is not None)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    valid_columns: Tensor | None = None,
    vocab_group: str | None = None,
    vocab_start: int = 0,
    schedule: str = "auto",
    backend: str = "auto",
) -> TokenLogprob:
    """Compute the log-probability of the target and the entropy of one model's next-token distribution, per token.

    The results are differentiable once with respect to hidden, weight and bias, for any upstream gradient per token.

    Args:
        hidden: [T, H], floating.
        weight: [V, H], of the dtype of hidden. Logits are fp32 whatever it is.
        target: [T] int64 or int32; -100 means ignored: 0 in both outputs, no gradient.
        bias: [V].
        schedule: as in `linear_divergence`; auto is lean on torch and fast on Triton.
        temperature, softcap, valid_columns, vocab_group, vocab_start, backend: as in `linear_divergence`.

    Returns:
        TokenLogprob of [T] values.

    Raises:
        ValueError: as in `linear_divergence`.
    """
    validate.tensor("target", target, 1)
    problem = validate.problem(
        hidden,
        weight,
        target=target,
        temperature=temperature,
        student_bias=bias,
        softcap=softcap,
        valid_columns=valid_columns,
        vocab_group=vocab_group,
        vocab_start=vocab_start,
        schedule=schedule,
        lean_on_cpu=True,
        backend=backend,
        prefix="",
    )
    return logprob_outputs(operators.head(problem))
