"""Ctrl-C and SIGTERM, turned into a request that the loop honours where all ranks can do so together.

torchrun passes the signal to every worker and waits 30 s. A rollout stops at once; scoring and an update, whose
collectives cannot be left half way, are finished first: where they take longer, give torchrun a --shutdown-timeout, or
the last checkpoint stands. A second Ctrl-C kills.
"""

from __future__ import annotations

import signal
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop; every rank raises it at the same place."""


class Interrupt:
    """Install with `with`; `requested` tells that a signal came."""

    def __init__(self):
        self.requested = False
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
