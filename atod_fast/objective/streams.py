"""The paper's equation as per-token streams, which the loss reads without knowing their meaning.

    A_t = kappa(s) * w_k(t) * [log pi_T(a_t) - log pi_old(a_t)]  +  rho(s) * A_RL

The bracket is the sampled-token estimate of the reverse KL (k1), used as an advantage and so without gradient: as a
loss its gradient would not depend on the teacher. The T-DUR weights w scale this term alone. The other
divergences are losses D:

    L = rho * L_clip(A_RL)  +  kappa * sum_t m_t w_k(t) D_t / sum_t m_t

where rho is folded into the advantage (the clipped surrogate is homogeneous) and kappa * w is the divergence weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from atod_kernels import DIVERGENCES
from torch import Tensor

from atod_fast.batches import TurnTable
from atod_fast.config import Objective

# These need the teacher's whole distribution at each token; k1, k2 and k3 need the log-prob of the sampled one.
FULL_VOCABULARY = DIVERGENCES


@dataclass(frozen=True, slots=True)
class Streams:
    """Per-token constants of an update, all [A], fp32 or wider, without gradient."""

    advantage: Tensor  # the hybrid A_t (k1), or rho * A_RL
    reward_advantage: Tensor  # rho * A_RL, the part of `advantage` that is not imitation; only diagnostics read it
    entropy_weight: Tensor  # coefficient of the entropy bonus (objective.entropy_bonus)
    old_logp: Tensor  # log-probs before the step's first update
    policy_weight: Tensor  # truncated importance weight of trainer against rollout engine; scales the policy term only
    weight: Tensor  # aggregation: the loss is the sum over the mini-batch's tokens of weight * token loss
    divergence_weight: Tensor | None = None  # kappa * w; None if the divergence is not a loss (k1) or kappa is 0
    teacher_logp: Tensor | None = None  # for k2 and k3
    # objective.ratio=sequence: log of the ratio of the token's response under the weights of this update.
    response_log_ratio: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the streams in use, by name: the `inputs` of `linear_token_loss`. `Streams(**tensors)` inverts it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The A action tokens of a micro-batch before its update."""

    turn: Tensor  # [A] int64, the turn's number in the TurnTable
    old_logp: Tensor  # [A] fp32, the trainer's log-probs before the step's first update
    teacher_logp: Tensor | None  # [A] fp32; None in a step without the teacher
    rollout_logp: Tensor  # [A] fp32, the rollout engine's log-probs


def step_streams(
    objective: Objective,
    minibatches: Sequence[Sequence[Tokens]],
    minibatch_turns: Sequence[Tensor],
    *,
    table: TurnTable,
    kappa: float,
    rho: float,
    turn_weight: Tensor,
    rl_advantage: Tensor,
    kept: Tensor | None = None,
) -> list[list[Streams]]:
    """Return the streams of every micro-batch of a step: the hybrid advantage and all else that the loss reads.

    minibatches: of this rank, each a list of micro-batches. minibatch_turns: each whole mini-batch's turns [M] over all
    ranks; its loss is a mean over their tokens. table: of all turns. turn_weight, rl_advantage [K]. kept: bool [K],
    False for a turn that is left out of the loss; None: no turn is.
    """
    return [
        [
            make_streams(
                objective,
                kappa,
                rho,
                turn=tokens.turn,
                old_logp=tokens.old_logp,
                teacher_logp=tokens.teacher_logp,
                rollout_logp=tokens.rollout_logp,
                turn_weight=turn_weight,
                rl_advantage=rl_advantage,
                token_weight=token_weights(objective.aggregation, tokens.turn, table, turns),
                kept=kept,
            )
            for tokens in minibatch
        ]
        for minibatch, turns in zip(minibatches, minibatch_turns, strict=True)
    ]


def needs_teacher(kappa: float) -> bool:
    """Return whether a step at this kappa uses the teacher; at 0 its forward pass is skipped."""
    return kappa > 0


@torch.no_grad()
def make_streams(
    objective: Objective,
    kappa: float,
    rho: float,
    turn: Tensor,
    old_logp: Tensor,
    teacher_logp: Tensor | None,
    rollout_logp: Tensor,
    turn_weight: Tensor,
    rl_advantage: Tensor,
    token_weight: Tensor,
    kept: Tensor | None = None,
) -> Streams:
    """Return the streams of A action tokens, in the dtype and on the device of `old_logp`.

    turn [A] int64 (number in the TurnTable); old_logp, rollout_logp, token_weight [A]; turn_weight, rl_advantage and
    kept (bool; None = all) [K], on any device. teacher_logp [A] is needed for k1, k2 and k3 while kappa > 0. The tokens
    of a turn that is not kept have no advantage, divergence or entropy weight: their loss is 0, and they stay in the
    mean that the loss is. Raises ValueError for log-probs below fp32.
    """
    if old_logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"old_logp is {old_logp.dtype}: ratios of log-probs need fp32, score in fp32")
    reward_advantage = rho * rl_advantage.to(old_logp)[turn]
    advantage, divergence_weight, read = reward_advantage, None, None
    if needs_teacher(kappa):
        imitation = kappa * turn_weight.to(old_logp)[turn]
        if objective.divergence in FULL_VOCABULARY:
            divergence_weight = imitation
        elif teacher_logp is None:
            raise ValueError(
                f"teacher_logp is None, but objective.divergence={objective.divergence} reads it while kappa > 0 "
                f"(kappa={kappa:g})"
            )
        elif objective.divergence == "k1":
            log_ratio = teacher_logp - old_logp
            if objective.log_ratio_clip > 0:
                log_ratio = log_ratio.clamp(-objective.log_ratio_clip, objective.log_ratio_clip)
            advantage = imitation * log_ratio + reward_advantage
        else:
            divergence_weight, read = imitation, teacher_logp

    policy_weight = torch.ones_like(old_logp)
    if objective.tis_cap > 0:
        policy_weight = (old_logp - rollout_logp).exp().clamp(max=objective.tis_cap)
    entropy_weight = torch.full_like(old_logp, objective.entropy_bonus)
    if kept is not None:
        inside = kept.to(turn.device)[turn]
        advantage, reward_advantage, entropy_weight = (
            torch.where(inside, values, 0.0) for values in (advantage, reward_advantage, entropy_weight)
        )
        if divergence_weight is not None:
            divergence_weight = torch.where(inside, divergence_weight, 0.0)
    return Streams(
        advantage=advantage,
        reward_advantage=reward_advantage,
        entropy_weight=entropy_weight,
        old_logp=old_logp,
        policy_weight=policy_weight,
        weight=token_weight.to(old_logp),
        divergence_weight=divergence_weight,
        teacher_logp=read,
    )


def token_weights(aggregation: str, turn: Tensor, table: TurnTable, minibatch_turns: Tensor) -> Tensor:
    """Return each action token's weight in the loss, [A] fp32, on turn's device: a plain sum becomes the mean.

    token       1 / tokens of the mini-batch
    turn        1 / (turns * tokens of the token's turn)
    trajectory  1 / (trajectories * tokens of the token's trajectory), within the mini-batch: with
                rollout.context=window it may hold only some of a trajectory's turns

    turn [A]: this rank's tokens; minibatch_turns [M]: the turns of the whole mini-batch, over all ranks and
    micro-batches; the weights of all their tokens sum to 1. A token whose turn is not among them has weight 0.
    """
    length = torch.zeros(len(table.length), dtype=torch.float64)  # tokens of each turn that are in the mini-batch
    minibatch_turns = minibatch_turns.cpu()
    length[minibatch_turns] = table.length[minibatch_turns].double()
    match aggregation:
        case "token":
            tokens, units = length.sum().expand_as(length), 1
        case "turn":
            tokens, units = length, (length > 0).sum()
        case "trajectory":
            trajectory = torch.repeat_interleave(torch.arange(len(table.reward)), table.offsets.diff())
            per_trajectory = torch.bincount(trajectory, length, minlength=len(table.reward))
            tokens, units = per_trajectory[trajectory], (per_trajectory > 0).sum()
        case _:
            raise ValueError(f"aggregation={aggregation!r} is not token, trajectory or turn")
    weight = torch.where(length > 0, 1 / (units * tokens), 0.0)  # [K]
    return weight.float().to(turn.device)[turn]
