"""The matrix products of both backends, and where gradients are summed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .problem import Problem, resolve


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix as its product wants it: 16-bit as it is where the product can accumulate and return fp32, else in the compute dtype."""
    return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32 else x.to(dtype)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, in the dtype of `out`; 16-bit operands (CUDA) accumulate in fp32."""
    if b.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    result = torch.mm(a.to(b.dtype), b, out_dtype=out.dtype)
    return out.add_(result) if add else out.copy_(result)


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

    def add(self, rows: slice, columns: slice, dz: Tensor, hidden: Tensor, weight: Tensor, dw: Tensor | None) -> None:
        """One tile's share: dz [n, w] with the tile's operands; `dw` [w, H] is where the weight's gradient of these columns is summed."""
        if self.dx.numel():
            product(dz, weight, self.dx[rows], add=columns.start > 0)
        if dw is not None:
            product(dz.t(), hidden, dw, add=rows.start > 0)
        if self.db.numel():
            self.db[columns] += dz.sum(0)

    def results(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of the parameters. Shards of the vocabulary add up in dx."""
        layer = problem.student
        if self.dx.numel() and problem.group:
            dist.all_reduce(self.dx, group=resolve(problem.group))
        bias_dtype = layer.weight.dtype if layer.bias is None else layer.bias.dtype
        return self.dx.to(layer.hidden.dtype), self.dw.to(layer.weight.dtype), self.db.to(bias_dtype)
