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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import tiles
from .validate import IGNORE

# Tokens and columns of a tile. CPU: four fp32 tiles of 256 x 512 are the 2 MiB of an L2 cache. Twice the rows or columns measured the same;
# 128 rows were slower, as a product needs about 256 to run at full speed, and so were 256 columns.
# Accelerators: enough rows for the product to be compute bound, few enough columns for the temporaries to be small.
TILE = {"cpu": (256, 512), "accelerator": (2048, 8192)}


@dataclass(frozen=True)
class Layer:
    """One model's output layer: hidden [T, H], weight [V, H], bias [V] or None, softcap (0 = none)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float


@dataclass(frozen=True)
class Problem:
    """What the operators compute on. target [T], temperature [T] or None, valid [V] or None; kind '' = no teacher."""

    student: Layer
    teacher: Layer | None
    target: Tensor | None
    temperature: Tensor | None
    valid: Tensor | None
    kind: str
    alpha: float
    group: str
    start: int
    lean: bool

    @property
    def tokens(self) -> int:
        return self.student.hidden.shape[0]

    @property
    def columns(self) -> int:
        """Size of the common vocabulary: what lies beyond belongs to neither softmax."""
        size = self.student.weight.shape[0]
        return size if self.teacher is None else min(size, self.teacher.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.student.hidden, None if self.teacher is None else self.teacher.hidden)

    @property
    def mixture(self) -> tiles.Mixture | None:
        return tiles.Mixture.of(self.kind, self.alpha)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile. Where tokens or columns are few the tile grows the other way, for the same work per call."""
        rows, columns = TILE["cpu" if self.student.hidden.device.type == "cpu" else "accelerator"]
        area = rows * columns
        # Shards may differ in columns, but every rank must cut the tokens alike: each chunk is a collective.
        rows = min(max(self.tokens, 1), rows if self.group else max(rows, area // self.columns))
        return rows, min(self.columns, max(columns, area // rows))

    def parts(self) -> list[slice]:
        """The tokens of each chunk."""
        rows = self.tile[0]
        return [slice(a, min(a + rows, self.tokens)) for a in range(0, self.tokens, rows)]

    def chunks(self) -> Iterator[Chunk]:
        return (Chunk(self, rows) for rows in self.parts())

    def slices(self) -> list[slice]:
        columns = self.tile[1]
        return [slice(a, min(a + columns, self.columns)) for a in range(0, self.columns, columns)]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where an input is fp64 (tests), else fp32: logits are never rounded to 16 bits."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as its product wants it: 16-bit as it is where the product can accumulate and return fp32, else in the compute dtype."""
    return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32 else x.to(dtype)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in the dtype of `out`; 16-bit operands (CUDA) accumulate in fp32."""
    if b.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    result = torch.mm(a.to(b.dtype), b, out_dtype=out.dtype)
    return out.add_(result) if add else out.copy_(result)


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


def resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


def over_shards(problem: Problem, part: Tensor) -> Tensor:
    """[k, ...] of this rank -> [k, ranks, ...] of the group's ranks, in rank order."""
    group = resolve(problem.group)
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts, 1)


def chunk_statistics(chunk: Chunk, scratch: Scratch, kept: Scratch | None) -> Tensor:
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


class Gradients:
    """Where gradients are summed, in the compute dtype: dx [T, H], dw [V, H], db [V]; an empty tensor is not wanted.

    The first chunk writes dw and the first slice of columns dx, the others add: clearing a [V, H] first would cost a pass over it.
    """

    def __init__(self, dx: Tensor, dw: Tensor, db: Tensor):
        self.dx, self.dw, self.db = dx, dw, db

    @staticmethod
    def of(problem: Problem, hidden: bool, weight: bool, bias: bool) -> Gradients:
        """The lean schedule finishes each slice of dw in fp32 by itself, so its dw is in the weight's dtype."""
        layer, dtype = problem.student, problem.dtype
        rows, columns = layer.weight.shape
        dw = layer.weight.new_empty((rows, columns) if weight else 0, dtype=layer.weight.dtype if problem.lean else dtype)
        dw[problem.columns if problem.tokens else 0 :].zero_()
        return Gradients(layer.hidden.new_empty(layer.hidden.shape if hidden else 0, dtype=dtype), dw, layer.weight.new_zeros(rows if bias else 0, dtype=dtype))

    def add(self, chunk: Chunk, columns: slice, dz: Tensor, weight: Tensor, dw: Tensor | None) -> None:
        """One tile's share; `dw` [w, H] is where the weight's gradient of these columns is summed."""
        if self.dx.numel():
            product(dz, weight, self.dx[chunk.rows], add=columns.start > 0)
        if dw is not None:
            product(dz.t(), chunk.student, dw, add=chunk.rows.start > 0)
        if self.db.numel():
            self.db[columns] += dz.sum(0)

    def results(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of the parameters. Shards of the vocabulary add up in dx."""
        layer = problem.student
        if self.dx.numel() and problem.group:
            dist.all_reduce(self.dx, group=resolve(problem.group))
        bias_dtype = layer.weight.dtype if layer.bias is None else layer.bias.dtype
        return self.dx.to(layer.hidden.dtype), self.dw.to(layer.weight.dtype), self.db.to(bias_dtype)


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
    for chunk in p.chunks():
        out[:, chunk.rows] = chunk_statistics(chunk, scratch, kept)
    return out


def head_gradients(p: Problem, stats: Tensor, upstream: Tensor, hidden: bool, weight: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [T, H], weight [V, H] and bias [V] with recomputed logits; stats [STATISTICS, T], upstream [>= 3, T]."""
    gradients, scratch = Gradients.of(p, hidden, weight, bias), Scratch.of(p, 3)
    chunks = [ChunkGradient(chunk, stats[:, chunk.rows], upstream[:, chunk.rows]) for chunk in p.chunks()]

    def add(gradient: ChunkGradient, columns: slice, w: Tensor, dw: Tensor | None) -> None:
        chunk = gradient.chunk
        zs, zt = chunk.both(columns, scratch(0, chunk.size, columns), None if p.teacher is None else scratch(1, chunk.size, columns), w)
        gradients.add(chunk, columns, gradient.tile(columns, zs, zt, scratch(2, chunk.size, columns)), w, dw)

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


def kept_gradients(chunk: Chunk, kept: Scratch, stats: Tensor, upstream: Tensor, gradients: Gradients) -> None:
    """Add one chunk's gradients, from the logits that `chunk_statistics` left in `kept` (they are overwritten)."""
    p, n, scratch = chunk.problem, chunk.size, Scratch.of(chunk.problem, 1)
    gradient = ChunkGradient(chunk, stats, upstream)
    for columns in p.slices():
        dz = gradient.tile(columns, kept(0, n, columns), None if p.teacher is None else kept(1, n, columns), scratch(0, n, columns))
        dw = gradients.dw[columns] if gradients.dw.numel() else None
        gradients.add(chunk, columns, dz, operand(p.student.weight[columns], p.dtype), dw)
