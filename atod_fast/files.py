"""Write files atomically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a temporary file that replaces `path` at the end of the block; on an error, `path` stays unchanged."""
    unfinished = partial(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def partial(path: Path) -> Path:
    """Return the temporary file that `replacing` writes before it replaces `path`."""
    return path.with_name(path.name + ".partial")


def write(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`, atomically."""
    with replacing(path) as file:
        file.write(text)
