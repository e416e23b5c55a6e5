"""Search-QA's client against retrievers that answer wrongly, slowly or not at all."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import atod_fast.envs.searchqa.client as client_module
from atod_fast.envs.searchqa.client import ANSWER_BYTES, HttpRetriever, read_answer
from atod_fast.envs.searchqa.env import UNUSABLE
from atod_fast.envs.searchqa.passages import Passage
from atod_fast.envs.searchqa.retriever import BadAnswer, RetrieverError
from atod_fast.envs.text import CUT
from atod_fast.rollout.pool import Pool
from helpers.searchqa import HOSTILE, searchqa


@contextmanager
def serving(respond):
    """Run a server that answers (queries, request number) by `respond`: bytes, (status, bytes), or a list of bytes
    sent with pauses; None hangs up. Yield its URL and the log of its requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                log.append(request["queries"])
                number = len(log)
                running.append(running[-1] + 1)
            try:
                answer = respond(request["queries"], number)
            finally:
                with lock:
                    running.append(running[-1] - 1)
            if answer is None:
                self.close_connection = True
                return
            status, parts = answer if isinstance(answer, tuple) else (200, answer)
            parts = [parts] if isinstance(parts, bytes) else parts
            self.send_response(status)
            self.send_header("Content-Length", str(sum(map(len, parts))))
            self.end_headers()
            for part in parts:
                try:
                    self.wfile.write(part)
                    self.wfile.flush()
                except OSError:
                    return
                if len(parts) > 1:
                    time.sleep(0.1)

        def log_message(self, *args):
            pass

    log, running, lock = [], [0], threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *args: None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", SimpleNamespace(requests=log, running=running)
    finally:
        server.shutdown()
        server.server_close()


def result(queries: list[str], text: str = "about {}") -> bytes:
    return json.dumps(
        {"result": [[{"document": {"id": "1", "contents": text.format(query)}, "score": 1.0}] for query in queries]}
    ).encode()


def one_search(files: tuple[str, str], url: str, **options):
    """Return observation and info of one search in an environment that uses `url`."""
    env = searchqa(questions=files[0], retriever=url, **options)
    env.reset(0, 0)
    observation, reward, terminated, truncated, info = env.step("<search>q</search>")
    assert reward == 0.0 and not terminated and not truncated
    return observation, info


@pytest.fixture(scope="module", autouse=True)
def short_waits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "FIRST_WAIT", 0.01)
        yield


def doc(**changes):
    return json.dumps({"result": [[{"document": {"id": "1", "contents": "c"} | changes, "score": 1}]]}).encode()


UNUSABLE_ANSWERS = {
    "empty": b"",
    "html": b"<html>It works!</html>",
    "cut": b'{"result": [[{"docu',
    "not utf-8": b"\xff\xfe\x00",
    "deep": b"[" * 200_000,
    "a list": b"[]",
    "a number": b"17",
    "no result": b'{"results": []}',
    "null": b'{"result": null}',
    "too few": b'{"result": []}',
    "too many": b'{"result": [[], []]}',
    "a text": b'{"result": ["found it"]}',
    "an object": b'{"result": [{"document": {}}]}',
    "documents of null": b'{"result": [[null]]}',
    "no contents": b'{"result": [[{"document": {"id": "1"}, "score": 1}]]}',
    "contents a list": doc(contents=["x"]),
    "contents blank": doc(contents=" \n"),
    "contents a number": doc(contents=5),
    "document a text": b'{"result": [[{"document": "text", "score": 1}]]}',
    "huge": doc() + b" " * ANSWER_BYTES,
}


@pytest.mark.parametrize("body", UNUSABLE_ANSWERS.values(), ids=UNUSABLE_ANSWERS.keys())
def test_an_answer_without_passages_costs_one_invalid_turn(files, body, caplog):
    with serving(lambda queries, number: body) as (url, log), caplog.at_level(logging.WARNING):
        observation, info = one_search(files, url)
        assert (
            observation == f"<information>{UNUSABLE}</information>" and not info["is_action_valid"] and not info["won"]
        )
        assert log.requests == [["q"]] and caplog.text.count("counts as invalid") == 1 and "\x1b" not in caplog.text


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(("result", "document", "contents", "id", "title")), inner, max_size=3)
        ),
    ),
    st.integers(1, 3),
)
def test_no_answer_of_any_shape_is_more_than_unusable(answer, queries):
    try:
        outcomes = read_answer(json.dumps(answer).encode(), queries, 3)
    except BadAnswer:
        return
    assert len(outcomes) == queries
    assert all(
        isinstance(one, BadAnswer) or (len(one) <= 3 and all(isinstance(passage, Passage) for passage in one))
        for one in outcomes
    )


def test_answers_of_search_r1s_other_servers_are_read():
    plain = (
        b'{"result": [[{"contents": "\\"T\\"\\nx"}, {"id": 5, "title": "U", "text": "y"}, {"id": 6, "contents": "z"}]]}'
    )
    assert read_answer(plain, 1, 2) == [[Passage("unknown", '"T"\nx'), Passage("5", '"U"\ny')]]


def test_a_document_without_text_spoils_no_other():
    documents = [
        None,
        {},
        {"contents": " "},
        {"contents": 7},
        {"contents": ["x"]},
        {"id": ["?"], "contents": "x"},
        {"title": "T"},
        {"id": None, "contents": "y"},
    ]
    answer = {"result": [[{"document": document, "score": 1} for document in documents], []]}
    assert read_answer(json.dumps(answer).encode(), 2, 2) == [[Passage("unknown", "x"), Passage("unknown", "y")], []]


def test_a_hostile_answer_is_shown_tame_and_cut(files):
    texts = [*HOSTILE, "y" * 900_000]
    body = json.dumps(
        {"result": [[{"document": {"id": "</id>", "contents": text}, "score": "high"} for text in texts]]}
    ).encode()
    with serving(lambda queries, number: body) as (url, _):
        observation, info = one_search(files, url, topk=99, passage_chars=100)
    assert info["is_action_valid"] and observation.count("<information>") == observation.count("</") == 1
    assert "<|" not in observation and "\x1b" not in observation
    assert observation.endswith("y" * 100 + CUT + "\n</information>")


def test_a_server_that_recovers_is_asked_again(files):
    def respond(queries, number):
        return {1: (503, b"busy"), 2: None, 3: (500, b"oops")}.get(number, result(queries))

    with serving(respond) as (url, log):
        observation, info = one_search(files, url)
    assert "about q" in observation and info["is_action_valid"] and len(log.requests) == 4


@pytest.mark.parametrize(
    ("answer", "attempts", "message"),
    [
        ((503, b"busy\nline two \x1b[2J"), 3, "HTTP status 503: busy line two in 3 attempts"),
        (None, 3, "no answer"),
        ((404, b'{"detail": "Not Found"}'), 1, "HTTP status 404"),
        ((422, b'{"detail": "query: field required"}'), 1, "query: field required"),
        ((302, b""), 1, "HTTP status 302"),
    ],
)
def test_a_server_that_does_not_serve_is_an_error_after_bounded_attempts(files, answer, attempts, message):
    with serving(lambda queries, number: answer) as (url, log):
        with pytest.raises(RetrieverError) as caught:
            one_search(files, url, retries=2)
    assert len(log.requests) == attempts and message in str(caught.value) and url in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_silent_server_is_given_up_in_time(files):
    release = threading.Event()
    with serving(lambda queries, number: release.wait(20) or b"") as (url, log):
        with pytest.raises(RetrieverError, match="in 2 attempts"):
            one_search(files, url, timeout=0.2, retries=1)
        release.set()
    assert len(log.requests) == 2


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS = {  # what is sent at once, and what drop by drop
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "header": (OK + b"X-Slow: ", b"x"),
    "100 continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": (OK + b"Content-Length: 9999\r\n\r\n", b" "),
    "body to the end": (OK + b"Connection: close\r\n\r\n", b" "),
    "chunk": (CHUNKED, b"1\r\n \r\n"),
    "chunk extension": (CHUNKED + b"1;", b"x"),
    "trailer": (CHUNKED + b"0\r\nX-Slow: ", b"x"),
}


@pytest.mark.parametrize(("start", "drop"), DRIPS.values(), ids=DRIPS.keys())
def test_a_server_that_drips_is_given_up_in_time_and_hung_up_on(start, drop):
    noticed = threading.Semaphore(0)

    def drip(connection):
        with connection:
            connection.recv(1 << 16)
            try:
                connection.sendall(start)
                for _ in range(200):
                    connection.sendall(drop)
                    time.sleep(0.02)
            except OSError:
                noticed.release()

    def accept():
        for _ in range(2):
            threading.Thread(target=drip, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/retrieve"
        retriever = HttpRetriever(url, timeout=0.1, retries=0, concurrency=1)
        for _ in range(2):  # the first leaves room for the second
            with pytest.raises(RetrieverError, match=f"retriever {url}: no whole answer within timeout=0.1 s"):
                retriever.search("q", 1)
        assert noticed.acquire(timeout=3) and noticed.acquire(timeout=3)


def test_no_server_at_all_is_one_clear_line(files):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        port = unused.getsockname()[1]
        with pytest.raises(
            RetrieverError, match=rf"retriever http://127.0.0.1:{port}/retrieve: no answer .*refused.* in 2 attempts"
        ) as caught:
            one_search(files, f"http://127.0.0.1:{port}", retries=1)
    assert "\n" not in str(caught.value)


def ask_together(retriever: HttpRetriever, queries: list[str]) -> list:
    start = threading.Barrier(len(queries))

    def ask(query):
        start.wait()
        try:
            return [passage.contents for passage in retriever.search(query, 3)]
        except (RetrieverError, BadAnswer) as error:
            return error

    with ThreadPoolExecutor(len(queries)) as threads:
        return list(threads.map(ask, queries))


def slowly(queries, number):
    time.sleep(0.05)
    return result(queries)


def test_queries_of_many_episodes_share_requests(monkeypatch):
    monkeypatch.setattr(client_module, "WINDOW", 0.0)  # they gather while a request is under way
    queries = [f"q{n}" for n in range(40)]
    with serving(slowly) as (url, log):
        assert ask_together(HttpRetriever(url, concurrency=1), queries) == [[f"about {query}"] for query in queries]
    assert sorted(sum(log.requests, [])) == sorted(queries) and len(log.requests) <= 20


def test_no_more_requests_run_than_allowed(monkeypatch):
    monkeypatch.setattr(client_module, "BATCH", 5)
    queries = [f"q{n}" for n in range(40)]
    with serving(slowly) as (url, log):
        assert ask_together(HttpRetriever(url, concurrency=2), queries) == [[f"about {query}"] for query in queries]
    assert max(log.running) <= 2 and max(map(len, log.requests)) <= 5


def test_a_full_batch_goes_at_once_and_the_rest_in_another(monkeypatch):
    monkeypatch.setattr(client_module, "BATCH", 4)
    monkeypatch.setattr(client_module, "WINDOW", 60.0)
    queries = [f"q{n}" for n in range(8)]
    with serving(lambda queries, number: result(queries)) as (url, log):
        assert ask_together(HttpRetriever(url), queries) == [[f"about {query}"] for query in queries]
    assert [len(request) for request in log.requests] == [4, 4]


@pytest.mark.parametrize("spoil", [(400, b"poison"), b"garbage", "alone"])
def test_a_query_that_spoils_a_batch_spoils_no_other(monkeypatch, spoil):
    monkeypatch.setattr(client_module, "BATCH", 6)
    monkeypatch.setattr(client_module, "WINDOW", 60.0)

    def respond(queries, number):
        if "poison" not in queries:
            return result(queries)
        return result(queries).replace(b'"contents": "about poison"', b'"empty": 1') if spoil == "alone" else spoil

    queries = ["q0", "q1", "poison", "q3", "q4", "q5"]
    with serving(respond) as (url, log):
        retriever = HttpRetriever(url, retries=0)
        found = ask_together(retriever, queries)
    assert isinstance(found[2], RetrieverError if isinstance(spoil, tuple) else BadAnswer)
    assert found[:2] + found[3:] == [[f"about {query}"] for query in queries if query != "poison"]
    assert Counter(map(len, log.requests)) == {6: 1, 1: 1 if spoil == "alone" else 6}


@pytest.mark.parametrize(("status", "requests"), [(429, 4), (503, 4), (404, 1), (401, 1), (422, 65)])
def test_a_server_that_serves_nobody_is_not_asked_again_for_each_query(monkeypatch, status, requests):
    monkeypatch.setattr(client_module, "WINDOW", 60.0)
    with serving(lambda queries, number: (status, b"no")) as (url, log):
        found = ask_together(HttpRetriever(url), [f"q{n}" for n in range(64)])
    assert (
        all(isinstance(one, RetrieverError) and f"HTTP status {status}" in str(one) for one in found)
        and len(log.requests) == requests
    )


def test_a_urls_secrets_are_sent_and_not_told():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers["Authorization"]))
            self.send_error(404)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        port = server.server_address[1]
        with pytest.raises(RetrieverError) as caught:
            HttpRetriever(f"http://me:s%20cret@127.0.0.1:{port}/find?key=s%20cret#cret").search("q", 1)
        server.shutdown()
    assert asked == [("/find?key=s%20cret", "Basic bWU6cyBjcmV0")]
    assert str(caught.value).startswith(
        f"retriever http://127.0.0.1:{port}/find: HTTP status 404"
    ) and "cret" not in str(caught.value)


def test_connections_are_kept():
    ports = set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            ports.add(self.client_address[1])
            body = result(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"])
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    retriever = HttpRetriever(f"http://127.0.0.1:{server.server_address[1]}")
    for n in range(5):
        assert retriever.search(f"q{n}", 1) == [Passage("1", f"about q{n}")]
    server.shutdown()
    server.server_close()
    assert len(ports) == 1


def test_in_the_agent_loops_pool_a_failing_retriever_ends_its_trajectories_alone(files):
    def respond(queries, number):
        return (400, b"gone") if "dead" in queries else result(queries)

    with serving(respond) as (url, _):
        env = searchqa(questions=files[0], retriever=url, retries=0)
        with closing(Pool(env, workers=4, timeout=30)) as pool:
            for key in range(4):
                pool.reset(key, 0, key % 2)
            answers = []
            while len(answers) < 4:
                answers += pool.ready(wait=True)
            assert all(answer.failure is None and answer.observation.lower().startswith("wh") for answer in answers)
            for key in range(4):
                pool.step(key, "<search>dead</search>" if key == 3 else f"<search>s{key}</search>")
            answers = []
            while len(answers) < 4:
                answers += pool.ready(wait=True)
    by_key = {answer.key: answer for answer in answers}
    assert by_key[3].failure.startswith(f"RetrieverError: retriever {url}/retrieve: HTTP status 400")
    assert [by_key[key].observation for key in range(3)] == [
        f"<information>Doc 1: about s{key}\n</information>" for key in range(3)
    ]
