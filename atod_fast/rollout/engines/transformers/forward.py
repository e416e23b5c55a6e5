"""Forward passes of a transformers model over the next tokens of many trajectories, each with its own cache slot.

`SlotForward` computes all rows at once, with this package's cache and attention. `CacheForward` leaves both to the
model: one row after the other, each with a cache of the model's own type. `tryout.py` finds out which of them computes
a model correctly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atod_fast.models import reaches, recurrent
from atod_fast.rollout.engines.transformers.slot_attention import Slots


class CannotRun(ValueError):
    """Raised where a forward cannot run this model; the message says why."""


class Forward(Protocol):
    """Runs forward passes for one model and keeps the caches."""

    splits: bool  # a prompt may be fed in several passes

    @property
    def patience(self) -> int:
        """Decode steps for which new prompts should wait for others, as a pass that fills them is much slower."""
        ...

    @property
    def slower(self) -> str | None:
        """Why it is slower than it could be; None if it is not."""
        ...

    def kept(self, cached: int, shared: int) -> int:
        """Return how many of a slot's `cached` tokens its next prompt can use; the first `shared` are equal."""
        ...

    def __call__(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, ids: np.ndarray, drawing: np.ndarray
    ) -> Tensor:
        """Feed counts[r] tokens to slot slots[r], behind the first starts[r] tokens of its cache; slots are ascending.

        ids [N]: all rows' tokens, end to end. Returns logits [n, V] after the last token of the rows that are
        `drawing` (bool [R]).
        """
        ...

    def free(self) -> None:
        """Free the caches' memory; every slot is then empty."""


MakeForward = Callable[[PreTrainedModel, int, int], Forward]  # (model, number of slots, their length)


class SlotForward:
    """A `Forward` for full, sliding-window or chunked attention, with rotary or added positions."""

    splits = True
    patience = 0
    slower = None

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        """Raise CannotRun for a recurrent model: with small weights its lost state could escape a try-out."""
        found = reaches(model.config)
        if recurrent(model):
            raise CannotRun(f"layers of {', '.join(sorted({reach.kind for reach in found}))}")
        self._layers = len(found)
        self._model = model
        self.size = slots, length
        self.dtype = model.dtype
        model.set_attn_implementation("atod_slots")
        self._slots = Slots(slots, length, found, model.dtype, model.device)

    def kept(self, cached: int, shared: int) -> int:
        return shared

    def __call__(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, ids: np.ndarray, drawing: np.ndarray
    ) -> Tensor:
        positions = self._slots.place(slots, starts, counts)
        last = (counts.cumsum() - 1)[drawing]
        tokens, positions, last = (torch.from_numpy(array).to(self._model.device) for array in (ids, positions, last))
        out = self._model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=last,
            slots=self._slots,
        )
        if self._slots.layers != self._layers:
            raise CannotRun(
                f"{self._slots.layers} of {self._layers} layers attend through transformers' AttentionInterface"
            )
        return out.logits[0]

    def decode(self, rows: int, length: int, inputs: Tensor, logits: Tensor) -> Callable[[], None]:
        """Return what feeds a token to each of the first `rows` slots and writes logits [slots, V], device work alone.

        inputs [3, slots] int64 is read on the device: token, its column below `length`, and 1, or 0 for a slot to
        leave as it is.
        """
        tokens, columns, real = (line[:rows] for line in inputs)

        def work() -> None:
            every = torch.arange(rows, device=inputs.device)
            self._slots.place_one_each(columns, real.bool(), length)
            out = self._model(
                input_ids=tokens[None],
                position_ids=columns[None],
                use_cache=False,
                logits_to_keep=every,
                slots=self._slots,
            )
            logits[:rows].copy_(out.logits[0])

        return work

    def free(self) -> None:
        self._slots.free()


class CacheForward:
    """A `Forward` for any model: transformers' own cache, one row after the other.

    A cache may hold states that cannot be cut back, so it serves a prompt only as a whole. `extends`: the model takes
    several tokens behind cached ones; otherwise each prompt is computed anew.
    """

    splits = False
    patience = 0
    extends = True

    def __init__(self, model: PreTrainedModel, slots: int, length: int) -> None:
        takes = inspect.signature(type(model).forward).parameters
        self._name = next(name for name in ("past_key_values", "cache_params", "state") if name in takes)
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes
        self._model = model
        self._caches: dict[int, Any] = {}

    @property
    def slower(self) -> str:
        anew = "" if self.extends else ", and every turn from its first token"
        kind = self._model.config.model_type
        return (
            f"a {kind} model generates with transformers' own cache, one trajectory after the other{anew}: "
            "slower than rollout.engine=vllm would be"
        )

    def kept(self, cached: int, shared: int) -> int:
        return cached if self.extends and shared == cached else 0

    def __call__(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, ids: np.ndarray, drawing: np.ndarray
    ) -> Tensor:
        logits, end = [], 0
        for slot, start, count, draws in zip(
            slots.tolist(), starts.tolist(), counts.tolist(), drawing.tolist(), strict=True
        ):
            tokens, end = torch.from_numpy(ids[end : end + count]).to(self._model.device), end + count
            given = {self._name: self._caches[slot]} if start else {}
            if self._takes_positions:  # some count them by their first layer's cache, which may hold no tokens
                given["position_ids"] = torch.arange(start, start + count, device=tokens.device)[None]
            out = self._model(input_ids=tokens[None], use_cache=True, **given, **self._options)
            self._caches[slot] = out.get(self._name)
            if self._caches[slot] is None:
                raise CannotRun("it hands out no cache")
            if draws:
                logits.append(out.logits[0, -1])
        return torch.stack(logits) if logits else torch.empty(0)

    def free(self) -> None:
        self._caches = {}


class AnewForward(CacheForward):
    """A `CacheForward` whose cache takes one token at a time: its recurrent layers start longer inputs from nothing."""

    extends = False


FORWARDS: tuple[MakeForward, ...] = (SlotForward, CacheForward, AnewForward)  # the fastest first
