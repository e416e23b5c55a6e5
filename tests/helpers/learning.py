"""A step of a learner on made-up rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atod_fast import objective, schedules
from atod_fast.batches import Row, TurnTable
from atod_fast.policy.learner import Learner


def learn(
    learner: Learner, rows: Sequence[Row], learning_rate: float
) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """Score rows of two turns each, and update on them; return the metrics, and disagreement and uncertainty."""
    config, turns = learner.config, 2 * len(rows)
    kappa, rho = (schedules.make(slide).value(20) for slide in (config.schedule.kappa, config.schedule.rho))
    minibatches, wholes = learner.partition(rows, step=1)
    scored = learner.score_student(minibatches, learner.score_teacher(minibatches) if kappa else None)
    disagreement, uncertainty = learner.turn_signals(scored, turns)
    table = TurnTable(
        disagreement=disagreement,
        uncertainty=uncertainty,
        length=torch.tensor([b - a for row in rows for a, b in row.spans]),
        well_formed=torch.ones(turns, dtype=torch.bool),
        valid=torch.ones(turns, dtype=torch.bool),
        turn_reward=torch.zeros(turns),
        anchor=torch.zeros(turns, dtype=torch.int64),
        offsets=torch.arange(0, turns + 1, 4),
        reward=torch.randn(turns // 4, generator=torch.Generator().manual_seed(0)),
        success=torch.zeros(turns // 4, dtype=torch.bool),
        group=torch.arange(turns // 4) // 2,
    )
    kept = None
    if config.objective.mismatch_mask:
        kept = objective.kept_turns(learner.mismatch(scored, turns), config.objective)
        assert 3 < kept.sum() < turns - 3
    streams = objective.step_streams(
        config.objective,
        [[micro.tokens for micro in minibatch] for minibatch in scored],
        wholes,
        table=table,
        kappa=kappa,
        rho=rho,
        turn_weight=objective.weigh_turns(table, config.turns).weight,
        rl_advantage=objective.rl_advantages(table, config.objective).turn,
        kept=kept,
    )
    return learner.update(scored, streams, learning_rate), (disagreement, uncertainty)
