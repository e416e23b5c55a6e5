"""The objective: turns in, per-token weight streams and a loss that knows nothing of the algorithm out.

`turns` the T-DUR turn weights · `advantage` the group advantages · `responses` what is taken over a turn's response ·
`streams` the paper's equation · `loss` the loss per token. The amounts of imitation and reward (kappa, rho) come from
outside. Nothing here knows models or process groups.
"""

from .advantage import Advantages, rl_advantages
from .loss import diagnostics, loss_function, token_loss
from .responses import kept_turns, response_log_ratio, response_means
from .streams import FULL_VOCABULARY, Streams, Tokens, make_streams, needs_teacher, step_streams, token_weights
from .turns import WeighedTurns, profile, token_signals, weigh_turns

__all__ = [
    "FULL_VOCABULARY",
    "Advantages",
    "Streams",
    "Tokens",
    "WeighedTurns",
    "diagnostics",
    "kept_turns",
    "loss_function",
    "make_streams",
    "needs_teacher",
    "profile",
    "response_log_ratio",
    "response_means",
    "rl_advantages",
    "step_streams",
    "token_loss",
    "token_signals",
    "token_weights",
    "weigh_turns",
]
