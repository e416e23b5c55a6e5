"""Games from ALFWorld's own data (`alfworld-download`): which files make up a split, after ALFWorld's filter."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.generator import TASK_TYPES
from atod_fast.envs.alfworld.pddl import GameError
from atod_fast.errors import NotHere, UserError

SPLITS = ("train", "valid_seen", "valid_unseen")
GAME_FILE = "game.tw-pddl"
_log = logging.getLogger(__name__)


def split_folder(split: str, data: str | None) -> Path:
    """Return the folder of a split below `data` (or $ALFWORLD_DATA): `json_2.1.1/<split>` or `<split>` itself."""
    if split not in SPLITS:
        near = get_close_matches(str(split), SPLITS, n=1)
        raise UserError(
            f"split={split!r} is not one of {', '.join(SPLITS)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    root = data or os.environ.get("ALFWORLD_DATA")
    if not root:
        raise NotHere(
            f"split={split!r} needs data=<folder> or $ALFWORLD_DATA (run alfworld-download), or use generate=N"
        )
    candidates = [*sorted(Path(root).expanduser().glob(f"json_*/{split}")), Path(root).expanduser() / split]
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise NotHere(f"data={str(root)!r} holds no json_2.1.1/{split}; point it at the folder alfworld-download filled")


def find_games(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Return the game files that `paths` name or contain, sorted within each folder."""
    found: list[Path] = []
    for path in map(Path, paths):
        path = path.expanduser()
        if path.is_dir():
            found += sorted(path.rglob(GAME_FILE))
        elif path.is_file():
            found.append(path)
        else:
            raise NotHere(f"games: {str(path)!r} does not exist; give game files, or folders with {GAME_FILE} files")
    return found


def playable(files: list[Path], task_types: tuple[str, ...] = TASK_TYPES) -> list[Path]:
    """Return the files that ALFWorld would play: solvable, of the task types, without movable receptacles or slicing.

    A damaged file is logged by name and left out. Raises UserError if nothing is left.
    """
    games: list[Path] = []
    damaged: list[str] = []
    for file in files:
        task = file.absolute().parent.parent.name  # pick_and_place_with_movable_recep-Egg-Bowl-Fridge-7
        if "with_movable_recep" in task or "Sliced" in task:
            continue
        try:
            data = read_file(file)
            if data.get("solvable") and Game.parse(data, "").task.type in task_types:
                games.append(file)
        except GameError as error:
            damaged.append(f"{file}: {error}")
    if damaged:
        shown = "; ".join(damaged[:3]) + ("; ..." if len(damaged) > 3 else "")
        _log.warning("skipped %d of %d ALFWorld games that cannot be read: %s", len(damaged), len(files), shown)
    if not games:
        reason = (
            f"{len(damaged)} damaged, first {damaged[0]}"
            if damaged
            else f"{len(files)} game files, none passes ALFWorld's filter"
        )
        raise UserError(f"no ALFWorld game left to play ({reason}); check games/data")
    return games


def read_file(file: Path) -> dict[str, object]:
    """Return a game file's content. Raise GameError if it is no JSON object."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GameError(f"not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise GameError("not a JSON object")
    return data


def task_id(file: Path) -> str:
    """Return the last two folders of a game file: `pick_and_place_simple-Mug-None-Desk-301/trial_T2019...`."""
    return "/".join(file.absolute().parts[-3:-1])
