"""Turn Ctrl-C and SIGTERM into a request to stop, which the loop follows where all ranks can stop together.

torchrun passes the signal to every worker and waits 30 s. A rollout stops at once; scoring and an update are finished
first, as their collectives cannot be left half way. If they take longer than 30 s, give torchrun a --shutdown-timeout,
or only the last checkpoint remains. A second Ctrl-C kills.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any

from atod_fast.errors import Ending


class Interrupted(Ending):
    """The run was asked to stop; every rank raises it at the same place."""

    exit_code = 130


class Interrupt:
    """Context manager that handles the signals; `requested` is True once a signal came."""

    def __init__(self):
        self.requested = False
        self._ending = False
        self._previous: dict[int, Any] = {}  # handlers

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # torchrun sends SIGTERM to the other ranks as soon as one has ended: that is no second request.
        if self.requested and number == signal.SIGINT and not self._ending:
            raise KeyboardInterrupt
        self.requested = True

    def ending(self) -> None:
        """Ignore further signals: all is saved, and the last line must still be printed."""
        self._ending = True

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


_AFTER = """
import os, select, sys
with os.fdopen(os.pidfd_open(int(sys.argv[1]))) as parent:
    select.select([parent], [], [], 120)
print(sys.argv[2], flush=True)
"""


def last_word(line: str) -> None:
    """Print `line`; under torchrun print it again after torchrun's own report."""
    print(line, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ and hasattr(os, "pidfd_open"):
        # In a new session: torchrun kills the processes of its workers' sessions.
        subprocess.Popen([sys.executable, "-c", _AFTER, str(os.getppid()), line], start_new_session=True)
