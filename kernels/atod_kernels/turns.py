"""Reduce per-token values over turns, and weigh turns by T-DUR (ATOD, arXiv 2606.27814).

Segments are CSR offsets [K + 1]: segment k is offsets[k] to offsets[k + 1]. Results are the same from run to run. This
module checks arguments and chooses the backend: `triton/turns.py` for fp32 tensors on a GPU, else `torch/turns.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import validate
from .names import FUSE, NORMALISE, REDUCTIONS
from .torch import turns as torch_turns
from .validate import require


def on_triton(x: Tensor) -> bool:
    """Return whether the kernels of `triton/turns.py` support a tensor."""
    return x.device.type == "cuda" and x.dtype == torch.float32 and validate.HAS_TRITON


@torch.library.custom_op("atod_kernels::turn_reduce", mutates_args=())
def _turn_reduce(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    if on_triton(values):
        from .triton import turns as triton_turns

        return triton_turns.turn_reduce(values.contiguous(), offsets, reduce)
    return torch_turns.turn_reduce(values, offsets, reduce)


@_turn_reduce.register_fake
def _(values: Tensor, offsets: Tensor, reduce: str) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("atod_kernels::turn_reduce_backward", mutates_args=())
def _turn_reduce_backward(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    if on_triton(values):
        from .triton import turns as triton_turns

        return triton_turns.turn_reduce_backward(upstream, values.contiguous(), offsets, out, reduce)
    return torch_turns.turn_reduce_backward(upstream, values, offsets, out, reduce)


@_turn_reduce_backward.register_fake
def _(upstream: Tensor, values: Tensor, offsets: Tensor, out: Tensor, reduce: str) -> Tensor:
    return values.new_empty(values.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    values, offsets, ctx.reduce = inputs
    ctx.offsets = offsets  # not saved for backward, which refuses tensors made under torch.inference_mode
    ctx.save_for_backward(values, output)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
    values, output = ctx.saved_tensors
    return _turn_reduce_backward(upstream, values, ctx.offsets, output, ctx.reduce), None, None


_turn_reduce.register_autograd(_backward, setup_context=_save)


def turn_reduce(values: Tensor, offsets: Tensor, reduce: str = "mean") -> Tensor:
    """Reduce per-token values to one value per turn: mean, sum, max or min. Differentiable.

    Args:
        values: [T] fp32 (or fp64).
        offsets: [K + 1] int64 or int32, non-decreasing, from 0 to T: turn k is values[offsets[k] : offsets[k + 1]].
        reduce: mean | sum | max | min.

    Returns:
        [K] in the dtype of values. An empty turn is 0 and has no gradient. Tokens that tie for a maximum or minimum
        share its gradient.

    Raises:
        ValueError: if an argument's type, shape, dtype, device or value is wrong. On an accelerator offsets are not
            read, which would wait for the device: a turn whose offsets are impossible is NaN.
    """
    validate.tensor("values", values, 1)
    require(values.dtype in (torch.float32, torch.float64), f"values is {values.dtype}; expected float32 (or float64)")
    validate.one_of("reduce", reduce, REDUCTIONS)
    validate.offsets("offsets", offsets, values.shape[0], "values")
    require(
        offsets.device == values.device,
        f"offsets is on {offsets.device}; expected {values.device}, where values are",
    )
    return _turn_reduce(values, offsets.long().contiguous(), reduce)


def expand_turns(values: Tensor, offsets: Tensor) -> Tensor:
    """Repeat each turn's value for each of its tokens. Differentiable.

    Args:
        values: [K], any dtype.
        offsets: [K + 1] int64 or int32, non-decreasing, from 0 to T. T is read from the device.

    Returns:
        [T] in the dtype of values.

    Raises:
        ValueError: if offsets do not start at 0, are not sorted, or do not fit values in shape or device.
    """
    validate.tensor("values", values, 1)
    validate.offsets("offsets", offsets, None, "the tokens")
    expected = values.shape[0] + 1
    require(
        offsets.shape[0] == expected,
        f"offsets has shape {list(offsets.shape)}; expected [{expected}], one more than values",
    )
    require(
        offsets.device == values.device,
        f"offsets is on {offsets.device}; expected {values.device}, where values are",
    )
    return torch.repeat_interleave(values, offsets[1:].long() - offsets[:-1].long())


class TurnWeights(NamedTuple):
    """Weights of turns, and the trajectories they do not apply to.

    Attributes:
        weights: [K] fp32, one per turn.
        unweighted: [N] bool, trajectories whose turns all keep weight 1: too few turns, or too little disagreement.
        fallback: [N] bool, weighted trajectories whose turns have weight 1 because budget mean1 has no solution.
    """

    weights: Tensor
    unweighted: Tensor
    fallback: Tensor


def unweighted(
    disagreement: Tensor, trajectory_offsets: Tensor, *, min_turns: int = 3, min_disagreement: float = 0.01
) -> Tensor:
    """Return which trajectories keep weight 1: those that are short or agree with the teacher in every turn.

    Args:
        disagreement: [K], d_k of each turn.
        trajectory_offsets: [N + 1], the turns of each trajectory.
        min_turns: a trajectory with fewer turns keeps weight 1.
        min_disagreement: a trajectory whose largest d_k is smaller keeps weight 1.

    Returns:
        bool [N].

    Raises:
        ValueError: if disagreement is not a vector or the offsets do not fit it.
    """
    validate.tensor("disagreement", disagreement, 1)
    validate.offsets("trajectory_offsets", trajectory_offsets, disagreement.shape[0], "disagreement")
    turns = trajectory_offsets[1:] - trajectory_offsets[:-1]
    # An empty trajectory's maximum is 0; it has no turn to weigh either way.
    return (turns < min_turns) | (turn_reduce(disagreement.detach(), trajectory_offsets, "max") < min_disagreement)


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
    """Weigh turns as `turn_weights` does, and also return which trajectories keep weight 1.

    The arguments and errors are those of `turn_weights`. In scope batch, `fallback` marks every weighted trajectory or
    none, as all of them have one scale.
    """
    validate.tensor("disagreement", disagreement, 1)
    device, count = disagreement.device, disagreement.shape[0]
    validate.tensor("trajectory_offsets", trajectory_offsets, 1)
    given = {"disagreement": disagreement, "uncertainty": uncertainty}
    if turn_lengths is not None:
        given["turn_lengths"] = turn_lengths
    for name, x in given.items():
        validate.tensor(name, x, 1)
        require(
            x.shape[0] == count,
            f"{name} has shape {list(x.shape)}; expected [{count}], one value per turn as in disagreement",
        )
        require(x.device == device, f"{name} is on {x.device}; expected {device}, where disagreement is")
        require(name == "turn_lengths" or x.dtype in validate.FLOATS, f"{name} is {x.dtype}; expected a floating dtype")
    require(
        trajectory_offsets.device == device,
        f"trajectory_offsets is on {trajectory_offsets.device}; expected {device}, where disagreement is",
    )
    validate.one_of("normalise", normalise, NORMALISE)
    validate.one_of("fuse", fuse, FUSE)
    validate.one_of("budget", budget, ("raw", "mean1"))
    validate.one_of("scope", scope, ("trajectory", "batch"))
    require(
        isinstance(clip, tuple | list) and len(clip) == 2 and 0 <= clip[0] <= 1 <= clip[1],
        f"clip is {clip!r}; expected (low, high) with 0 <= low <= 1 <= high",
    )
    require(
        budget == "raw" or turn_lengths is not None,
        "turn_lengths is None; expected the tokens of each turn [K] for budget='mean1'",
    )
    require(
        fuse != "shuffled" or generator is not None, "generator is None; expected a torch.Generator for fuse='shuffled'"
    )
    lengths = turn_lengths if budget == "mean1" else None
    if scope == "trajectory" and normalise != "rank" and fuse != "shuffled" and on_triton(disagreement):
        validate.offsets("trajectory_offsets", trajectory_offsets, count, "disagreement")
        from .triton import turns as triton_turns

        offsets = trajectory_offsets.long().contiguous()
        return TurnWeights(
            *triton_turns.turn_weights(
                disagreement,
                uncertainty,
                offsets,
                lengths,
                normalise=normalise,
                fuse=fuse,
                clip=clip,
                min_turns=min_turns,
                min_disagreement=min_disagreement,
            )
        )
    left = unweighted(disagreement, trajectory_offsets, min_turns=min_turns, min_disagreement=min_disagreement)
    weights, fallback = torch_turns.turn_weights(
        disagreement,
        uncertainty,
        trajectory_offsets.long(),
        left,
        lengths,
        normalise=normalise,
        fuse=fuse,
        scope=scope,
        clip=clip,
        generator=generator,
    )
    return TurnWeights(weights, left, fallback)


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
    """Weigh turns by disagreement with the teacher and uncertainty of the student (T-DUR, ATOD, arXiv 2606.27814).

    With every default, the paper's w_k = 1 - (1 - d~_k)(1 - h~_k), d~ and h~ scaled to [0, 1] in each trajectory.

    Args:
        disagreement: [K] floating, d_k of the turns of N trajectories, one trajectory after the other.
        uncertainty: [K] floating, h_k of the turns.
        trajectory_offsets: [N + 1] int64 or int32, non-decreasing, from 0 to K: the turns of each trajectory.
        turn_lengths: [K] tokens of each turn. Budget mean1 needs it; nothing else uses it.
        normalise: how each signal is brought to [0, 1] over its scope: minmax (0.5 where its range is below 1e-8), rank
            (average rank) or none (clipped).
        fuse: how the two signals make a weight: softor | mean | max | product | disagreement | uncertainty | uniform
            (all 1) | shuffled (the softor weights, permuted at random within the scope: a control).
        budget: raw, or mean1: clip(c w, *clip), c such that the token-weighted mean over the scope is 1. Where there is
            no such c, and where all w are 0, weights are 1.
        scope: the turns that are compared: those of a trajectory, or those of all the batch's weighted trajectories.
        clip: (low, high) with 0 <= low <= 1 <= high, of budget mean1.
        min_turns: a trajectory with fewer turns keeps weight 1 in all of its turns.
        min_disagreement: so does a trajectory whose largest d_k is smaller.
        generator: the source of random numbers; fuse shuffled needs it.

    Returns:
        [K] fp32, detached. Raw weights are in [0, 1].

    Raises:
        ValueError: if an argument's type, shape, dtype, device or value is wrong. scope='batch' waits for the device
            once.
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
