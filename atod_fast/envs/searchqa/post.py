"""POST requests to one URL that end within a time limit, whatever the server does."""

from __future__ import annotations

import queue
import re
from contextlib import closing, suppress
from functools import partial
from http.client import HTTPException
from socket import SHUT_RDWR, socket
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote

from atod_fast.errors import UserError


def without_secrets(url: str) -> str:
    """Return `url`, which may be no URL, without user, password, query and fragment."""
    return re.sub("(?<=//)[^?#]*@|[?#].*", "", url, flags=re.DOTALL)


class TooLong(Exception):
    """The server's answer has more bytes than are allowed."""


class Poster:
    """Sends JSON to `url` over connections that are kept open; `path` is used if `url` has none.

    shown: the URL for messages, `without_secrets`. timeout: seconds from connecting to the last byte. Raises UserError
    if `url` is no URL, ImportError without urllib3.
    """

    def __init__(self, url: str, path: str, timeout: float) -> None:
        from urllib3 import connection, exceptions, util

        try:
            parts = util.parse_url(url)
        except exceptions.LocationParseError:
            parts = util.Url()
        if not parts.host or parts.port == 0:
            raise UserError(
                f"retriever={without_secrets(url)!r} is not a URL; give one like http://127.0.0.1:8000/retrieve"
            )
        if parts.path in (None, "/"):
            parts = parts._replace(path=path)
        self.shown = without_secrets(parts.url)
        self._target, self._headers = parts.request_uri, {"Content-Type": "application/json"}
        if parts.auth:
            self._headers |= util.make_headers(basic_auth=unquote(parts.auth))
        kind = connection.HTTPSConnection if parts.scheme == "https" else connection.HTTPConnection
        self._connection = partial(kind, parts.host, parts.port, timeout=timeout)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()  # connections
        self._timeout, self._failures = timeout, (OSError, HTTPException, exceptions.HTTPError)

    def post(self, body: bytes, most: int) -> tuple[int, bytes]:
        """Send `body` and return the status and body of the answer.

        Raises TooLong if the answer has more than `most` bytes, TimeoutError, or ConnectionError for any other failure.
        """
        try:
            connection = self._idle.get_nowait()
        except queue.Empty:
            connection = self._connection()
        exchange = _Exchange(connection)
        Thread(target=exchange.run, args=(self._target, body, self._headers, most), daemon=True).start()
        try:
            answer = exchange.answer.get(timeout=self._timeout)
        except queue.Empty:
            exchange.give_up()
            raise TimeoutError from None
        if isinstance(answer, self._failures) and not isinstance(answer, TimeoutError):
            raise ConnectionError(str(answer)) from answer
        if isinstance(answer, BaseException):
            raise answer
        self._idle.put(connection)
        return answer


class _Exchange:
    """A request and its answer, in a thread of their own.

    A socket's time limit applies to a single read: a server that sends byte by byte would never exceed it.
    """

    def __init__(self, connection: Any) -> None:
        self._connection, self._sockets, self._given_up = connection, list[socket](), Event()
        self.answer: queue.SimpleQueue[tuple[int, bytes] | BaseException] = queue.SimpleQueue()

    def run(self, target: str, request: bytes, headers: dict[str, str], most: int) -> None:
        try:
            self.answer.put(self._exchange(target, request, headers, most))
        except BaseException as error:
            self._connection.close()
            self.answer.put(error)

    def give_up(self) -> None:
        self._given_up.set()
        for line in self._sockets:
            with suppress(OSError):
                line.shutdown(SHUT_RDWR)  # ends a waiting read; closing would not

    def _exchange(self, target: str, request: bytes, headers: dict[str, str], most: int) -> tuple[int, bytes]:
        connection = self._connection
        if not connection.is_connected:
            connection.close()
            connection.connect()
        self._sockets.append(connection.sock)  # kept: a connection drops its socket before its last answer's body
        if self._given_up.is_set():
            raise TimeoutError
        connection.request("POST", target, body=request, headers=headers, preload_content=False)
        with closing(connection.getresponse()) as response:
            body = bytearray()
            while chunk := response.read1(1 << 16, decode_content=False):
                body += chunk
                if len(body) > most:
                    raise TooLong(f"an answer of more than {most:,} bytes")
            return response.status, bytes(body)
