"""Serve an index or a corpus by Search-R1's protocol:

    python -m atod_fast.envs.searchqa.server wiki-index --port 8000

One process serves any number of runs. For dense retrieval use Search-R1's own server, which speaks the same protocol.
`--port 0` takes a free port; the line printed on start names it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from atod_fast.envs.searchqa.bm25 import Bm25
from atod_fast.envs.searchqa.retriever import is_url, local_path, open_local
from atod_fast.errors import UserError

REQUEST_BYTES, QUERIES, TOPK, DEFAULT_TOPK = 4 << 20, 1024, 100, 3
IDLE = 60.0  # seconds a connection may be silent


def answer(retriever: Bm25, body: bytes) -> dict[str, Any]:
    """Return the answer to a request's body. Raise ValueError, with the reason, if it does not follow the protocol."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    if not isinstance(request, dict):
        raise ValueError("the body is not a JSON object")
    queries, topk, scores = request.get("queries"), request.get("topk"), request.get("return_scores", False)
    if (
        not isinstance(queries, list)
        or not 1 <= len(queries) <= QUERIES
        or not all(isinstance(query, str) for query in queries)
    ):
        raise ValueError(f"queries must be a list of 1 to {QUERIES} texts")
    topk = DEFAULT_TOPK if topk is None else topk
    if type(topk) is not int or not 1 <= topk <= TOPK:
        raise ValueError(f"topk must be a whole number from 1 to {TOPK}")
    if not isinstance(scores, bool):
        raise ValueError("return_scores must be true or false")
    found = [retriever.scored(query, topk) for query in queries]
    if scores:
        return {
            "result": [[{"document": asdict(passage), "score": score} for passage, score in hits] for hits in found]
        }
    return {"result": [[asdict(passage) for passage, _ in hits] for hits in found]}


def make_server(retriever: Bm25, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that is ready for `serve_forever`. Raise OSError if the address is not available.

    port: 0 takes a free one, which `server_address` tells.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE
        wbufsize = -1  # head and body are sent together

        def do_GET(self) -> None:
            self.send_error(405, "POST /retrieve is all there is")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.path != "/retrieve":
                self.send_error(404, "POST /retrieve is all there is")
            elif not (length.isascii() and length.isdigit() and len(length) < 20):
                self.send_error(411, "Content-Length is missing")
            elif int(length) > REQUEST_BYTES:
                self.send_error(413, f"the body may have {REQUEST_BYTES} bytes")
            else:
                body = self.rfile.read(int(length))
                try:
                    content = answer(retriever, body)
                except ValueError as error:
                    self.send_error(400, str(error))
                else:
                    self._reply(200, content)

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            self.close_connection = True  # the request's body may be unread
            self._reply(code, {"error": message or self.responses[code][0]})

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: a line for each request would be thousands a step."""

    return _Server((host, port), Handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections waiting to be accepted: a rollout's come all at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that hung up is no error here
            super().handle_error(request, client_address)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    It is 0 if ended by Ctrl-C, 2 for bad usage or input, 130 if interrupted by Ctrl-C before it serves.
    """
    parser = argparse.ArgumentParser(
        prog="python -m atod_fast.envs.searchqa.server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("retriever", help="index folder, or corpus .jsonl to index in memory")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in (default 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 = any free one (default 8000)")
    parser.add_argument(
        "--bad-lines", type=int, default=10, metavar="N", help="skip up to N malformed lines of a corpus (default 10)"
    )
    arguments = parser.parse_args(argv)
    try:
        if is_url(arguments.retriever):
            raise UserError("a server has no server behind it; give an index folder or a corpus .jsonl")
        retriever = open_local(local_path(arguments.retriever), arguments.bad_lines)
        try:
            server = make_server(retriever, arguments.host, arguments.port)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host {arguments.host} --port {arguments.port} cannot be listened at ({error}); choose another"
            ) from None
    except UserError as error:
        print(f"atod_fast: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    host, port = server.server_address[:2]
    print(f"serving {len(retriever):,} passages at http://{host}:{port}/retrieve", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
