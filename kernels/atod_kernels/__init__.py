"""Exact divergence, entropy and log-probability per token without a [tokens, vocabulary] matrix, and turn weights.

The package needs torch, uses Triton on GPUs and knows nothing of any trainer.
"""

from .divergence import TokenDivergence, TokenLogprob, linear_divergence, linear_logprob
from .names import DIVERGENCES, MIXTURES
from .token_loss import linear_token_loss
from .turns import TurnWeights, expand_turns, turn_reduce, turn_weight_report, turn_weights, unweighted

__all__ = [
    "DIVERGENCES",
    "MIXTURES",
    "TokenDivergence",
    "TokenLogprob",
    "TurnWeights",
    "expand_turns",
    "linear_divergence",
    "linear_logprob",
    "linear_token_loss",
    "turn_reduce",
    "turn_weight_report",
    "turn_weights",
    "unweighted",
]

__version__ = "0.1.0"
