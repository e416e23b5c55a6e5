"""Compute divergences, entropy and gradients from one tile of logits [n tokens, w columns], zs and zt (teacher).

Forward, one online pass. Each tile leaves a few sums per token, relative to its own maximum m; u = z - m, e = exp(u):

    S = sum e_s     R = sum e_s u_s     Q = sum e_t     U = sum e_t u_t     y = z[target]
    X = sum e_s (u_s - u_t)  (reverse KL)   or   sum e_t (u_t - u_s)  (forward KL)

`merge` rescales the sums of many tiles (or vocabulary shards) to a common maximum M; `statistics` finishes:

    log p = u_s - log S      entropy = log S - R/S      logp = y - M_s - log S
    KL(p||q) = X/S - log S + log Q                      KL(q||p) = X/Q - log Q + log S

Only differences to the maximum are used, so large logits (1e4) lose no precision. The mixtures need log S and log Q
first, so they pass over the tile a second time. With D = m/p = a + b q/p, m = a p + b q:

    jsd                a = 1-alpha, b = alpha     a KL(p||m) + b KL(q||m)     f' = -a log D
    skew_forward_kl    a = 1-alpha, b = alpha     KL(q||m)                    f' = -a (q/p) / D
    skew_reverse_kl    a = alpha, b = 1-alpha     KL(p||m)                    f' = -log D - a / D

Backward, for per-token upstream g (divergence), h (entropy), lp (log-probability), with respect to the scaled logits:

    d KL(p||q) = p (log p - log q - KL)     d KL(q||p) = p - q     d mixture = p (f' - sum p f')
    d entropy  = -p (log p + entropy)       d logp = onehot - p

and the factor 1/temperature * (1 - (z temperature / softcap)^2) turns these into gradients of the raw logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .names import FORWARD_KL, JSD, MIXTURES, NO_TEACHER, REVERSE_KL, SKEW_FORWARD_KL, SKEW_REVERSE_KL

# Rows of partial sums [PARTIALS, ..., n]. The student's four and the teacher's four are in the same order.
MAX_S, SUM_S, DOT_S, PICK_S, MAX_T, SUM_T, DOT_T, PICK_T, CROSS, OWNED = range(10)
PARTIALS = 10

# Rows of the statistics [STATISTICS, n]. The first five are the public outputs.
DIVERGENCE, ENTROPY, LOGP, TEACHER_LOGP, TEACHER_ENTROPY, SHIFT_S, LOG_S, SHIFT_T, LOG_T, MEAN_SLOPE = range(10)
SHIFTS, LOGS = slice(SHIFT_S, MEAN_SLOPE, 2), slice(LOG_S, MEAN_SLOPE, 2)  # of both models
STATISTICS = 10
OUTPUTS = 5


@dataclass(frozen=True)
class Mixture:
    """A divergence against the mixture m = a p + b q; it needs both softmaxes' normalisers first."""

    kind: str
    a: float
    b: float

    @staticmethod
    def of(kind: str, alpha: float) -> Mixture | None:
        """Return the mixture of a divergence; None for a KL and for kind '' (one model)."""
        if kind not in MIXTURES:
            return None
        return Mixture(kind, alpha, 1 - alpha) if kind == SKEW_REVERSE_KL else Mixture(kind, 1 - alpha, alpha)

    def ratio(self, log_p: Tensor, log_q: Tensor, difference: Tensor) -> tuple[Tensor, Tensor]:
        """Return q/p and D = m/p, both [n, w], and write log q - log p to `difference`.

        The difference is clamped to +-80, as exp could overflow; beyond it p or q is below e^-80, and so is its share
        of the sum.
        """
        torch.sub(log_q, log_p, out=difference).clamp_(-80, 80)
        ratio = difference.exp()
        return ratio, (ratio * self.b).add_(self.a)

    def value(self, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return the tile's part of the divergence and of sum p f', [2, n]. Overwrites log_p."""
        ratio, mean = self.ratio(log_p, log_q, log_p)
        log_mean = mean.log()
        if self.kind == SKEW_REVERSE_KL:
            return torch.stack(((p * log_mean).sum(1).neg_(), (p * (log_mean + self.a / mean)).sum(1).neg_()))
        towards_q = (q * (log_p - log_mean)).sum(1)
        if self.kind == SKEW_FORWARD_KL:
            return torch.stack((towards_q, (p * ratio / mean).sum(1).mul_(-self.a)))
        towards_p = (p * log_mean).sum(1).mul_(-self.a)
        return torch.stack((towards_p + self.b * towards_q, towards_p))

    def slope(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Return f' [n, w]. Overwrites log_q."""
        ratio, mean = self.ratio(log_p, log_q, log_q)
        if self.kind == JSD:
            return mean.log_().mul_(-self.a)
        if self.kind == SKEW_FORWARD_KL:
            return ratio.div_(mean).mul_(-self.a)
        return mean.log().neg_().sub_(mean.reciprocal_().mul_(self.a))


def pick(z: Tensor, target: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Return the targets' columns [n, 1] within a tile z [..., n, w], and which of them [n, 1] lie in it.

    start: the vocabulary column of the tile's first column.
    """
    local = (target - start)[:, None]
    return local.clamp(0, z.shape[-1] - 1), (local >= 0) & (local < z.shape[-1])


def picked(z: Tensor, target: Tensor, start: int, out: Tensor) -> None:
    """Write the targets' logits found in the tile z [models, n, w], and which were found, into out [PARTIALS, n]."""
    where, inside = pick(z, target, start)
    out[PICK_S : MAX_T * len(z) : MAX_T] = z.gather(2, where.expand(len(z), -1, -1)).masked_fill_(~inside, 0)[:, :, 0]
    out[OWNED] = inside[:, 0]


def partial(z: Tensor, kind: str, scratch: Tensor, out: Tensor) -> None:
    """Write the sums over logits z [models, n, w], student first, into out [PARTIALS, n, 1].

    scratch [2 models + 1, n, w] is overwritten.
    """
    models = len(z)
    u, e, x = scratch.split((models, models, 1))
    top, total, dot = (out[row : MAX_T * models : MAX_T] for row in (MAX_S, SUM_S, DOT_S))
    torch.sub(z, torch.amax(z, 2, True, out=top), out=u)
    torch.sum(torch.exp(u, out=e), 2, True, out=total)
    if kind in (REVERSE_KL, FORWARD_KL):
        mine, other = (0, 1) if kind == REVERSE_KL else (1, 0)
        torch.sum(torch.sub(u[mine], u[other], out=x[0]).mul_(e[mine]), 1, True, out=out[CROSS])
    torch.sum(u.mul_(e), 2, True, out=dot)


def merge(parts: Tensor, kind: str) -> Tensor:
    """Merge the sums [PARTIALS, k, n] of k disjoint column sets into those of their union, [PARTIALS, n]."""
    out = torch.empty_like(parts[:, 0])
    shift, scale = {}, {}
    for first in (MAX_S, MAX_T):
        torch.amax(parts[first], 0, out=out[first])
        shift[first] = parts[first] - out[first]
        scale[first] = shift[first].exp()
        out[first + 1] = (scale[first] * parts[first + 1]).sum(0)
        out[first + 2] = (scale[first] * (parts[first + 2] + shift[first] * parts[first + 1])).sum(0)
        out[first + 3] = parts[first + 3].sum(0)
    mine, other = (MAX_T, MAX_S) if kind == FORWARD_KL else (MAX_S, MAX_T)
    out[CROSS] = (scale[mine] * (parts[CROSS] + (shift[mine] - shift[other]) * parts[mine + 1])).sum(0)
    out[OWNED] = parts[OWNED].sum(0)
    return out


def statistics(sums: Tensor, kind: str) -> Tensor:
    """Return the statistics [STATISTICS, n] of merged sums [PARTIALS, n].

    A mixture's DIVERGENCE and MEAN_SLOPE are 0 until `second_look`.
    """
    out = sums.new_zeros(STATISTICS, sums.shape[1])
    student = (MAX_S, SHIFT_S, LOG_S, ENTROPY, LOGP)
    teacher = (MAX_T, SHIFT_T, LOG_T, TEACHER_ENTROPY, TEACHER_LOGP)
    for first, shift, log, entropy, logp in (student,) if kind == NO_TEACHER else (student, teacher):
        out[shift] = sums[first]
        torch.log(sums[first + 1], out=out[log])
        out[entropy] = out[log] - sums[first + 2] / sums[first + 1]
        out[logp] = sums[first + 3] - sums[first] - out[log]
    if kind == REVERSE_KL:
        out[DIVERGENCE] = sums[CROSS] / sums[SUM_S] - out[LOG_S] + out[LOG_T]
    elif kind == FORWARD_KL:
        out[DIVERGENCE] = sums[CROSS] / sums[SUM_T] - out[LOG_T] + out[LOG_S]
    return out


def second_look(z: Tensor, stats: Tensor, mixture: Mixture) -> Tensor:
    """Return a mixture's divergence and mean slope [2, n] over logits z [2, n, w], from known normalisers.

    stats: [STATISTICS, n, 1].
    """
    log_p, log_q = (z - stats[SHIFTS]).sub_(stats[LOGS])
    return mixture.value(log_p.exp(), log_q.exp(), log_p, log_q)


def factors(stats: Tensor, upstream: Tensor, kind: str) -> Tensor:
    """Return the three per-token factors [3, n] from which `logit_gradient` forms the gradient of every logit.

    They are own, other and constant in exp(u_s) (own u_s + other x + constant), where x is u_t for the reverse KL and
    f' for a mixture; the forward KL adds other exp(u_t) instead. 1/S and 1/Q are folded in.

    stats [STATISTICS, n]; upstream [3, n] of divergence, entropy and logp.
    """
    g, h, lp = upstream
    log_s, log_t = stats[LOG_S], stats[LOG_T]
    own, other, constant = -h, g, h * (log_s - stats[ENTROPY]) - lp
    if kind == REVERSE_KL:
        own, other, constant = own + g, -g, constant - g * (log_s - log_t + stats[DIVERGENCE])
    elif kind == FORWARD_KL:
        other, constant = -g * (log_s - log_t).exp(), constant + g
    else:
        constant = constant - g * stats[MEAN_SLOPE]
    return torch.stack((own, other, constant)) * log_s.neg().exp()


def logit_gradient(z: Tensor, stats: Tensor, factors: Tensor, kind: str, mixture: Mixture | None, e: Tensor) -> Tensor:
    """Write the gradient of the student's scaled logits over z[0], without the target's onehot, and return it.

    z [models, n, w] and e [n, w] are overwritten; stats [STATISTICS, n, 1], factors [3, n, 1].
    """
    own, other, constant = factors.unbind(0)
    us, *of_teacher = z.sub_(stats[SHIFTS][: len(z)])
    torch.exp(us, out=e)
    if not of_teacher:
        return us.mul_(own).add_(constant).mul_(e)
    x = of_teacher[0]
    if mixture is not None:
        x = mixture.slope(us, x.add_(stats[LOG_S] - stats[LOG_T]))  # log q against u_s = log p: log S is added to both
    dz = us.mul_(own)
    if kind == FORWARD_KL:
        return dz.add_(constant).mul_(e).addcmul_(x.exp_(), other)
    return dz.addcmul_(x, other).add_(constant).mul_(e)


def softcap_slope(z: Tensor, cap: Tensor) -> Tensor:
    """Return the softcap's slope 1 - tanh(raw / softcap)^2 at scaled logits z [n, w]; 0 where masked.

    cap: [n, 1], the softcap, scaled as z is.
    """
    return (z / cap).square_().clamp_(max=1).neg_().add_(1)
