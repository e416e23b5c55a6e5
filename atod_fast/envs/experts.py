"""Scripted experts: `expert_for` gets an environment's own, `Demonstrated` lets it accompany an episode."""

from __future__ import annotations

from typing import Any, cast

from atod_fast.envs.protocol import Environment, Expert, Info
from atod_fast.envs.text import one_line
from atod_fast.errors import UserError

COMMAND = "expert_command"  # key of an info: what the expert does next


def check_expert(name: str, env: Environment) -> None:
    """Raise UserError if `env` has no expert. name: env.name, for messages."""
    if not callable(getattr(env, "expert", None)):
        raise UserError(
            f"env.name={name!r} has no expert; give its class a method expert() (docs/collect.md), "
            "or collect with a model in place of expert"
        )


class Demonstrated:
    """An environment that also tells, as `info[COMMAND]`, what its expert does next. It is an `Environment`.

    An expert that fails fails the episode.
    """

    def __init__(self, env: Environment) -> None:
        self._env, self.instant = env, env.instant
        self._expert: Expert | None = None

    def __len__(self) -> int:
        return len(self._env)

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        observation, info = self._env.reset(seed, task)
        self._expert = cast(Any, self._env).expert()
        return observation, self._told(observation, info)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = self._env.step(action)
        if not (terminated or truncated):
            info = self._told(observation, info)
        return observation, reward, terminated, truncated, info

    def clone(self) -> Demonstrated:
        return Demonstrated(self._env.clone())

    def close(self) -> None:
        self._env.close()

    def _told(self, observation: str, info: Info) -> Info:
        assert self._expert is not None
        try:
            command = self._expert.act(observation, info)
        except Exception as error:
            raise RuntimeError(f"the expert fails: {one_line(error)}") from error
        return cast(Info, {**info, COMMAND: command})
