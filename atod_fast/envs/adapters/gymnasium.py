"""Any gymnasium environment whose observations can be shown as text, as an `Environment`.

env.name=gymnasium env.options='{id="FrozenLake-v1", observation="render", actions=["left", "down", "right", "up"]}'
env.train='{tasks=1000, seed=0}' env.eval='{tasks=200, seed=1000000}'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from atod_fast.envs.adapters.adapter import LONGEST_NAME, Adapter
from atod_fast.envs.options import require
from atod_fast.envs.protocol import Info, copy_with, known_facts
from atod_fast.envs.text import fit, one_line
from atod_fast.errors import UserError

if TYPE_CHECKING:
    from gymnasium import Env

_COLOURED = re.compile("\x1b\\[([0-9;]*)m(.*?)\x1b\\[0m", re.DOTALL)
_COLOURS = "black red green yellow blue magenta cyan white".split()


class Gymnasium(Adapter):
    """A gymnasium environment by its registered `id`, or by `module:id` to import the module that registers it.

    observation: "text", if observations are text; "render", for what render() draws in mode ansi, with terminal
      colours as words; or "module:function", which is called with (observation, info) and returns the text.
    actions: names of a Discrete space's actions, in its order; by default their numbers. A command that is no such
      name, or that info["action_mask"] forbids, is invalid: no step is made, and the last observation is shown again.
      Commands for a Text space are passed on unchanged.
    max_steps: replaces the registered limit. kwargs: arguments of the environment. instant: False steps it in threads,
      each step under env.step_timeout. tasks, seed, won, instructions, chars: see `Adapter`.

    Entries of the environment's info that are keys of `Info` are passed on; a `won` among them replaces the rule for
    rewards. Raises UserError if the environment cannot be made, its action space is of another kind, or its first
    observation is no text.
    """

    def __init__(
        self,
        *,
        id: str,
        tasks: int,
        seed: int = 0,
        observation: str = "text",
        actions: Sequence[str] = (),
        won: float = 1.0,
        max_steps: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
        instructions: str = "",
        chars: int = 4000,
        instant: bool = True,
    ) -> None:
        super().__init__(tasks=tasks, seed=seed, won=won, instructions=instructions, chars=chars)
        require("id", id, isinstance(id, str), "the name of an environment")
        require("observation", observation, isinstance(observation, str), "text, render or module:function")
        require("actions", actions, isinstance(actions, list | tuple), "a list of names")
        require("kwargs", kwargs, kwargs is None or isinstance(kwargs, Mapping), "a table of arguments")
        require("instant", instant, isinstance(instant, bool), "true or false")
        self.instant = instant
        self._id, self._observation = id, observation
        self._arguments = {"max_episode_steps": max_steps, "disable_env_checker": True} | dict(kwargs or {})
        if observation == "render":
            self._arguments["render_mode"] = "ansi"
        self._describe = _function(observation) if ":" in observation else None
        if self._describe is None and observation not in ("text", "render"):
            raise UserError(f"observation={observation!r} is not known; use text, render or module:function")
        self._env: Env | None = None
        self._numbers: dict[str, int] | None = None  # name in lower case -> action; None for a Text space
        try:
            self._env = self._open()
            self._names, self._numbers = self._named(self._env.action_space, actions)
            self.reset(0, 0)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"id={id!r}: {one_line(error)}; use observation=render where there is a mode ansi, or module:function"
            ) from error
        finally:
            self.close()

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        start = self._world_seed(task)
        if self._env is None:
            self._env = self._open()
        observation, info = self._env.reset(seed=start)
        self._text = self._shown(self._env, observation, info)
        self._facts = Info(task_id=f"{self._id}/{start}") | self._told(info, False)
        return self._text, self._facts.copy()

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._env is None:
            raise RuntimeError("step before reset")
        taken = self._meant(action)
        if taken is None:
            return self._text, 0.0, False, False, self._facts | Info(is_action_valid=False)
        observation, gained, terminated, truncated, info = self._env.step(taken)
        reward = float(gained)
        self._text = self._shown(self._env, observation, info)
        won = bool(terminated) and reward >= self._won
        self._facts |= self._told(info, won)
        return self._text, reward, bool(terminated), bool(truncated), self._facts.copy()

    def clone(self) -> Gymnasium:
        return copy_with(self, _env=None)

    def close(self) -> None:
        if self._env is not None:
            env, self._env = self._env, None
            env.close()

    def _open(self) -> Env:
        try:
            import gymnasium
        except ImportError as error:
            raise UserError(f"id={self._id!r} needs gymnasium ({error}); pip install 'atod_fast[gym]'") from None
        try:
            env = gymnasium.make(self._id, **self._arguments)
        except gymnasium.error.UnregisteredEnv as error:
            near = get_close_matches(self._id, gymnasium.registry, n=1)
            hint = f"did you mean {near[0]}?" if near else "give module:id to import the module that registers it"
            raise UserError(f"id={self._id!r} is not registered with gymnasium; {hint}") from error
        except Exception as error:  # the constructor failed on the configured arguments
            raise UserError(f"id={self._id!r} cannot be made: {one_line(error)}; correct id or kwargs") from error
        modes = env.metadata.get("render_modes", [])
        if self._observation == "render" and "ansi" not in modes:
            raise UserError(
                f"observation='render': {self._id} draws in {', '.join(modes) or 'no mode'}, not in ansi; "
                "use text or module:function"
            )
        return env

    def _named(self, space: Any, names: Sequence[str]) -> tuple[list[str], dict[str, int] | None]:
        from gymnasium.spaces import Discrete, Text

        if isinstance(space, Text) and not names:
            return [], None
        if not isinstance(space, Discrete):
            kind = type(space).__name__
            raise UserError(
                f"id={self._id!r}: actions are {kind}"
                + ("; leave out actions=" if isinstance(space, Text) else ", not Text or Discrete; wrap it")
            )
        first, count = int(space.start), int(space.n)
        named = [fit(str(name), LONGEST_NAME) for name in names] or [str(first + place) for place in range(count)]
        numbers = {name.strip().lower(): first + place for place, name in enumerate(named)}
        if len(named) != count or len(numbers) != count:
            raise UserError(
                f"actions={list(names)!r} has {len(numbers)} different names; "
                f"{self._id} has {count} actions: give each one"
            )
        return named, numbers

    def _meant(self, command: str) -> str | int | None:
        """Return the action that a command means, or None for a command that is not listed."""
        if self._numbers is None:
            return command
        name = command.strip().lower()
        return self._numbers.get(name) if name in self._allowed else None

    def _told(self, info: Mapping[str, Any], won: bool) -> Info:
        """Return the facts of a reset or a step, with texts and lists bounded; set which actions are allowed.

        An action that is allowed but left out of the list for lack of room is accepted too.
        """
        mask, names = info.get("action_mask"), self._names
        if self._numbers is not None and mask is not None:
            names = [name for name, may in zip(names, mask, strict=True) if may]
        facts = Info(won=won, is_action_valid=True) | known_facts(info)
        actions = facts.get("admissible_actions", names)
        self._allowed = {name.strip().lower() for name in actions}
        facts["admissible_actions"] = self._fit_list(actions)
        for name in ("task_type", "task_id"):
            if text := facts.get(name):
                facts[name] = fit(text, LONGEST_NAME)
        return facts

    def _shown(self, env: Env, observation: Any, info: Mapping[str, Any]) -> str:
        if self._observation == "render":
            observation = env.render()
        elif self._describe is not None:
            observation = self._describe(observation, info)
        if not isinstance(observation, str):
            raise TypeError(f"observation={self._observation!r} gives {type(observation).__name__}, not text")
        return self._fit(_worded(observation))


def _worded(text: str) -> str:
    """Return `text` with terminal colours as words, `[red S]`: in gymnasium's toy environments they mark positions."""

    def word(match: re.Match[str]) -> str:
        codes = [int(code) for code in match[1].split(";") if code]
        colours = (_COLOURS[code % 10] for code in codes if 30 <= code <= 37 or 40 <= code <= 47)
        return f"[{' '.join([*colours, match[2]])}]"

    return _COLOURED.sub(word, text)


def _function(name: str) -> Callable[[Any, Mapping[str, Any]], str]:
    module, _, attribute = name.partition(":")
    try:
        found: Callable[..., str] = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"observation={name!r} cannot be loaded: {error}") from error
    if not callable(found):
        raise UserError(f"observation={name!r} is not a function")
    return found
