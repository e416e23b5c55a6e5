"""Turn reductions and T-DUR weights as Triton kernels: one program per segment, one launch, no atomics.

The mathematics and its reference are in `../turns.py`; here are the same results for tensors on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..turns import FLAT, TurnWeights

BLOCK = 128  # elements a program takes at a time: turns are tens to hundreds of tokens, trajectories tens of turns


@triton.jit
def bounds(offsets, i, K, total):
    """Segment i as [low, high) within [0, total), and whether its offsets could be followed."""
    low = tl.load(offsets + i)
    high = tl.load(offsets + i + 1)
    good = (low >= 0) & (low <= high) & (high <= total) & ((i > 0) | (low == 0)) & ((i < K - 1) | (high == total))
    return tl.where(good, low, 0), tl.where(good, high, 0), good


@triton.jit(do_not_specialize=["K", "total"])
def reduce_kernel(values, offsets, out, K, total, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """[total] -> out [K]; an empty segment is 0, one with impossible offsets NaN. Grid: (K,)."""
    i = tl.program_id(0)
    low, high, good = bounds(offsets, i, K, total)
    if REDUCE == "max":
        acc = tl.full([BLOCK], float("-inf"), tl.float32)
    elif REDUCE == "min":
        acc = tl.full([BLOCK], float("inf"), tl.float32)
    else:
        acc = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for j in range(low, high, BLOCK):
        at = j + tl.arange(0, BLOCK)
        inside = at < high
        x = tl.load(values + at, mask=inside, other=0.0)
        if REDUCE == "max":
            acc = tl.maximum(acc, tl.where(inside, x, float("-inf")))
        elif REDUCE == "min":
            acc = tl.minimum(acc, tl.where(inside, x, float("inf")))
        else:
            acc += x
        bad |= (x != x).to(tl.int32)
    if REDUCE == "max":
        result = tl.max(acc, 0)
    elif REDUCE == "min":
        result = tl.min(acc, 0)
    else:
        result = tl.sum(acc, 0)
    if REDUCE == "mean":
        result /= tl.maximum(high - low, 1).to(tl.float32)
    result = tl.where(high > low, result, 0.0)
    tl.store(out + i, tl.where(good & (tl.max(bad, 0) == 0), result, float("nan")))


@triton.jit(do_not_specialize=["K", "total"])
def reduce_backward_kernel(upstream, values, offsets, out, dx, K, total, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """dx [total]: a mean's gradient is shared by all tokens of the turn, a maximum's by those that attain it. Grid: (K,)."""
    i = tl.program_id(0)
    low, high, _ = bounds(offsets, i, K, total)
    g = tl.load(upstream + i)
    extreme = tl.load(out + i)
    if REDUCE == "mean":
        g /= tl.maximum(high - low, 1).to(tl.float32)
    if (REDUCE == "max") | (REDUCE == "min"):
        count = tl.zeros([BLOCK], tl.float32)
        for j in range(low, high, BLOCK):
            at = j + tl.arange(0, BLOCK)
            inside = at < high
            count += tl.where(inside & (tl.load(values + at, mask=inside, other=0.0) == extreme), 1.0, 0.0)
        g /= tl.maximum(tl.sum(count, 0), 1.0)
    for j in range(low, high, BLOCK):
        at = j + tl.arange(0, BLOCK)
        inside = at < high
        share = tl.zeros([BLOCK], tl.float32) + g
        if (REDUCE == "max") | (REDUCE == "min"):
            share = tl.where(tl.load(values + at, mask=inside, other=0.0) == extreme, share, 0.0)
        tl.store(dx + at, share, mask=inside)


@triton.jit
def span(x, low, high, BLOCK: tl.constexpr):
    """Smallest and largest of a segment, in fp64."""
    least = tl.full([BLOCK], float("inf"), tl.float64)
    most = tl.full([BLOCK], float("-inf"), tl.float64)
    for j in range(low, high, BLOCK):
        at = j + tl.arange(0, BLOCK)
        inside = at < high
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float64)
        least = tl.minimum(least, tl.where(inside, v, float("inf")))
        most = tl.maximum(most, tl.where(inside, v, float("-inf")))
    return tl.min(least, 0), tl.max(most, 0)


@triton.jit
def normalised(x, least, most, flat, NORMALISE: tl.constexpr):
    if NORMALISE == "none":
        y = tl.minimum(tl.maximum(x, 0.0), 1.0)
    else:
        width = most - least
        y = tl.where(width < flat, 0.5, (x - least) / tl.maximum(width, flat))
    return y


@triton.jit
def fused_weight(d, h, FUSE: tl.constexpr):
    if FUSE == "softor":
        w = 1 - (1 - d) * (1 - h)
    elif FUSE == "mean":
        w = (d + h) / 2
    elif FUSE == "max":
        w = tl.maximum(d, h)
    elif FUSE == "product":
        w = d * h
    elif FUSE == "disagreement":
        w = d
    elif FUSE == "uncertainty":
        w = h
    else:
        w = d * 0 + 1
    return w


@triton.jit
def weight_of(disagreement, uncertainty, at, inside, d0, d1, h0, h1, flat, NORMALISE: tl.constexpr, FUSE: tl.constexpr):
    """Raw weights of a block of turns, fp64."""
    d = normalised(tl.load(disagreement + at, mask=inside, other=0.0).to(tl.float64), d0, d1, flat, NORMALISE)
    h = normalised(tl.load(uncertainty + at, mask=inside, other=0.0).to(tl.float64), h0, h1, flat, NORMALISE)
    return fused_weight(d, h, FUSE)


@triton.jit
def clipped_mean(scale, disagreement, uncertainty, lengths, low, high, d0, d1, h0, h1, flat, least, most, NORMALISE: tl.constexpr, FUSE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip # noqa: E501
    """Token-weighted mean of clip(scale * w, least, most) over a trajectory; scale inf: the supremum."""
    total = tl.zeros([BLOCK], tl.float64)
    tokens = tl.zeros([BLOCK], tl.float64)
    for j in range(low, high, BLOCK):
        at = j + tl.arange(0, BLOCK)
        inside = at < high
        n = tl.load(lengths + at, mask=inside, other=0).to(tl.float64)
        w = weight_of(disagreement, uncertainty, at, inside, d0, d1, h0, h1, flat, NORMALISE, FUSE)
        total += n * tl.where(w > 0, tl.minimum(tl.maximum(scale * w, least), most), least)
        tokens += n
    return tl.sum(total, 0) / tl.maximum(tl.sum(tokens, 0), 1.0), tl.sum(tokens, 0)


@triton.jit(do_not_specialize=["N", "total", "least", "most", "min_turns", "min_disagreement", "flat"])
def weights_kernel(
    disagreement, uncertainty, lengths, offsets, weights, unweighted, fallback, N, total, least, most, min_turns, min_disagreement, flat,
    NORMALISE: tl.constexpr, FUSE: tl.constexpr, MEAN_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`turns.turn_weight_report` with scope trajectory: the weights of one trajectory's turns. Grid: (N,)."""
    i = tl.program_id(0)
    low, high, good = bounds(offsets, i, N, total)
    d0, d1 = span(disagreement, low, high, BLOCK)
    h0, h1 = span(uncertainty, low, high, BLOCK)
    left = (high - low < min_turns) | (d1 < min_disagreement)
    scale = tl.full([], 1.0, tl.float64)
    exists = True
    if MEAN_ONE:
        # As in `turns.mean_one`: the mean grows with the scale, so bisection on its logarithm finds the one with mean 1, if there is one.
        w0 = tl.full([BLOCK], float("inf"), tl.float64)
        w1 = tl.full([BLOCK], 0.0, tl.float64)
        for j in range(low, high, BLOCK):
            at = j + tl.arange(0, BLOCK)
            inside = at < high
            w = weight_of(disagreement, uncertainty, at, inside, d0, d1, h0, h1, flat, NORMALISE, FUSE)
            w0 = tl.minimum(w0, tl.where(inside & (w > 0), w, float("inf")))
            w1 = tl.maximum(w1, tl.where(inside, w, 0.0))
        smallest = tl.min(w0, 0)
        largest = tl.max(w1, 0)
        supremum, tokens = clipped_mean(
            float("inf"), disagreement, uncertainty, lengths, low, high, d0, d1, h0, h1, flat, least, most, NORMALISE, FUSE, BLOCK
        )  # fmt: skip
        exists = (supremum >= 1) & (largest > 0) & (tokens > 0)
        a = tl.where(exists, tl.log(tl.maximum(least, 1e-12) / tl.where(exists, largest, 1.0)), 0.0)
        b = tl.where(exists, tl.log(most / tl.where(exists, smallest, 1.0)), 0.0)
        for _ in range(64):
            c = (a + b) / 2
            mean, _tokens = clipped_mean(
                tl.exp(c), disagreement, uncertainty, lengths, low, high, d0, d1, h0, h1, flat, least, most, NORMALISE, FUSE, BLOCK
            )  # fmt: skip
            above = mean >= 1
            a = tl.where(above, a, c)
            b = tl.where(above, c, b)
        scale = tl.exp(b)
    for j in range(low, high, BLOCK):
        at = j + tl.arange(0, BLOCK)
        inside = at < high
        w = weight_of(disagreement, uncertainty, at, inside, d0, d1, h0, h1, flat, NORMALISE, FUSE)
        if MEAN_ONE:
            w = tl.where(exists, tl.minimum(tl.maximum(scale * w, least), most), 1.0)
        tl.store(weights + at, tl.where(left, 1.0, w).to(tl.float32), mask=inside)
    tl.store(unweighted + i, left.to(tl.int8))
    if MEAN_ONE:
        tl.store(fallback + i, (~left & ~exists).to(tl.int8))


def turn_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    """[T] fp32 -> [K]."""
    out = values.new_empty(offsets.shape[0] - 1)
    if len(out):
        with torch.cuda.device_of(values):
            reduce_kernel[(len(out),)](values, offsets, out, len(out), values.shape[0], REDUCE=reduce, BLOCK=BLOCK)
    return out


def turn_reduce_backward(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    """Gradient [T] of `turn_reduce`; 0 for tokens that no segment holds."""
    dx = torch.zeros_like(values)
    if len(out):
        with torch.cuda.device_of(values):
            reduce_backward_kernel[(len(out),)](upstream.contiguous(), values, offsets, out, dx, len(out), values.shape[0], REDUCE=reduce, BLOCK=BLOCK)
    return dx


def turn_weights(
    disagreement: Tensor,
    uncertainty: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    normalise: str,
    fuse: str,
    budget: str,
    clip: tuple[float, float],
    min_turns: int,
    min_disagreement: float,
) -> TurnWeights:
    """`turns.turn_weight_report`, scope trajectory, but for normalise='rank' and fuse='shuffled'; offsets int64 [N + 1]."""
    n = offsets.shape[0] - 1
    weights = torch.full(disagreement.shape, torch.nan, dtype=torch.float32, device=disagreement.device)  # NaN: in no trajectory
    flags = torch.zeros(2, n, dtype=torch.int8, device=disagreement.device)
    if n:
        with torch.cuda.device_of(disagreement):
            weights_kernel[(n,)](
                disagreement.contiguous(), uncertainty.contiguous(), None if lengths is None else lengths.contiguous(), offsets, weights, flags[0],
                flags[1], n, len(weights), *map(float, clip), min_turns, min_disagreement, FLAT,
                NORMALISE=normalise, FUSE=fuse, MEAN_ONE=budget == "mean1", BLOCK=BLOCK,
            )  # fmt: skip
    return TurnWeights(weights, flags[0].bool(), flags[1].bool())
