"""ALFWorld as an `Environment`: official or generated games, the fast engine or TextWorld, rewards after verl-agent."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

from atod_fast.envs.alfworld.engine import FastAlfWorld
from atod_fast.envs.alfworld.expert import AlfWorldExpert
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import SMALL_TASK_TYPES, TASK_TYPES, Spec, generate
from atod_fast.envs.alfworld.loader import SPLITS, find_games, playable, read_file, split_folder, task_id
from atod_fast.envs.alfworld.prompt import AlfWorldPrompt
from atod_fast.envs.alfworld.textworld import TextWorldEngine
from atod_fast.envs.options import choice, goes_with, whole
from atod_fast.envs.protocol import Info, Usual, copy_with
from atod_fast.errors import UserError

CACHED_GAMES = 256  # parsed games in memory, 75 to 250 kB each

Paths = str | os.PathLike | Sequence[str | os.PathLike]


class Engine(Protocol):
    """What plays a game: `FastAlfWorld`, or `TextWorldEngine` on top of the original."""

    admissible: list[str]
    won: bool

    def reset(self) -> str:
        """Restart the game and return the first observation."""
        ...

    def step(self, command: str) -> tuple[str, bool]:
        """Return the observation, and whether the command was admissible."""
        ...


class Games:
    """A fixed list of games, parsed (or generated) when first played. Shared by all clones and threads."""

    def __init__(self, count: int, load: Callable[[int], Game]) -> None:
        self.count = count
        self.get = lru_cache(maxsize=CACHED_GAMES)(load)


class AlfWorld:
    """ALFWorld text games.

    Where the games come from (exactly one):
      generate: number of generated games, with seed, scene ("small" | "full") and, for small scenes, the most
        receptacles and objects. Even and odd seeds share no game.
      split: "train", "valid_seen" or "valid_unseen" of the official data below `data` or $ALFWORLD_DATA.
      games: paths of game files, or of folders that contain some, or a split's name.
    task_types: only these of the six types; by default all, but in small scenes the four that are possible in a kitchen
      with one thing of each type.
    engine: "fast" (pure Python, the default) or "textworld" (the original; needs `pip install alfworld==0.4.2`).
    reward: of the step that reaches the goal and so ends the episode; all other steps give 0.
    """

    usual = Usual(turns=35, prompt_tokens=454, response_tokens=60)  # bench/prompts.py; the rest assumed

    def __init__(
        self,
        *,
        generate: int | None = None,
        seed: int = 0,
        task_types: Sequence[str] = (),
        scene: str = "small",
        receptacles: int = 6,
        objects: int = 6,
        split: str | None = None,
        data: str | None = None,
        games: Paths | None = None,
        engine: str = "fast",
        reward: float = 10.0,
    ) -> None:
        if sum(source is not None for source in (generate, split, games)) != 1:
            raise UserError(
                "alfworld takes exactly one of generate=N, split=train|valid_seen|valid_unseen and games=<paths>"
            )
        choice("engine", engine, ("fast", "textworld"))
        for kind in task_types:
            choice("task_types", kind, TASK_TYPES)
        if generate is None:
            sizes = {"receptacles": (receptacles, 6), "objects": (objects, 6)}
            goes_with("generate=N, not with games that exist already", seed=(seed, 0), scene=(scene, "small"), **sizes)
            self._games = _official(split, data, games, tuple(task_types) or TASK_TYPES)
        else:
            if data is not None:
                raise UserError(f"data={str(data)!r} goes with split=, not with generate={generate}; leave it out")
            choice("scene", scene, ("small", "full"))
            whole(generate=(generate, 1), seed=(seed, 0), receptacles=(receptacles, 3), objects=(objects, 3))
            types = tuple(dict.fromkeys(task_types)) or (SMALL_TASK_TYPES if scene == "small" else TASK_TYPES)
            self._games = _generated(Spec(seed, types, scene, receptacles, objects), generate)
        self.instant = engine == "fast"
        self._reward = float(reward)
        # TextWorldEngine() is called at once, to fail early if alfworld is not installed.
        self.engine: Engine | None = None if self.instant else TextWorldEngine()
        self.game: Game | None = None

    def __len__(self) -> int:
        return self._games.count

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        """Start game `task`. ALFWorld is deterministic: `seed` changes nothing."""
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} of {len(self)} games")
        self.game = self._games.get(task)
        if self.instant:
            self.engine = FastAlfWorld(self.game)
        else:  # a clone loads its own copy of the planner
            self.engine = self.engine if isinstance(self.engine, TextWorldEngine) else TextWorldEngine()
            self.engine.load(self.game)
        return self.engine.reset(), _info(self.game, self.engine, True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self.game is None or self.engine is None:
            raise RuntimeError("step before reset")
        observation, accepted = self.engine.step(action)
        won = self.engine.won
        return observation, self._reward if won else 0.0, won, False, _info(self.game, self.engine, accepted)

    def clone(self) -> AlfWorld:
        return copy_with(self, engine=None, game=None)

    def prompt(self, thinking: bool, history: int) -> AlfWorldPrompt:
        return AlfWorldPrompt(thinking, history)

    def expert(self) -> AlfWorldExpert:
        """Return a scripted player of the game of the last reset. Raises UserError with engine="textworld"."""
        if not isinstance(self.engine, FastAlfWorld):
            raise UserError("alfworld's expert sees the state of the game, which TextWorld hides; set engine='fast'")
        return AlfWorldExpert(self.engine)

    def close(self) -> None:
        if isinstance(self.engine, TextWorldEngine):
            self.engine.close()
        self.engine = self.game = None


def _info(game: Game, engine: Engine, accepted: bool) -> Info:
    return Info(
        won=engine.won,
        admissible_actions=list(engine.admissible),
        is_action_valid=accepted,
        task_type=game.task.type,
        task_id=game.task_id,
    )


def _generated(spec: Spec, count: int) -> Games:
    def load(index: int) -> Game:
        name, data = generate(spec, index)
        return Game.parse(data, name)

    return Games(count, load)


def _official(split: str | None, data: str | None, games: Paths | None, task_types: tuple[str, ...]) -> Games:
    if isinstance(games, str) and games in SPLITS and not os.path.exists(games):
        split = games
    if split is not None:
        games = split_folder(split, data)
    paths = [games] if isinstance(games, str | os.PathLike) else games or ()
    files = playable(find_games(paths), task_types)
    return Games(len(files), lambda index: Game.parse(read_file(files[index]), task_id(files[index])))
