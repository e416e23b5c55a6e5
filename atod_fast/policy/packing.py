"""Partitions rows into mini-batches, ranks and micro-batches, and collates a micro-batch's tensors.

The partition is a pure function of the rows and the seed, so every rank computes the same one without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from atod_fast.batches import Batch, Row

Partition = list[list[list[list[int]]]]  # [mini-batch][rank][micro-batch] -> row numbers


def partition(
    rows: Sequence[Row], *, ranks: int, minibatch_rows: int, budget: int, packed: bool, rng: np.random.Generator
) -> Partition:
    """Shuffle rows into mini-batches, spread each over the ranks and cut each rank's share into micro-batches.

    Mini-batches have at most `minibatch_rows` rows (0 = one mini-batch) and even sizes. Rows go to ranks by tokens,
    longest first. Micro-batches have at most `budget` tokens; a longer row is alone in one. Every rank gets the same
    number of micro-batches; missing ones are empty.
    """
    order = rng.permutation(len(rows))
    count = max(1, -(-len(rows) // minibatch_rows)) if minibatch_rows else 1
    out: Partition = []
    for minibatch in np.array_split(order, count):
        share: list[list[int]] = [[] for _ in range(ranks)]
        load = [0] * ranks
        for row in sorted(minibatch.tolist(), key=lambda r: -len(rows[r].ids)):
            rank = load.index(min(load))
            share[rank].append(row)
            load[rank] += len(rows[row].ids)
        cut = [_micro_batches(rows, mine, budget, packed) for mine in share]
        most = max(len(batches) for batches in cut)
        out.append([batches + [[]] * (most - len(batches)) for batches in cut])
    return out


def _micro_batches(rows: Sequence[Row], longest_first: list[int], budget: int, packed: bool) -> list[list[int]]:
    batches: list[list[int]] = []
    tokens = 0
    for row in longest_first:
        length = len(rows[row].ids)
        # A padded batch is as wide as its first, longest row.
        grown = (
            tokens + length if packed else (len(batches[-1]) + 1) * len(rows[batches[-1][0]].ids) if batches else length
        )
        if batches and grown <= budget:
            batches[-1].append(row)
            tokens = grown
        else:
            batches.append([row])
            tokens = length
    return batches


def collate(rows: Sequence[Row], *, packed: bool) -> Batch:
    """Make one micro-batch. Without rows it is one pad token and no action token: a forward pass that adds no loss."""
    lengths = np.array([len(row.ids) for row in rows] or [1])
    longest = int(lengths.max())
    # A padded row is as wide as the longest.
    widths = lengths if packed else np.full(len(lengths), longest)
    starts = np.concatenate([[0], widths.cumsum()])
    position = np.arange(starts[-1]) - np.repeat(starts[:-1], widths)
    ids, index, target, turn = np.zeros(starts[-1], np.int32), [], [], []
    for start, row in zip(starts.tolist(), rows, strict=False):
        ids[start : start + len(row.ids)] = row.ids
        for (first, last), number in zip(row.spans, row.turns, strict=True):
            index.append(np.arange(start + first - 1, start + last - 1))
            target.append(row.ids[first:last])
            turn.append(np.full(last - first, number))
    shape = (1, -1) if packed else (len(lengths), longest)
    logprobs = _joined([row.logprobs for row in rows], np.float32)
    return Batch(
        input_ids=torch.from_numpy(ids).long().view(shape),
        position_ids=torch.from_numpy(position).view(shape),
        index=_joined(index, np.int64),
        target=_joined(target, np.int64),
        turn=_joined(turn, np.int64),
        rollout_logp=logprobs,
        row_starts=torch.from_numpy(starts.astype(np.int32)),
        longest=longest,
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Return packed micro-batches as one. Its action tokens are theirs, in order."""
    if len(batches) == 1:
        return batches[0]
    offsets = [0, *accumulate(batch.tokens for batch in batches)]
    starts = [batch.row_starts[1:] + offset for batch, offset in zip(batches, offsets, strict=False)]
    index = [batch.index + offset for batch, offset in zip(batches, offsets, strict=False)]
    return Batch(
        input_ids=torch.cat([batch.input_ids for batch in batches], 1),
        position_ids=torch.cat([batch.position_ids for batch in batches], 1),
        index=torch.cat(index),
        target=torch.cat([batch.target for batch in batches]),
        turn=torch.cat([batch.turn for batch in batches]),
        rollout_logp=torch.cat([batch.rollout_logp for batch in batches]),
        row_starts=torch.cat([batches[0].row_starts[:1], *starts]),
        longest=max(batch.longest for batch in batches),
    )


def _joined(parts: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
    """Return arrays end to end as a tensor; empty without any."""
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False))
