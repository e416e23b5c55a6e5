"""The environments of a rollout: instant ones run in the calling thread, others in threads with a time limit.

An environment that raises, exceeds the time limit or answers outside the protocol yields a failure in place of an
answer, and is not used again.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from atod_fast.envs.protocol import Environment, Info, known_facts
from atod_fast.envs.text import encodable, one_line

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of resetting or stepping the environment of episode `key`."""

    key: int
    observation: str = ""
    info: Info = field(default_factory=Info)
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    failure: str | None = None  # why the environment raised or hung; the other fields mean nothing then


@dataclass(slots=True, eq=False)
class _Call:
    world: Environment
    started: float = float("inf")
    # Acquired once, by the worker thread or by the time-out; the winner reports the result.
    claim: threading.Lock = field(default_factory=threading.Lock)


class Pool:
    """Runs environment calls by episode key, each episode in its own clone of `env`; clones are reused.

    `reset` and `step` start a call; `ready` returns the results. If `env.instant`, a call runs in the calling thread,
    in order, with no time limit. Otherwise at most `workers` threads run calls, each for at most `timeout` seconds; a
    thread that hangs is abandoned and, being a daemon, does not keep the process from exiting.
    """

    def __init__(self, env: Environment, *, workers: int, timeout: float) -> None:
        self._env, self._timeout = env, timeout
        self._worlds: dict[int, Environment] = {}
        self._idle: list[Environment] = []
        self._calls: dict[int, _Call] = {}  # in threads
        self._gate = threading.Semaphore(workers)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def reset(self, key: int, seed: int, task: int) -> None:
        """Start episode `key`: reset an environment to `task` with `seed`."""
        try:
            world = self._worlds[key] = self._idle.pop() if self._idle else self._env.clone()
        except (Exception, SystemExit) as error:
            self._answers.put(Answer(key, failure=_reason(error)))
            return

        def reset() -> Answer:
            observation, info = _parts(world.reset(seed, task), "reset", "observation, info")
            return _answer(key, observation, info)

        self._start(key, reset)

    def step(self, key: int, action: str) -> None:
        """Send `action` to the environment of episode `key`."""

        def step() -> Answer:
            reply = _parts(world.step(action), "step", "observation, reward, terminated, truncated, info")
            observation, reward, terminated, truncated, info = reply
            return _answer(key, observation, info, float(reward), bool(terminated), bool(truncated))

        world = self._worlds[key]
        self._start(key, step)

    def ready(self, *, wait: bool) -> list[Answer]:
        """Return answers and failures since the last call; `wait` blocks for the first one if a call is running."""
        answers = self._collect()
        while wait and not answers and self._calls:
            with suppress(queue.Empty):
                answers.append(self._answers.get(timeout=min(0.5, self._timeout / 10)))
            answers += self._collect()
        for answer in answers:
            self._calls.pop(answer.key, None)
            if answer.failure is not None:
                self._worlds.pop(answer.key, None)
        return answers

    def release(self, key: int) -> None:
        """End episode `key`; its environment may serve another."""
        if key in self._worlds:
            self._idle.append(self._worlds.pop(key))

    def close(self) -> None:
        """Close the environments that are not in a call; closing that exceeds the time limit is abandoned."""
        worlds = [*self._idle, *(world for key, world in self._worlds.items() if key not in self._calls)]
        self._idle, self._worlds = [], {}
        closing = threading.Thread(target=lambda: [_close(world) for world in worlds], daemon=True)
        closing.start()
        closing.join(self._timeout)

    def _start(self, key: int, action: Callable[[], Answer]) -> None:
        if self._env.instant:
            self._answers.put(_attempt(key, action, self._worlds[key]))
        else:
            call = self._calls[key] = _Call(self._worlds[key])
            threading.Thread(target=self._run, args=(key, action, call), daemon=True).start()

    def _run(self, key: int, action: Callable[[], Answer], call: _Call) -> None:
        self._gate.acquire()
        call.started = time.monotonic()
        answer = _attempt(key, action, call.world)
        if call.claim.acquire(blocking=False):
            self._gate.release()
            self._answers.put(answer)
        else:
            _close(call.world)

    def _collect(self) -> list[Answer]:
        now = time.monotonic()
        for key, call in self._calls.items():
            if now - call.started > self._timeout and call.claim.acquire(blocking=False):
                self._gate.release()
                self._answers.put(Answer(key, failure=f"no answer within env.step_timeout={self._timeout:g} s"))
        return [self._answers.get() for _ in range(self._answers.qsize())]


def _parts(reply: Any, call: str, due: str) -> Sequence[Any]:
    """Return an environment's reply. Raises TypeError unless it has the parts that are `due`."""
    count = due.count(",") + 1
    if not isinstance(reply, tuple | list) or len(reply) != count:
        what = f"{len(reply)} values" if isinstance(reply, tuple | list) else type(reply).__name__
        raise TypeError(f"{call} returned {what}; {count} are due: {due}")
    return reply


def _answer(
    key: int, observation: str, info: Info, reward: float = 0.0, terminated: bool = False, truncated: bool = False
) -> Answer:
    """Validate an environment's reply; a bad type or non-finite number fails this episode only."""
    if not isinstance(observation, str) or not isinstance(info, dict):
        raise TypeError(
            f"the observation is {type(observation).__name__}, the info {type(info).__name__}; text and a dict are due"
        )
    answer = Answer(key, encodable(observation), info | known_facts(info), reward, terminated, truncated)
    for name, number in (("reward", answer.reward), ("score", answer.info.get("score", 0.0))):
        if not math.isfinite(number):
            raise ValueError(f"the {name} is {number}")
    return answer


def _attempt(key: int, action: Callable[[], Answer], world: Environment) -> Answer:
    try:
        return action()
    except (Exception, SystemExit) as error:
        _close(world)
        return Answer(key, failure=_reason(error))


def _reason(error: BaseException) -> str:
    """Return an error on one line, with the file and line where it was raised, if that is not in this package."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if at.filename.startswith(_PACKAGE) else f" ({os.path.basename(at.filename)}:{at.lineno})"
    return one_line(error) + where


def _close(world: Environment) -> None:
    with suppress(Exception, SystemExit):
        world.close()
