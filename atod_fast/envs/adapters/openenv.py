"""Environments behind an OpenEnv server (github.com/huggingface/OpenEnv, BSD-3-Clause), as an `Environment`.

    env.name=openenv env.train='{tasks=1000, seed=0}' env.eval='{tasks=200, seed=1000000}'
    env.options='{url="http://127.0.0.1:8000", action={message="{}"}, observation="messages.-1.content"}'

This speaks the messages of the server's WebSocket, as its own client does. Neither openenv nor the environment's
package has to be installed here:

    {"type": "reset", "data": {"seed": 7}}        {"type": "step", "data": {"message": "..."}}        {"type": "close"}
    {"type": "observation", "data": {"observation": {...}, "reward": 1.0, "done": true}}
    {"type": "error", "data": {"code": "VALIDATION_ERROR", "message": "..."}}

The messages carry no version; they are the same in openenv 0.2.0 to 0.10.0 (core/env_server/types.py,
serialization.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from atod_fast.envs.adapters.adapter import Adapter
from atod_fast.envs.options import require
from atod_fast.envs.protocol import Info, copy_with
from atod_fast.envs.text import one_line
from atod_fast.errors import NotHere, UserError

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

COMMAND = "{}"  # placeholder for the command in `action`
MESSAGE_BYTES = 1 << 22  # longest message of a server
CLOSING = 5.0  # seconds a server may take to end a session
_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}


class ServerError(Exception):
    """The server answered with an error.

    of_value: the action has the right fields, but the server rejects what the agent said in them.
    """

    def __init__(self, data: Mapping[str, Any]) -> None:
        code, errors = data.get("code"), data.get("errors") or []
        problems = [
            problem if isinstance(problem, dict) else {"msg": problem}
            for problem in (errors if isinstance(errors, list) else [errors])
        ]
        self.of_value = code == "VALIDATION_ERROR" and not any(
            problem.get("type") in ("missing", "extra_forbidden") for problem in problems
        )
        details = [
            ": ".join(str(part) for part in (_dotted(problem.get("loc") or ""), problem.get("msg")) if part)
            for problem in problems
        ]
        hint = (
            "lower rollout.concurrency, which each engine has to itself, or let it have more"
            if code == "CAPACITY_REACHED"
            else ""
        )
        super().__init__("; ".join(str(part) for part in (code, data.get("message"), *details, hint) if part))


class OpenEnv(Adapter):
    """An environment on an OpenEnv server, where each episode has a session of its own.

    The server must allow rollout.concurrency sessions for each engine.

    url: address of the server. action: data of a step, in which every "{}" becomes the command. observation: path of
      the observation's field that is shown, such as "messages.-1.content", or several paths, whose texts are joined by
      line ends; a field that is absent or null is left out. admissible: path of the field that lists the actions.
      reset: data of every reset beside the seed.
    timeout: seconds a server may take to answer; less than env.step_timeout.
    tasks, seed, won, instructions, chars: see `Adapter`. OpenEnv does not tell a time limit from other ends of an
      episode: all are `terminated`.

    An action whose value the server rejects is invalid: no step is made, and the last observation is shown again.
    Raises UserError if the server does not answer, or its first observation has none of the fields.
    """

    instant = False

    def __init__(
        self,
        *,
        url: str,
        tasks: int,
        seed: int = 0,
        action: Mapping[str, Any] | None = None,
        observation: str | Sequence[str] = "message",
        admissible: str | None = None,
        reset: Mapping[str, Any] | None = None,
        won: float = 1.0,
        timeout: float = 30.0,
        instructions: str = "",
        chars: int = 4000,
    ) -> None:
        super().__init__(tasks=tasks, seed=seed, won=won, instructions=instructions, chars=chars)
        fields = [observation] if isinstance(observation, str) else observation
        require(
            "action",
            action,
            action is None or isinstance(action, Mapping),
            f'a table, in which "{COMMAND}" stands for the command',
        )
        require(
            "observation",
            observation,
            isinstance(fields, list) and all(isinstance(field, str) for field in fields),
            "a field's name, or a list of them",
        )
        require("admissible", admissible, admissible is None or isinstance(admissible, str), "a field's name")
        require("reset", reset, reset is None or isinstance(reset, Mapping), "a table")
        require("timeout", timeout, isinstance(timeout, int | float) and timeout > 0, "a number of seconds above 0")
        try:
            parts = urlsplit(url)
            path = parts.path.rstrip("/").removesuffix("/ws") + "/ws"
            self._url, self._host = parts._replace(scheme=_SCHEMES[parts.scheme], path=path).geturl(), parts.hostname
        except (KeyError, ValueError, AttributeError, TypeError):
            raise UserError(
                f"url={url!r} is not the address of a server; give one like http://127.0.0.1:8000"
            ) from None
        self._action = dict(action or {"message": COMMAND})
        if filled(self._action, "") == self._action:
            raise UserError(f'action={self._action!r} has no place for the command; put "{COMMAND}" where it goes')
        self._fields = fields
        self._admissible, self._reset, self._timeout = admissible, dict(reset or {}), timeout
        self._socket: ClientConnection | None = None
        try:
            self.reset(0, 0)
        except UserError:
            raise
        except Exception as error:
            kind = NotHere if isinstance(error, OSError) else UserError
            raise kind(f"url={url!r}: {one_line(error)}; see that the server runs, and correct env.options") from error
        finally:
            self.close()

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        start = self._world_seed(task)
        kept, self._task_id = self._socket, f"{self._host}/{start}"
        try:
            data = self._ask(kept or self._connect(), "reset", self._reset | {"seed": start})
        except ConnectionError:
            if kept is None:
                raise
            self.close()  # servers end idle sessions
            data = self._ask(self._connect(), "reset", self._reset | {"seed": start})
        self._text, self._listed = self._read(data, first=True)
        return self._text, self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._socket is None:
            raise RuntimeError("step before reset")
        try:
            data = self._ask(self._socket, "step", filled(self._action, action))
        except ServerError as error:
            if not error.of_value:
                raise
            return self._text, 0.0, False, False, self._info(False)
        self._text, self._listed = self._read(data, first=False)
        reward, done = float(data.get("reward") or 0.0), bool(data.get("done"))
        return self._text, reward, done, False, self._info(True, won=done and reward >= self._won)

    def clone(self) -> OpenEnv:
        return copy_with(self, _socket=None)

    def close(self) -> None:
        if self._socket is not None:
            socket, self._socket = self._socket, None
            with self._open, suppress(Exception):  # a server that is gone has no session to end
                socket.send(json.dumps({"type": "close"}))
                # The server hangs up when the session is over and a new one can start.
                socket.recv(timeout=min(CLOSING, self._timeout))

    def _connect(self) -> ClientConnection:
        try:
            from websockets.sync.client import connect
        except ImportError as error:
            raise UserError(
                f"env.name='openenv' needs websockets ({error}); pip install 'atod_fast[openenv]'"
            ) from None
        # True: as the environment variables say.
        proxy = None if self._host in ("localhost", "127.0.0.1", "::1") else True
        waits = {"open_timeout": self._timeout, "close_timeout": min(CLOSING, self._timeout)}
        self._open = ExitStack()
        self._socket = self._open.enter_context(connect(self._url, max_size=MESSAGE_BYTES, proxy=proxy, **waits))
        return self._socket

    def _ask(self, socket: ClientConnection, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and return the server's answer.

        Raises ServerError if that is an error, ConnectionError if the server is gone, TimeoutError after `timeout`.
        """
        from websockets.exceptions import ConnectionClosed

        try:
            with suppress(ConnectionClosed):  # its last message can still be read
                socket.send(json.dumps({"type": kind, "data": data}))
            reply = json.loads(socket.recv(timeout=self._timeout))
        except ConnectionClosed as error:
            raise ConnectionError(f"the server hung up ({error})") from error
        except TimeoutError:
            raise TimeoutError(f"no answer within timeout={self._timeout:g} s") from None
        match reply:
            case {"type": "observation", "data": {"observation": dict()} as answer}:
                return answer
            case {"type": "error", "data": dict(problem)}:
                raise ServerError(problem)
        raise ValueError(f"an answer that is no observation: {json.dumps(reply)[:100]}")

    def _read(self, data: Mapping[str, Any], first: bool) -> tuple[str, list[str]]:
        """Return the text to show of an observation, and the actions it lists.

        Raises LookupError if the first observation lacks all fields to show, or its actions are no list.
        """
        seen = data["observation"]
        found = [value for field in self._fields if (value := at(seen, field)) is not None]
        if first and not found:
            raise LookupError(
                f"observation={', '.join(self._fields)} is not in what the server tells: {', '.join(seen)}"
            )
        text = "\n".join(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in found)
        listed = at(seen, self._admissible) if self._admissible else []
        if first and not isinstance(listed, list):
            raise LookupError(
                f"admissible={self._admissible} is not a list in what the server tells: {', '.join(seen)}"
            )
        return self._fit(text), self._fit_list([str(action) for action in listed] if isinstance(listed, list) else [])

    def _info(self, valid: bool, won: bool = False) -> Info:
        return Info(won=won, admissible_actions=list(self._listed), is_action_valid=valid, task_id=self._task_id)


def _dotted(path: Any) -> str:
    return ".".join(map(str, path)) if isinstance(path, list) else str(path)


def filled(template: Any, command: str) -> Any:
    """Return `template` with `command` in place of every COMMAND."""
    if isinstance(template, Mapping):
        return {name: filled(value, command) for name, value in template.items()}
    if isinstance(template, list):
        return [filled(value, command) for value in template]
    return command if template == COMMAND else template


def at(value: Any, path: str) -> Any:
    """Return the value at `path` in `value`, names and indices joined by dots; None if there is none."""
    for part in path.split("."):
        try:
            value = value[int(part)] if isinstance(value, list) else value[part]
        except (LookupError, TypeError, ValueError):
            return None
    return value
