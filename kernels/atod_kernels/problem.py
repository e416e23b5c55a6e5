"""The checked arguments of the operators, and how tokens and columns are cut into tiles and shards."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .algebra import Mixture
from .names import NO_TEACHER

# Tokens and columns of a tile. CPU: a product needs about 256 rows to run at full speed, and tiles of 512 columns cost
# it 5 to 10%. Accelerators: enough rows for the product to be compute bound, few enough columns for small temporaries.
TILE = {"cpu": (256, 8192), "accelerator": (2048, 8192)}
# Elements of a tile's weight on the CPU, where 16-bit ones are held in fp32: 16 MiB. With a large hidden size
# a tile has fewer columns.
OPERAND = 2**22


@dataclass(frozen=True)
class Layer:
    """One model's output layer: hidden [T, H], weight [V, H], and what is applied to their product."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None  # [V]
    softcap: float  # 0: none
    scale: float  # factor of the logits after the softcap


@dataclass(frozen=True)
class Problem:
    """The checked arguments of an operator: tensors of the models, of tokens and of columns, and options.

    The operators take the fields in this order, by position; their schema is made from the names and types here.
    """

    student_hidden: Tensor  # [T, H_s]
    student_weight: Tensor  # [V_s, H_s]
    student_bias: Tensor | None = None  # [V_s]
    teacher_hidden: Tensor | None = None  # [T, H_t]
    teacher_weight: Tensor | None = None  # [V_t, H_t]
    teacher_bias: Tensor | None = None  # [V_t]
    target: Tensor | None = None  # [T] int64
    temperature: Tensor | None = None  # [T] in the compute dtype; None: 1
    valid: Tensor | None = None  # [V] bool of the common vocabulary; None: all columns count
    softcap: float = 0.0  # 0: none
    teacher_softcap: float = 0.0
    teacher_scale: float = 1.0
    kind: str = NO_TEACHER  # the divergence
    alpha: float = 0.5
    group: str = ""  # the process group that holds shards of the vocabulary; '': one process holds all of it
    start: int = 0  # this rank's first column
    lean: bool = False
    triton: bool = False

    def flat(self) -> tuple[Any, ...]:
        """Return the values of the fields in order; `Problem(*flat)` restores them."""
        return tuple(getattr(self, name) for name in FIELDS)

    def detached(self) -> Problem:
        """Return the same problem with the parameters detached."""
        values: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        values |= {name: None if values[name] is None else values[name].detach() for name in PARAMETERS}
        return Problem(**values)

    @property
    def student(self) -> Layer:
        """The student's output layer. Its scale is 1: a factor of its logits is part of the temperature."""
        return Layer(self.student_hidden, self.student_weight, self.student_bias, self.softcap, 1.0)

    @property
    def teacher(self) -> Layer | None:
        """The teacher's output layer, None without a teacher."""
        hidden, weight = self.teacher_hidden, self.teacher_weight
        if hidden is None or weight is None:
            return None
        return Layer(hidden, weight, self.teacher_bias, self.teacher_softcap, self.teacher_scale)

    @property
    def layers(self) -> list[Layer]:
        """The models' output layers, student first."""
        teacher = self.teacher
        return [self.student] if teacher is None else [self.student, teacher]

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.student_hidden.shape[0]

    @property
    def columns(self) -> int:
        """Size of the common vocabulary: columns beyond it belong to neither softmax."""
        return min(layer.weight.shape[0] for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits, statistics and sums of gradients."""
        return compute_dtype(self.student_hidden, self.teacher_hidden)

    @property
    def mixture(self) -> Mixture | None:
        """The divergence as a mixture; None for a KL."""
        return Mixture.of(self.kind, self.alpha)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile: more rows for a small vocabulary, on accelerators more columns for few tokens."""
        cpu = self.student_hidden.device.type == "cpu"
        rows, columns = TILE["cpu" if cpu else "accelerator"]
        area = rows * columns
        # Shards may differ in columns, but every rank must cut the tokens alike: each chunk is a collective.
        rows = min(max(self.tokens, 1), rows if self.group else max(rows, area // self.columns))
        widest = max(1, *(x.weight.shape[1] for x in self.layers))
        # One product over all of a large vocabulary would sum too many terms in a row: four times the columns at most.
        columns = min(columns, max(1, OPERAND // widest)) if cpu else min(4 * columns, max(columns, area // rows))
        return rows, min(self.columns, columns)

    def parts(self) -> list[slice]:
        """Return the slice of tokens of each chunk."""
        rows = self.tile[0]
        return [slice(a, min(a + rows, self.tokens)) for a in range(0, self.tokens, rows)]

    @property
    def stride(self) -> int:
        """Elements between two rows of a tile in memory.

        Triton kernels load 16 bytes at a time, from addresses that are multiples of 16.
        """
        return -(-self.tile[1] // 16) * 16 if self.triton else self.tile[1]

    def kept(self) -> Tensor:
        """Return an empty buffer for all models' logits of one chunk."""
        width = len(self.slices()) * self.stride if self.triton else self.columns
        return self.student_hidden.new_empty(len(self.layers), self.tile[0] * width, dtype=self.dtype)

    def slices(self) -> list[slice]:
        """Return the slice of columns of each tile."""
        columns = self.tile[1]
        return [slice(a, min(a + columns, self.columns)) for a in range(0, self.columns, columns)]


FIELDS = tuple(field.name for field in fields(Problem))
TENSORS = tuple(field.name for field in fields(Problem) if str(field.type).startswith("Tensor"))
OPTIONS = tuple(name for name in FIELDS if name not in TENSORS)
PARAMETERS = ("student_hidden", "student_weight", "student_bias")  # those that take a gradient
SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?"}
SCHEMA = ", ".join(f"{SCHEMA_TYPES.get(str(field.type), field.type)} {field.name}" for field in fields(Problem))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of logits: fp64 if an input is fp64 (tests), else fp32, never 16 bits."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def resolve(group: str) -> dist.ProcessGroup:
    """Return the process group of a name. Raises RuntimeError if this process has none."""
    by_name = dist.distributed_c10d._resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
    return by_name(group)  # pyright: ignore[reportArgumentType]


def over_shards(problem: Problem, part: Tensor) -> Tensor:
    """Gather `part` [k, ...] from each rank of the problem's group into [k, ranks, ...], in rank order."""
    group = resolve(problem.group)
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.stack(parts, 1)
