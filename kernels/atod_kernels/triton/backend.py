"""The Triton backend: matrix products by the vendor's library, everything between them by kernels.

fast  tiles of logits, [2048, 8192] in fp32, made by the library's product and passed over by one kernel of `tiles.py`
      at a time; the gradient of the logits is written in the operands' dtype to a buffer of its own. The default: the
      library's products are the fastest there are.
lean  `fused.py`: logits live in registers only. The backward takes the vocabulary outermost, so that each slice of the
      weight's gradient is finished in fp32 and stored once; what it holds is one tile of the logits' gradient.

The functions are those of `torch/backend.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .. import algebra
from ..names import IGNORE
from ..problem import Problem, over_shards
from ..products import Gradients, operand, product
from ..validate import interpreted
from .configs import architecture, configuration
from .fused import fused_gradient_bwd_kernel, fused_mixture_fwd_kernel, fused_sums_fwd_kernel
from .tiles import combine_sums_fwd_kernel, tile_gradient_bwd_kernel, tile_mixture_fwd_kernel, tile_sums_fwd_kernel

COMBINE_BLOCK = 128  # rows a program of `combine_sums_fwd_kernel` takes


def constants(p: Problem) -> dict[str, Any]:
    """Return the compile-time constants of all kernels over tiles."""
    cap, scale = (p.teacher.softcap, p.teacher.scale) if p.teacher else (0.0, 1.0)
    return {"KIND": p.kind, "CAP_S": p.student.softcap, "CAP_T": cap, "SCALE_T": scale}


def shares(p: Problem) -> dict[str, float]:
    """Return the shares of p and q in a mixture, as compile-time constants; 0 without a mixture."""
    return {"A": 0.0, "B": 0.0} if p.mixture is None else {"A": p.mixture.a, "B": p.mixture.b}


def sliced(x: Tensor | None, part: slice) -> Tensor | None:
    """Return a part of x; None stays None."""
    return None if x is None else x[part]


def pointers(p: Problem, rows: slice, columns: slice) -> dict[str, Tensor | None]:
    """Return the tensors that scale and mask raw logits, from the tile's first row and column on."""
    valid = None if p.valid is None else p.valid.view(torch.uint8)
    inverse = None if p.temperature is None else p.temperature[rows].float().reciprocal()
    bias_s, bias_t = sliced(p.student_bias, columns), sliced(p.teacher_bias, columns)
    return {"bias_s": bias_s, "bias_t": bias_t, "valid": sliced(valid, columns), "inverse": inverse}


def config(p: Problem, kernel: str) -> dict[str, Any]:
    """Return block sizes and launch options of a kernel for the problem's operands and device."""
    bits = 32 if torch.float32 in [layer.hidden.dtype for layer in p.layers] else 16
    return configuration(kernel, architecture(p.student_hidden.device), bits)


class Tiles:
    """Tiles [n, w] of fp32 logits in a buffer [models, elements].

    Rows are a whole tile's width apart, so that they stay aligned; with `keep`, tiles lie one after the other over the
    whole vocabulary.
    """

    def __init__(self, p: Problem, buffer: Tensor, keep: bool):
        self.p, self.buffer, self.keep = p, buffer, keep

    @staticmethod
    def of(p: Problem) -> Tiles:
        """Return memory for one tile of each model."""
        buffer = p.student_hidden.new_empty(len(p.layers), p.tile[0] * p.stride, dtype=torch.float32)
        return Tiles(p, buffer, keep=False)

    def __call__(self, model: int, n: int, columns: slice) -> Tensor:
        """Return the tile [n, w] of a model: 0 the student, 1 the teacher."""
        first = columns.start // self.p.tile[1] * n * self.p.stride if self.keep else 0
        return self.buffer[model, first : first + n * self.p.stride].view(n, -1)[:, : columns.stop - columns.start]

    def pair(self, n: int, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Return the tiles of student and teacher; None without a teacher."""
        return self(0, n, columns), None if self.p.teacher is None else self(1, n, columns)

    def make(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Compute the raw logits of one tile by the library's products, and return the tiles."""
        pair = self.pair(rows.stop - rows.start, columns)
        for layer, out in zip(self.p.layers, pair, strict=False):
            x, weight = operand(layer.hidden[rows], torch.float32), operand(layer.weight[columns], torch.float32)
            product(x, weight.t(), out)
        return pair


def statistics_of_sums(p: Problem, parts: Tensor, rows: slice) -> Tensor:
    """Statistics [STATISTICS, n] of some tokens from their partial sums [PARTIALS, k, n]."""
    if p.group:
        parts = over_shards(p, algebra.merge(parts, p.kind))
    _, k, n = parts.shape
    out = parts.new_empty(algebra.STATISTICS, n)
    combine_sums_fwd_kernel[(triton.cdiv(n, COMBINE_BLOCK),)](
        parts,
        out,
        sliced(p.target, rows),
        n,
        k,
        stride_parts=parts.stride(0),
        stride_set=parts.stride(1),
        stride_stats=out.stride(0),
        KIND=p.kind,
        BLOCK=COMBINE_BLOCK,
    )
    return out


def add_mixture(p: Problem, stats: Tensor, look: Tensor, rows: slice) -> None:
    """Write a mixture's divergence and mean slope into stats [STATISTICS, n].

    look [2, k, n] has the parts of k column sets.
    """
    total = look.sum(1)
    if p.group:
        total = over_shards(p, total).sum(1)
    # As its log-probability, the divergence of an ignored row is 0, that of a row whose target is on no shard NaN.
    if p.target is not None:
        total[0].masked_fill_(p.target[rows] == IGNORE, 0).masked_fill_(stats[algebra.LOGP].isnan(), torch.nan)
    stats[algebra.DIVERGENCE :: algebra.MEAN_SLOPE - algebra.DIVERGENCE] = total


def tile_statistics(p: Problem, rows: slice, logits: Tiles) -> Tensor:
    """Statistics [STATISTICS, n] of some tokens from tiles of logits in memory."""
    n, slices = rows.stop - rows.start, p.slices()
    parts = logits.buffer.new_empty(algebra.PARTIALS, len(slices), n)
    for i, columns in enumerate(slices):
        zs, zt = logits.make(rows, columns)
        tile_sums_fwd_kernel[(n,)](
            zs,
            zt,
            sliced(p.target, rows),
            **pointers(p, rows, columns),
            parts=parts[:, i],
            start=p.start + columns.start,
            w=zs.shape[1],
            stride_z=p.stride,
            stride_parts=parts.stride(0),
            **constants(p),
            **config(p, "sums"),
        )
    stats = statistics_of_sums(p, parts, rows)
    if p.mixture is not None:
        look = logits.buffer.new_empty(2, len(slices), n)
        for i, columns in enumerate(slices):
            zs, zt = logits.pair(n, columns) if logits.keep else logits.make(rows, columns)
            tile_mixture_fwd_kernel[(n,)](
                zs,
                zt,
                **pointers(p, rows, columns),
                stats=stats,
                look=look[:, i],
                w=zs.shape[1],
                stride_z=p.stride,
                stride_stats=stats.stride(0),
                stride_look=look.stride(0),
                **constants(p),
                **shares(p),
                **config(p, "mixture"),
            )
        add_mixture(p, stats, look, rows)
    return stats


def gradient_dtype(p: Problem) -> torch.dtype:
    """Return the dtype of the logits' gradient: bf16 for bf16 inputs, else fp32.

    The range of fp16 is too small: a probability times a weight of 1/tokens is below its smallest number. So the last
    two products of fp16 inputs are computed in fp32, without the tensor cores' 16-bit speed.
    """
    return torch.bfloat16 if p.student_hidden.dtype == torch.bfloat16 else torch.float32


def tile_gradient(
    p: Problem, rows: slice, columns: slice, zs: Tensor, zt: Tensor | None, dz: Tensor, stats: Tensor, upstream: Tensor
) -> Tensor:
    """Write the gradient of one tile's raw logits into dz [n, w], which may be zs, and return it.

    stats [STATISTICS, n] and upstream [>= 3, n] are those of the tile's tokens. What lies between w and dz's stride is
    overwritten.
    """
    n, w = zs.shape
    launch = config(p, "gradient")
    tile_gradient_bwd_kernel[(n, triton.cdiv(w, launch["BLOCK"]))](
        zs,
        zt,
        dz,
        sliced(p.target, rows),
        **pointers(p, rows, columns),
        temperature=sliced(p.temperature, rows),
        stats=stats,
        upstream=upstream,
        start=p.start + columns.start,
        w=w,
        stride_z=zs.stride(0),
        stride_dz=dz.stride(0),
        stride_stats=stats.stride(0),
        stride_upstream=upstream.stride(0),
        **constants(p),
        **shares(p),
        **launch,
    )
    return dz


class Fused:
    """Launches the kernels that keep no logits in memory, with one set of operands for all tokens and columns."""

    def __init__(self, p: Problem):
        self.p = p
        teacher = p.teacher or p.student
        layers = {
            "xs": p.student_hidden,
            "ws": p.student_weight[: p.columns],
            "xt": teacher.hidden,
            "wt": teacher.weight[: p.columns],
        }
        sizes = p.student_hidden.shape[1], teacher.hidden.shape[1]
        launch = config(p, "fused")
        descriptors = launch["TMA"] and all(aligned(x) for x in layers.values())
        if not descriptors and (launch["TMA"] or any(h % launch["BK"] for h in sizes)):
            launch = config(p, "ragged")
        # The hardware pads what a descriptor reads beyond the end.
        even = descriptors or all(h % launch["BK"] == 0 for h in sizes)
        self.launch = launch
        if descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            bm, bn, bk = (launch[k] for k in ("BM", "BN", "BK"))
            layers = {k: TensorDescriptor.from_tensor(x, [bm if k[0] == "x" else bn, bk]) for k, x in layers.items()}
        else:
            layers = {k: x.contiguous() for k, x in layers.items()}
        precision = "interpreter" if interpreted() else "ieee"
        self.arguments = layers | {"HS": sizes[0], "HT": sizes[1], "tokens": p.tokens} | constants(p) | shares(p)
        self.arguments |= self.launch | {"TMA": descriptors, "EVEN": even, "PRECISION": precision}

    def __call__(self, kernel: Any, grid: tuple[int, int], columns: slice, **arguments: Any) -> None:
        """Launch a kernel with the shared arguments that it takes and with `arguments`."""
        takes = set(kernel.arg_names) | {"num_warps", "num_stages"}
        shared = self.arguments | pointers(self.p, slice(0, self.p.tokens), columns)
        kernel[grid](**{k: v for k, v in shared.items() if k in takes}, **arguments)

    def splits(self) -> tuple[int, int]:
        """Return how many programs share a row of blocks, and the columns of each.

        The smallest number that leaves the fewest multiprocessors idle.
        """
        p, device = self.p, self.p.student_hidden.device
        rows, blocks = triton.cdiv(p.tokens, self.launch["BM"]), triton.cdiv(p.columns, self.launch["BN"])
        units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        wanted = min(
            range(1, min(max(units // rows, 16), blocks) + 1),
            key=lambda k: (round(triton.cdiv(rows * k, units) / k, 2), k),
        )
        share = triton.cdiv(blocks, wanted) * self.launch["BN"]
        return triton.cdiv(p.columns, share), share

    def statistics(self) -> Tensor:
        """Statistics [STATISTICS, T] of all tokens."""
        p, every = self.p, slice(0, self.p.columns)
        k, share = self.splits()
        grid = (triton.cdiv(p.tokens, self.launch["BM"]), k)
        parts = p.student_hidden.new_empty(algebra.PARTIALS, k, p.tokens, dtype=torch.float32)
        self(
            fused_sums_fwd_kernel,
            grid,
            every,
            target=p.target,
            parts=parts,
            V=p.columns,
            start=p.start,
            share=share,
            stride_parts=parts.stride(0),
        )
        stats = statistics_of_sums(p, parts, slice(0, p.tokens))
        if p.mixture is not None:
            look = parts[:2]
            self(
                fused_mixture_fwd_kernel,
                grid,
                every,
                stats=stats,
                look=look,
                V=p.columns,
                share=share,
                stride_stats=stats.stride(0),
                stride_look=look.stride(0),
            )
            add_mixture(p, stats, look, slice(0, p.tokens))
        return stats

    def gradient(self, rows: slice, columns: slice, dz: Tensor, stats: Tensor, upstream: Tensor) -> Tensor:
        """Write the gradient of one tile's raw logits into dz [n, w] and return it.

        stats and upstream are of all tokens. What lies between w and dz's stride is overwritten.
        """
        p, (n, w) = self.p, dz.shape
        self(
            fused_gradient_bwd_kernel,
            (triton.cdiv(n, self.launch["BM"]), triton.cdiv(w, self.launch["BN"])),
            slice(0, p.columns),
            dz=dz,
            target=p.target,
            temperature=p.temperature,
            stats=stats,
            upstream=upstream,
            row0=rows.start,
            n=n,
            column0=columns.start,
            end=columns.stop,
            start=p.start,
            stride_dz=dz.stride(0),
            stride_stats=stats.stride(0),
            stride_upstream=upstream.stride(0),
        )
        return dz


def aligned(x: Tensor) -> bool:
    """Return whether a matrix can have a TMA descriptor: contiguous, address and rows multiples of 16 bytes."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[1] * x.element_size() % 16 == 0


def clean(p: Problem, rows: slice) -> Tensor:
    """Return the student's hidden rows for the weight's gradient, ignored rows zeroed: NaN times 0 is NaN."""
    x = p.student_hidden[rows]
    if p.target is not None:
        x = x.masked_fill((p.target[rows] == IGNORE)[:, None], 0)
    return x.to(gradient_dtype(p))


def head_statistics(p: Problem) -> Tensor:
    """Statistics [STATISTICS, T] of all tokens."""
    if not p.tokens:
        return p.student_hidden.new_zeros(algebra.STATISTICS, 0, dtype=torch.float32)
    if p.lean:
        return Fused(p).statistics()
    logits = Tiles(p, p.kept(), keep=True) if p.mixture is not None else Tiles.of(p)
    return torch.cat([tile_statistics(p, rows, logits) for rows in p.parts()], 1)


def head_gradients(
    p: Problem, stats: Tensor, upstream: Tensor, hidden: bool, weight: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of hidden [T, H], weight [V, H] and bias [V], from recomputed logits.

    stats [STATISTICS, T], upstream [>= 3, T]; an empty tensor stands for a gradient that is not wanted.
    """
    gradients, dtype = Gradients.of(p, hidden, weight, bias), gradient_dtype(p)
    stats, upstream = stats.contiguous(), upstream.contiguous()
    room = Tiles(p, p.student_hidden.new_empty(1, p.tile[0] * p.stride, dtype=dtype), keep=False)

    if p.lean and p.tokens:
        fused = Fused(p)
        for columns in p.slices():
            w = p.student_weight[columns].to(dtype)
            dw = torch.empty_like(w, dtype=torch.float32) if weight else None
            for rows in p.parts():
                dz = fused.gradient(rows, columns, room(0, rows.stop - rows.start, columns), stats, upstream)
                gradients.add(rows, columns, dz, clean(p, rows), w, dw)
            if dw is not None:
                gradients.dw[columns] = dw
    else:
        logits = Tiles.of(p)
        for rows in p.parts():
            x = clean(p, rows)
            for columns in p.slices():
                zs, zt = logits.make(rows, columns)
                dz = room(0, len(x), columns)
                tile_gradient(p, rows, columns, zs, zt, dz, stats[:, rows], upstream[:, rows])
                dw = gradients.dw[columns] if weight else None
                gradients.add(rows, columns, dz, x, p.student_weight[columns].to(dtype), dw)
    return gradients.results(p)


def chunk_statistics(p: Problem, rows: slice, kept: Tensor) -> Tensor:
    """Return the statistics [STATISTICS, n] of the tokens `rows`; leaves raw logits in `kept` (`Problem.kept`)."""
    return tile_statistics(p, rows, Tiles(p, kept, keep=True))


def chunk_gradients(
    p: Problem, rows: slice, kept: Tensor, stats: Tensor, upstream: Tensor, gradients: Gradients
) -> None:
    """Add the gradients of the tokens `rows`, from the logits that `chunk_statistics` left in `kept`.

    The logits are overwritten.
    """
    logits, x, n, dtype = Tiles(p, kept, keep=True), clean(p, rows), rows.stop - rows.start, gradient_dtype(p)
    stats, upstream = stats.contiguous(), upstream.contiguous()
    room = None if dtype == torch.float32 else x.new_empty(n, p.stride)
    for columns in p.slices():
        zs, zt = logits.pair(n, columns)
        dz = zs if room is None else room[:, : zs.shape[1]]
        tile_gradient(p, rows, columns, zs, zt, dz, stats, upstream)
        dw = gradients.dw[columns] if gradients.dw.numel() else None
        gradients.add(rows, columns, dz, x, p.student_weight[columns].to(dtype), dw)
