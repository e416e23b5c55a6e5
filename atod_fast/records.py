"""The data that flows: what an agent did, as token ids that were sampled and never re-encoded.

Rollouts make trajectories; the objective reads a table with one line a turn; the policy trains on rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor


@dataclass(slots=True)
class Turn:
    """One exchange: what the agent was shown, what it said, what the world made of it."""

    prompt: list[int]  # context `window`: the whole prompt; `full`: the tokens added since the previous action
    action: list[int]  # ids as sampled, the stop token included when one was sampled
    logprobs: list[float]  # the rollout engine's log-probs of `action` at the rollout temperature
    observation: str  # text shown before this action
    text: str  # decoded action
    command: str  # what was sent to the environment
    well_formed: bool  # the response had the form that the prompt asks for
    accepted: bool = True  # the environment took the command for an action
    reward: float = 0.0
    stopped: bool = True  # by a stop token; False: cut off at rollout.response_tokens

    @property
    def valid(self) -> bool:
        return self.well_formed and self.accepted


@dataclass(slots=True)
class Trajectory:
    """One episode of one task."""

    task: int  # index of the task in its environment
    group: int  # the tasks of a step are numbered 0..tasks_per_step-1; trajectories of one group share a task
    member: int  # 0..group_size-1
    context: str  # "window" | "full"
    turns: list[Turn] = field(default_factory=list)
    success: bool = False
    truncated: bool = False  # ended by the turn or token limit
    failure: str | None = None  # the environment raised or hung: why
    task_id: str = ""
    task_type: str = ""
    score: float | None = None  # the world's own measure, where it is finer than success

    @property
    def reward(self) -> float:
        """Sum of the rewards of its turns."""
        return sum(turn.reward for turn in self.turns)


def outcomes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Share of them that succeeded, those whose environment failed among them, whose number follows; mean turns; the
    world's mean score, where it has one.
    """
    scores = [t.score for t in trajectories if t.score is not None and t.failure is None]
    return {
        "success": sum(t.success for t in trajectories) / len(trajectories),
        "failed_environments": sum(t.failure is not None for t in trajectories),
        "turns": sum(len(t.turns) for t in trajectories) / len(trajectories),
        **({"score": sum(scores) / len(scores)} if scores else {}),
    }


def success_by_type(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Share that succeeded by task type, in alphabetical order. Those without a name count as one type, ""."""
    solved: dict[str, list[bool]] = {}
    for trajectory in trajectories:
        solved.setdefault(trajectory.task_type, []).append(trajectory.success)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in sorted(solved.items())}


@dataclass(frozen=True, slots=True)
class TurnTable:
    """All turns of a step over all ranks, in trajectory order. N trajectories, K turns; CPU tensors.

    Everything the objective may look at: it never sees tokens, models or process groups.
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
    """The table of a step's trajectories and its turns' signals, [K] fp32 each."""
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
    """63 bits that do not change from run to run, as Python's own hash of a string does."""
    return int.from_bytes(blake2b(observation.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: a turn with its prompt (`window`) or a whole trajectory (`full`)."""

    ids: list[int]
    spans: list[tuple[int, int]]  # action token ranges in `ids`, one per turn, ascending; none starts at 0
    turns: list[int]  # index of each span's turn in the step's TurnTable
    logprobs: list[float]  # rollout engine's, all spans concatenated

    @property
    def action_tokens(self) -> int:
        return len(self.logprobs)


def rows(trajectories: Sequence[Trajectory]) -> list[Row]:
    """Training rows of a step's trajectories, in trajectory order; turns are numbered as in the TurnTable.

    A turn without action tokens adds nothing to learn from and yields no span (but keeps its number).
    """
    out: list[Row] = []
    number = 0
    for trajectory in trajectories:
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        turns: list[int] = []
        logprobs: list[float] = []
        for turn in trajectory.turns:
            if trajectory.context == "window":
                ids, spans, turns, logprobs = [], [], [], []
            ids = ids + turn.prompt
            if turn.action:
                spans.append((len(ids), len(ids) + len(turn.action)))
                turns.append(number)
                logprobs.extend(turn.logprobs)
            ids = ids + turn.action
            number += 1
            if trajectory.context == "window" and spans:
                out.append(Row(ids, spans, turns, logprobs))
        if trajectory.context == "full" and spans:
            out.append(Row(ids, spans, turns, logprobs))
    return out


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

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))
