"""The torch backend: loops over tiles of logits, registered as operators so that they trace under torch.compile.

Two schedules. Both work tile by tile, [rows tokens, columns of the vocabulary], small enough to stay in a CPU's L2 cache between
the matrix product and the element-wise passes, and both recompute logits in the backward with the same call on the same shapes,
so that they are the same to the last bit.

fast  a chunk of tokens at a time. A mixture divergence and `linear_token_loss` keep the chunk's logits, [rows, V] of each model, and
      need no second product; the gradient of the weight is summed over the chunks in one fp32 [V, H].
lean  nothing larger than a tile is held. A mixture recomputes its logits, and the backward takes the vocabulary outermost, so that
      each slice of the weight's gradient is finished in fp32 and stored once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tiles
from .problem import Layer, Problem, over_shards
from .products import Gradients, operand, product
from .validate import IGNORE


class Chunk:
    """Some tokens of a problem: their operands, ready for the products."""

    def __init__(self, problem: Problem, rows: slice):
        self.problem, self.rows = problem, rows
        p = problem
        target = None if p.target is None else p.target[rows]
        self.ignored = None if target is None else target == IGNORE
        self.target = None if target is None else target - p.start
        self.student = self._hidden(p.student)
        self.teacher = None if p.teacher is None else self._hidden(p.teacher)
        self.temperature = None if p.temperature is None else p.temperature[rows]
        self.inverse = None if p.temperature is None else self.temperature.reciprocal()

    def _hidden(self, layer: Layer) -> Tensor:
        """Hidden rows as an operand. An ignored row is zeroed: whatever it holds, NaN too, must not reach a sum over tokens."""
        x = operand(layer.hidden[self.rows], self.problem.dtype)
        return x if self.ignored is None or (x.device.type == "cpu" and not self.ignored.any()) else x.masked_fill(self.ignored[:, None], 0)

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start

    def logits(self, layer: Layer, x: Tensor, weight: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Scaled logits of one tile into `out` [n, w]. `weight` is the tile's operand [w, H]."""
        product(x, weight.t(), out)
        if layer.bias is not None:
            out.add_(layer.bias[columns])
        if layer.softcap:
            out.div_(layer.softcap).tanh_().mul_(layer.softcap)
        if self.inverse is not None:
            out.mul_(self.inverse[:, None])
        if layer.bias is not None:
            out.clamp_(min=tiles.MASKED)  # a bias of -inf is probability 0, not NaN
        if self.problem.valid is not None:
            out.masked_fill_(~self.problem.valid[columns], tiles.MASKED)
        return out

    def both(self, columns: slice, zs: Tensor, zt: Tensor | None, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Student's and teacher's logits of one tile; `weight` is the student's operand where the caller has it."""
        p = self.problem
        self.logits(p.student, self.student, operand(p.student.weight[columns], p.dtype) if weight is None else weight, columns, zs)
        if p.teacher is not None:
            self.logits(p.teacher, self.teacher, operand(p.teacher.weight[columns], p.dtype), columns, zt)
        return zs, zt


class Scratch:
    """Rows of a [count, elements] buffer viewed as tiles [n, w]; with `keep`, tile after tile over the whole vocabulary."""

    def __init__(self, buffers: Tensor, keep: bool = False):
        self.buffers, self.keep = buffers, keep

    @staticmethod
    def of(problem: Problem, count: int, keep: bool = False) -> Scratch:
        rows, columns = problem.tile
        return Scratch(problem.student.hidden.new_empty(count, rows * (problem.columns if keep else columns), dtype=problem.dtype), keep)

    def __call__(self, i: int, n: int, columns: slice) -> Tensor:
        first = n * columns.start if self.keep else 0
        return self.buffers[i, first : first + n * (columns.stop - columns.start)].view(n, -1)


def statistics(chunk: Chunk, scratch: Scratch, kept: Scratch | None) -> Tensor:
    """Statistics [STATISTICS, n] of one chunk; leaves the logits in `kept` if given."""
    p, n, slices = chunk.problem, chunk.size, chunk.problem.slices()

    def place(columns: slice) -> tuple[Tensor, Tensor | None]:
        where = scratch if kept is None else kept
        return where(0, n, columns), None if p.teacher is None else where(1, n, columns)

    parts = scratch.buffers.new_zeros(tiles.PARTIALS, len(slices), n)
    for i, columns in enumerate(slices):
        zs, zt = chunk.both(columns, *place(columns))
        buffers = tuple(scratch(k, n, columns) for k in range(4))
        tiles.partial(zs, zt, chunk.target, columns.start, p.kind, buffers, parts[:, i])
    sums = tiles.merge(parts, p.kind)
    if p.group:
        sums = tiles.merge(over_shards(p, sums), p.kind)
    out = tiles.statistics(sums, p.kind)
    if p.mixture is not None:
        look = out.new_zeros(2, n)
        for columns in slices:
            zs, zt = place(columns) if kept is not None else chunk.both(columns, *place(columns))
            look += tiles.second_look(zs, zt, out, p.mixture)
        out[[tiles.DIVERGENCE, tiles.MEAN_SLOPE]] = over_shards(p, look).sum(1) if p.group else look
    if chunk.ignored is not None:
        unheld = ~chunk.ignored & (sums[tiles.OWNED] != 1)
        out[: tiles.OUTPUTS].masked_fill_(unheld, torch.nan).masked_fill_(chunk.ignored, 0)
    return out


class ChunkGradient:
    """The gradient of a chunk's logits, tile by tile, for its statistics [STATISTICS, n] and upstream [>= 3, n]."""

    def __init__(self, chunk: Chunk, stats: Tensor, upstream: Tensor):
        upstream = upstream[: tiles.LOGP + 1].to(stats.dtype)
        if chunk.ignored is not None:
            # Ignored and out-of-range tokens add nothing to any gradient; the latter's outputs are NaN. The normalisers stay.
            dead = chunk.ignored | stats[tiles.LOGP].isnan()
            stats, upstream = stats.clone(), upstream.masked_fill(dead, 0)
            stats[: tiles.OUTPUTS].masked_fill_(dead, 0)
        if chunk.inverse is not None:
            upstream = upstream * chunk.inverse  # from the scaled logits to the raw ones
        self.chunk, self.stats, self.factors = chunk, stats, tiles.Factors.of(stats, upstream, chunk.problem.kind)

    def tile(self, columns: slice, zs: Tensor, zt: Tensor | None, e: Tensor) -> Tensor:
        """Over zs; zt and e are overwritten."""
        chunk, p = self.chunk, self.chunk.problem
        softcap = p.student.softcap
        slope = tiles.softcap_slope(zs, chunk.temperature, softcap) if softcap else None
        dz = tiles.logit_gradient(zs, zt, chunk.target, columns.start, self.stats, self.factors, p.kind, p.mixture, e)
        return dz if slope is None else dz.mul_(slope)


def head_statistics(p: Problem) -> Tensor:
    """Statistics [STATISTICS, T] of all tokens."""
    out = p.student.hidden.new_zeros(tiles.STATISTICS, p.tokens, dtype=p.dtype)
    scratch = Scratch.of(p, 4)
    kept = Scratch.of(p, 2, keep=True) if p.mixture is not None and not p.lean else None
    for rows in p.parts():
        out[:, rows] = statistics(Chunk(p, rows), scratch, kept)
    return out


def head_gradients(p: Problem, stats: Tensor, upstream: Tensor, hidden: bool, weight: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [T, H], weight [V, H] and bias [V] with recomputed logits; stats [STATISTICS, T], upstream [>= 3, T]."""
    gradients, scratch = Gradients.of(p, hidden, weight, bias), Scratch.of(p, 3)
    chunks = [ChunkGradient(Chunk(p, rows), stats[:, rows], upstream[:, rows]) for rows in p.parts()]

    def add(gradient: ChunkGradient, columns: slice, w: Tensor, dw: Tensor | None) -> None:
        chunk = gradient.chunk
        zs, zt = chunk.both(columns, scratch(0, chunk.size, columns), None if p.teacher is None else scratch(1, chunk.size, columns), w)
        gradients.add(chunk.rows, columns, gradient.tile(columns, zs, zt, scratch(2, chunk.size, columns)), chunk.student, w, dw)

    if p.lean:
        for columns in p.slices():
            w = operand(p.student.weight[columns], p.dtype)
            dw = torch.empty_like(w, dtype=p.dtype) if weight else None
            for gradient in chunks:
                add(gradient, columns, w, dw)
            if weight and chunks:
                gradients.dw[columns] = dw
    else:
        for gradient in chunks:
            for columns in p.slices():
                add(gradient, columns, operand(p.student.weight[columns], p.dtype), gradients.dw[columns] if weight else None)
    return gradients.results(p)


def chunk_statistics(p: Problem, rows: slice, kept: Tensor) -> Tensor:
    """Statistics [STATISTICS, n] of the tokens `rows`; leaves their logits in `kept` (`Problem.kept`)."""
    return statistics(Chunk(p, rows), Scratch.of(p, 4), Scratch(kept, keep=True))


def chunk_gradients(p: Problem, rows: slice, kept: Tensor, stats: Tensor, upstream: Tensor, gradients: Gradients) -> None:
    """Add the gradients of the tokens `rows`, from the logits that `chunk_statistics` left in `kept` (they are overwritten)."""
    logits, scratch = Scratch(kept, keep=True), Scratch.of(p, 1)
    gradient = ChunkGradient(Chunk(p, rows), stats, upstream)
    n = rows.stop - rows.start
    for columns in p.slices():
        dz = gradient.tile(columns, logits(0, n, columns), None if p.teacher is None else logits(1, n, columns), scratch(0, n, columns))
        dw = gradients.dw[columns] if gradients.dw.numel() else None
        gradients.add(rows, columns, dz, gradient.chunk.student, operand(p.student.weight[columns], p.dtype), dw)
