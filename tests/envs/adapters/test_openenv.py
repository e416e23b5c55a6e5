"""The adapter for OpenEnv's servers, in the real agent loop, against a replica and OpenEnv itself."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from types import ModuleType

import pytest

from atod_fast.envs.adapters.openenv import OpenEnv, ServerError, at, filled
from atod_fast.errors import UserError
from atod_fast.rollout.pool import Pool
from helpers.guess import HOSTILE_ACTIONS, HOSTILE_TEXT, check_shown, play, won_by_halving


class Served:
    """Guess as a server shows it: observations with fields, and a step that takes a number."""

    def __init__(self, page: ModuleType) -> None:
        self.page = page

    def reset(self, seed: int = 0, most: int = 50) -> dict:
        self.world = self.page.Guess(tasks=1, seed=seed, most=most)
        return self.told(self.world.reset(0, 0)[0])

    def step(self, number: int) -> dict:
        if number == 666:
            raise KeyError("the server's own fault")
        text, reward, done, *_ = self.world.step(str(number))
        return self.told(text, reward, done)

    def told(self, text: str, reward: float | None = None, done: bool = False) -> dict:
        turns = [{"content": "before"}, {"content": text}]
        return {"observation": {"turns": turns, "legal": [1, 2], "metadata": {}}, "reward": reward, "done": done}


@contextmanager
def replica(page: ModuleType, sessions: int = 100):
    """A server of OpenEnv's messages, as observed from openenv 0.10.0."""
    serve = pytest.importorskip("websockets.sync.server", reason="needs the extra `openenv`").serve
    free = threading.Semaphore(sessions)
    held = []

    def session(socket) -> None:
        def tell(kind: str, **data) -> None:
            socket.send(json.dumps({"type": kind, "data": data}))

        if not free.acquire(blocking=False):
            return tell("error", message="Server at capacity", code="CAPACITY_REACHED")
        held.append(socket)
        world = Served(page)
        try:
            for message in map(json.loads, socket):
                data = message.get("data", {})
                try:
                    if message["type"] == "close":
                        break
                    elif message["type"] == "reset":
                        tell("observation", **world.reset(**data))
                    elif set(data) != {"number"}:
                        problem = {"type": "missing", "loc": ["number"], "msg": "Field required"}
                        tell("error", message="Invalid message", code="VALIDATION_ERROR", errors=[problem])
                    elif not data["number"].isdecimal():
                        problem = {"type": "int_parsing", "loc": ["number"], "msg": "not an integer"}
                        tell("error", message="Invalid message", code="VALIDATION_ERROR", errors=[problem])
                    else:
                        tell("observation", **world.step(int(data["number"])))
                except Exception as error:
                    tell("error", message=str(error), code="EXECUTION_ERROR")
        finally:
            free.release()

    with serve(session, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", held
        server.shutdown()
        thread.join()


@contextmanager
def genuine(page: ModuleType, sessions: int = 100):
    """The same, served by the package openenv."""
    core = pytest.importorskip("openenv.core.env_server", reason="needs the package openenv")
    import uvicorn
    from pydantic import create_model

    action = create_model("GuessAction", __base__=core.Action, number=(int, ...))
    observation = create_model("GuessObservation", __base__=core.Observation, turns=(list, ...), legal=(list, ...))

    class World(core.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True
        state = core.State()

        def reset(self, seed=None, episode_id=None, most=50):
            self.world = Served(page)
            return self.seen(self.world.reset(seed, most))

        def step(self, action, timeout_s=None):
            return self.seen(self.world.step(action.number))

        def seen(self, told):
            return observation(**told["observation"] | {"reward": told["reward"], "done": told["done"]})

    app = core.create_fastapi_app(World, action, observation, max_concurrent_envs=sessions)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", None
    server.should_exit = True
    thread.join()


@pytest.fixture(params=[replica, genuine], ids=["replica", "openenv"])
def served(request, page):
    return lambda **options: request.param(page, **options)


def connect(address: str, **changes) -> OpenEnv:
    return OpenEnv(
        **{
            "url": address,
            "tasks": 20,
            "seed": 5,
            "action": {"number": "{}"},
            "observation": "turns.-1.content",
            "timeout": 20.0,
        }
        | changes
    )


def test_an_openenv_server_is_played_by_the_agent_loop(served, page):
    with served() as (url, _):
        played = play(connect(url, instructions="You guess."))
        won_by_halving(played)
        same = [page.Guess(tasks=1, seed=5 + task) for task in range(12)]
        assert all(
            world.reset(0, 0) and str(world.number) == t.turns[-1].command
            for world, t in zip(same, played, strict=True)
        )


def test_a_wrong_value_costs_the_turn_and_a_server_s_fault_the_trajectory(served):
    with served() as (url, _):
        env = connect(
            url, admissible="legal", reset={"most": 7}, observation=["turns.0.content", "turns.-1.content", "nothing"]
        )
        first, info = env.reset(0, 0)
        assert first == "before\nI think of a number from 1 to 7. Which?" and info["admissible_actions"] == ["1", "2"]
        assert env.step("three") == (first, 0.0, False, False, info | {"is_action_valid": False})
        assert env.step("0")[0] == "before\nHigher."
        with pytest.raises(Exception, match="EXECUTION_ERROR.*fault"):
            env.step("666")
        env.close()
        wrong = connect(url, action={"guess": "{}"})
        wrong.reset(0, 0)
        with pytest.raises(Exception, match="VALIDATION_ERROR.*number: Field required"):
            wrong.step("3")
        wrong.close()


def test_a_session_is_free_again_as_soon_as_it_is_closed(served):
    with served(sessions=1) as (url, _):
        env = connect(url)
        other = env.clone()
        env.reset(0, 0)
        with pytest.raises(Exception, match="CAPACITY_REACHED.*lower rollout.concurrency"):
            other.reset(0, 0)
        other.close()
        for world in (env, other, env):
            world.reset(0, 1)
            world.close()


def test_an_idle_session_that_was_ended_is_opened_again(page):
    with replica(page) as (url, held):
        env = connect(url)
        first = env.reset(0, 3)
        held[-1].close()
        assert env.reset(0, 3) == first
        held[-1].close()
        with pytest.raises(ConnectionError, match="hung up"):
            env.step("3")
        env.close()


def test_what_a_server_tells_is_cleaned_and_cut(page, monkeypatch):
    told = {
        "observation": {"turns": [{"content": HOSTILE_TEXT}], "legal": HOSTILE_ACTIONS},
        "reward": None,
        "done": False,
    }
    monkeypatch.setattr(Served, "told", lambda *_: told)
    with replica(page) as (url, _):
        env = connect(url, admissible="legal")
        for observation, *_, info in (env.reset(0, 0), env.step("3"), env.step("three")):
            check_shown(observation, info)
        told["observation"]["legal"] = "none"
        assert env.step("3")[4]["admissible_actions"] == []
        env.close()


@pytest.mark.parametrize(
    ("reward", "done", "gained", "won"), [(2.0, False, 2.0, False), (2.0, True, 2.0, True), (None, True, 0.0, False)]
)
def test_a_server_s_episode_is_won_at_its_end_and_no_reward_is_none(page, monkeypatch, reward, done, gained, won):
    monkeypatch.setattr(
        Served, "told", lambda *_: {"observation": {"turns": [{"content": "x"}]}, "reward": reward, "done": done}
    )
    with replica(page) as (url, _):
        env = connect(url)
        env.reset(0, 0)
        observation, found, terminated, _, info = env.step("3")
        assert (observation, found, terminated, info["won"]) == ("x", gained, done, won)
        env.close()


def test_a_server_s_message_has_a_longest_size(page, monkeypatch):
    monkeypatch.setattr(Served, "told", lambda *_: {"observation": {"turns": [{"content": "x" * 5_000_000}]}})
    with replica(page) as (url, _), pytest.raises(UserError, match="hung up"):
        connect(url)


@pytest.mark.parametrize(
    ("problem", "of_value", "words"),
    [
        ({"code": "VALIDATION_ERROR", "errors": [{"msg": "too low"}]}, True, "VALIDATION_ERROR; too low"),
        ({"code": "VALIDATION_ERROR", "errors": [{"type": "missing"}]}, False, "VALIDATION_ERROR"),
        (
            {"code": "VALIDATION_ERROR", "errors": [{"type": "missing", "loc": "number", "msg": 5}]},
            False,
            "VALIDATION_ERROR; number: 5",
        ),
        ({"code": "VALIDATION_ERROR", "errors": ["too low", None]}, True, "VALIDATION_ERROR; too low"),
        ({"code": "X", "errors": "its own words", "message": "m"}, False, "X; m; its own words"),
        ({"code": ["X"], "errors": {"msg": "one"}}, False, "['X']; one"),
        ({}, False, ""),
    ],
)
def test_whatever_a_server_s_error_looks_like_its_cause_is_told(problem, of_value, words):
    error = ServerError(problem)
    assert (error.of_value, str(error)) == (of_value, words)


def test_a_server_s_words_are_cleaned_and_cut_where_they_are_told(page):
    with replica(page) as (url, _):
        env = connect(url)
        pool = Pool(env, workers=1, timeout=20.0)
        pool.reset(0, 0, 0)
        assert pool.ready(wait=True)[0].failure is None
        page.Guess.step = lambda *_: (_ for _ in ()).throw(KeyError("\x1b[31m\n" + "long " * 20_000 + "end"))
        pool.step(0, "3")
        failure = pool.ready(wait=True)[0].failure
        pool.close()
    assert (
        failure.startswith("ServerError: EXECUTION_ERROR")
        and failure.endswith("long end'")
        and len(failure) < 340
        and failure.isprintable()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"observation": "turn"}, "observation=turn is not in what the server tells: turns, legal, metadata"),
        ({"admissible": "metadata"}, "admissible=metadata is not a list"),
        ({"reset": {"most": 1, "seed": 7, "x": 1}}, "EXECUTION_ERROR"),
        ({"action": {"number": 3}}, 'has no place for the command; put "{}" where it goes'),
        ({"action": "{}"}, "action='{}' must be a table"),
        ({"action": 5}, "action=5 must be a table"),
        ({"reset": 5}, "reset=5 must be a table"),
        ({"observation": 5}, "observation=5 must be a field's name, or a list of them"),
        ({"observation": ["turns", 5]}, "observation=['turns', 5] must be"),
        ({"admissible": 5}, "admissible=5 must be a field's name"),
        ({"timeout": "long"}, "timeout='long' must be a number of seconds"),
        ({"timeout": 0}, "timeout=0 must be a number of seconds above 0"),
        ({"url": 5}, "url=5 is not the address of a server"),
        ({"url": ["x"]}, "url=['x'] is not the address of a server"),
        ({"url": "127.0.0.1:80"}, "url='127.0.0.1:80' is not the address of a server"),
        ({"url": "http://127.0.0.1:1"}, "ConnectionRefusedError"),
    ],
)
def test_what_cannot_be_played_is_said_at_once_on_one_line(page, options, words):
    with replica(page) as (url, _), pytest.raises(UserError) as error:
        connect(url, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_does_not_answer_is_not_waited_for():
    serve = pytest.importorskip("websockets.sync.server", reason="needs the extra `openenv`").serve
    over = threading.Event()
    with serve(lambda socket: over.wait(20), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match="no answer within timeout=0.3 s"):
            connect(f"ws://127.0.0.1:{server.socket.getsockname()[1]}/ws", timeout=0.3)
        over.set()
        server.shutdown()


def test_templates_are_filled_and_paths_followed():
    template = {"type": "call_tool", "arguments": {"message": "{}", "to": ["{}", "all"]}}
    assert filled(template, "hi {}") == {"type": "call_tool", "arguments": {"message": "hi {}", "to": ["hi {}", "all"]}}
    value = {"a": [{"b": 1}, {"b": None}], "c": "text"}
    assert [at(value, path) for path in ("a.0.b", "a.-1.b", "a.2.b", "a.b", "c.0", "c", "d")] == [
        1,
        None,
        None,
        None,
        None,
        "text",
        None,
    ]
