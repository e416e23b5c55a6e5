"""Turn reductions and T-DUR weights in torch operations, vectorised over segments; for any device, in fp32 or fp64.

`../turns.py` checks the arguments. Segments are CSR offsets [K + 1]: segment k is x[offsets[k] : offsets[k + 1]].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..names import FLAT


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """Return the index of the segment that each of `total` elements lies in, [total]."""
    positions = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), positions, right=True)


def segment_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    """Reduce values [n] to one number per segment, [K]; an empty segment is 0."""
    out = torch.segment_reduce(values, reduce, offsets=offsets, unsafe=True)
    return out.masked_fill_(offsets[1:] == offsets[:-1], 0)


def well_formed(offsets: Tensor, total: int) -> Tensor:
    """Return which segments lie within [0, total], bool [K]. The first must start at 0, the last end at total."""
    low, high = offsets[:-1], offsets[1:]
    good = (low >= 0) & (low <= high) & (high <= total)
    good[:1] &= low[:1] == 0
    good[-1:] &= high[-1:] == total
    return good


def turn_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    """Reduce values [T] to one number per turn, [K]."""
    if values.device.type == "cpu":
        return segment_reduce(values, offsets, reduce)
    # Offsets cannot be read without waiting for the device: bring them into range, and report bad ones as NaN.
    safe = offsets.clamp(0, values.shape[0]).cummax(0).values
    return segment_reduce(values, safe, reduce).masked_fill_(~well_formed(offsets, values.shape[0]), torch.nan)


def turn_reduce_backward(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    """Return the gradient [T] of `turn_reduce`, whose result was `out` [K], for upstream [K].

    The mean shares a turn's gradient evenly over its tokens, max and min over the tokens that attain them.
    """
    ids = segment_ids(offsets, values.shape[0]).clamp(max=max(out.shape[0] - 1, 0))
    if reduce == "mean":
        upstream = upstream / (offsets[1:] - offsets[:-1]).clamp(min=1)
    elif reduce in ("max", "min"):
        attained = (values == out[ids]).to(values.dtype)
        return attained * (upstream / segment_reduce(attained, offsets, "sum").clamp(min=1))[ids]
    return upstream[ids]


def minmax(x: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Scale x [n] to [0, 1] within each segment; 0.5 where the segment's range is below FLAT."""
    low, high = (segment_reduce(x, offsets, r)[ids] for r in ("min", "max"))
    width = high - low
    return torch.where(width < FLAT, 0.5, (x - low) / width.clamp(min=FLAT))


def rank(x: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Return the average rank of x [n] within its segment, scaled to [0, 1]; 0.5 where all values are equal."""
    order = x.argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]
    x, ids_sorted = x[order], ids[order]
    at = torch.arange(x.shape[0], device=x.device)
    opens = torch.ones_like(at, dtype=torch.bool)
    opens[1:] = (x[1:] != x[:-1]) | (ids_sorted[1:] != ids_sorted[:-1])
    closes = opens.roll(-1)
    first = torch.where(opens, at, 0).cummax(0).values
    last = torch.where(closes, at, x.shape[0]).flip(0).cummin(0).values.flip(0)
    start, length = offsets[:-1][ids_sorted], (offsets[1:] - offsets[:-1])[ids_sorted]
    ranks = torch.where(length > 1, ((first + last) / 2 - start) / (length - 1).clamp(min=1), 0.5)
    return torch.empty_like(x).scatter_(0, order, ranks.to(x.dtype))


def shuffle(x: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Permute x [n] at random within each segment."""
    order = torch.rand(x.shape[0], generator=generator, device=generator.device).to(x.device).argsort(stable=True)
    # Segments are contiguous, so position i of segment k holds a random element of k.
    order = order[ids[order].argsort(stable=True)]
    return x[order]


def fuse_signals(d: Tensor, h: Tensor, fuse: str) -> Tensor:
    """Return the weights [n] of turns from their normalised disagreement d and uncertainty h."""
    if fuse in ("softor", "shuffled"):
        return 1 - (1 - d) * (1 - h)
    if fuse == "mean":
        return (d + h) / 2
    if fuse == "max":
        return torch.maximum(d, h)
    if fuse == "product":
        return d * h
    if fuse == "uniform":
        return torch.ones_like(d)
    return d if fuse == "disagreement" else h


def mean_one(
    w: Tensor, lengths: Tensor, ids: Tensor, offsets: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Scale weights w [n] to a token-weighted mean of 1 in each segment: clip(c w, *clip), by bisection on log c.

    Returns the weights [n] and, [S], the segments where no such c exists; their weights are 1. The mean grows with c
    from clip[0] to clip[1] times the share of tokens with w > 0 plus clip[0] times the others', so a c exists if and
    only if 1 lies between.
    """
    low, high = clip
    tokens = segment_reduce(lengths, offsets, "sum")

    def mean(x: Tensor) -> Tensor:
        return segment_reduce(lengths * x, offsets, "sum") / tokens.clamp(min=1)

    smallest = segment_reduce(torch.where(w > 0, w, torch.inf), offsets, "min")
    largest = segment_reduce(w, offsets, "max")
    exists = (mean(torch.where(w > 0, high, low)) >= 1) & (largest > 0) & (tokens > 0)
    a = torch.where(exists, (max(low, 1e-12) / largest).log(), 0)
    b = torch.where(exists, (high / smallest).log(), 0)
    for _ in range(64):
        c = (a + b) / 2
        above = mean((c.exp()[ids] * w).clamp(low, high)) >= 1
        a, b = torch.where(above, a, c), torch.where(above, c, b)
    return torch.where(exists[ids], (b.exp()[ids] * w).clamp(low, high), 1), ~exists


def turn_weights(
    disagreement: Tensor,
    uncertainty: Tensor,
    offsets: Tensor,
    left: Tensor,
    lengths: Tensor | None,
    *,
    normalise: str,
    fuse: str,
    scope: str,
    clip: tuple[float, float],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return T-DUR weights [K] of turns, and the trajectories [N] where no scale has mean 1.

    offsets [N + 1] int64; left [N] marks the trajectories that keep weight 1; lengths [K] are given where the mean
    weight is to be 1.
    """
    device, count = disagreement.device, disagreement.shape[0]
    trajectory = segment_ids(offsets, count)
    # Only weighted turns are compared: in scope batch they form one segment, and the others are set aside.
    weighted = ~left[trajectory]
    if scope == "trajectory":
        chosen, ids = torch.arange(count, device=device), trajectory
    else:
        chosen = weighted.nonzero()[:, 0]
        ids, offsets = torch.zeros_like(chosen), torch.tensor([0, chosen.shape[0]], device=device)
    d, h = disagreement[chosen].double(), uncertainty[chosen].double()
    if normalise == "none":
        d, h = d.clamp(0, 1), h.clamp(0, 1)
    else:
        d, h = ((minmax if normalise == "minmax" else rank)(x, ids, offsets) for x in (d, h))
    w = fuse_signals(d, h, fuse)
    if fuse == "shuffled":
        assert generator is not None
        w = shuffle(w, ids, generator)
    fallback = torch.zeros_like(left)
    if lengths is not None:
        w, missing = mean_one(w, lengths[chosen].double(), ids, offsets, clip)
        fallback = missing & ~left
    weights = torch.ones(count, dtype=torch.float32, device=device)
    weights[chosen] = w.float()
    return weights.masked_fill_(~weighted, 1), fallback
