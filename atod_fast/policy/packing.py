"""Partitions rows into mini-batches, ranks and micro-batches, and collates a micro-batch's tensors.

The partition is a pure function of the rows and the seed, so every rank computes the same one without communication.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    if not rows:
        empty = torch.zeros(0, dtype=torch.int64)
        return Batch(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1, 1, dtype=torch.int64),
            empty,
            empty,
            empty,
            torch.zeros(0),
        )
    lengths = [len(row.ids) for row in rows]
    if packed:
        input_ids = torch.tensor([token for row in rows for token in row.ids])[None]
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
    else:
        width = max(lengths)
        input_ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
        position_ids = torch.arange(width).expand(len(rows), width).contiguous()
        starts = [i * width for i in range(len(rows))]
    index, target, turn = [], [], []
    for start, row in zip(starts, rows, strict=True):
        for (first, last), number in zip(row.spans, row.turns, strict=True):
            index.extend(range(start + first - 1, start + last - 1))
            target.extend(row.ids[first:last])
            turn.extend([number] * (last - first))
    logprobs = [value for row in rows for value in row.logprobs]
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        index=torch.tensor(index, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        turn=torch.tensor(turn, dtype=torch.int64),
        rollout_logp=torch.tensor(logprobs, dtype=torch.float32),
    )
