"""One process writes a run folder at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from atod_fast.errors import UserError


def hold(folder: Path) -> Callable[[], None]:
    """Lock `folder` until what is returned is called, or the process ends. A file system without locks is gone on with.

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
        file.close()  # of a process that ended meanwhile and took its lock away

    def release() -> None:
        path.unlink(missing_ok=True)
        file.close()

    return release
