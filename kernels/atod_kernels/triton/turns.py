"""Turn reductions and T-DUR weights as Triton kernels: one program per segment, one launch, no atomics.

`torch/turns.py` has the same functions in torch operations, and is the reference. For fp32 tensors on a GPU.

Names: b_ values of a block, i_ an index, o_ offsets of a block's elements, m_ a mask; constants in capitals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..names import FLAT

BLOCK = 128  # elements a program takes at a time: turns are tens to hundreds of tokens, trajectories tens of turns


@triton.jit
def segment(offsets, i_k, K, total):
    """Bounds of segment i_k within [0, total), and whether its offsets are possible."""
    i_start = tl.load(offsets + i_k)
    i_end = tl.load(offsets + i_k + 1)
    b_good = (
        (i_start >= 0)
        & (i_start <= i_end)
        & (i_end <= total)
        & ((i_k > 0) | (i_start == 0))
        & ((i_k < K - 1) | (i_end == total))
    )
    return tl.where(b_good, i_start, 0), tl.where(b_good, i_end, 0), b_good


@triton.jit(do_not_specialize=["K", "total"])
def turn_reduce_fwd_kernel(values, offsets, out, K, total, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """Reduce values [total] to out [K]. An empty segment is 0, one with impossible offsets NaN. Grid: (K,)."""
    i_k = tl.program_id(0)
    i_start, i_end, b_good = segment(offsets, i_k, K, total)
    if REDUCE == "max":
        b_acc = tl.full([BLOCK], float("-inf"), tl.float32)
    elif REDUCE == "min":
        b_acc = tl.full([BLOCK], float("inf"), tl.float32)
    else:
        b_acc = tl.zeros([BLOCK], tl.float32)
    b_bad = tl.zeros([BLOCK], tl.int32)
    for i_t in range(i_start, i_end, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = o_t < i_end
        b_x = tl.load(values + o_t, mask=m_t, other=0.0)
        if REDUCE == "max":
            b_acc = tl.maximum(b_acc, tl.where(m_t, b_x, float("-inf")))
        elif REDUCE == "min":
            b_acc = tl.minimum(b_acc, tl.where(m_t, b_x, float("inf")))
        else:
            b_acc += b_x
        b_bad |= (b_x != b_x).to(tl.int32)
    if REDUCE == "max":
        b_out = tl.max(b_acc, 0)
    elif REDUCE == "min":
        b_out = tl.min(b_acc, 0)
    else:
        b_out = tl.sum(b_acc, 0)
    if REDUCE == "mean":
        b_out /= tl.maximum(i_end - i_start, 1).to(tl.float32)
    b_out = tl.where(i_end > i_start, b_out, 0.0)
    tl.store(out + i_k, tl.where(b_good & (tl.max(b_bad, 0) == 0), b_out, float("nan")))


@triton.jit(do_not_specialize=["K", "total"])
def turn_reduce_bwd_kernel(upstream, values, offsets, out, dx, K, total, REDUCE: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient dx [total] of the reduction to out [K], for upstream [K]. Grid: (K,).

    All tokens of a turn share a mean's gradient, those that attain the maximum share the maximum's.
    """
    i_k = tl.program_id(0)
    i_start, i_end, _ = segment(offsets, i_k, K, total)
    b_g = tl.load(upstream + i_k)
    b_extreme = tl.load(out + i_k)
    if REDUCE == "mean":
        b_g /= tl.maximum(i_end - i_start, 1).to(tl.float32)
    if (REDUCE == "max") | (REDUCE == "min"):
        b_count = tl.zeros([BLOCK], tl.float32)
        for i_t in range(i_start, i_end, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            m_t = o_t < i_end
            b_count += tl.where(m_t & (tl.load(values + o_t, mask=m_t, other=0.0) == b_extreme), 1.0, 0.0)
        b_g /= tl.maximum(tl.sum(b_count, 0), 1.0)
    for i_t in range(i_start, i_end, BLOCK):
        o_t = i_t + tl.arange(0, BLOCK)
        m_t = o_t < i_end
        b_dx = tl.zeros([BLOCK], tl.float32) + b_g
        if (REDUCE == "max") | (REDUCE == "min"):
            b_dx = tl.where(tl.load(values + o_t, mask=m_t, other=0.0) == b_extreme, b_dx, 0.0)
        tl.store(dx + o_t, b_dx, mask=m_t)


@triton.jit
def span(x, i_start, i_end, BLOCK: tl.constexpr):
    """Smallest and largest element of a segment of x, in fp64."""
    b_least = tl.full([BLOCK], float("inf"), tl.float64)
    b_most = tl.full([BLOCK], float("-inf"), tl.float64)
    for i_k in range(i_start, i_end, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        m_k = o_k < i_end
        b_x = tl.load(x + o_k, mask=m_k, other=0.0).to(tl.float64)
        b_least = tl.minimum(b_least, tl.where(m_k, b_x, float("inf")))
        b_most = tl.maximum(b_most, tl.where(m_k, b_x, float("-inf")))
    return tl.min(b_least, 0), tl.max(b_most, 0)


@triton.jit
def normalised(b_x, b_min, b_max, flat, NORMALISE: tl.constexpr):
    """Scale a block of one signal to [0, 1], by the segment's smallest and largest element."""
    if NORMALISE == "none":
        b_y = tl.minimum(tl.maximum(b_x, 0.0), 1.0)
    else:
        b_width = b_max - b_min
        b_y = tl.where(b_width < flat, 0.5, (b_x - b_min) / tl.maximum(b_width, flat))
    return b_y


@triton.jit
def fused_weight(b_d, b_h, FUSE: tl.constexpr):
    """Weights of a block of turns from their normalised disagreement and uncertainty."""
    if FUSE == "softor":
        b_w = 1 - (1 - b_d) * (1 - b_h)
    elif FUSE == "mean":
        b_w = (b_d + b_h) / 2
    elif FUSE == "max":
        b_w = tl.maximum(b_d, b_h)
    elif FUSE == "product":
        b_w = b_d * b_h
    elif FUSE == "disagreement":
        b_w = b_d
    elif FUSE == "uncertainty":
        b_w = b_h
    else:
        b_w = b_d * 0 + 1
    return b_w


@triton.jit
def raw_weights(
    disagreement, uncertainty, o_k, m_k, b_d0, b_d1, b_h0, b_h1, flat, NORMALISE: tl.constexpr, FUSE: tl.constexpr
):
    """Raw weights of a block of turns, in fp64; (b_d0, b_d1) and (b_h0, b_h1) are the signals' spans."""
    b_d = tl.load(disagreement + o_k, mask=m_k, other=0.0).to(tl.float64)
    b_d = normalised(b_d, b_d0, b_d1, flat, NORMALISE)
    b_h = tl.load(uncertainty + o_k, mask=m_k, other=0.0).to(tl.float64)
    b_h = normalised(b_h, b_h0, b_h1, flat, NORMALISE)
    return fused_weight(b_d, b_h, FUSE)


@triton.jit
def clipped_mean(
    b_scale, disagreement, uncertainty, lengths, i_start, i_end, b_d0, b_d1, b_h0, b_h1, flat, least, most,
    NORMALISE: tl.constexpr, FUSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Token-weighted mean of clip(scale * w, least, most) over a trajectory, and its tokens; scale inf is the limit."""
    b_total = tl.zeros([BLOCK], tl.float64)
    b_tokens = tl.zeros([BLOCK], tl.float64)
    for i_k in range(i_start, i_end, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        m_k = o_k < i_end
        b_n = tl.load(lengths + o_k, mask=m_k, other=0).to(tl.float64)
        b_w = raw_weights(disagreement, uncertainty, o_k, m_k, b_d0, b_d1, b_h0, b_h1, flat, NORMALISE, FUSE)
        b_total += b_n * tl.where(b_w > 0, tl.minimum(tl.maximum(b_scale * b_w, least), most), least)
        b_tokens += b_n
    return tl.sum(b_total, 0) / tl.maximum(tl.sum(b_tokens, 0), 1.0), tl.sum(b_tokens, 0)


@triton.jit(do_not_specialize=["N", "total", "least", "most", "min_turns", "min_disagreement", "flat"])
def turn_weights_kernel(
    disagreement, uncertainty, lengths, offsets, weights, unweighted, fallback,
    N, total, least, most, min_turns, min_disagreement, flat,
    NORMALISE: tl.constexpr, FUSE: tl.constexpr, MEAN_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights [total] of the turns of N trajectories, and flags [N]; scope trajectory. Grid: (N,).

    unweighted marks the trajectories that keep weight 1, fallback those for which no scale has mean 1.
    """
    i_n = tl.program_id(0)
    i_start, i_end, b_good = segment(offsets, i_n, N, total)
    b_d0, b_d1 = span(disagreement, i_start, i_end, BLOCK)
    b_h0, b_h1 = span(uncertainty, i_start, i_end, BLOCK)
    b_left = (i_end - i_start < min_turns) | (b_d1 < min_disagreement)
    b_scale = tl.full([], 1.0, tl.float64)
    b_exists = True
    if MEAN_ONE:
        # As in `mean_one` of torch/turns.py: the mean grows with the scale, so bisection on its logarithm finds the one
        # with mean 1, if there is one.
        b_w0 = tl.full([BLOCK], float("inf"), tl.float64)
        b_w1 = tl.full([BLOCK], 0.0, tl.float64)
        for i_k in range(i_start, i_end, BLOCK):
            o_k = i_k + tl.arange(0, BLOCK)
            m_k = o_k < i_end
            b_w = raw_weights(disagreement, uncertainty, o_k, m_k, b_d0, b_d1, b_h0, b_h1, flat, NORMALISE, FUSE)
            b_w0 = tl.minimum(b_w0, tl.where(m_k & (b_w > 0), b_w, float("inf")))
            b_w1 = tl.maximum(b_w1, tl.where(m_k, b_w, 0.0))
        b_smallest = tl.min(b_w0, 0)
        b_largest = tl.max(b_w1, 0)
        b_supremum, b_tokens = clipped_mean(
            float("inf"), disagreement, uncertainty, lengths, i_start, i_end, b_d0, b_d1, b_h0, b_h1, flat, least, most,
            NORMALISE, FUSE, BLOCK,
        )  # fmt: skip
        b_exists = (b_supremum >= 1) & (b_largest > 0) & (b_tokens > 0)
        b_lower = tl.where(b_exists, tl.log(tl.maximum(least, 1e-12) / tl.where(b_exists, b_largest, 1.0)), 0.0)
        b_upper = tl.where(b_exists, tl.log(most / tl.where(b_exists, b_smallest, 1.0)), 0.0)
        for _ in range(64):
            b_middle = (b_lower + b_upper) / 2
            b_mean, _tokens = clipped_mean(
                tl.exp(b_middle), disagreement, uncertainty, lengths, i_start, i_end, b_d0, b_d1, b_h0, b_h1, flat,
                least, most, NORMALISE, FUSE, BLOCK,
            )  # fmt: skip
            b_above = b_mean >= 1
            b_lower = tl.where(b_above, b_lower, b_middle)
            b_upper = tl.where(b_above, b_middle, b_upper)
        b_scale = tl.exp(b_upper)
    for i_k in range(i_start, i_end, BLOCK):
        o_k = i_k + tl.arange(0, BLOCK)
        m_k = o_k < i_end
        b_w = raw_weights(disagreement, uncertainty, o_k, m_k, b_d0, b_d1, b_h0, b_h1, flat, NORMALISE, FUSE)
        if MEAN_ONE:
            b_w = tl.where(b_exists, tl.minimum(tl.maximum(b_scale * b_w, least), most), 1.0)
        tl.store(weights + o_k, tl.where(b_left, 1.0, b_w).to(tl.float32), mask=m_k)
    tl.store(unweighted + i_n, b_left.to(tl.int8))
    if MEAN_ONE:
        tl.store(fallback + i_n, (~b_left & ~b_exists).to(tl.int8))


def turn_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    """Reduce contiguous fp32 values [T] to one number per turn, [K]; offsets int64 [K + 1]."""
    out = values.new_empty(offsets.shape[0] - 1)
    k, total = len(out), values.shape[0]
    if k:
        with torch.cuda.device_of(values):
            turn_reduce_fwd_kernel[(k,)](values, offsets, out, k, total, REDUCE=reduce, BLOCK=BLOCK)
    return out


def turn_reduce_backward(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    """Gradient [T] of `turn_reduce`, whose result was `out` [K]; 0 for tokens that no segment holds."""
    dx = torch.zeros_like(values)
    k, total = len(out), values.shape[0]
    if k:
        upstream = upstream.contiguous()
        with torch.cuda.device_of(values):
            turn_reduce_bwd_kernel[(k,)](upstream, values, offsets, out, dx, k, total, REDUCE=reduce, BLOCK=BLOCK)
    return dx


def turn_weights(
    disagreement: Tensor,
    uncertainty: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    *,
    normalise: str,
    fuse: str,
    clip: tuple[float, float],
    min_turns: int,
    min_disagreement: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """T-DUR weights [K], trajectories left at 1 and trajectories without a solution, bool [N]; scope trajectory.

    offsets int64 [N + 1]; lengths [K] are given where the mean weight is to be 1. There is no normalise='rank' and no
    fuse='shuffled' here. `turns.turn_weight_report` explains the options.
    """
    n, device = offsets.shape[0] - 1, disagreement.device
    weights = torch.full(disagreement.shape, torch.nan, dtype=torch.float32, device=device)  # NaN: in no trajectory
    left, fallback = torch.zeros(2, n, dtype=torch.int8, device=device)
    if n:
        disagreement, uncertainty = disagreement.contiguous(), uncertainty.contiguous()
        lengths = None if lengths is None else lengths.contiguous()
        with torch.cuda.device_of(disagreement):
            turn_weights_kernel[(n,)](
                disagreement, uncertainty, lengths, offsets, weights, left, fallback,
                n, len(weights), *map(float, clip), min_turns, min_disagreement, FLAT,
                NORMALISE=normalise, FUSE=fuse, MEAN_ONE=lengths is not None, BLOCK=BLOCK,
            )  # fmt: skip
    return weights, left.bool(), fallback.bool()
