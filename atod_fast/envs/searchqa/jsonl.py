"""Read JSON lines that people made: a malformed line is named and skipped, too many raise UserError."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from atod_fast.errors import NotHere, UserError

T = TypeVar("T")
# First bytes of xz, gzip, bzip2, zstd and zip files.
PACKED = (b"\xfd7zXZ", b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"PK")
SHOWN = 3  # malformed lines named in the log
_log = logging.getLogger(__name__)


def read_jsonl(
    paths: Sequence[Path],
    parse: Callable[[dict[str, Any], Path, int], T],
    *,
    option: str,
    bad_lines: int,
    read: Callable[[int], object] = lambda size: None,
) -> Iterator[T]:
    """Yield what `parse` makes of every line of the files; blank lines are ignored.

    parse: gets a line's object, its file and its number from 1; raises ValueError with the reason if it is malformed.
    option: what the user called these files. bad_lines: so many malformed lines are logged by file and number and left
    out; one more raises UserError. read: called with the size of each line in bytes.
    """
    bad: list[str] = []
    for path in paths:
        try:
            file = path.open("rb")
        except OSError as error:
            kind = NotHere if isinstance(error, FileNotFoundError) else UserError
            raise kind(f"{option}={str(path)!r} cannot be read ({error.strerror}); give a JSON-lines file") from None
        with file:
            for number, line in enumerate(file, 1):
                read(len(line))
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise ValueError("not a JSON object")
                    item = parse(entry, path, number)
                except (ValueError, RecursionError) as error:
                    if number == 1 and line.startswith(PACKED):
                        raise UserError(f"{option}={str(path)!r} is compressed; unpack it first") from None
                    bad.append(f"{path}:{number}: {error}")
                    if len(bad) > bad_lines:
                        found = f"{len(bad)} malformed lines, the last {bad[-1]}"
                        raise UserError(
                            f"{option}: {found}; mend the file, or skip more: bad_lines is {bad_lines}"
                        ) from None
                else:
                    yield item
    if bad:
        _log.warning(
            "%s: skipped %d malformed lines: %s%s",
            option,
            len(bad),
            "; ".join(bad[:SHOWN]),
            "; ..." if len(bad) > SHOWN else "",
        )


def text_of(entry: dict[str, Any], key: str) -> str:
    """Return the non-blank string `entry[key]`, a number as its digits. Raise ValueError if it is neither."""
    value = entry.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a text, not {json.dumps(value)[:60]}" if key in entry else f"no {key}")
    return value
