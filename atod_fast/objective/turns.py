"""T-DUR turn weights: imitate most where student and teacher disagree or the student is uncertain (paper).

    d_k = mean_t |log pi_old(a_t) - log pi_T(a_t)|      disagreement of turn k
    h_k = mean_t (-log pi_old(a_t))                     uncertainty of turn k
    d~, h~ = min-max over the turns of a trajectory     0.5 if a signal's range is below 1e-8
    w_k = 1 - (1 - d~_k) (1 - h~_k)                     soft-OR, in [0, 1]

A trajectory with fewer than `min_turns` turns, or none whose d_k reaches `min_disagreement`, keeps w = 1. The weights
scale only the imitation term (streams.py). `token_signals` gives the per-token terms of d and h; the learner averages
them per turn (all-gathered into the TurnTable); `weigh_turns` does the rest. `config.Turns` documents the variants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from atod_kernels import turn_weight_report
from torch import Tensor

from atod_fast.batches import TurnTable
from atod_fast.config import Turns


@dataclass(frozen=True, slots=True)
class WeighedTurns:
    """The turn weights of a step, and how many trajectories were left unweighted."""

    weight: Tensor  # [K] fp32, w_k
    unweighted: float  # share of trajectories that keep w = 1 because they are short or agree with the teacher
    fallbacks: int  # budget mean1: trajectories left at w = 1 because no scale of their scope gives mean 1


def token_signals(
    config: Turns,
    old_logp: Tensor,
    teacher_logp: Tensor,
    entropy: Tensor,
    divergence: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the per-token terms of d and h, to be averaged over each turn. All tensors are [A].

    The entropy of pi_old and the full-vocabulary divergence are read if the configuration asks for exact signals.
    """
    disagreement = divergence if config.disagreement == "exact" else (old_logp - teacher_logp).abs()
    uncertainty = entropy if config.uncertainty == "exact" else -old_logp
    return disagreement, uncertainty


def weigh_turns(table: TurnTable, config: Turns, generator: torch.Generator | None = None) -> WeighedTurns:
    """Return w_k of every turn of the step. fuse=shuffled draws from `generator`, seeded alike on every rank."""
    acted = table.length > 0  # a turn without tokens has no signals to be compared by
    report = turn_weight_report(
        table.disagreement[acted],
        table.uncertainty[acted],
        torch.nn.functional.pad(acted.cumsum(0), (1, 0))[table.offsets],
        turn_lengths=table.length[acted],
        normalise=config.normalise,
        fuse=config.fuse,
        budget=config.budget,
        scope=config.scope,
        min_turns=config.min_turns,
        min_disagreement=config.min_disagreement,
        generator=generator,
    )
    weight = torch.ones_like(table.disagreement).masked_scatter(acted, report.weights)
    return WeighedTurns(weight, report.unweighted.double().mean().item(), int(report.fallback.sum()))


def profile(values: Tensor, offsets: Tensor) -> list[float]:
    """Return the mean of `values` [K] by turn index, over the trajectories that have such a turn; offsets [N+1]."""
    index = torch.cat([torch.arange(0), *(torch.arange(size) for size in offsets.diff().tolist())])
    return (torch.bincount(index, values.double()) / torch.bincount(index)).tolist()
