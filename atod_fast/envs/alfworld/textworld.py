"""Play the same games in the original, TextWorld's PDDL engine with ALFWorld's naming.

It is about a thousand times slower than the fast engine, which is tested against it.
"""

from __future__ import annotations

import os
import sys
from threading import Lock

from atod_fast.envs.alfworld.game import Game
from atod_fast.errors import UserError

# TextWorld's parsers are module globals, and its PDDL translator redirects sys.stdout and overwrites sys.argv.
_ALONE = Lock()


class TextWorldEngine:
    """Plays a game as `FastAlfWorld` does, but does not show its state. One instance loads many games."""

    def __init__(self) -> None:
        data = os.environ.get("ALFWORLD_DATA")
        try:
            from alfworld.agents.utils.misc import Demangler
            from textworld.core import EnvInfos
            from textworld.envs import PddlEnv
        except ImportError as error:
            raise UserError(
                f"engine='textworld' needs alfworld ({error}); pip install alfworld==0.4.2, or use engine='fast'"
            ) from error
        if data is None:
            os.environ.pop("ALFWORLD_DATA", None)  # alfworld sets it on import, whether or not there are data
        self._demangler = Demangler
        self._env = PddlEnv(EnvInfos(won=True, admissible_commands=True))

    def load(self, game: Game) -> None:
        """Make `game` the one that `reset` starts."""
        argv = sys.argv
        with _ALONE:
            try:
                self._env.load(dict(game.data))
            finally:
                sys.argv = argv
        entities = self._env._entity_infos
        names = self._demangler(game_infos=entities, shuffle=False)
        for entity in entities.values():
            entity.name = names.demangle_alfred_name(entity.id)  # pyright: ignore[reportAttributeAccessIssue]

    def reset(self) -> str:
        argv = sys.argv
        with _ALONE:
            try:
                return self._observe(self._env.reset())
            finally:
                sys.argv = argv

    def step(self, command: str) -> tuple[str, bool]:
        accepted = command.strip() in self.admissible
        with _ALONE:
            return self._observe(self._env.step(command)[0]), accepted

    def close(self) -> None:
        """Free the planner's memory. Its library stays loaded: unloading a second copy crashes Python on exit."""
        self._env.downward_lib.cleanup()

    def _observe(self, state) -> str:
        self.admissible: list[str] = state["admissible_commands"]
        self.won = bool(state["won"])
        return state.feedback
