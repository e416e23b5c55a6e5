"""What a step's turns are worth: trajectories in, per-token weight streams and an algorithm-blind loss out.

`schedule` how much imitation and how much reward (kappa, rho) · `turns` the T-DUR turn weights · `advantage` the group
advantages · `streams` the paper's equation · `loss` what a token costs. Nothing here knows models or process groups.
"""

from .advantage import Advantages, rl_advantages
from .loss import diagnostics, loss_function, token_loss
from .schedule import AdaptiveKappa, needs_teacher, value
from .streams import FULL_VOCABULARY, Streams, Tokens, make_streams, step_streams, token_weights
from .turns import TurnWeights, profile, token_signals, weigh_turns

__all__ = [
    "FULL_VOCABULARY",
    "AdaptiveKappa",
    "Advantages",
    "Streams",
    "Tokens",
    "TurnWeights",
    "diagnostics",
    "loss_function",
    "make_streams",
    "needs_teacher",
    "profile",
    "rl_advantages",
    "step_streams",
    "token_loss",
    "token_signals",
    "token_weights",
    "value",
    "weigh_turns",
]
