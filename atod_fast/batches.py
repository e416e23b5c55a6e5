"""A step's trajectories as tensors: the table of turns for the objective, and the training rows for the policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atod_fast.records import Trajectory, Turn


@dataclass(frozen=True, slots=True)
class TurnTable:
    """All turns of a step over all ranks, in trajectory order. N trajectories, K turns; CPU tensors.

    All that the objective reads; it never sees tokens, models or process groups.
    """

    disagreement: Tensor  # [K] fp32, d_k
    uncertainty: Tensor  # [K] fp32, h_k
    length: Tensor  # [K] int64, action tokens
    well_formed: Tensor  # [K] bool, the response had the required form
    valid: Tensor  # [K] bool, well formed and accepted by the environment
    turn_reward: Tensor  # [K] fp32
    anchor: Tensor  # [K] int64, equal iff the observations before the action are equal (step-level groups of GiGPO)
    offsets: Tensor  # [N+1] int64, turns of trajectory n are offsets[n]:offsets[n+1]
    reward: Tensor  # [N] fp32, trajectory reward
    success: Tensor  # [N] bool
    group: Tensor  # [N] int64


def turn_table(trajectories: Sequence[Trajectory], disagreement: Tensor, uncertainty: Tensor) -> TurnTable:
    """Return the TurnTable of a step's trajectories, with the signals of its turns, [K] fp32 each."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    return TurnTable(
        disagreement=disagreement,
        uncertainty=uncertainty,
        length=torch.tensor([len(turn.action) for turn in turns]),
        well_formed=torch.tensor([turn.well_formed for turn in turns]),
        valid=torch.tensor([turn.valid for turn in turns]),
        turn_reward=torch.tensor([turn.reward for turn in turns], dtype=torch.float32),
        anchor=torch.tensor([_anchor(turn.observation) for turn in turns]),
        offsets=torch.tensor([0, *(len(t.turns) for t in trajectories)]).cumsum(0),
        reward=torch.tensor([t.reward for t in trajectories], dtype=torch.float32),
        success=torch.tensor([t.success for t in trajectories]),
        group=torch.tensor([t.group for t in trajectories]),
    )


def _anchor(observation: str) -> int:
    """Return a 63-bit hash of a text, the same in every run (Python's own hash is not)."""
    return int.from_bytes(blake2b(observation.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: a turn with its prompt (`window`) or a whole trajectory (`full`)."""

    ids: NDArray[np.int32]
    spans: list[tuple[int, int]]  # action token ranges in `ids`, one per turn, ascending; none starts at 0
    turns: list[int]  # index of each span's turn in the step's TurnTable
    logprobs: NDArray[np.float32]  # rollout engine's, all spans concatenated

    @property
    def action_tokens(self) -> int:
        return len(self.logprobs)


def rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    """Return the training rows of a step's trajectories, in trajectory order; turns are numbered as in the TurnTable.

    A turn without action tokens adds nothing to learn from and yields no span (but keeps its number).
    """
    out: list[Row] = []
    number = 0
    for trajectory in trajectories:
        for sequence in [[turn] for turn in trajectory.turns] if trajectory.context == "window" else [trajectory.turns]:
            numbers = range(number, number := number + len(sequence))
            if any(len(turn.action) for turn in sequence):
                out.append(_row(sequence, numbers))
    return out


def _row(sequence: Sequence[Turn], numbers: Sequence[int]) -> Row:
    """Return the row of turns whose tokens follow each other."""
    ids = np.concatenate([np.asarray(part, np.int32) for turn in sequence for part in (turn.prompt, turn.action)])
    logprobs = np.concatenate([np.asarray(turn.logprobs, np.float32) for turn in sequence])
    ends = accumulate(len(turn.prompt) + len(turn.action) for turn in sequence)
    said = [(turn, number, end) for turn, number, end in zip(sequence, numbers, ends, strict=True) if len(turn.action)]
    return Row(
        ids, [(end - len(turn.action), end) for turn, _, end in said], [number for _, number, _ in said], logprobs
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of rows, right-padded or packed. B x L token grid, A action tokens.

    Packed: B = 1, rows end to end, `position_ids` restart at 0 for each. Padded: one row a line, pads at the end
    (causal attention never lets an action token see them).
    """

    input_ids: Tensor  # [B, L] int64
    position_ids: Tensor  # [B, L] int64
    index: Tensor  # [A] int64, flat index into B*L of the position that predicts each action token
    target: Tensor  # [A] int64, the action tokens
    turn: Tensor  # [A] int64, turn of each action token in the TurnTable
    rollout_logp: Tensor  # [A] fp32, the rollout engine's log-probs
    row_starts: Tensor  # [rows + 1] int32, where each row (padded: line) begins in the B*L tokens, and their end
    longest: int  # tokens of the longest row (padded: L)

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        tensors = (getattr(self, name).to(device, non_blocking=True) for name in self.__slots__ if name != "longest")
        return Batch(*tensors, longest=self.longest)
