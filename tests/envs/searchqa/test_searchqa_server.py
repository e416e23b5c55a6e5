"""Search-QA's server, started for real: Search-R1's protocol, refusals, and an episode over HTTP."""

from __future__ import annotations

import json
import lzma
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest
import urllib3

from atod_fast.envs.searchqa.bm25 import Bm25
from atod_fast.envs.searchqa.server import main as server_main
from atod_fast.envs.searchqa.server import make_server
from helpers.searchqa import CORPUS, searchqa


@pytest.fixture(scope="module")
def server(files):
    """The URL of `python -m atod_fast.envs.searchqa.server CORPUS --port 0`."""
    command = [sys.executable, "-m", "atod_fast.envs.searchqa.server", files[1], "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving 4 passages at http://127.0.0.1:")
        yield line.split()[-1]
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(10)


def post(url: str, body: bytes, method: str = "POST") -> tuple[int, dict]:
    response = urllib3.request(method, url, body=body, retries=False, timeout=10)
    return response.status, response.json()


def test_the_server_speaks_search_r1s_protocol(server):
    queries = ["mary shelley", "zürich", "nothing of the kind"]
    status, answer = post(server, json.dumps({"queries": queries, "topk": 2, "return_scores": True}).encode())
    expected = [Bm25.of(CORPUS).scored(query, 2) for query in queries]
    assert status == 200 and answer == {
        "result": [
            [{"document": {"id": passage.id, "contents": passage.contents}, "score": score} for passage, score in hits]
            for hits in expected
        ]
    }
    _, plain = post(server, json.dumps({"queries": queries, "topk": None}).encode())
    assert plain == {
        "result": [[{"id": passage.id, "contents": passage.contents} for passage, _ in hits] for hits in expected]
    }


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        (b"{", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"{}", 400, "queries"),
        (b'{"queries": "x"}', 400, "queries"),
        (b'{"queries": []}', 400, "queries"),
        (b'{"queries": [1]}', 400, "queries"),
        (b'{"queries": ["x"], "topk": 0}', 400, "topk"),
        (b'{"queries": ["x"], "topk": true}', 400, "topk"),
        (b'{"queries": ["x"], "topk": 1000}', 400, "topk"),
        (b'{"queries": ["x"], "return_scores": 1}', 400, "return_scores"),
        (b" " * (5 << 20), 413, "bytes"),
    ],
)
def test_a_bad_request_gets_one_clear_error(server, body, status, complaint):
    try:
        got, answer = post(server, body)
    except urllib3.exceptions.ProtocolError:
        assert status == 413  # the server need not read what it refuses
        return
    assert got == status and answer.keys() == {"error"} and complaint in answer["error"] and "\n" not in answer["error"]


def test_a_server_takes_no_url_and_says_what_a_packed_corpus_is(tmp_path, capsys):
    from atod_fast.envs.searchqa.server import main

    assert main(["http://127.0.0.1:9/retrieve"]) == 2
    assert "a server has no server behind it" in capsys.readouterr().err
    packed = tmp_path / "corpus.jsonl.xz"
    packed.write_bytes(lzma.compress(b'{"id": "1", "contents": "x"}'))
    assert main([str(packed)]) == 2
    assert "corpus.jsonl.xz' is compressed; unpack it first" in capsys.readouterr().err


def test_other_paths_and_methods_get_json_too(server):
    assert post(server.replace("retrieve", "elsewhere"), b"{}")[0] == 404
    status, answer = post(server, b"", method="GET")
    assert status == 405 and answer["error"] == "POST /retrieve is all there is"


def test_the_server_says_why_it_cannot_start(files, tmp_path, capsys):
    for arguments, complaint in (
        ([str(tmp_path / "none")], "no index folder"),
        ([files[1], "--host", "256.0.0.1"], "cannot be listened at"),
    ):
        assert server_main([*arguments, "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1


def test_connections_that_come_all_at_once_wait_to_be_taken():
    with make_server(Bm25.of(CORPUS), "127.0.0.1", 0) as server, ExitStack() as callers:
        for _ in range(100):
            callers.enter_context(socket.create_connection(server.server_address, timeout=0.5))


def test_over_http_an_episode_is_the_same(files, server):
    local, remote = searchqa(questions=files[0], retriever=files[1]), searchqa(questions=files[0], retriever=server)
    assert local.instant and not remote.instant
    actions = ["<search>Frankenstein author</search>", "nonsense", "<search>the</search>", "<answer>london</answer>"]
    transcripts = []
    for env in (local, remote):
        transcripts.append([env.reset(0, 0)] + [env.step(action) for action in actions])
    assert transcripts[0] == transcripts[1]
