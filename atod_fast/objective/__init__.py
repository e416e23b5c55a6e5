"""What a step's turns are worth: trajectories in, per-token weight streams and an algorithm-blind loss out.

`turns` the T-DUR turn weights · `advantage` the group advantages · `streams` the paper's equation · `loss` what a token
costs. How much imitation and reward there is (kappa, rho) comes from outside. Nothing here knows models or process
groups.
"""

from .advantage import Advantages, rl_advantages
from .loss import diagnostics, loss_function, token_loss
from .streams import FULL_VOCABULARY, Streams, Tokens, make_streams, needs_teacher, step_streams, token_weights
from .turns import TurnWeights, profile, token_signals, weigh_turns

__all__ = [
    "FULL_VOCABULARY",
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
    "weigh_turns",
]
