"""What a CUDA graph does, on a CPU: operations on tensors are recorded once and repeated on the same memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default)


class Tape(TorchDispatchMode):
    """A `Record` for CPU tensors: whatever the host computed or read while recording stays as it was.

    An operation whose result the host reads is an error, as it is in a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        # Aliases: a tensor that is later given other memory does not take the recording along.
        self.calls.append(
            tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (func, args, kwargs or {}, out))
        )
        return out

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            work()
        return lambda: repeat(tape.calls)


def alias(x: object) -> object:
    """Return the same memory under a tensor of its own: one that is later given other memory takes nothing along."""
    return x.detach() if isinstance(x, Tensor) else x


@torch.inference_mode()
def repeat(calls: list[tuple[Callable, tuple, dict, object]]) -> None:
    for func, args, kwargs, out in calls:
        again = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
            if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in given:
                old.copy_(new)
