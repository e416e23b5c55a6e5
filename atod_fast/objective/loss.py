"""The loss of one token, given its statistics and streams; it knows neither turns nor rewards.

    ratio = pi / pi_old = exp(logp - old_logp)
    policy = -min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A),  and for A < 0 at most -dual_clip A
    loss = weight * (policy_weight * policy + divergence_weight * D - entropy_weight * entropy)

The surrogate is that of verl (core_algos.compute_policy_loss), with its clamp of the log-ratio to [-20, 20]; clip_high
is DAPO's (arXiv 2503.14476), dual_clip that of arXiv 1912.09729. With objective.ratio=sequence the ratio is that of the
whole response, s = exp(mean of logp - old_logp), in the form that gives each token a gradient of its own:

    ratio = stop_gradient(s) * pi / stop_gradient(pi)        GSPO-token, arXiv 2507.18071

As s is a constant of the token, the loss stays a function of one token. Where the tokens of a response have one
advantage, its gradient is GSPO's; objective.aggregation=turn is GSPO's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from atod_fast.config import Objective

from .streams import FULL_VOCABULARY, Streams

LOG_RATIO_BOUND = 20.0  # exp() beyond it gives no useful gradient, and 0 * inf would be NaN


class Statistics(Protocol):
    """What the loss reads of the student's `TokenDivergence` or, without a teacher, `TokenLogprob`; [A] each."""

    @property
    def logp(self) -> Tensor: ...

    @property
    def entropy(self) -> Tensor: ...

    @property
    def divergence(self) -> Tensor: ...  # of TokenDivergence alone; without a teacher it is not read


def token_loss(stats: Statistics, streams: Streams, objective: Objective) -> Tensor:
    """Return the loss of each token [A], aggregation weight included: their sum over the mini-batch is the loss.

    It reads the statistics logp, entropy and, for a full-vocabulary objective.divergence, divergence, which may be
    differentiable; of the objective it reads clip, clip_high (0 = clip), dual_clip (0 = off) and divergence. No token
    affects another.
    """
    _, bounded = _ratios(stats, streams, objective)
    loss = -streams.policy_weight * streams.advantage * bounded - streams.entropy_weight * stats.entropy
    if streams.divergence_weight is not None:
        loss = loss + streams.divergence_weight * _divergence(stats, streams, objective)
    return streams.weight * loss


def loss_function(objective: Objective) -> Callable[..., Tensor]:
    """Return `token_loss` as `atod_kernels.linear_token_loss` takes it: (statistics, **streams.tensors()) -> [C]."""
    return lambda stats, **inputs: token_loss(stats, Streams(**inputs), objective)


@torch.no_grad()
def diagnostics(stats: Statistics, streams: Streams, objective: Objective) -> dict[str, Tensor]:
    """Return scalars that, like the loss, add up over micro-batches and ranks to the mini-batch's mean.

    clip_fraction: tokens whose gradient a clip stopped. approx_kl: k3 estimate of KL(old || current), never negative,
    from the tokens' own ratios also with objective.ratio=sequence.
    importance: mean truncated importance weight, 1 if the rollout engine computes as the trainer does. opd and rl: mean
    size of the imitation term (or loss) and of the reward term; their quotient shows the balance.
    """
    ratio, bounded = _ratios(stats, streams, objective)
    changed = _token_ratio(stats, streams)
    opd = (streams.advantage - streams.reward_advantage).abs()
    if streams.divergence_weight is not None:
        opd = (streams.divergence_weight * _divergence(stats, streams, objective)).abs()
    values = {
        "clip_fraction": ((bounded != ratio) & (streams.advantage != 0)).to(ratio.dtype),
        "approx_kl": changed - 1 - changed.log(),
        "entropy": stats.entropy,
        "opd": opd,
        "rl": streams.reward_advantage.abs(),
        "importance": streams.policy_weight,
    }
    return {name: (streams.weight * value).sum() for name, value in values.items()}


def _ratios(stats: Statistics, streams: Streams, objective: Objective) -> tuple[Tensor, Tensor]:
    """Return the ratio [A], and the same within its bounds; where a bound applies it has no gradient.

    max(-r A, -clip(r) A) bounds the ratio above where A > 0 and below where A < 0; dual clip bounds it above there.
    """
    if streams.response_log_ratio is None:
        ratio = _token_ratio(stats, streams)
    else:
        of_response = streams.response_log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        ratio = (of_response + (stats.logp - stats.logp.detach())).exp()
    good = ratio.clamp(max=1 + (objective.clip_high or objective.clip))
    bad = ratio.clamp(1 - objective.clip, objective.dual_clip or None)
    return ratio, torch.where(streams.advantage < 0, bad, good)


def _token_ratio(stats: Statistics, streams: Streams) -> Tensor:
    """Return pi / pi_old of each token, [A]."""
    return (stats.logp - streams.old_logp).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def _divergence(stats: Statistics, streams: Streams, objective: Objective) -> Tensor:
    """Return D_t [A]: the full-vocabulary divergence, or a sampled estimate.

    k2 = (log pi - log pi_T)^2 / 2, whose on-policy expected gradient is the reverse KL's, and k3 = r - log r - 1 with
    r = pi_T / pi, whose on-policy expected gradient is the forward KL's.
    """
    if objective.divergence in FULL_VOCABULARY:
        return stats.divergence
    assert streams.teacher_logp is not None, f"{objective.divergence} reads the teacher's log-probs"
    log_ratio = streams.teacher_logp - stats.logp
    if objective.divergence == "k2":
        return log_ratio**2 / 2
    log_ratio = log_ratio.clamp(max=LOG_RATIO_BOUND)
    return log_ratio.exp() - log_ratio - 1
