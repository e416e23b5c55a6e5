"""Argument checks of the public functions. Every error is a ValueError that names the argument and what was expected.

Checks read shapes, dtypes and devices always, and values only on the CPU: reading a value on an accelerator would
wait for it.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from .names import DIVERGENCES, FORWARD_KL, IGNORE, NO_TEACHER, REVERSE_KL, SKEW_FORWARD_KL, SKEW_REVERSE_KL
from .problem import Problem, compute_dtype, resolve

SCHEDULES = ("auto", "fast", "lean")
BACKENDS = ("auto", "torch", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Check that an argument is one of some names."""
    require(value in choices, f"{name} is {value!r}; expected one of {', '.join(choices)}")


def use_triton(value: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether to use the Triton backend: on request, or with auto on a GPU if triton is installed.

    dtype: that of the logits.
    """
    one_of("backend", value, BACKENDS)
    if value == "torch" or (value == "auto" and not (device.type == "cuda" and dtype == torch.float32 and HAS_TRITON)):
        return False
    require(
        dtype == torch.float32,
        "backend is 'triton' and an input is float64; expected at most float32, or backend='torch'",
    )
    require(
        device.type == "cuda" or interpreted(),
        f"backend is 'triton' and the tensors are on {device}; move them to a GPU, or use backend='torch'",
    )
    require(HAS_TRITON, "backend is 'triton', which is not installed; pip install triton, or use backend='torch'")
    return True


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, slowly and on CPU tensors, for tests.

    The environment variable TRITON_INTERPRET decides when the kernels are imported.
    """
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def tensor(name: str, value: object, rank: int) -> Tensor:
    """Return `value`, or raise ValueError unless it is a plain tensor (no DTensor) of `rank` dimensions."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {type(value).__name__}; expected a tensor")
    require(
        not hasattr(value, "full_tensor"),
        f"{name} is a DTensor; expected a plain tensor: call this in the forward of the module that FSDP2 unshards",
    )
    require(
        value.dim() == rank,
        f"{name} has shape {list(value.shape)}; expected {rank} dimension{'s' if rank != 1 else ''}",
    )
    return value


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Check that a tensor is on the device of the student's hidden states."""
    require(
        value.device == device, f"{name} is on {value.device}; expected {device}, where the student's hidden states are"
    )


def layer(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, device: torch.device) -> None:
    """Check one model's output layer: hidden [T, H], weight [V, H], bias [V] or None, one dtype, on `device`."""
    h, w, b = f"{prefix}hidden", f"{prefix}weight", "bias" if not prefix else f"{prefix}bias"
    tensor(h, hidden, 2)
    tensor(w, weight, 2)
    require(
        hidden.dtype in FLOATS,
        f"{h} is {hidden.dtype}; expected a floating dtype (float32, bfloat16, float16 or float64)",
    )
    require(weight.dtype == hidden.dtype, f"{w} is {weight.dtype}; expected {hidden.dtype}, the dtype of {h}")
    require(
        hidden.shape[1] == weight.shape[1],
        f"{w} has shape {list(weight.shape)}; expected [V, {hidden.shape[1]}] to fit {h} {list(hidden.shape)}",
    )
    require(
        weight.shape[0] > 0, f"{w} has shape {list(weight.shape)}; expected at least one row (column of the vocabulary)"
    )
    require(
        weight.is_contiguous(),
        f"{w} is not contiguous (strides {list(weight.stride())}); "
        f"expected rows of H one after the other, pass {w}.contiguous()",
    )
    same_device(h, hidden, device)
    same_device(w, weight, device)
    if bias is not None:
        tensor(b, bias, 1)
        require(
            bias.shape[0] == weight.shape[0],
            f"{b} has shape {list(bias.shape)}; expected [{weight.shape[0]}], one value per row of {w}",
        )
        require(bias.dtype in FLOATS, f"{b} is {bias.dtype}; expected a floating dtype")
        same_device(b, bias, device)


def cap(name: str, value: float | None) -> float:
    """Check a softcap and return it as a float, 0.0 for none."""
    if value is None:
        return 0.0
    require(
        isinstance(value, int | float) and math.isfinite(value) and value > 0,
        f"{name} is {value!r}; expected a positive number or None",
    )
    return float(value)


def scale(value: float) -> float:
    """Check the factor of the teacher's logits and return it as a float."""
    good = isinstance(value, int | float) and math.isfinite(value) and value > 0
    require(good, f"teacher_scale is {value!r}; expected a positive number")
    return float(value)


def share(value: float) -> float:
    """Return the mixture weight alpha as a float, or raise ValueError unless it is in [0, 1]."""
    require(isinstance(value, int | float) and 0 <= value <= 1, f"alpha is {value!r}; expected a number in [0, 1]")
    return float(value)


def target_ids(value: Tensor, tokens: int, columns: int | None, valid: Tensor | None, device: torch.device) -> Tensor:
    """Check target ids and return them as int64 [T].

    `columns` is None where the vocabulary is sharded: the range is not known here and is not checked.
    """
    tensor("target", value, 1)
    require(value.dtype in (torch.int64, torch.int32), f"target is {value.dtype}; expected int64 or int32")
    require(
        value.shape[0] == tokens,
        f"target has shape {list(value.shape)}; expected [{tokens}], one id per row of the hidden states",
    )
    same_device("target", value, device)
    value = value.long().contiguous()
    if value.device.type == "cpu" and columns is not None and not torch.compiler.is_compiling():
        bad = (value != IGNORE) & ((value < 0) | (value >= columns))
        if bad.any():
            at = int(bad.nonzero()[0])
            require(
                False,
                f"target[{at}] is {int(value[at])}; expected 0 to {columns - 1} (the columns both models have) "
                f"or {IGNORE} for an ignored token",
            )
        if valid is not None:
            bad = (value != IGNORE) & ~valid[value.clamp(min=0)]
            if bad.any():
                at = int(bad.nonzero()[0])
                require(
                    False,
                    f"target[{at}] is {int(value[at])}, a column that valid_columns leaves out; "
                    f"expected a valid column or {IGNORE}",
                )
    return value


def temperatures(value: float | Tensor, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return checked temperatures as a [T] tensor of `dtype`; None for the number 1."""
    if isinstance(value, Tensor):
        tensor("temperature", value, 1)
        require(value.shape[0] == tokens, f"temperature has shape {list(value.shape)}; expected a number or [{tokens}]")
        require(value.dtype in FLOATS, f"temperature is {value.dtype}; expected a floating dtype")
        require(
            not value.requires_grad,
            "temperature requires a gradient; it is not differentiable, pass temperature.detach()",
        )
        same_device("temperature", value, device)
        if value.device.type == "cpu" and not torch.compiler.is_compiling():
            require(
                bool(((value > 0) & value.isfinite()).all()), "temperature has an entry that is not positive and finite"
            )
        return value.to(dtype).contiguous()
    require(
        isinstance(value, int | float) and math.isfinite(value) and value > 0,
        f"temperature is {value!r}; expected a positive number or a [T] tensor",
    )
    return None if value == 1 else torch.full((tokens,), float(value), dtype=dtype, device=device)


def columns_mask(value: Tensor | None, sizes: tuple[int, ...], sharded: bool, device: torch.device) -> Tensor | None:
    """Check a mask of either model's vocabulary and return it cut to the common one.

    A shard may have no valid column.
    """
    if value is None:
        return None
    tensor("valid_columns", value, 1)
    require(value.dtype == torch.bool, f"valid_columns is {value.dtype}; expected bool")
    require(
        value.shape[0] in sizes,
        f"valid_columns has shape {list(value.shape)}; expected [{' or '.join(str(s) for s in dict.fromkeys(sizes))}]",
    )
    same_device("valid_columns", value, device)
    value = value[: min(sizes)].contiguous()
    if not sharded and value.device.type == "cpu" and not torch.compiler.is_compiling():
        require(bool(value.any()), "valid_columns is False everywhere; expected at least one column to be left")
    return value


def group(name: str) -> None:
    """Check that this process has a process group of a name."""
    try:
        resolve(name)
    except RuntimeError:
        raise ValueError(
            f"vocab_group is {name!r}; expected the name of a process group of this process (ProcessGroup.group_name)"
        ) from None


def offsets(name: str, value: Tensor, total: int | None, of: str) -> None:
    """Check CSR offsets [n + 1]: integers, 0 first, non-decreasing, `total` last (values on the CPU only)."""
    tensor(name, value, 1)
    require(value.dtype in (torch.int64, torch.int32), f"{name} is {value.dtype}; expected int64 or int32")
    require(value.shape[0] > 0, f"{name} is empty; expected at least one entry, 0")
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        require(int(value[0]) == 0, f"{name}[0] is {int(value[0])}; expected 0")
        require(bool((value[1:] >= value[:-1]).all()), f"{name} is not sorted; expected non-decreasing offsets")
        require(
            total is None or int(value[-1]) == total,
            f"{name}[-1] is {int(value[-1])}; expected {total}, the length of {of}",
        )


def problem(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    target: Tensor | None = None,
    *,
    divergence: str = NO_TEACHER,
    alpha: float = 0.5,
    temperature: float | Tensor = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    teacher_scale: float = 1.0,
    valid_columns: Tensor | None = None,
    vocab_group: str | None = None,
    vocab_start: int = 0,
    schedule: str = "auto",
    lean_on_cpu: bool,
    backend: str = "auto",
    prefix: str = "student_",
) -> Problem:
    """Check the arguments of a public function and return them as a Problem.

    `prefix` is how the caller names the student's tensors; `lean_on_cpu` is what the schedule auto means on the torch
    backend.
    """
    one_of("schedule", schedule, SCHEDULES)
    tensor(f"{prefix}hidden", student_hidden, 2)
    device, tokens = student_hidden.device, student_hidden.shape[0]
    layer(prefix, student_hidden, student_weight, student_bias, device)
    sizes = (student_weight.shape[0],)
    if teacher_hidden is not None:
        one_of("divergence", divergence, DIVERGENCES)
        teacher_weight = tensor("teacher_weight", teacher_weight, 2)
        layer("teacher_", teacher_hidden, teacher_weight, teacher_bias, device)
        require(
            teacher_hidden.shape[0] == tokens,
            f"teacher_hidden has shape {list(teacher_hidden.shape)}; expected [{tokens}, H], as student_hidden",
        )
        sizes += (teacher_weight.shape[0],)
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
        teacher_bias = None if teacher_bias is None else teacher_bias.detach().contiguous()
    dtype = compute_dtype(student_hidden, teacher_hidden)
    triton = use_triton(backend, device, dtype)
    alpha = share(alpha)
    # With alpha 0 the mixture is one of the two models, and the divergence a plain KL.
    if alpha == 0:
        divergence = {SKEW_REVERSE_KL: REVERSE_KL, SKEW_FORWARD_KL: FORWARD_KL}.get(divergence, divergence)
    if vocab_group is None:
        require(
            vocab_start == 0, f"vocab_start is {vocab_start}; it is only meaningful with vocab_group, which is None"
        )
    else:
        require(
            len(set(sizes)) == 1,
            f"vocab_group: student and teacher shards have {sizes} rows; expected the same columns in both",
        )
        group(vocab_group)
        require(vocab_start >= 0, f"vocab_start is {vocab_start}; expected the first column of this rank's shard")
    valid = columns_mask(valid_columns, sizes, vocab_group is not None, device)
    if target is not None:
        target = target_ids(target, tokens, min(sizes) if vocab_group is None else None, valid, device)
    return Problem(
        student_hidden,
        student_weight,
        None if student_bias is None else student_bias.contiguous(),
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        target,
        temperature=temperatures(temperature, tokens, dtype, device),
        valid=valid,
        softcap=cap("softcap", softcap),
        teacher_softcap=cap("teacher_softcap", teacher_softcap),
        teacher_scale=scale(teacher_scale),
        kind=NO_TEACHER if teacher_hidden is None else divergence,
        alpha=alpha,
        group=vocab_group or "",
        start=vocab_start,
        lean=schedule == "lean" or (schedule == "auto" and lean_on_cpu and not triton),
        triton=triton,
    )
