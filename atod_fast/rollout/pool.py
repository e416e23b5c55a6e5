"""The worlds of a rollout: stepped at once where a step is instant, else side by side in threads with a time limit.

A world that raises, does not answer in time, or answers what the protocol does not know yields a failure in place of an answer, and is not used
again.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from atod_fast.envs.protocol import Environment, Info, known_facts
from atod_fast.envs.text import encodable, one_line


@dataclass(frozen=True, slots=True)
class Answer:
    """What the world of episode `key` made of a reset or a step."""

    key: int
    observation: str = ""
    info: Info = field(default_factory=Info)
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    failure: str | None = None  # the world raised or hung: why; the other fields mean nothing then


@dataclass(slots=True, eq=False)
class _Call:
    world: Environment
    started: float = float("inf")
    # Whoever takes it, the thread with its answer or the watch that gives up on it, speaks for the call.
    claim: threading.Lock = field(default_factory=threading.Lock)


class Pool:
    """Episodes by key, each in a world of its own: clones of `env`, reused from one episode to the next.

    `reset` and `step` start a call; `ready` collects what came of them. Where `env.instant` a call runs in the calling
    thread, in order, with no time limit. Elsewhere at most `workers` threads are at it, each for at most `timeout`
    seconds; one that hangs is left behind and, being a daemon, does not keep the process from ending.
    """

    def __init__(self, env: Environment, *, workers: int, timeout: float) -> None:
        self._env, self._timeout = env, timeout
        self._worlds: dict[int, Environment] = {}
        self._idle: list[Environment] = []
        self._calls: dict[int, _Call] = {}  # in threads
        self._gate = threading.Semaphore(workers)
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    def reset(self, key: int, seed: int, task: int) -> None:
        """Start an episode."""
        try:
            world = self._worlds[key] = self._idle.pop() if self._idle else self._env.clone()
        except (Exception, SystemExit) as error:
            self._answers.put(Answer(key, failure=one_line(error)))
            return

        def reset() -> Answer:
            observation, info = world.reset(seed, task)
            return _answer(key, observation, info)

        self._start(key, reset)

    def step(self, key: int, action: str) -> None:
        def step() -> Answer:
            observation, reward, terminated, truncated, info = world.step(action)
            return _answer(key, observation, info, float(reward), bool(terminated), bool(truncated))

        world = self._worlds[key]
        self._start(key, step)

    def ready(self, *, wait: bool) -> list[Answer]:
        """Answers and failures since the last call; with `wait` at least one, unless no call is under way."""
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
        """The episode is over: its world may serve another."""
        if key in self._worlds:
            self._idle.append(self._worlds.pop(key))

    def close(self) -> None:
        """Close the worlds that are not in a call; one that takes longer than the time limit is left behind."""
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


def _answer(key: int, observation: str, info: Info, *outcome: float) -> Answer:
    """What a world said, if it is what the protocol says; what is not would end the run where it is used, or spoil a mean."""
    if not isinstance(observation, str) or not isinstance(info, dict):
        raise TypeError(
            f"the observation is {type(observation).__name__}, the info {type(info).__name__}; text and a dict are due"
        )
    answer = Answer(key, encodable(observation), info | known_facts(info), *outcome)
    for name, number in (("reward", answer.reward), ("score", answer.info.get("score", 0.0))):
        if not math.isfinite(number):
            raise ValueError(f"the {name} is {number}")
    return answer


def _attempt(key: int, action: Callable[[], Answer], world: Environment) -> Answer:
    try:
        return action()
    except (Exception, SystemExit) as error:
        _close(world)
        return Answer(key, failure=one_line(error))


def _close(world: Environment) -> None:
    with suppress(Exception, SystemExit):
        world.close()
