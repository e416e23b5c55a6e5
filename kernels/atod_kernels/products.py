"""The matrix products of both backends, and the sums of gradients."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from .problem import Problem, resolve


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a matrix to the dtype that `product` takes it in.

    16-bit matrices stay so on CUDA, where a product can accumulate and return fp32; others become the compute dtype.
    """
    return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32 else x.to(dtype)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Compute out = a @ b, or out += a @ b, in the dtype of `out`; bf16 operands (CUDA) accumulate in fp32.

    Operands of two dtypes are a gradient of logits and a 16-bit matrix: they become bf16, which has the range of fp32,
    never fp16.
    """
    if a.dtype != b.dtype:
        common = torch.bfloat16 if torch.bfloat16 in (a.dtype, b.dtype) else torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(common), b.to(common)
    if a.is_cpu:
        a, b = a.to(out.dtype), b.to(out.dtype)  # no CPU product takes 16-bit operands and returns fp32
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not add:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if adds_in_fp32(a.device):
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.add_(torch.mm(a, b, out_dtype=out.dtype))


@functools.cache
def adds_in_fp32(device: torch.device) -> bool:
    """Return whether torch can add a product of 16-bit operands to an fp32 matrix in one call."""
    a, out = torch.zeros(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=out.dtype, out=out)
    except RuntimeError:
        return False
    return True


class Gradients:
    """Sums of gradients in the compute dtype: dx [T, H], dw [V, H], db [V]; empty if not wanted.

    The first chunk writes dw, the first slice of columns writes dx, and later ones add: this saves clearing them.
    """

    def __init__(self, dx: Tensor, dw: Tensor, db: Tensor):
        self.dx, self.dw, self.db = dx, dw, db

    @staticmethod
    def of(problem: Problem, hidden: bool, weight: bool, bias: bool) -> Gradients:
        """Return empty sums for the gradients that are wanted.

        The lean schedule completes each slice of dw in fp32 elsewhere, so its dw has the weight's dtype.
        """
        layer, dtype = problem.student, problem.dtype
        rows, columns = layer.weight.shape
        dw = layer.weight.new_empty(
            (rows, columns) if weight else 0, dtype=layer.weight.dtype if problem.lean else dtype
        )
        dw[problem.columns if problem.tokens else 0 :].zero_()
        return Gradients(
            layer.hidden.new_empty(layer.hidden.shape if hidden else 0, dtype=dtype),
            dw,
            layer.weight.new_zeros(rows if bias else 0, dtype=dtype),
        )

    def add(self, rows: slice, columns: slice, dz: Tensor, hidden: Tensor, weight: Tensor, dw: Tensor | None) -> None:
        """Add the gradients of one tile: the products of its logits' gradient dz [n, w] with hidden and weight.

        dw: [w, H], the sum of the weight's gradient in these columns.
        """
        if self.dx.numel():
            product(dz, weight, self.dx[rows], add=columns.start > 0)
        if dw is not None:
            product(dz.t(), hidden, dw, add=rows.start > 0)
        if self.db.numel():
            self.db[columns] += dz.sum(0, dtype=self.db.dtype)

    def results(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients in the dtypes of the parameters. Sums dx over the shards of the vocabulary."""
        layer = problem.student
        if self.dx.numel() and problem.group:
            dist.all_reduce(self.dx, group=resolve(problem.group))
        bias_dtype = layer.weight.dtype if layer.bias is None else layer.bias.dtype
        return self.dx.to(layer.hidden.dtype), self.dw.to(layer.weight.dtype), self.db.to(bias_dtype)
