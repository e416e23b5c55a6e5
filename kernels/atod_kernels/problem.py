"""What the operators compute on: two output layers, options, how tokens and columns are cut, and the shards of a vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import algebra

# Tokens and columns of a tile. CPU: a product needs about 256 rows to run at full speed, and tiles of 512 columns cost it 5 to 10%.
# Accelerators: enough rows for the product to be compute bound, few enough columns for the temporaries to be small.
TILE = {"cpu": (256, 8192), "accelerator": (2048, 8192)}
# Elements of a tile's weight on the CPU, where 16-bit ones are held in fp32: 16 MiB. A product with a large hidden size does with fewer columns.
OPERAND = 2**22


@dataclass(frozen=True)
class Layer:
    """One model's output layer: hidden [T, H], weight [V, H], bias [V] or None, softcap (0 = none), a factor (the student's is 1)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float
    scale: float = 1.0


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
    triton: bool

    @property
    def layers(self) -> list[Layer]:
        """The models' output layers, student first."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

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
    def mixture(self) -> algebra.Mixture | None:
        return algebra.Mixture.of(self.kind, self.alpha)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile. Where columns are few it has more rows, on accelerators where tokens are few more columns."""
        cpu = self.student.hidden.device.type == "cpu"
        rows, columns = TILE["cpu" if cpu else "accelerator"]
        area = rows * columns
        # Shards may differ in columns, but every rank must cut the tokens alike: each chunk is a collective.
        rows = min(max(self.tokens, 1), rows if self.group else max(rows, area // self.columns))
        widest = max(1, *(x.weight.shape[1] for x in self.layers))
        # One product over all of a large vocabulary would sum too many terms in a row: four times the columns at most.
        columns = min(columns, max(1, OPERAND // widest)) if cpu else min(4 * columns, max(columns, area // rows))
        return rows, min(self.columns, columns)

    def parts(self) -> list[slice]:
        """The tokens of each chunk."""
        rows = self.tile[0]
        return [slice(a, min(a + rows, self.tokens)) for a in range(0, self.tokens, rows)]

    @property
    def stride(self) -> int:
        """Elements between two rows of a tile in memory: kernels load 16 bytes at a time, from addresses that are multiples of that."""
        return -(-self.tile[1] // 16) * 16 if self.triton else self.tile[1]

    def kept(self) -> Tensor:
        """Room for both models' logits of one chunk."""
        width = len(self.slices()) * self.stride if self.triton else self.columns
        return self.student.hidden.new_empty(1 if self.teacher is None else 2, self.tile[0] * width, dtype=self.dtype)

    def slices(self) -> list[slice]:
        columns = self.tile[1]
        return [slice(a, min(a + columns, self.columns)) for a in range(0, self.columns, columns)]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 where an input is fp64 (tests), else fp32: logits are never rounded to 16 bits."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


def over_shards(problem: Problem, part: Tensor) -> Tensor:
    """[k, ...] of this rank -> [k, ranks, ...] of the group's ranks, in rank order."""
    group = resolve(problem.group)
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts, 1)
