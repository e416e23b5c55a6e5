"""The interface of the frozen teacher. `local.py` is a teacher in this process, sharded over the ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from atod_fast.batches import Batch
from atod_fast.policy.model import HeadJob, TeacherHead


class Teacher(Protocol):
    """Scores micro-batches. Every method but `rest` is collective: all ranks call it alike."""

    columns: int  # width of its head
    packs: bool  # it scores packed rows as it would each alone

    def logp(self, batch: Batch, job: HeadJob) -> Tensor:
        """Return the log-probs [A] fp32 of the action tokens, at the job's temperature over its valid columns."""
        ...

    def hidden(self, batch: Batch) -> Tensor:
        """Return the final hidden states [A, H_t] of the positions that predict the action tokens.

        With `head` they give the teacher's whole distribution at each token.
        """
        ...

    def head(self) -> AbstractContextManager[TeacherHead]:
        """Return a context that yields the head, unsharded while the context lasts."""
        ...

    def rest(self) -> None:
        """Free device memory between uses."""
        ...
