"""What is taken over a whole response: the tokens of one turn, which the engine sampled in one request.

The response is GSPO's sequence (arXiv 2507.18071): what the policy says to one prompt. It is the same with
rollout.context=window, where it is the row's only one, and with full, where a row has one a turn. The tokens of a
response lie in one micro-batch, one after the other.
"""

from __future__ import annotations

import math

import torch
from atod_kernels import turn_reduce
from torch import Tensor

from atod_fast.config import Objective


def response_means(values: Tensor, turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of each of the R responses [R], the mean of `values` [A] over it [R], and its tokens [R].

    turn [A] int64: number of each token's turn, equal ones in a row.
    """
    numbers, tokens = torch.unique_consecutive(turn, return_counts=True)
    if not len(numbers):
        return numbers, values.new_zeros(0), tokens
    offsets = torch.nn.functional.pad(tokens.cumsum(0), (1, 0))
    return numbers, turn_reduce(values, offsets, "mean"), tokens


@torch.no_grad()
def response_log_ratio(logp: Tensor, old_logp: Tensor, turn: Tensor) -> Tensor:
    """Return log (pi / pi_old)^(1 / tokens) of each token's response, GSPO's ratio in logs. All [A], `turn` int64."""
    _, means, tokens = response_means(logp - old_logp, turn)
    return torch.repeat_interleave(means, tokens)


def kept_turns(mismatch: Tensor, objective: Objective) -> Tensor:
    """Return which turns stay in the loss, [K] bool: those whose engine and trainer agree within the bound.

    mismatch [K]: mean of log pi_old - log mu over the turn's tokens, mu being the rollout engine's probability. Its exp
    is the geometric mean of the ratio, whose bounds are objective.mismatch_mask and its inverse, as in verl
    (rollout_corr_helper.compute_rollout_rejection_mask, level `geometric`). NaN is not kept.
    """
    return mismatch.abs() <= math.log(objective.mismatch_mask)
