"""Decode steps replayed from CUDA graphs: the device gets one launch a step instead of a thousand from the host.

A step is captured when every row decodes one token. Its inputs, the key/value cache and the logits have fixed
addresses; weights are replaced in place, so a graph stays valid after a sync. Graphs are made as they are needed, for
the first 2^k slots and for a multiple of some columns. The step that makes one runs eagerly too, and is compared with
it: a graph that differs, or cannot be made, ends capturing with one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from atod_fast.rollout.engines.transformers.forward import SlotForward
from atod_fast.rollout.engines.transformers.tryout import EXACT, TOLERANCE

ROWS = 8  # slots of the smallest graph
COLUMNS = 256  # the least step between the columns of two graphs
LENGTHS = 8  # graphs of different columns, at most
# A pass that fills prompts is not captured and takes as long as several that are: prompts wait for each other.
PATIENCE = 16


class Record(Protocol):
    """Records work on the device. A new one is made after the cache was freed."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats `work`. Raise any error if it cannot be repeated, which leaves the device usable."""
        ...


class CudaGraphs:
    """Records work as CUDA graphs that share one pool of memory for what lives only within them."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with _no_waiting():
            work()  # an operation that waits for the device fails here, not during the capture
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.current_stream()
        with torch.cuda.stream(here):  # a capture that fails would leave its own stream as the current one
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                work()
        return graph.replay


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Make an operation of the host that waits for the device raise RuntimeError within the context."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CapturedForward:
    """A `Forward` that replays decode steps of a `SlotForward`; all other passes are the `SlotForward`'s.

    record: makes a `Record`. say: gets the line that says why nothing is captured any more.
    """

    splits = True
    slower = None

    def __init__(self, plain: SlotForward, record: Callable[[], Record], say: Callable[[str], None]) -> None:
        self._plain, self._new_record, self._say = plain, record, say
        self._on = True
        self.replays = 0  # steps that were replayed
        self._empty()

    def _empty(self) -> None:
        self._record: Record | None = None
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}  # by slots and columns
        self._inputs: Tensor | None = None  # [3, slots] int64: token, column, whether the slot decodes
        self._logits: Tensor | None = None  # [slots, V]

    @property
    def patience(self) -> int:
        """Decode steps for which new prompts should wait for others."""
        return PATIENCE if self._on else 0

    def kept(self, cached: int, shared: int) -> int:
        return self._plain.kept(cached, shared)

    def __call__(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, ids: np.ndarray, drawing: np.ndarray
    ) -> Tensor:
        if not self._on or counts.max() > 1 or not drawing.all():
            return self._plain(slots, starts, counts, ids, drawing)
        size = self._size(int(slots[-1]) + 1, int(starts.max()) + 1)
        if size not in self._graphs:
            logits = self._plain(slots, starts, counts, ids, drawing)
            self._capture(size, slots, starts, ids, logits)
            return logits
        self.replays += 1
        return self._replay(size, slots, starts, ids)

    def _size(self, slots: int, columns: int) -> tuple[int, int]:
        """Return the slots and columns of the smallest graph that holds so many."""
        most, longest = self._plain.size
        rows = ROWS
        while rows < slots:
            rows *= 2
        step = max(COLUMNS, -(-longest // LENGTHS // 64) * 64)
        return min(rows, most), min(-(-columns // step) * step, longest)

    def _replay(self, size: tuple[int, int], slots: np.ndarray, starts: np.ndarray, ids: np.ndarray) -> Tensor:
        """Return the logits [n, V] after feeding ids [n] to the slots [n]."""
        self._feed(slots, starts, ids)
        self._graphs[size]()
        assert self._logits is not None
        return self._logits.index_select(0, torch.from_numpy(slots).to(self._logits.device))

    def _feed(self, slots: np.ndarray, starts: np.ndarray, ids: np.ndarray) -> None:
        assert self._inputs is not None
        inputs = np.zeros(self._inputs.shape, np.int64)
        inputs[:, slots] = np.stack([ids, starts, np.ones_like(ids)])
        self._inputs.copy_(torch.from_numpy(inputs))

    def _capture(
        self, size: tuple[int, int], slots: np.ndarray, starts: np.ndarray, ids: np.ndarray, eager: Tensor
    ) -> None:
        """Make the graph of a size during the step of `slots`, whose logits are `eager`, and compare it with them."""
        if not eager.isfinite().all():
            return  # nothing can be compared; the engine will raise
        try:
            if self._record is None or self._inputs is None or self._logits is None:
                self._record = self._new_record()
                self._inputs = torch.zeros(3, self._plain.size[0], dtype=torch.int64, device=eager.device)
                self._logits = eager.new_zeros(self._plain.size[0], eager.shape[1])
            self._feed(slots, starts, ids)
            work = self._plain.decode(*size, self._inputs, self._logits)
            self._graphs[size] = self._record(work)
            if not _equal(self._replay(size, slots, starts, ids), eager, self._plain.dtype):
                self._stop("it computes other log-probs")
        except Exception as error:  # the model's code may raise anything
            said = str(error).strip().splitlines() or [""]
            self._stop(f"{type(error).__name__}: {said[0][:120]}")

    def _stop(self, why: str) -> None:
        self._on = False
        self._empty()
        self._say(
            f"warning: the rollout engine decodes without CUDA graphs, several times slower ({why}); "
            "rollout.enforce_eager=true leaves them out, rollout.engine=vllm has its own"
        )

    def free(self) -> None:
        self._empty()
        self._plain.free()


def _equal(logits: Tensor, eager: Tensor, dtype: torch.dtype) -> bool:
    """Return whether no row's log-probs differ from the eager ones by more than rounding in `dtype` (see tryout.py)."""
    got, expected = (x.float().log_softmax(-1) for x in (logits, eager))
    apart = (got - expected).abs().mean(-1)
    return bool((apart <= TOLERANCE.get(dtype, EXACT) * expected.std(-1) + 1e-5).all())
