"""Segments of tokens: reductions over turns, and T-DUR, the weights of turns (ATOD, arXiv 2606.27814).

Segments are CSR offsets [K + 1]: segment k is offsets[k] to offsets[k + 1]. Everything is vectorised over segments and deterministic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validate
from .validate import require

REDUCTIONS = ("mean", "sum", "max", "min")
NORMALISE = ("minmax", "rank", "none")
FUSE = ("softor", "mean", "max", "product", "disagreement", "uncertainty", "uniform", "shuffled")
FLAT = 1e-8  # a signal with a smaller range over its scope does not tell turns apart: 0.5 for all of them


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """[total] index of the segment each element lies in; empty segments hold none."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(total, dtype=offsets.dtype, device=offsets.device), right=True)


def segment_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    """[n] -> [K]; an empty segment is 0."""
    out = torch.segment_reduce(values, reduce, offsets=offsets, unsafe=True)
    return out.masked_fill_(offsets[1:] == offsets[:-1], 0)


def well_formed(offsets: Tensor, total: int) -> Tensor:
    """bool [K] on the offsets' device: segments that lie within [0, total], the first from 0 and the last to total."""
    low, high = offsets[:-1], offsets[1:]
    good = (low >= 0) & (low <= high) & (high <= total)
    good[:1] &= low[:1] == 0
    good[-1:] &= high[-1:] == total
    return good


def on_triton(x: Tensor) -> bool:
    """Whether the kernels of `triton/turns.py` take it."""
    return x.device.type == "cuda" and x.dtype == torch.float32 and validate.HAS_TRITON


@torch.library.custom_op("atod_kernels::turn_reduce", mutates_args=())
def _turn_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    if on_triton(values):
        from .triton import turns as triton_turns

        return triton_turns.turn_reduce(values.contiguous(), offsets, reduce)
    if values.device.type == "cpu":
        return segment_reduce(values, offsets, reduce)
    # Offsets cannot be read without waiting for the device: bring them into range, and report bad ones as NaN.
    safe = offsets.clamp(0, values.shape[0]).cummax(0).values
    return segment_reduce(values, safe, reduce).masked_fill_(~well_formed(offsets, values.shape[0]), torch.nan)


@_turn_reduce.register_fake
def _(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("atod_kernels::turn_reduce_backward", mutates_args=())
def _turn_reduce_backward(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    """The mean shares a turn's gradient evenly over its tokens, max and min over the tokens that attain them."""
    if on_triton(values):
        from .triton import turns as triton_turns

        return triton_turns.turn_reduce_backward(upstream, values.contiguous(), offsets, out, reduce)
    ids = segment_ids(offsets, values.shape[0]).clamp(max=max(out.shape[0] - 1, 0))
    if reduce == "mean":
        upstream = upstream / (offsets[1:] - offsets[:-1]).clamp(min=1)
    elif reduce in ("max", "min"):
        attained = (values == out[ids]).to(values.dtype)
        return attained * (upstream / segment_reduce(attained, offsets, "sum").clamp(min=1))[ids]
    return upstream[ids]


@_turn_reduce_backward.register_fake
def _(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    return values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    values, offsets, ctx.reduce = inputs
    ctx.offsets = offsets  # beside the saved tensors, which may not be made under torch.inference_mode
    ctx.save_for_backward(values, output)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    values, output = ctx.saved_tensors
    return _turn_reduce_backward(upstream, values, ctx.offsets, output, ctx.reduce), None, None


_turn_reduce.register_autograd(_backward, setup_context=_save)


def turn_reduce(values: Tensor, offsets: Tensor, reduce: str = "mean") -> Tensor:
    """Reduce tokens to turns.

    Args:
        values: [T] fp32 (fp64 for tests); offsets: [K + 1] int, from 0 to T, non-decreasing; reduce: mean | sum | max | min.

    Returns:
        [K], differentiable with respect to values; an empty turn is 0 with no gradient, and tokens that tie for a maximum share it.

    Raises:
        ValueError: on bad arguments. On an accelerator offsets are not read: a turn whose offsets are impossible is NaN.
    """
    validate.tensor("values", values, 1)
    require(values.dtype in (torch.float32, torch.float64), f"values is {values.dtype}; expected float32 (or float64)")
    validate.one_of("reduce", reduce, REDUCTIONS)
    validate.offsets("offsets", offsets, values.shape[0], "values")
    require(offsets.device == values.device, f"offsets is on {offsets.device}; expected {values.device}, where values are")
    return _turn_reduce(values, offsets.long().contiguous(), reduce)


def expand_turns(values: Tensor, offsets: Tensor) -> Tensor:
    """Give each token its turn's value: [K] and offsets [K + 1] -> [T], T = offsets[-1] (read from the device). Differentiable.

    Raises:
        ValueError: if offsets do not start at 0, are not sorted or do not fit values.
    """
    validate.tensor("values", values, 1)
    validate.offsets("offsets", offsets, None, "the tokens")
    require(offsets.shape[0] == values.shape[0] + 1, f"offsets has shape {list(offsets.shape)}; expected [{values.shape[0] + 1}], one more than values")
    require(offsets.device == values.device, f"offsets is on {offsets.device}; expected {values.device}, where values are")
    return torch.repeat_interleave(values, offsets[1:].long() - offsets[:-1].long())


class TurnWeights(NamedTuple):
    """weights [K]; unweighted [N] trajectories that keep weight 1; fallback [N] trajectories for which mean1 had no solution."""

    weights: Tensor
    unweighted: Tensor
    fallback: Tensor


def unweighted(disagreement: Tensor, trajectory_offsets: Tensor, *, min_turns: int = 3, min_disagreement: float = 0.01) -> Tensor:
    """bool [N]: trajectories that keep weight 1, with fewer than min_turns turns or no turn's disagreement at min_disagreement."""
    validate.tensor("disagreement", disagreement, 1)
    validate.offsets("trajectory_offsets", trajectory_offsets, disagreement.shape[0], "disagreement")
    turns = trajectory_offsets[1:] - trajectory_offsets[:-1]
    # An empty trajectory's maximum is 0; it has no turn to weigh either way.
    return (turns < min_turns) | (turn_reduce(disagreement.detach(), trajectory_offsets, "max") < min_disagreement)


def minmax(x: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    low, high = (segment_reduce(x, offsets, r)[ids] for r in ("min", "max"))
    width = high - low
    return torch.where(width < FLAT, 0.5, (x - low) / width.clamp(min=FLAT))


def rank(x: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """Average rank within the segment over its length less one, in [0, 1]; 0.5 for a segment of one or of equal values."""
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
    """A random permutation of x within each segment."""
    order = torch.rand(x.shape[0], generator=generator, device=generator.device).to(x.device).argsort(stable=True)
    order = order[ids[order].argsort(stable=True)]  # segments are contiguous, so position i of segment k holds a random element of k
    return x[order]


def fuse_signals(d: Tensor, h: Tensor, fuse: str) -> Tensor:
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


def mean_one(w: Tensor, lengths: Tensor, ids: Tensor, offsets: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """w' = clip(c w, *clip) whose token-weighted mean is 1 in each segment, by bisection on log c; and [S] where no c exists (w' = 1).

    The mean grows with c from clip[0] to clip[1] times the tokens with w > 0 plus clip[0] times the others, so a c exists iff 1 lies between.
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


@torch.no_grad()
def turn_weight_report(
    disagreement: Tensor,
    uncertainty: Tensor,
    trajectory_offsets: Tensor,
    *,
    turn_lengths: Tensor | None = None,
    normalise: str = "minmax",
    fuse: str = "softor",
    budget: str = "raw",
    scope: str = "trajectory",
    clip: tuple[float, float] = (0.5, 2.0),
    min_turns: int = 3,
    min_disagreement: float = 0.01,
    generator: torch.Generator | None = None,
) -> TurnWeights:
    """`turn_weights`, with which trajectories were left at 1 and for which mean1 had no solution (all weighted ones, scope batch)."""
    validate.tensor("disagreement", disagreement, 1)
    device, count = disagreement.device, disagreement.shape[0]
    validate.tensor("trajectory_offsets", trajectory_offsets, 1)
    for name, x in (("disagreement", disagreement), ("uncertainty", uncertainty), ("turn_lengths", turn_lengths)):
        if x is None and name == "turn_lengths":
            continue
        validate.tensor(name, x, 1)
        require(x.shape[0] == count, f"{name} has shape {list(x.shape)}; expected [{count}], one value per turn as in disagreement")
        require(x.device == device, f"{name} is on {x.device}; expected {device}, where disagreement is")
        require(name == "turn_lengths" or x.dtype in validate.FLOATS, f"{name} is {x.dtype}; expected a floating dtype")
    require(trajectory_offsets.device == device, f"trajectory_offsets is on {trajectory_offsets.device}; expected {device}, where disagreement is")
    validate.one_of("normalise", normalise, NORMALISE)
    validate.one_of("fuse", fuse, FUSE)
    validate.one_of("budget", budget, ("raw", "mean1"))
    validate.one_of("scope", scope, ("trajectory", "batch"))
    require(
        isinstance(clip, tuple | list) and len(clip) == 2 and 0 <= clip[0] <= 1 <= clip[1], f"clip is {clip!r}; expected (low, high) with 0 <= low <= 1 <= high"
    )
    require(budget == "raw" or turn_lengths is not None, "turn_lengths is None; expected the tokens of each turn [K] for budget='mean1'")
    require(fuse != "shuffled" or generator is not None, "generator is None; expected a torch.Generator for fuse='shuffled'")
    if scope == "trajectory" and normalise != "rank" and fuse != "shuffled" and on_triton(disagreement):
        validate.offsets("trajectory_offsets", trajectory_offsets, count, "disagreement")
        from .triton import turns as triton_turns

        offsets = trajectory_offsets.long().contiguous()
        return triton_turns.turn_weights(
            disagreement, uncertainty, offsets, turn_lengths if budget == "mean1" else None, normalise, fuse, budget, clip, min_turns, min_disagreement
        )
    left = unweighted(disagreement, trajectory_offsets, min_turns=min_turns, min_disagreement=min_disagreement)
    trajectory_offsets = trajectory_offsets.long()
    trajectory = segment_ids(trajectory_offsets, count)

    # Only weighted turns are compared with each other: in scope batch they form one segment and the others are set aside.
    weighted = ~left[trajectory]
    if scope == "trajectory":
        chosen, ids, offsets = torch.arange(count, device=device), trajectory, trajectory_offsets
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
        w = shuffle(w, ids, generator)
    fallback = torch.zeros_like(left)
    if budget == "mean1":
        w, missing = mean_one(w, turn_lengths[chosen].double(), ids, offsets, clip)
        fallback = missing & ~left
    weights = torch.ones(count, dtype=torch.float32, device=device)
    weights[chosen] = w.float()
    return TurnWeights(weights.masked_fill_(~weighted, 1), left, fallback)


def turn_weights(
    disagreement: Tensor,
    uncertainty: Tensor,
    trajectory_offsets: Tensor,
    *,
    turn_lengths: Tensor | None = None,
    normalise: str = "minmax",
    fuse: str = "softor",
    budget: str = "raw",
    scope: str = "trajectory",
    clip: tuple[float, float] = (0.5, 2.0),
    min_turns: int = 3,
    min_disagreement: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """T-DUR: how much each turn is to be supervised. With every default, the paper's w_k = 1 - (1 - d~_k)(1 - h~_k).

    Args:
        disagreement, uncertainty: [K], d_k and h_k of the turns of N trajectories; trajectory_offsets: [N + 1].
        turn_lengths: [K] tokens of each turn, needed by budget mean1 and used by it alone.
        normalise: each signal over its scope to [0, 1]: minmax (0.5 where its range is below 1e-8), rank (average rank), none (clipped to it).
        fuse: softor | mean | max | product | disagreement | uncertainty | uniform (1) | shuffled (the softor weights, permuted at random
            within the scope with `generator`: a control).
        budget: raw, or mean1: clip(c w, *clip) with c such that the token-weighted mean over the scope is 1; where no c exists, and where
            all w are 0, 1. `clip` is used by mean1 alone.
        scope: which turns are compared: those of a trajectory, or all of the batch's weighted trajectories.
        min_turns, min_disagreement: a trajectory with fewer turns, or whose largest d is smaller, keeps weight 1 in all of its turns.

    Returns:
        [K] fp32, detached; raw weights are in [0, 1].

    Raises:
        ValueError: naming the argument. scope='batch' waits for the device once.
    """
    return turn_weight_report(
        disagreement,
        uncertainty,
        trajectory_offsets,
        turn_lengths=turn_lengths,
        normalise=normalise,
        fuse=fuse,
        budget=budget,
        scope=scope,
        clip=clip,
        min_turns=min_turns,
        min_disagreement=min_disagreement,
        generator=generator,
    ).weights
