"""Reinforcement-learning advantages: a turn's reward compared with those of its group.

A turn (verl-agent: a row) earns its trajectory's reward less a penalty if its action is invalid,
r_k = R_n - penalty * invalid_k; `objective.invalid` defines invalid. The group's statistics are taken over

    rows        the r_k of all its turns, so a long trajectory counts more often (verl-agent's default)
    trajectory  the R_n of its trajectories, each once and without penalty

    grpo    (r_k - mean) / (std + eps), or without the division (Dr. GRPO)
    rloo    r_k - mean of the other trajectories' R (baseline `trajectory` alone: a turn's other rows hold its own R)
    gigpo   grpo + omega * the same score of the discounted return, penalty included, among the turns of the group that
            saw the same observation (arXiv 2505.10978, eq. 3 and 5 to 8; verl-agent gigpo/core_gigpo.py)

std is the unbiased one (n - 1), torch.std's default, as in verl's and verl-agent's GRPO and GiGPO. Two differences from
them, where nothing can be compared: a group of one keeps its raw reward there and is its own mean here; in a group
without variance a z-score is 0 here, while they may divide a penalised row by eps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from atod_fast.batches import TurnTable
from atod_fast.config import Objective


@dataclass(frozen=True, slots=True)
class Advantages:
    """The advantages of a step's turns."""

    turn: Tensor  # [K] fp32, A_RL of the turn's tokens
    flat_groups: float  # share of groups without variance in what is compared: rewards, with `rows` less penalties


def rl_advantages(table: TurnTable, objective: Objective) -> Advantages:
    """Return A_RL of every turn of the step. Turns without action tokens are no rows and enter no statistics."""
    trajectory = torch.repeat_interleave(torch.arange(len(table.reward)), table.offsets.diff())  # [K]
    group = torch.unique(table.group, return_inverse=True)[1]  # [N]
    turn_group = group[trajectory]  # [K]
    is_row = table.length > 0
    right = table.well_formed if objective.invalid == "form" else table.valid
    penalty = objective.invalid_penalty * (~right).double()
    reward = table.reward.double()[trajectory] - penalty

    if objective.baseline == "rows":
        own, peers = reward, _Groups.of(reward[is_row], turn_group[is_row], len(group))
    else:
        own, peers = reward + penalty, _Groups.of(table.reward.double(), group, len(group))

    if objective.advantage == "rloo":
        advantage = reward - peers.mean_of_others(own, turn_group)
    else:
        advantage = peers.score(reward, turn_group, objective)
    if objective.advantage == "gigpo":
        anchor_group = torch.unique(torch.stack([turn_group, table.anchor], dim=1), dim=0, return_inverse=True)[1]
        step_return = discounted_returns(table.turn_reward, table.offsets, objective.gigpo_gamma) - penalty
        alike = _Groups.of(step_return[is_row], anchor_group[is_row], len(anchor_group))
        advantage = advantage + objective.gigpo_omega * alike.score(step_return, anchor_group, objective)
    return Advantages(torch.where(is_row, advantage, 0.0).float(), peers.flat_share())


def discounted_returns(turn_reward: Tensor, offsets: Tensor, gamma: float) -> Tensor:
    """Return sum_{j >= k} gamma^(j-k) r_j within each trajectory (GiGPO, eq. 5). [K], [N+1] -> [K] fp64."""
    returns = turn_reward.tolist()
    for start, end in pairwise(offsets.tolist()):
        for k in range(end - 2, start - 1, -1):
            returns[k] += gamma * returns[k + 1]
    return torch.tensor(returns, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Statistics of G groups of values, in fp64."""

    count: Tensor  # [G]
    mean: Tensor  # [G]
    std: Tensor  # [G], unbiased; 0 for a group of one

    @staticmethod
    def of(value: Tensor, group: Tensor, size: int) -> _Groups:
        """Return the statistics of value [M] by group [M] in 0..size-1; a number that is absent is an empty group."""
        count = torch.bincount(group, minlength=size)
        mean = torch.bincount(group, value, minlength=size) / count.clamp(min=1)
        square = torch.bincount(group, (value - mean[group]) ** 2, minlength=size)
        return _Groups(count, mean, (square / (count - 1).clamp(min=1)).sqrt())

    @property
    def flat(self) -> Tensor:
        """Which groups have no variance, [G] bool. Rewards are fp32 sums: less than their resolution is rounding."""
        return self.std <= 1e-6 * self.mean.abs()

    def flat_share(self) -> float:
        """Return the share of non-empty groups that are flat."""
        present = self.count > 0
        return (self.flat & present).sum().item() / max(present.sum().item(), 1)

    def score(self, value: Tensor, group: Tensor, objective: Objective) -> Tensor:
        """Return value [M] centred in its group [M], and divided by the std if the objective says so."""
        centred = value - self.mean[group]
        if not objective.normalise_std:
            return centred
        return torch.where(self.flat[group], 0.0, centred / (self.std[group] + objective.std_epsilon))

    def mean_of_others(self, value: Tensor, group: Tensor) -> Tensor:
        """Return the group's mean without its member `value`; `value` itself in a group of one. [M], [M] -> [M]."""
        count = self.count[group]
        others = (self.mean[group] * count - value) / (count - 1).clamp(min=1)
        return torch.where(count > 1, others, value)
