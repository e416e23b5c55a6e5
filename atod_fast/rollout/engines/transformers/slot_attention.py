"""Attention of a packed forward pass over trajectories that each own a slot of the key/value cache.

A pass holds the next tokens of many rows end to end, [1, N]: one token of a row being decoded, several prompt tokens of
a row being filled. All but attention is token-wise and never sees padding. Attention runs once per group of rows with
similarly many tokens:

    q of a group   [R, kv_heads, G*n, dim]   n tokens a row, padded; the G query heads of a key head lie along n
    k, v           [R, kv_heads, L, dim]     the first L columns of the rows' slots

so grouped-query models never repeat their keys. A layer with a sliding window or chunks has its own mask over the same
columns. Registered with transformers as attention "atod_slots"; the model's forward passes its argument `slots` on to
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from atod_fast.models import Reach

_WIDTHS = (2, 17, 129, 1025)  # rows with 1, 2-16, 17-128, ... tokens are attended together


@dataclass(frozen=True, slots=True)
class _Group:
    """R rows, padded to n tokens each, that are attended together."""

    slots: slice | Tensor  # the rows' slots; a slice is read in place, an index [R] copies
    source: Tensor  # [R*n] int64, place of each token in the pass; padding repeats the first
    target: Tensor  # [R*n] int64, the same, but N for padding
    last: Tensor  # [R, n] int64, the last column each token sees
    length: int  # L
    dtype: torch.dtype
    masks: dict[Reach, Tensor] = field(default_factory=dict)

    def visible(self, reach: Reach) -> Tensor:
        """Return the additive mask [R, 1, n, L] of layers with this reach."""
        if reach not in self.masks:
            columns, last = torch.arange(self.length, device=self.last.device), self.last[:, None, :, None]
            hidden = columns > last
            match reach:
                case Reach("sliding_attention", int(size)):
                    hidden |= columns <= last - size
                case Reach("chunked_attention", int(size)):
                    hidden |= columns < last // size * size
            zeros = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
            self.masks[reach] = zeros.masked_fill_(hidden, -torch.inf)
        return self.masks[reach]


class Slots:
    """Key/value cache of S slots with T columns: [S, kv_heads, T, dim] twice per layer, made at the first pass.

    `reaches` says for each layer which columns a token sees.
    """

    def __init__(
        self, slots: int, columns: int, reaches: Sequence[Reach], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._reaches = reaches
        self._shape = slots, columns
        self._dtype, self._device = dtype, device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._real: Tensor | None = None  # [N, 1, 1] bool, tokens to store; None: all

    def place(self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Set up the next pass; return the columns [N] of its tokens.

        Row r fills columns starts[r] : starts[r] + counts[r] of slot slots[r]; slots are ascending.
        """
        firsts = counts.cumsum() - counts
        columns = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
        self._lines = self._tensor(np.repeat(slots, counts)), slice(None), self._tensor(columns)
        self._real = None
        kinds = np.digitize(counts, _WIDTHS)
        alike = [kinds == kind for kind in np.unique(kinds)]
        self._groups = [
            self._group(slots[rows], starts[rows], counts[rows], firsts[rows], columns.size) for rows in alike
        ]
        return columns

    def place_one_each(self, columns: Tensor, real: Tensor, length: int) -> None:
        """Set up a pass of one token for each of the first R slots, with nothing that the host must read.

        columns [R] int64: where each token goes, below `length`; real [R] bool: False for a slot that gets no token
        and stays as it is (its column is then 0).
        """
        rows = torch.arange(columns.numel(), device=columns.device)
        self._lines = rows, slice(None), columns
        self._real = real[:, None, None]
        self._groups = [_Group(slice(0, columns.numel()), rows, rows, columns[:, None], length, self._dtype)]

    def _group(
        self, slots: np.ndarray, starts: np.ndarray, counts: np.ndarray, firsts: np.ndarray, total: int
    ) -> _Group:
        low, span, width = int(slots[0]), int(slots[-1] - slots[0]) + 1, counts.max()
        # An idle slot between decoding rows costs one wasted query; copying those rows' cache costs more, unless they
        # are few.
        if span == slots.size or (width == 1 and span <= 2 * slots.size):
            spread = np.zeros((3, span), np.int64)
            spread[:, slots - low] = starts, counts, firsts
            (starts, counts, firsts), place = spread, slice(low, low + span)
        else:
            place = self._tensor(slots)
        steps = np.arange(width)
        real = steps < counts[:, None]
        tokens = firsts[:, None] + steps
        source, target = np.where(real, tokens, 0).reshape(-1), np.where(real, tokens, total).reshape(-1)
        # Padding sees the first column, so that no softmax is empty; what it computes goes nowhere.
        last = self._tensor(np.where(real, starts[:, None] + steps, 0))
        return _Group(
            place, self._tensor(source), self._tensor(target), last, int((starts + counts).max()), self._dtype
        )

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store the pass's key, value [1, kv_heads, N, dim] and attend its query [1, heads, N, dim].

        softcap: of the scores, before the mask; sinks [heads]: an extra score per head, without a value.
        Returns [1, N, heads, dim].
        """
        (_, heads, total, dim), kv_heads = query.shape, key.shape[1]
        ratio = heads // kv_heads
        if layer not in self._layers:
            # Zeros: a masked column still enters a product, and must be finite.
            slots, columns = self._shape
            self._layers[layer] = (
                key.new_zeros(slots, kv_heads, columns, dim),
                value.new_zeros(slots, kv_heads, columns, value.shape[3]),
            )
        keys, values = self._layers[layer]
        self._store(keys, key[0].transpose(0, 1))
        self._store(values, value[0].transpose(0, 1))
        packed = query[0].transpose(0, 1)
        out = query.new_empty(total + 1, heads, value.shape[3])
        for group in self._groups:
            visible = group.visible(self._reaches[layer])
            rows, _, width, length = visible.shape
            q = (
                packed.index_select(0, group.source)
                .view(rows, width, kv_heads, ratio, dim)
                .permute(0, 2, 3, 1, 4)
                .reshape(rows, kv_heads, ratio * width, dim)
            )
            k, v = (_take(state[:, :, :length], group.slots) for state in (keys, values))
            mask = visible if ratio == 1 or width == 1 else visible.repeat(1, 1, ratio, 1)
            if softcap is None and sinks is None:
                attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            else:
                line = None if sinks is None else sinks.view(1, kv_heads, ratio, 1, 1).expand(rows, -1, -1, width, -1)
                attended = _attend(q, k, v, mask, scaling, softcap, None if line is None else line.flatten(2, 3))
            attended = attended.view(rows, kv_heads, ratio, width, -1)
            out.index_copy_(0, group.target, attended.permute(0, 3, 1, 2, 4).reshape(rows * width, heads, -1))
        return out[None, :total]

    def _store(self, state: Tensor, new: Tensor) -> None:
        """Write new [N, kv_heads, dim] into its slots and columns."""
        state[self._lines] = new if self._real is None else torch.where(self._real, new, state[self._lines])

    @property
    def layers(self) -> int:
        """Number of layers that have stored keys and values."""
        return len(self._layers)

    def free(self) -> None:
        """Free the memory; every slot is then empty."""
        self._layers = {}

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _take(state: Tensor, slots: slice | Tensor) -> Tensor:
    return state[slots] if isinstance(slots, slice) else state.index_select(0, slots)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend q [R, kv_heads, m, dim] with sinks [R, kv_heads, m, 1] and softcap, which SDPA does not take."""
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return weights[..., : k.shape[2]] @ v


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    slots: Slots,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
):
    return slots.attend(module.layer_idx, query, key, value, scaling, softcap, s_aux), None


AttentionInterface.register("atod_slots", _attention)
