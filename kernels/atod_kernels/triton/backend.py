"""The Triton backend: matrix products by the vendor's library, everything between them by the kernels of `tiles.py`.

fast  tiles of logits, [2048, 8192] in fp32, made by the library's product and passed over by one kernel at a time; the gradient of the
      logits is written in the operands' dtype to a buffer of its own. The default: the library's products are the fastest there are.
lean  `fused.py`: logits live in registers only. The backward takes the vocabulary outermost, so that each slice of the weight's
      gradient is finished in fp32 and stored once; what it holds is one tile of the logits' gradient.

The functions are those of `torch/backend.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .. import algebra
from ..problem import Problem, over_shards
from ..products import Gradients, operand, product
from ..validate import IGNORE, interpreted
from . import fused as fused_kernels
from . import tiles as tile_kernels
from .configs import architecture, configuration


def options(p: Problem) -> dict[str, Any]:
    """Compile-time constants that the kernels share."""
    mixture = p.mixture
    cap, scale = (p.teacher.softcap, p.teacher.scale) if p.teacher else (0.0, 1.0)
    constants = {"KIND": p.kind, "CAP_S": p.student.softcap, "CAP_T": cap, "SCALE_T": scale}
    return constants if mixture is None else constants | {"A": mixture.a, "B": mixture.b}


def own(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def pointers(p: Problem, rows: slice, columns: slice) -> dict[str, Tensor | None]:
    """What is added to raw logits on the way in, from the tile's first row and column on."""
    valid = None if p.valid is None else p.valid.view(torch.uint8)
    inverse = None if p.temperature is None else p.temperature[rows].float().reciprocal()
    bias_t = p.teacher.bias if p.teacher else None
    return {"bias_s": own(p.student.bias, columns), "bias_t": own(bias_t, columns), "valid": own(valid, columns), "inverse": inverse}


def config(p: Problem, kernel: str) -> dict[str, Any]:
    bits = 32 if torch.float32 in (p.student.hidden.dtype, p.teacher.hidden.dtype if p.teacher else None) else 16
    return configuration(kernel, architecture(p.student.hidden.device), bits)


class Tiles:
    """Tiles [n, w] of fp32 logits in a buffer [models, elements], rows a whole tile's width apart so that they stay aligned;
    with `keep`, tile after tile over the whole vocabulary."""

    def __init__(self, p: Problem, buffer: Tensor, keep: bool):
        self.p, self.buffer, self.keep = p, buffer, keep

    @staticmethod
    def of(p: Problem) -> Tiles:
        return Tiles(p, p.student.hidden.new_empty(1 if p.teacher is None else 2, p.tile[0] * p.stride, dtype=torch.float32), keep=False)

    def __call__(self, model: int, n: int, columns: slice) -> Tensor:
        first = columns.start // self.p.tile[1] * n * self.p.stride if self.keep else 0
        return self.buffer[model, first : first + n * self.p.stride].view(n, -1)[:, : columns.stop - columns.start]

    def make(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Raw logits of one tile, by the products."""
        layers = (self.p.student,) if self.p.teacher is None else (self.p.student, self.p.teacher)
        out = [
            product(operand(layer.hidden[rows], torch.float32), operand(layer.weight[columns], torch.float32).t(), self(i, rows.stop - rows.start, columns))
            for i, layer in enumerate(layers)
        ]
        return out[0], out[1] if len(out) > 1 else None


def statistics_of_sums(p: Problem, parts: Tensor, rows: slice) -> Tensor:
    """parts [PARTIALS, k, n] -> [STATISTICS, n]."""
    if p.group:
        parts = over_shards(p, algebra.merge(parts, p.kind))
    n = parts.shape[2]
    out = parts.new_empty(algebra.STATISTICS, n)
    block = 128
    tile_kernels.combine[(triton.cdiv(n, block),)](
        parts, out, own(p.target, rows), n, parts.shape[1], parts.stride(0), parts.stride(1), out.stride(0), KIND=p.kind, BLOCK=block
    )
    return out


def add_look(p: Problem, stats: Tensor, look: Tensor, rows: slice) -> None:
    """look [2, k, n]: a mixture's divergence and mean slope of k column sets, into stats [STATISTICS, n]."""
    total = look.sum(1)
    if p.group:
        total = over_shards(p, total).sum(1)
    # The log-probability of an ignored row is 0, that of a row whose target no shard holds is NaN: so is the divergence.
    if p.target is not None:
        total[0].masked_fill_(p.target[rows] == IGNORE, 0).masked_fill_(stats[algebra.LOGP].isnan(), torch.nan)
    stats[algebra.DIVERGENCE :: algebra.MEAN_SLOPE - algebra.DIVERGENCE] = total


def tile_statistics(p: Problem, rows: slice, logits: Tiles) -> Tensor:
    """Statistics [STATISTICS, n] of some tokens from tiles of logits in memory."""
    n, slices, constants = rows.stop - rows.start, p.slices(), options(p)
    parts = logits.buffer.new_empty(algebra.PARTIALS, len(slices), n)
    extra = {k: v for k, v in constants.items() if k not in ("A", "B")}
    for i, columns in enumerate(slices):
        zs, zt = logits.make(rows, columns)
        tile_kernels.tile_sums[(n,)](
            zs, zt, own(p.target, rows), **pointers(p, rows, columns), parts=parts[:, i], start=p.start + columns.start, w=zs.shape[1],
            stride=p.stride, step=parts.stride(0), **extra, **config(p, "sums"),
        )  # fmt: skip
    stats = statistics_of_sums(p, parts, rows)
    if p.mixture is not None:
        look = logits.buffer.new_empty(2, len(slices), n)
        for i, columns in enumerate(slices):
            zs, zt = (logits(0, n, columns), logits(1, n, columns)) if logits.keep else logits.make(rows, columns)
            tile_kernels.tile_look[(n,)](
                zs, zt, **pointers(p, rows, columns), stats=stats, look=look[:, i], w=zs.shape[1], stride=p.stride, step=stats.stride(0),
                step_look=look.stride(0), **constants, **config(p, "look"),
            )  # fmt: skip
        add_look(p, stats, look, rows)
    return stats


def gradient_dtype(p: Problem) -> torch.dtype:
    """Of the logits' gradient. fp16 has not the range for it: a probability times a weight of 1/tokens is below its smallest number.

    So the last two products of fp16 inputs are made in fp32, without the tensor cores' 16-bit speed.
    """
    return torch.bfloat16 if p.student.hidden.dtype == torch.bfloat16 else torch.float32


def tile_gradient(p: Problem, rows: slice, columns: slice, zs: Tensor, zt: Tensor | None, dz: Tensor, stats: Tensor, upstream: Tensor) -> Tensor:
    """Gradient of one tile's raw logits into dz [n, w], which may be zs; stats [STATISTICS, n] and upstream [>= 3, n] of its tokens.

    What lies between w and dz's stride is overwritten.
    """
    n, w = zs.shape
    launch = config(p, "gradient")
    tile_kernels.tile_gradient[(n, triton.cdiv(w, launch["BLOCK"]))](
        zs, zt, dz, own(p.target, rows), **pointers(p, rows, columns), temperature=own(p.temperature, rows), stats=stats, upstream=upstream,
        start=p.start + columns.start, w=w, stride=zs.stride(0), stride_dz=dz.stride(0), step=stats.stride(0), step_up=upstream.stride(0),
        **{"A": 0.0, "B": 0.0} | options(p), **launch,
    )  # fmt: skip
    return dz


class Fused:
    """Launches of the kernels without logits in memory; one set of operands for all tokens and columns."""

    def __init__(self, p: Problem):
        self.p = p
        teacher = p.teacher or p.student
        layers = {"xs": p.student.hidden, "ws": p.student.weight[: p.columns], "xt": teacher.hidden, "wt": teacher.weight[: p.columns]}
        sizes = p.student.hidden.shape[1], teacher.hidden.shape[1]
        launch = config(p, "fused")
        descriptors = launch["TMA"] and all(aligned(x) for x in layers.values())
        if not descriptors and (launch["TMA"] or any(h % launch["BK"] for h in sizes)):
            launch = config(p, "ragged")
        even = descriptors or all(h % launch["BK"] == 0 for h in sizes)  # the hardware pads what a descriptor reads beyond the end
        self.launch = launch
        if descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            bm, bn, bk = (launch[k] for k in ("BM", "BN", "BK"))
            layers = {k: TensorDescriptor.from_tensor(x, [bm if k[0] == "x" else bn, bk]) for k, x in layers.items()}
        else:
            layers = {k: x.contiguous() for k, x in layers.items()}
        self.arguments = layers | {"HS": sizes[0], "HT": sizes[1], "tokens": p.tokens} | options(p)
        self.arguments |= self.launch | {"TMA": descriptors, "EVEN": even, "PRECISION": "interpreter" if interpreted() else "ieee"}

    def __call__(self, kernel: Any, grid: tuple[int, int], columns: slice, **arguments: Any) -> None:
        takes = set(kernel.arg_names) | {"num_warps", "num_stages"}
        shared = {"A": 0.0, "B": 0.0} | self.arguments | pointers(self.p, slice(0, self.p.tokens), columns)
        kernel[grid](**{k: v for k, v in shared.items() if k in takes}, **arguments)

    def splits(self) -> tuple[int, int]:
        """How many programs share a row of blocks, and columns of each: as many as leave the fewest units idle, the fewest of these."""
        p, device = self.p, self.p.student.hidden.device
        rows, blocks = triton.cdiv(p.tokens, self.launch["BM"]), triton.cdiv(p.columns, self.launch["BN"])
        units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        wanted = min(range(1, min(max(units // rows, 16), blocks) + 1), key=lambda k: (round(triton.cdiv(rows * k, units) / k, 2), k))
        share = triton.cdiv(blocks, wanted) * self.launch["BN"]
        return triton.cdiv(p.columns, share), share

    def statistics(self) -> Tensor:
        """Statistics [STATISTICS, T] of all tokens."""
        p, every = self.p, slice(0, self.p.columns)
        k, share = self.splits()
        grid = (triton.cdiv(p.tokens, self.launch["BM"]), k)
        parts = p.student.hidden.new_empty(algebra.PARTIALS, k, p.tokens, dtype=torch.float32)
        self(fused_kernels.fused_sums, grid, every, target=p.target, parts=parts, V=p.columns, start=p.start, share=share, step=parts.stride(0))
        stats = statistics_of_sums(p, parts, slice(0, p.tokens))
        if p.mixture is not None:
            look = parts[:2]
            self(
                fused_kernels.fused_look, grid, every, stats=stats, look=look, V=p.columns, share=share, step=stats.stride(0), step_look=look.stride(0)
            )  # fmt: skip
            add_look(p, stats, look, slice(0, p.tokens))
        return stats

    def gradient(self, rows: slice, columns: slice, dz: Tensor, stats: Tensor, upstream: Tensor) -> Tensor:
        """Gradient of one tile's raw logits into dz [n, w]; stats and upstream are of all tokens. What lies between w and dz's stride is overwritten."""
        p, (n, w) = self.p, dz.shape
        grid = (triton.cdiv(n, self.launch["BM"]), triton.cdiv(w, self.launch["BN"]))
        self(
            fused_kernels.fused_gradient, grid, slice(0, p.columns), dz=dz, target=p.target, temperature=p.temperature, stats=stats, upstream=upstream,
            row0=rows.start, n=n, column0=columns.start, end=columns.stop, start=p.start, stride_dz=dz.stride(0), step=stats.stride(0),
            step_up=upstream.stride(0),
        )  # fmt: skip
        return dz


def aligned(x: Tensor) -> bool:
    """Whether a tensor-memory descriptor can stand for a matrix: contiguous, from an address and with rows of whole 16 bytes."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[1] * x.element_size() % 16 == 0


def clean(p: Problem, rows: slice) -> Tensor:
    """Student's hidden rows as an operand of the weight's gradient: an ignored row's NaN must not meet its 0."""
    x = p.student.hidden[rows]
    if p.target is not None:
        x = x.masked_fill((p.target[rows] == IGNORE)[:, None], 0)
    return x.to(gradient_dtype(p))


def head_statistics(p: Problem) -> Tensor:
    """Statistics [STATISTICS, T] of all tokens."""
    if not p.tokens:
        return p.student.hidden.new_zeros(algebra.STATISTICS, 0, dtype=torch.float32)
    if p.lean:
        return Fused(p).statistics()
    logits = Tiles(p, p.kept(), keep=True) if p.mixture is not None else Tiles.of(p)
    return torch.cat([tile_statistics(p, rows, logits) for rows in p.parts()], 1)


def head_gradients(p: Problem, stats: Tensor, upstream: Tensor, hidden: bool, weight: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [T, H], weight [V, H] and bias [V] with recomputed logits; stats [STATISTICS, T], upstream [>= 3, T]."""
    gradients, dtype = Gradients.of(p, hidden, weight, bias), gradient_dtype(p)
    stats, upstream = stats.contiguous(), upstream.contiguous()
    room = Tiles(p, p.student.hidden.new_empty(1, p.tile[0] * p.stride, dtype=dtype), keep=False)

    if p.lean:
        fused = Fused(p) if p.tokens else None
        for columns in p.slices():
            w = p.student.weight[columns].to(dtype)
            dw = torch.empty_like(w, dtype=torch.float32) if weight else None
            for rows in p.parts():
                dz = fused.gradient(rows, columns, room(0, rows.stop - rows.start, columns), stats, upstream)
                gradients.add(rows, columns, dz, clean(p, rows), w, dw)
            if weight and p.tokens:
                gradients.dw[columns] = dw
    else:
        logits = Tiles.of(p)
        for rows in p.parts():
            x = clean(p, rows)
            for columns in p.slices():
                zs, zt = logits.make(rows, columns)
                dz = tile_gradient(p, rows, columns, zs, zt, room(0, len(x), columns), stats[:, rows], upstream[:, rows])
                gradients.add(rows, columns, dz, x, p.student.weight[columns].to(dtype), gradients.dw[columns] if weight else None)
    return gradients.results(p)


def chunk_statistics(p: Problem, rows: slice, kept: Tensor) -> Tensor:
    """Statistics [STATISTICS, n] of the tokens `rows`; leaves their raw logits in `kept` (`Problem.kept`)."""
    return tile_statistics(p, rows, Tiles(p, kept, keep=True))


def chunk_gradients(p: Problem, rows: slice, kept: Tensor, stats: Tensor, upstream: Tensor, gradients: Gradients) -> None:
    """Add the gradients of the tokens `rows`, from the logits that `chunk_statistics` left in `kept`."""
    logits, x, n, dtype = Tiles(p, kept, keep=True), clean(p, rows), rows.stop - rows.start, gradient_dtype(p)
    stats, upstream = stats.contiguous(), upstream.contiguous()
    room = None if dtype == torch.float32 else x.new_empty(n, p.stride)
    for columns in p.slices():
        zs, zt = logits(0, n, columns), None if p.teacher is None else logits(1, n, columns)
        dz = tile_gradient(p, rows, columns, zs, zt, zs if room is None else room[:, : zs.shape[1]], stats, upstream)
        gradients.add(rows, columns, dz, x, p.student.weight[columns].to(dtype), gradients.dw[columns] if gradients.dw.numel() else None)
