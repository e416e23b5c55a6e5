"""The torch backend: loops over tiles of logits in torch operations.

Two schedules. Both make the logits tile by tile, [rows tokens, columns of the vocabulary], large enough for the matrix
products to run at full speed, and pass over a tile a group of rows at a time, small enough to stay in a CPU's L2 cache
from the first pass to the last. Both recompute logits in the backward with the same call on the same shapes, so that
they are the same to the last bit.

fast  a chunk of tokens at a time. A mixture divergence and `linear_token_loss` keep the chunk's logits, [rows, V] of
      each model, and need no second product; the gradient of the weight is summed over the chunks in one fp32 [V, H].
lean  nothing larger than a tile is held. A mixture recomputes its logits, and the backward takes the vocabulary
      outermost, so that each slice of the weight's gradient is finished in fp32 and stored once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import algebra
from ..names import IGNORE, MASKED
from ..problem import Layer, Problem, over_shards
from ..products import Gradients, operand, product

AMX = torch.cpu._is_amx_tile_supported()
MATRIX_UNIT = threading.Lock()
# Logits of one model in a group of rows, per thread. A pass with its scratch needs seven times that: 1.75 MiB of fp32.
GROUP = 2**16


@contextmanager
def products_of(p: Problem) -> Iterator[None]:
    """Let a CPU with AMX make the products of bf16 inputs, held in fp32, in bf16 and sum in fp32: half the time.

    The logits lose nothing by it; their gradient is rounded to bf16 before the last two products, as on a GPU. torch
    has no such option for one call, so it is set for the process and reset after: meanwhile fp32 products of other
    threads use bf16, too.
    """
    inputs = {layer.hidden.dtype for layer in p.layers}
    if not (AMX and inputs == {torch.bfloat16} and p.dtype == torch.float32 and p.student.hidden.is_cpu):
        yield
        return
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with MATRIX_UNIT:  # one thread at a time, or one would restore another's setting
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


class Chunk:
    """A chunk of a problem's tokens, with their operands ready for the products."""

    def __init__(self, problem: Problem, rows: slice):
        self.problem, self.rows = problem, rows
        p = problem
        target = None if p.target is None else p.target[rows]
        self.ignored = None if target is None else target == IGNORE
        self.target = None if target is None else target - p.start
        self.hidden = [self._hidden(layer) for layer in p.layers]
        self.temperature = None if p.temperature is None else p.temperature[rows, None]
        self.inverse = None if self.temperature is None else self.temperature.reciprocal()

    def _hidden(self, layer: Layer) -> Tensor:
        """Return the hidden rows as an operand, ignored rows zeroed: their NaN must not reach a sum over tokens."""
        x = operand(layer.hidden[self.rows], self.problem.dtype)
        return (
            x
            if self.ignored is None or (x.device.type == "cpu" and not self.ignored.any())
            else x.masked_fill(self.ignored[:, None], 0)
        )

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def logits(self, columns: slice, weights: list[Tensor], out: Tensor) -> Tensor:
        """Write the scaled logits of one tile into `out` [models, n, w]; `weights` are the tile's operands [w, H]."""
        p = self.problem
        for layer, x, weight, z in zip(p.layers, self.hidden, weights, out, strict=True):
            product(x, weight.t(), z)
            if layer.bias is not None:
                z.add_(layer.bias[columns])
            if layer.softcap:
                z.div_(layer.softcap).tanh_().mul_(layer.softcap)
            if layer.scale != 1:
                z.mul_(layer.scale)
            if self.inverse is not None:
                z.mul_(self.inverse)
            if layer.bias is not None:
                z.clamp_(min=MASKED)  # a bias of -inf is probability 0, not NaN
        if p.valid is not None:
            excluded = ~p.valid[columns]
            # masked_fill_ with a mask of columns is not vectorised on a CPU, where the mask can be read.
            out.index_fill_(2, excluded.nonzero()[:, 0], MASKED) if out.is_cpu else out.masked_fill_(excluded, MASKED)
        return out


def group_rows(p: Problem, columns: slice) -> int:
    """Return how many rows of a tile the element-wise passes take at a time."""
    cpu = p.student.hidden.device.type == "cpu"
    return (
        min(p.tile[0], max(1, GROUP // (columns.stop - columns.start)) * torch.get_num_threads()) if cpu else p.tile[0]
    )


def weights(p: Problem, columns: slice) -> list[Tensor]:
    """Return the weight operands [w, H] of a tile, student first."""
    return [operand(layer.weight[columns], p.dtype) for layer in p.layers]


class Room:
    """Memory [count, elements] for tiles [count, n, w]; if `kept`, for those of all columns, one after the other."""

    def __init__(self, memory: Tensor, kept: bool = False):
        self.memory, self.kept = memory, kept

    @staticmethod
    def of(p: Problem, count: int, group: bool = False) -> Room:
        """Return memory for `count` tiles, or for groups of their rows."""
        slices = p.slices()
        elements = max((group_rows(p, c) if group else p.tile[0]) * (c.stop - c.start) for c in (slices[0], slices[-1]))
        return Room(p.student.hidden.new_empty(count, elements, dtype=p.dtype))

    def __call__(self, n: int, columns: slice) -> Tensor:
        first = n * columns.start if self.kept else 0
        return self.memory[:, first : first + n * (columns.stop - columns.start)].view(len(self.memory), n, -1)


def statistics(chunk: Chunk, kept: Room | None) -> Tensor:
    """Return the statistics [STATISTICS, n] of one chunk; leaves the scaled logits in `kept` if given."""
    p, n, slices = chunk.problem, chunk.size, chunk.problem.slices()
    models = len(p.layers)
    place = Room.of(p, models) if kept is None else kept
    scratch = Room.of(p, 2 * models + 1, group=True)
    parts = scratch.memory.new_zeros(algebra.PARTIALS, len(slices), n, 1)

    def logits(columns: slice) -> Tensor:
        return chunk.logits(columns, weights(p, columns), place(n, columns))

    for i, columns in enumerate(slices):
        z, rows = logits(columns), group_rows(p, columns)
        memory = scratch(rows, columns)
        for group, out in zip(z.split(rows, 1), parts[:, i].split(rows, 1), strict=True):
            algebra.partial(group, p.kind, memory[:, : group.shape[1]], out)
        if chunk.target is not None:
            algebra.picked(z, chunk.target, columns.start, parts[:, i, :, 0])
    sums = algebra.merge(parts[..., 0], p.kind)
    if p.group:
        sums = algebra.merge(over_shards(p, sums), p.kind)
    out = algebra.statistics(sums, p.kind)
    if p.mixture is not None:
        look = out.new_zeros(2, n)
        for columns in slices:
            z, rows = logits(columns) if kept is None else kept(n, columns), group_rows(p, columns)
            for group, stats, total in zip(
                z.split(rows, 1), out[:, :, None].split(rows, 1), look.split(rows, 1), strict=True
            ):
                total += algebra.second_look(group, stats, p.mixture)
        out[algebra.DIVERGENCE :: algebra.MEAN_SLOPE - algebra.DIVERGENCE] = (
            over_shards(p, look).sum(1) if p.group else look
        )
    if chunk.ignored is not None:
        unheld = ~chunk.ignored & ((sums[algebra.OWNED] != 1) | (sums[algebra.PICK_S] <= MASKED / 2))
        out[: algebra.OUTPUTS].masked_fill_(unheld, torch.nan).masked_fill_(chunk.ignored, 0)
    return out


class ChunkGradient:
    """The gradient of a chunk's logits, tile by tile, for its statistics [STATISTICS, n] and upstream [>= 3, n]."""

    def __init__(self, chunk: Chunk, stats: Tensor, upstream: Tensor):
        upstream = upstream[: algebra.LOGP + 1].to(stats.dtype)
        if chunk.ignored is not None:
            # Ignored and out-of-range tokens (whose outputs are NaN) add nothing to any gradient. The normalisers
            # stay.
            dead = chunk.ignored | stats[algebra.LOGP].isnan()
            stats, upstream = stats.clone(), upstream.masked_fill(dead, 0)
            stats[: algebra.OUTPUTS].masked_fill_(dead, 0)
        if chunk.temperature is not None:
            upstream = upstream / chunk.temperature[:, 0]  # from the scaled logits to the raw ones
        self.chunk, self.stats = chunk, stats[:, :, None]
        self.factors = algebra.factors(stats, upstream, chunk.problem.kind)[:, :, None]
        self.onehot = upstream[algebra.LOGP, :, None]
        softcap = chunk.problem.student.softcap
        if softcap:
            self.cap = (
                self.onehot.new_full(self.onehot.shape, softcap)
                if chunk.temperature is None
                else softcap / chunk.temperature
            )
            self.onehot = self.onehot * algebra.softcap_slope(
                self.stats[[algebra.LOGP, algebra.SHIFT_S, algebra.LOG_S]].sum(0), self.cap
            )

    def tile(self, columns: slice, z: Tensor, scratch: Room) -> Tensor:
        """Write one tile's gradient over z[0], from scaled logits z [models, n, w]; the rest of z is overwritten."""
        p, target, rows = self.chunk.problem, self.chunk.target, group_rows(self.chunk.problem, columns)
        e = scratch(rows, columns)[0]
        slope = algebra.softcap_slope(z[0], self.cap) if p.student.softcap else None
        for group, stats, factors in zip(
            z.split(rows, 1), self.stats.split(rows, 1), self.factors.split(rows, 1), strict=True
        ):
            algebra.logit_gradient(group, stats, factors, p.kind, p.mixture, e[: group.shape[1]])
        dz = z[0] if slope is None else z[0].mul_(slope)
        if target is not None:
            where, inside = algebra.pick(z, target, columns.start)
            dz.scatter_add_(1, where, self.onehot * inside)
        return dz


def head_statistics(p: Problem) -> Tensor:
    """Return the statistics [STATISTICS, T] of all tokens."""
    out = p.student.hidden.new_zeros(algebra.STATISTICS, p.tokens, dtype=p.dtype)
    kept = Room(p.kept(), kept=True) if p.mixture is not None and not p.lean else None
    with products_of(p):
        for rows in p.parts():
            out[:, rows] = statistics(Chunk(p, rows), kept)
    return out


def head_gradients(
    p: Problem, stats: Tensor, upstream: Tensor, hidden: bool, weight: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of hidden [T, H], weight [V, H] and bias [V], from recomputed logits.

    stats [STATISTICS, T], upstream [>= 3, T]; an empty tensor stands for a gradient that is not wanted.
    """
    gradients = Gradients.of(p, hidden, weight, bias)
    place, scratch = Room.of(p, len(p.layers)), Room.of(p, 1, group=True)
    chunks = [ChunkGradient(Chunk(p, rows), stats[:, rows], upstream[:, rows]) for rows in p.parts()]

    def add(gradient: ChunkGradient, columns: slice, operands: list[Tensor], dw: Tensor | None) -> None:
        chunk = gradient.chunk
        z = chunk.logits(columns, operands, place(chunk.size, columns))
        gradients.add(chunk.rows, columns, gradient.tile(columns, z, scratch), chunk.hidden[0], operands[0], dw)

    with products_of(p):
        if p.lean:
            for columns in p.slices():
                operands = weights(p, columns)
                final = gradients.dw[columns] if weight else None
                dw = final if final is None or final.dtype == p.dtype else torch.empty_like(final, dtype=p.dtype)
                for gradient in chunks:
                    add(gradient, columns, operands, dw)
                if chunks and final is not None and dw is not None and dw is not final:
                    final.copy_(dw)
        else:
            for gradient in chunks:
                for columns in p.slices():
                    add(gradient, columns, weights(p, columns), gradients.dw[columns] if weight else None)
    return gradients.results(p)


def chunk_statistics(p: Problem, rows: slice, kept: Tensor) -> Tensor:
    """Return the statistics [STATISTICS, n] of the tokens `rows`; leaves their logits in `kept` (`Problem.kept`)."""
    with products_of(p):
        return statistics(Chunk(p, rows), Room(kept, kept=True))


def chunk_gradients(
    p: Problem, rows: slice, kept: Tensor, stats: Tensor, upstream: Tensor, gradients: Gradients
) -> None:
    """Add the gradients of the tokens `rows`, from the logits that `chunk_statistics` left in `kept`.

    The logits are overwritten.
    """
    logits, scratch = Room(kept, kept=True), Room.of(p, 1, group=True)
    gradient = ChunkGradient(Chunk(p, rows), stats, upstream)
    with products_of(p):
        for columns in p.slices():
            dz = gradient.tile(columns, logits(rows.stop - rows.start, columns), scratch)
            dw = gradients.dw[columns] if gradients.dw.numel() else None
            gradients.add(rows, columns, dz, gradient.chunk.hidden[0], operand(p.student.weight[columns], p.dtype), dw)
