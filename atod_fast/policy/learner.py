"""Scores and learns from a step's rows: tokens and weight streams, without turns, rewards or schedules.

A step's rows are partitioned once into mini-batches and micro-batches. The teacher scores them, the student scores them
and then learns from them, so scores stay beside the tokens they belong to. FSDP gathers a unit whenever any rank uses
it, so every rank runs the same number of micro-batches, empty ones included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import nan
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from atod_fast import ranks
from atod_fast.batches import Batch, Row
from atod_fast.config import Config
from atod_fast.errors import GuardError
from atod_fast.objective import (
    FULL_VOCABULARY,
    Streams,
    Tokens,
    diagnostics,
    loss_function,
    response_log_ratio,
    response_means,
    token_signals,
)
from atod_fast.policy.loading import load_student, load_teacher
from atod_fast.policy.model import Comparison, HeadJob, Loss
from atod_fast.policy.packing import collate, join, partition
from atod_fast.policy.sharding import reduce_between_copies, reshard
from atod_fast.policy.teacher import Teacher
from atod_fast.policy.teacher.local import LocalTeacher

if TYPE_CHECKING:
    from atod_fast.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Scored:
    """A micro-batch and the fp32 scores of its A action tokens under the frozen student and teacher."""

    batch: Batch
    logp: Tensor  # [A] log pi_old, the trainer's own
    entropy: Tensor  # [A] of pi_old
    teacher_logp: Tensor | None = None  # [A]; None: no teacher in this step
    divergence: Tensor | None = None  # [A] full-vocabulary divergence between pi_old and the teacher, if it is read
    teacher_hidden: Tensor | None = None  # [A, H_t], if the loss needs the teacher's whole distribution

    @property
    def tokens(self) -> Tokens:
        """The action tokens as `objective.step_streams` takes them."""
        return Tokens(self.batch.turn, self.logp, self.teacher_logp, self.batch.rollout_logp)


T = TypeVar("T", Batch, Scored)
MiniBatches = list[list[T]]  # [mini-batch][micro-batch] of this rank
# The teacher's scores of micro-batches, in order: log-probs [A], or for exact divergences its final hidden states
# [A, H_t]. They are taken out when they are used, so that nothing holds hidden states longer than needed.
Taught = deque[Tensor]


class Learner:
    """The student, its optimiser and its frozen teacher (None if no step of the schedule uses one) over the mesh.

    valid_columns: bool [V], of the student's head; False columns hold no token and are left out of every softmax.
    """

    def __init__(self, config: Config, runtime: Runtime, valid_columns: Tensor | None):
        self.config, self.device = config, runtime.device
        mesh, how = runtime.mesh, {"liger": runtime.liger, "compiled": runtime.compiled}
        assert mesh is not None, "a dry run has no learner"
        self.student = load_student(runtime.student, mesh, checkpointing=runtime.checkpointing, **how)
        assert all(p.dtype == torch.float32 for p in self.student.parameters()), "AdamW needs fp32 masters"
        self.teacher: Teacher | None = None
        if runtime.teacher is not None:
            how |= {"offload": config.teacher.offload, "gathered": runtime.gathered}
            self.teacher = LocalTeacher(load_teacher(runtime.teacher, mesh, **how))
        # Fused: torch's default updates DTensors one by one, five times slower for a small model.
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(),
            lr=config.train.learning_rate,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        self.updates = 0  # of the weights so far, with one that has begun
        self.skipped = 0  # updates in a row, up to now, that were not applied because their gradient was not finite
        columns = self.student.parts.head.weight.shape[0]
        if valid_columns is None and self.teacher and columns != self.teacher.columns:
            valid_columns = torch.ones(columns, dtype=torch.bool)
        self.valid_columns = None if valid_columns is None else valid_columns.to(runtime.device)
        # sdpa would attend from all rows to all others; a recurrent layer would carry state from row to row.
        self.packed = self.student.packs and (self.teacher is None or self.teacher.packs)
        self.joined = runtime.joined if self.packed else 1
        # The loss or the turn signal may need the teacher's whole distribution; the signal is then the reverse KL.
        self.loss_divergence = config.objective.divergence if config.objective.divergence in FULL_VOCABULARY else None
        self.score_divergence = self.loss_divergence or ("reverse_kl" if config.turns.disagreement == "exact" else None)

    def partition(self, rows: Sequence[Row], step: int) -> tuple[MiniBatches[Batch], list[Tensor]]:
        """Return this rank's micro-batches, and each whole mini-batch's turns [M] over all ranks."""
        train = self.config.train
        rng = np.random.default_rng([train.seed, step])
        whole = partition(
            rows,
            ranks=ranks.world_size(),
            minibatch_rows=train.minibatch_rows,
            budget=train.microbatch_tokens,
            packed=self.packed,
            rng=rng,
        )
        mine = [
            [collate([rows[r] for r in micro], packed=self.packed) for micro in minibatch[ranks.rank()]]
            for minibatch in whole
        ]
        members = [[r for rank in minibatch for micro in rank for r in micro] for minibatch in whole]
        turns = [torch.tensor([turn for r in part for turn in rows[r].turns]) for part in members]
        return [[batch.to(self.device) for batch in minibatch] for minibatch in mine], turns

    def _job(self, batch: Batch, teacher: Comparison | None = None, loss: Loss | None = None) -> HeadJob:
        return HeadJob(batch.target, self.config.rollout.temperature, self.valid_columns, teacher, loss)

    @contextmanager
    def _comparing(self, divergence: str | None) -> Iterator[Callable[[Tensor], Comparison] | None]:
        """Yield a function from the teacher's hidden states to the comparison with it; None without a divergence."""
        if divergence is None or self.teacher is None:
            yield None
            return
        with self.teacher.head() as head:
            yield lambda hidden: Comparison(hidden, head, divergence, alpha=self.config.objective.alpha)

    def score_teacher(self, minibatches: MiniBatches[Batch]) -> Taught:
        """Run the teacher's backbone once; return log-probs, or final hidden states for exact divergences.

        Packed micro-batches are joined, also those of different mini-batches: as many on every rank.
        """
        assert self.teacher is not None, "kappa > 0 in a step of a run without a teacher"
        batches = [batch for minibatch in minibatches for batch in minibatch]
        taught: Taught = deque()
        for first in range(0, len(batches), self.joined):
            parts = batches[first : first + self.joined]
            batch = join(parts)
            scores = self.teacher.hidden(batch) if self.score_divergence else self.teacher.logp(batch, self._job(batch))
            taught.extend(scores.split([len(part.target) for part in parts]))
        self.teacher.rest()
        return taught

    @torch.no_grad()
    def score_student(self, minibatches: MiniBatches[Batch], taught: Taught | None) -> MiniBatches[Scored]:
        """Compute log pi_old, its entropy and, from the teacher's hidden states, the exact divergence.

        Empties `taught`; None: the teacher has no part in this step.
        """
        with self._comparing(None if taught is None else self.score_divergence) as compare:
            return [
                [self._score(batch, None if taught is None else taught.popleft(), compare) for batch in minibatch]
                for minibatch in minibatches
            ]

    def _score(self, batch: Batch, taught: Tensor | None, compare: Callable[[Tensor], Comparison] | None) -> Scored:
        if taught is None or compare is None:
            out = self.student(batch, self._job(batch))
            return Scored(batch, out.logp, out.entropy, taught)
        out = self.student(batch, self._job(batch, compare(taught)))
        kept = None if self.loss_divergence is None else taught
        return Scored(batch, out.logp, out.entropy, out.teacher_logp, out.divergence, kept)

    def turn_signals(self, minibatches: MiniBatches[Scored], turns: int) -> tuple[Tensor, Tensor]:
        """Return disagreement d and uncertainty h of all ranks' turns, [K] fp32 on the CPU; 0 for turns without tokens.

        A turn's tokens lie in one row, so in one micro-batch of one rank: the sum over ranks adds only zeros to its
        mean.
        """
        signals = torch.zeros(2, turns)
        for scored in (s for minibatch in minibatches for s in minibatch):
            teacher_logp = scored.logp if scored.teacher_logp is None else scored.teacher_logp
            divergence = torch.zeros_like(scored.logp) if scored.divergence is None else scored.divergence
            for line, values in enumerate(
                token_signals(self.config.turns, scored.logp, teacher_logp, scored.entropy, divergence)
            ):
                numbers, means, _ = response_means(values, scored.batch.turn)
                signals[line, numbers.cpu()] = means.cpu()
        disagreement, uncertainty = ranks.total(signals)
        return disagreement, uncertainty

    def mismatch(self, minibatches: MiniBatches[Scored], turns: int) -> Tensor:
        """Return the mean of log pi_old - log mu over each turn of all ranks, mu being the engine's probability.

        [K] fp32 on the CPU; 0 for turns without tokens.
        """
        mismatch = torch.zeros(turns)
        for scored in (s for minibatch in minibatches for s in minibatch):
            numbers, means, _ = response_means(scored.logp - scored.batch.rollout_logp, scored.batch.turn)
            mismatch[numbers.cpu()] = means.cpu()
        return ranks.total(mismatch)

    def make_room(self) -> None:
        """Free device memory for a rollout engine to wake up in, all but shards and optimiser state."""
        reshard(self.student)
        if self.teacher:
            self.teacher.rest()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def logprob_gap(self, minibatches: MiniBatches[Scored]) -> tuple[float, float]:
        """Return the mean and largest |rollout engine's - trainer's log-prob| of the sampled tokens, over all ranks.

        Both are at the rollout temperature and, before the first update, of the same weights: a gap beyond rounding
        means that the engine's weights are not the trainer's.
        """
        gaps = [(s.batch.rollout_logp - s.logp).abs() for minibatch in minibatches for s in minibatch]
        gap = torch.cat(gaps).double().cpu()
        summed, count = ranks.total(
            torch.stack([gap.sum(), torch.tensor(float(len(gap)), dtype=torch.float64)])
        ).tolist()
        return summed / count, ranks.largest(float(gap.max()) if len(gap) else 0.0)

    def update(
        self, minibatches: MiniBatches[Scored], streams: Sequence[Sequence[Streams]], learning_rate: float
    ) -> dict[str, float]:
        """Take one optimiser step per mini-batch, for `train.epochs` epochs; `streams` hold one entry per micro-batch.

        An update whose gradient is not finite on any rank is skipped on all: weights and optimiser stay as they are.
        Returns means over the updates applied (NaN without any): loss, the objective's diagnostics, gradient norm
        before clipping; and `skipped`, the number of the others.

        Raises:
            GuardError: more than guard.skipped_updates in a row had such a gradient, steps before this one included.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        found: Mapping[str, Tensor] = {}
        sums = found
        norms: list[float] = []  # of the updates applied
        skipped, scored_at = 0, self.updates
        self.student.train()
        # pi_theta is compared with the teacher only if a stream asks for it.
        exact = minibatches[0][0].teacher_hidden is not None
        with self._comparing(self.loss_divergence if exact else None) as compare:
            for _ in range(self.config.train.epochs):
                for minibatch, wanted in zip(minibatches, streams, strict=True):
                    if self.config.objective.ratio == "sequence":
                        wanted = self._with_responses(minibatch, wanted, moved=self.updates > scored_at)
                    found = self._backward(minibatch, wanted, compare, sums)
                    norm = self._clip()
                    if not np.isfinite(norm):
                        skipped += 1
                        self._skip(norm, number=len(norms) + skipped)
                        continue
                    sums = found
                    norms.append(norm)
                    self.updates, self.skipped = self.updates + 1, 0
                    self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not norms:
            return dict.fromkeys([*found, "gradient_norm"], nan) | {"skipped": skipped}
        totals = ranks.total(torch.stack(list(sums.values())).double()).tolist()
        means = {name: value / len(norms) for name, value in zip(sums, totals, strict=True)}
        return means | {"gradient_norm": sum(norms) / len(norms), "skipped": skipped}

    @torch.no_grad()
    def _with_responses(
        self, minibatch: Sequence[Scored], streams: Sequence[Streams], *, moved: bool
    ) -> Sequence[Streams]:
        """Return the streams with each response's ratio under the present weights, in a forward pass of its own.

        moved: the weights are no longer those of the scores; while they are, every ratio is 1 and no pass is needed.
        """
        found = []
        for scored, stream in zip(minibatch, streams, strict=True):
            logp = self.student(scored.batch, self._job(scored.batch)).logp if moved else scored.logp
            ratio = response_log_ratio(logp, scored.logp, scored.batch.turn)
            found.append(replace(stream, response_log_ratio=ratio))
        return found

    def _backward(
        self,
        minibatch: Sequence[Scored],
        streams: Sequence[Streams],
        compare: Callable[[Tensor], Comparison] | None,
        sums: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Form a mini-batch's gradient; return `sums` with its loss and diagnostics added."""
        objective = self.config.objective
        found, loss_fn = dict(sums), loss_function(objective)
        # A loss that reads other tokens does so in the first update already; later checks would only cost.
        check = not self.optimizer.state
        self.optimizer.zero_grad(set_to_none=True)
        for number, (scored, stream) in enumerate(zip(minibatch, streams, strict=True), 1):
            hidden = scored.teacher_hidden
            teacher = None if compare is None or hidden is None else compare(hidden)
            how = Loss(loss_fn, stream.tensors(), self.config.student.head, check)
            loss, stats = self.student(scored.batch, self._job(scored.batch, teacher, how))
            reduce_between_copies(self.student, number == len(minibatch))
            # FSDP2 averages gradients over ranks; the streams' weights already divide by the mini-batch.
            (loss * ranks.world_size()).backward()
            for key, value in (diagnostics(stats, stream, objective) | {"loss": loss.detach()}).items():
                found[key] = found.get(key, 0.0) + value
        return found

    def _clip(self) -> float:
        """Clip the gradient; return its norm before, the same on every rank."""
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.train.grad_clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _skip(self, norm: float, number: int) -> None:
        """Count a skipped update, the step's `number`-th. Raises GuardError if it is one too many."""
        before, self.skipped = self.skipped, self.skipped + 1
        if before >= self.config.guard.skipped_updates:
            others = f", nor were the {before} before it" if before else ""
            raise GuardError(
                f"gradient norm is {norm} in update {number} of the step: the loss is not finite. "
                f"It was not applied{others}; resume from the last checkpoint "
                "with a lower train.learning_rate or a bound in objective.log_ratio_clip"
            )
