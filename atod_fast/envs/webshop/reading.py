"""Read WebShop's data files entry by entry: JSON arrays, JSON objects and JSON lines, plain or compressed (.gz, .xz).

The official product file is one array of 5 GB: entries are decoded one at a time and never all held. `parse` decides
what an entry should be; a malformed one is named, counted and left out, up to a limit.
"""

from __future__ import annotations

import gzip
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TextIO, TypeVar

from atod_fast.errors import NotHere, UserError

CHUNK = 1 << 20  # characters read at a time
LONGEST_ENTRY = 1 << 26  # characters; beyond, a bracket was never closed
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
LINES = frozenset((".jsonl", ".ndjson"))
AFTER = frozenset(",:]} \t\r\n")  # characters that end a value
SHOWN = 3  # malformed entries named in the log

T = TypeVar("T")
_log = logging.getLogger(__name__)
_decoder = json.JSONDecoder()


class Malformed(Exception):
    """An entry is not what its file should hold; the message says why."""


def read(option: str, path: str | Path, limit: int, parse: Callable[[Any], T]) -> Iterator[T]:
    """Yield `parse` of each entry of the file at `path`: array elements, an object's (key, value) pairs, or lines.

    Entries for which `parse` raises Malformed, and lines that are no JSON, are left out, counted and logged. Raises
    UserError, naming `option`, for more than `limit` of them, and if a file cannot be read or its JSON breaks off.
    """
    path = Path(path).expanduser()
    bad: list[str] = []
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8", errors="replace") as file:
            for where, value in (_lines if LINES.intersection(path.suffixes) else _entries)(file):
                try:
                    yield parse(_sound(value))
                except Malformed as error:
                    bad.append(f"{where}: {error}")
                    if len(bad) > limit:
                        raise UserError(
                            f"{option}={str(path)!r} has more than malformed={limit} malformed entries, "
                            f"the first {bad[0]}; mend the file or raise malformed"
                        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, Malformed) as error:
        kind = NotHere if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{option}={str(path)!r} cannot be read: {error}; give one of WebShop's data files") from error
    finally:
        if 0 < len(bad) <= limit:
            _log.warning(
                "%s=%r: left out %d malformed entries: %s",
                option,
                str(path),
                len(bad),
                "; ".join(bad[:SHOWN]) + ("; ..." if bad[SHOWN:] else ""),
            )


def _sound(value: Any) -> Any:
    if isinstance(value, Malformed):
        raise value
    return value


def _lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                value = Malformed(f"not JSON ({getattr(error, 'msg', error)})")
            yield f"line {number}", value


def _entries(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the one array, or the pairs of the one object, in `file`."""
    text = _Text(file)
    kind = text.next_character()
    if kind not in ("[", "{"):
        raise Malformed("it is neither a JSON array nor a JSON object")
    closing = "]" if kind == "[" else "}"
    text.skip()
    for index in count():
        character = text.next_character()
        if character == closing:
            return
        if index:
            text.expect(",")
        if kind == "[":
            yield f"entry {index + 1}", text.value()
        else:
            key = text.value()
            text.expect(":")
            yield f"entry {str(key)[:40]!r}", (key, text.value())


class _Text:
    """A file's characters from a moving position on. No more of them is held than one entry needs."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._held, self._at, self._passed = file, "", 0, 0

    def next_character(self) -> str:
        """Move to the next character that is no white space and return it; "" at the end."""
        while True:
            rest = self._held[self._at : self._at + 1]
            if rest and not rest.isspace():
                return rest
            if rest:
                self._at += 1
            elif not self._more():
                return ""

    def skip(self) -> None:
        self._at += 1

    def expect(self, character: str) -> None:
        if self.next_character() != character:
            raise Malformed(f"no JSON at character {self._passed + self._at}, where {character!r} should be")
        self.skip()

    def value(self) -> Any:
        """Return the JSON value at the position, and move behind it."""
        self.next_character()
        while True:
            try:
                value, end = _decoder.raw_decode(self._held, self._at)
            except (ValueError, RecursionError) as error:
                if len(self._held) - self._at > LONGEST_ENTRY or not self._more():
                    raise Malformed(
                        f"no JSON at character {self._passed + self._at} ({getattr(error, 'msg', error)})"
                    ) from None
            else:
                # Before any other character more of a number may follow.
                if self._held[end : end + 1] in AFTER or not self._more():
                    self._at = end
                    return value

    def _more(self) -> bool:
        """Read as much again as is held; return False at the end of the file, where nothing changes."""
        chunk = self._file.read(max(CHUNK, len(self._held) - self._at))
        if chunk:
            self._held, self._passed, self._at = self._held[self._at :] + chunk, self._passed + self._at, 0
        return bool(chunk)
