"""The readable reference: the same quantities from full [T, V] logits with torch's own autograd, in fp32 or fp64.

For tests and benchmarks. It holds several [T, V] tensors; the package's own functions compute the same without them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .divergence import TokenDivergence, TokenLogprob
from .names import FORWARD_KL, IGNORE, REVERSE_KL, SKEW_FORWARD_KL, SKEW_REVERSE_KL


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: int,
    temperature: float | Tensor,
    softcap: float | None,
) -> Tensor:
    """Return logits [T, columns] in fp32 (fp64 for fp64 inputs), with bias, softcap, then temperature applied."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    z = hidden.to(dtype) @ weight[:columns].to(dtype).T
    if bias is not None:
        z = z + bias[:columns].to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / (temperature[:, None].to(dtype) if isinstance(temperature, Tensor) else temperature)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) per row of log-probabilities; a column where a is zero adds nothing."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b).masked_fill(a == 0, 0), 0).sum(-1)


def entropy_of(log_p: Tensor) -> Tensor:
    """Return the entropy [T] of log-probabilities [T, V]."""
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1)


def sampled(log_p: Tensor, target: Tensor) -> Tensor:
    """Return the log-probability of the target [T]."""
    return log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]


def mixture(log_p: Tensor, log_q: Tensor, p_share: float) -> Tensor:
    """Return log-probabilities [T, V] of the mixture p_share p + (1 - p_share) q."""
    parts = [log + math.log(share) for log, share in ((log_p, p_share), (log_q, 1 - p_share)) if share > 0]
    return parts[0] if len(parts) == 1 else torch.logaddexp(*parts)


def divergence_of(log_p: Tensor, log_q: Tensor, kind: str, alpha: float) -> Tensor:
    """Return the divergence [T] of a kind in `names.DIVERGENCES` between log-probabilities [T, V]."""
    if kind == REVERSE_KL:
        return kl(log_p, log_q)
    if kind == FORWARD_KL:
        return kl(log_q, log_p)
    if kind == SKEW_REVERSE_KL:
        return kl(log_p, mixture(log_p, log_q, alpha))
    if kind == SKEW_FORWARD_KL:
        return kl(log_q, mixture(log_p, log_q, 1 - alpha))
    m = mixture(log_p, log_q, 1 - alpha)
    return alpha * kl(log_q, m) + (1 - alpha) * kl(log_p, m)


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
    teacher_softcap: float | None = None,
    teacher_scale: float = 1.0,
    valid_columns: Tensor | None = None,
) -> TokenDivergence:
    """Compute `atod_kernels.linear_divergence` from full logits.

    Logits must be finite; excluded columns are cut out, so that autograd sees no -inf.
    """
    columns = min(student_weight.shape[0], teacher_weight.shape[0])
    keep = (
        torch.arange(columns, device=student_hidden.device)
        if valid_columns is None
        else valid_columns[:columns].nonzero()[:, 0]
    )
    log_p = logits(student_hidden, student_weight, student_bias, columns, temperature, softcap)[:, keep].log_softmax(-1)
    with torch.no_grad():
        z = logits(teacher_hidden, teacher_weight, teacher_bias, columns, temperature, teacher_softcap)
        log_q = (z * teacher_scale)[:, keep].log_softmax(-1)
    values = divergence_of(log_p, log_q, divergence, alpha)
    entropy, teacher_entropy = entropy_of(log_p), entropy_of(log_q)
    if target is None:
        return TokenDivergence(values, entropy, None, None, teacher_entropy)
    ids = torch.searchsorted(keep, target.clamp(min=0))
    out = values, entropy, sampled(log_p, ids), sampled(log_q, ids), teacher_entropy
    return TokenDivergence(*(x.masked_fill(target == IGNORE, 0) for x in out))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    valid_columns: Tensor | None = None,
) -> TokenLogprob:
    """Compute `atod_kernels.linear_logprob` from full logits."""
    keep = (
        torch.arange(weight.shape[0], device=weight.device) if valid_columns is None else valid_columns.nonzero()[:, 0]
    )
    log_p = logits(hidden, weight, bias, weight.shape[0], temperature, softcap)[:, keep].log_softmax(-1)
    out = sampled(log_p, torch.searchsorted(keep, target.clamp(min=0))), entropy_of(log_p)
    return TokenLogprob(*(x.masked_fill(target == IGNORE, 0) for x in out))
