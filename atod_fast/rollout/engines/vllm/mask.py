"""Keeps vLLM from sampling columns that hold no token, in both of its model runners."""

from __future__ import annotations

import torch
from torch import Tensor


class Mask:
    """The columns that are never sampled and left out of the softmax, the same for all requests.

    vLLM's own `allowed_token_ids` lists them per request: 150,000 numbers each.
    """

    def __init__(self) -> None:
        self._banned: Tensor | None = None

    def allow(self, valid_columns: Tensor | None) -> None:
        """Set the columns that may be sampled, bool [V]; None = all."""
        self._banned = None if valid_columns is None or valid_columns.all() else ~valid_columns

    def apply(self, logits: Tensor) -> Tensor:
        """Set the masked columns of `logits` to -inf, in place."""
        if self._banned is None:
            return logits
        self._banned = self._banned.to(logits.device)
        return logits.masked_fill_(self._banned, -torch.inf)

    def processor(self) -> type:
        """Return a logits processor class with this mask, for both model runners: V1 on a CPU, V2 where Triton runs."""
        from vllm.v1.sample.logits_processor import LogitsProcessor as OfV1
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as OfV2

        mask = self

        class Masked(OfV1, OfV2):
            def __init__(self, *_: object) -> None:
                pass

            def apply(self, logits: Tensor, *_: object) -> Tensor:
                return mask.apply(logits)

            def is_argmax_invariant(self) -> bool:
                return False

            def update_state(self, *_: object) -> None:
                pass

        return Masked
