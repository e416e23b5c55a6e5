"""Lock a run folder, so that only one process writes to it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from atod_fast.errors import UserError


def hold(folder: Path) -> Callable[[], None]:
    """Lock `folder` until the returned function is called or the process ends. Does nothing if locks are unsupported.

    Raises:
        UserError: another process holds it.
        OSError: nothing can be written there.
    """
    path = folder / ".lock"
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(
                f"{folder} is being written by another process; wait for it, or give another --run-dir"
            ) from None
        except OSError:
            break
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the process that held it has ended meanwhile and removed the file

    def release() -> None:
        path.unlink(missing_ok=True)
        file.close()

    return release
