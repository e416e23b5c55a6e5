"""Exact per-token divergence, entropy and log-probability from hidden states and head weights, without a [T, V] matrix."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from . import algebra, operators, validate
from .problem import compute_dtype


class TokenDivergence(NamedTuple):
    """Per-token values [T], fp32 (fp64 if an input is fp64). An ignored token is 0 in each. No target: logp and teacher_logp are None."""

    divergence: Tensor
    entropy: Tensor
    logp: Tensor | None
    teacher_logp: Tensor | None
    teacher_entropy: Tensor


class TokenLogprob(NamedTuple):
    """Per-token values [T], fp32 (fp64 if an input is fp64). An ignored token is 0 in both."""

    logp: Tensor
    entropy: Tensor


def head_arguments(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    target: Tensor | None,
    *,
    divergence: str,
    alpha: float,
    temperature: float | Tensor,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    softcap: float | None,
    teacher_softcap: float | None,
    teacher_scale: float,
    valid_columns: Tensor | None,
    vocab_group: str | None,
    vocab_start: int,
    schedule: str,
    lean_on_cpu: bool,
    backend: str,
    prefix: str = "student_",
) -> tuple:
    """The checked arguments of the operators, in their order. `prefix` is how the caller names the student's tensors, `lean_on_cpu` what
    the schedule auto means on the torch backend."""
    validate.one_of("schedule", schedule, validate.SCHEDULES)
    validate.tensor(f"{prefix}hidden", student_hidden, 2)
    device = student_hidden.device
    validate.layer(prefix, student_hidden, student_weight, student_bias, device)
    sizes = (student_weight.shape[0],)
    if teacher_hidden is not None:
        validate.one_of("divergence", divergence, validate.DIVERGENCES)
        validate.layer("teacher_", teacher_hidden, teacher_weight, teacher_bias, device)
        tokens = student_hidden.shape[0]
        validate.require(
            teacher_hidden.shape[0] == tokens,
            f"teacher_hidden has shape {list(teacher_hidden.shape)}; expected [{tokens}, H], as student_hidden",
        )
        sizes += (teacher_weight.shape[0],)
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
    dtype = compute_dtype(student_hidden, teacher_hidden)
    triton = validate.backend(backend, device, dtype)
    student_bias, teacher_bias = (None if bias is None else bias.contiguous() for bias in (student_bias, teacher_bias))
    alpha = validate.alpha(alpha)
    # A mixture that is one of the two models alone is the plain KL, exactly.
    if alpha == 0 and divergence in ("skew_reverse_kl", "skew_forward_kl"):
        divergence = divergence.removeprefix("skew_")
    if vocab_group is None:
        validate.require(vocab_start == 0, f"vocab_start is {vocab_start}; it is only meaningful with vocab_group, which is None")
    else:
        validate.require(len(set(sizes)) == 1, f"vocab_group: student and teacher shards have {sizes} rows; expected the same columns in both")
        validate.group(vocab_group)
        validate.require(vocab_start >= 0, f"vocab_start is {vocab_start}; expected the first column of this rank's shard")
    valid = validate.valid_columns(valid_columns, sizes, vocab_group is not None, device)
    if target is not None:
        target = validate.target(target, student_hidden.shape[0], min(sizes) if vocab_group is None else None, valid, device)
    return (
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        target,
        validate.temperature(temperature, student_hidden.shape[0], dtype, device),
        valid,
        validate.softcap("softcap", softcap),
        validate.softcap("teacher_softcap", teacher_softcap),
        validate.scale(teacher_scale),
        "" if teacher_hidden is None else divergence,
        alpha,
        vocab_group or "",
        vocab_start,
        schedule == "lean" or (schedule == "auto" and lean_on_cpu and not triton),
        triton,
    )


def public(statistics: Tensor, teacher: bool, target: bool) -> TokenDivergence | TokenLogprob:
    """Statistics [STATISTICS, T] as the public tuple; the teacher's values carry no gradient."""
    if not teacher:
        return TokenLogprob(statistics[algebra.LOGP], statistics[algebra.ENTROPY])
    return TokenDivergence(
        statistics[algebra.DIVERGENCE],
        statistics[algebra.ENTROPY],
        statistics[algebra.LOGP] if target else None,
        statistics[algebra.TEACHER_LOGP].detach() if target else None,
        statistics[algebra.TEACHER_ENTROPY].detach(),
    )


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
    """Divergence between two models' next-token distributions, with entropy and log-probabilities, per token.

    Args:
        student_hidden, student_weight: [T, H_s] and [V_s, H_s], one floating dtype. Logits are fp32 whatever it is; the products
            of fp32 inputs on a GPU are as exact as torch.backends.cuda.matmul allows (TF32 off by default).
        teacher_hidden, teacher_weight: [T, H_t] and [V_t, H_t]. H and V may differ between the models, either way round; columns
            beyond the smaller V belong to neither softmax. The teacher's side never gets a gradient.
        target: [T] int64 or int32, the sampled tokens; -100 = ignored: 0 in every output, no gradient.
        divergence: with p the student's and q the teacher's softmax,
            reverse_kl KL(p||q); forward_kl KL(q||p);
            jsd alpha KL(q||m) + (1-alpha) KL(p||m), m = alpha q + (1-alpha) p (GKD's beta is alpha); at alpha 0 or 1 it is
            identically 0, where some libraries switch to a KL;
            skew_reverse_kl KL(p || alpha p + (1-alpha) q); skew_forward_kl KL(q || alpha q + (1-alpha) p) (DistiLLM).
        temperature: number or [T]; everything returned is at it.
        student_bias, teacher_bias: [V]. A bias of -inf is a probability of 0 (without softcap); a target there gives NaN.
        softcap, teacher_softcap: z = softcap * tanh(raw / softcap), after the bias and before the temperature.
        teacher_scale: factor of the teacher's logits after its softcap. A model whose own logits are cap * tanh(s * raw / cap) has the
            softcap cap / s and the factor s; a student's factor is its temperature divided by s, and the teacher's then relative to it.
        valid_columns: bool [V] of either model; False columns are left out of both softmaxes.
        vocab_group, vocab_start: the name of a process group over which both weights are sharded by rows, and the first column of this
            rank's shard. Hidden states and targets are the same on every rank; so are the outputs and the gradient of student_hidden.
            A target that no shard holds gives NaN in the outputs of its token.
        schedule: fast makes tiles of logits with the vendor's products and sums the weight's gradient in one fp32 [V, H]; a mixture keeps
            the logits of a chunk of tokens, as it needs them twice. lean holds less: torch one tile at a time, a mixture recomputing its
            logits; Triton no logits at all (they live in registers); either finishes the gradient of a 16-bit weight slice by slice.
            auto: on torch lean for the KLs, where both do the same products, and fast for the mixtures, which save a quarter of them;
            on Triton fast, as the vendor's products are the faster ones.
        backend: torch, triton, or auto: triton for tensors on a GPU where it is installed and no input is float64.

    Returns:
        TokenDivergence of [T] values. divergence, entropy and logp are differentiable once with respect to student_hidden,
        student_weight and student_bias, for any upstream gradient per token. The backward recomputes the logits bit for bit.

    Raises:
        ValueError: naming the argument and what was expected. Values (target range, offsets, temperature) are read on the CPU only; on
            an accelerator a target out of range or left out gives NaN in the outputs of its token and no gradient, without a device sync.
    """
    validate.require(isinstance(teacher_hidden, Tensor), f"teacher_hidden is {type(teacher_hidden).__name__}; expected a tensor (without one: linear_logprob)")
    arguments = head_arguments(
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
        lean_on_cpu=divergence in ("reverse_kl", "forward_kl"),
        backend=backend,
    )
    return public(operators.head(*arguments), True, target is not None)


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
    """Log-probability of the target and entropy, per token; the arguments are `linear_divergence`'s; auto is lean on torch, fast on Triton.

    Returns:
        TokenLogprob of [T] values, differentiable with respect to hidden, weight and bias for any upstream gradient per token.
    """
    validate.tensor("target", target, 1)
    arguments = head_arguments(
        hidden,
        weight,
        None,
        None,
        target,
        divergence="",
        alpha=0.0,
        temperature=temperature,
        student_bias=bias,
        teacher_bias=None,
        softcap=softcap,
        teacher_softcap=None,
        teacher_scale=1.0,
        valid_columns=valid_columns,
        vocab_group=vocab_group,
        vocab_start=vocab_start,
        schedule=schedule,
        lean_on_cpu=True,
        backend=backend,
        prefix="",
    )
    return public(operators.head(*arguments), False, True)
