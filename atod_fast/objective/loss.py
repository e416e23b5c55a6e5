"""What one token costs, given its statistics and its streams. Knows neither turns nor rewards.

    ratio = pi / pi_old = exp(logp - old_logp)
    policy = -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A),  and for A < 0 at most -dual_clip A  (arXiv 1912.09729)
    loss = weight * (policy_weight * policy + divergence_weight * D - entropy_weight * entropy)

The surrogate is verl's (core_algos.compute_policy_loss), its clamp of the log-ratio to [-20, 20] included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atod_fast.config import Objective

from .streams import FULL_VOCABULARY, Streams

LOG_RATIO_BOUND = 20.0  # exp() beyond it is no number to learn from, and 0 * inf would be NaN


def token_loss(logp: Tensor, entropy: Tensor, divergence: Tensor | None, streams: Streams, objective: Objective) -> Tensor:
    """Loss of each token, aggregation weight included: their sum over the mini-batch is the loss. [A] -> [A].

    logp, entropy: the student's, differentiable; divergence: the full-vocabulary one where objective.divergence asks for
    it, else unused. Of the objective only clip, dual_clip (0 = off) and divergence are read. No token sees another.
    """
    policy, _ = _surrogate(logp, streams, objective)
    loss = streams.policy_weight * policy - streams.entropy_weight * entropy
    if streams.divergence_weight is not None:
        loss = loss + streams.divergence_weight * _divergence(logp, divergence, streams, objective)
    return streams.weight * loss


def loss_function(objective: Objective) -> Callable[..., Tensor]:
    """`token_loss` in the form `atod_kernels.linear_token_loss` takes: (statistics, **streams.tensors()) -> [C]."""

    def loss(stats: Any, **inputs: Tensor) -> Tensor:
        return token_loss(stats.logp, stats.entropy, getattr(stats, "divergence", None), Streams(**inputs), objective)

    return loss


@torch.no_grad()
def diagnostics(logp: Tensor, entropy: Tensor, divergence: Tensor | None, streams: Streams, objective: Objective) -> dict[str, Tensor]:
    """Scalars that, like the loss, add up over micro-batches and ranks to the mini-batch's mean.

    clip_fraction: tokens whose gradient a clip stopped. approx_kl: KL(old || current) by its k3 estimate, never negative.
    opd and rl: mean size of the imitation and the reward term; their quotient is the balance to log. Where imitation is a
    loss, its size is that of the loss term.
    """
    _, clipped = _surrogate(logp, streams, objective)
    log_ratio = (logp - streams.old_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    opd = (streams.advantage - streams.reward_advantage).abs()
    if streams.divergence_weight is not None:
        opd = (streams.divergence_weight * _divergence(logp, divergence, streams, objective)).abs()
    values = {
        "clip_fraction": clipped.to(logp.dtype),
        "approx_kl": log_ratio.exp() - 1 - log_ratio,
        "entropy": entropy,
        "opd": opd,
        "rl": streams.reward_advantage.abs(),
    }
    return {name: (streams.weight * value).sum() for name, value in values.items()}


def _surrogate(logp: Tensor, streams: Streams, objective: Objective) -> tuple[Tensor, Tensor]:
    """Clipped policy loss [A], and [A] bool: a clip decides it, so it has no gradient."""
    advantage = streams.advantage
    ratio = (logp - streams.old_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    free, bounded = -advantage * ratio, -advantage * ratio.clamp(1 - objective.clip, 1 + objective.clip)
    policy = torch.maximum(free, bounded)
    clipped = bounded > free
    if objective.dual_clip > 0:
        worst = -objective.dual_clip * advantage
        clipped = clipped | ((advantage < 0) & (policy > worst))
        policy = torch.where(advantage < 0, torch.minimum(policy, worst), policy)
    return policy, clipped


def _divergence(logp: Tensor, divergence: Tensor | None, streams: Streams, objective: Objective) -> Tensor:
    """D_t [A]. Sampled: k2 = (log pi - log pi_T)^2 / 2, whose on-policy expected gradient is the reverse KL's, and
    k3 = r - log r - 1 with r = pi_T / pi, whose on-policy expected gradient is the forward KL's."""
    if objective.divergence in FULL_VOCABULARY:
        return divergence
    log_ratio = streams.teacher_logp - logp
    if objective.divergence == "k2":
        return log_ratio**2 / 2
    log_ratio = log_ratio.clamp(max=LOG_RATIO_BOUND)
    return log_ratio.exp() - log_ratio - 1
