"""ALFWorld's text games in pure Python, without TextWorld's planner.

Observations, admissible commands and goal check equal TextWorld's: `test_alfworld_textworld.py` compares them
step by step.
"""

from __future__ import annotations

from collections.abc import Iterator

from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.alfworld.pddl import Row

NOTHING_HAPPENS = "Nothing happens."

# Action, receptacle and object ("" if it has none); the object of sliceobject is what is cut.
Move = tuple[str, str, str]


class FastAlfWorld:
    """One episode of a game. Ids are those of `Game`; the attributes below are for reading only.

    location: where the agent is. held: the object in its hand or None. facts: fluent -> rows that are true now (with
    `not_inreceptacle`: pairs that were undone). admissible: sorted commands. won: whether the goal holds.
    """

    def __init__(self, game: Game) -> None:
        self.game = game
        self._start()

    def reset(self) -> str:
        """Restart the game and return the first observation."""
        self._start()
        return self.game.texts.derive("intro", {}, self.game.names, self._rows)

    def step(self, command: str) -> tuple[str, bool]:
        """Return the observation, and whether the command was admissible; an inadmissible one changes nothing."""
        game = self.game
        command = command.strip()
        move = self._moves.get(command)
        if move is None:
            receptacle = game.travel.get(command)
            if receptacle is None or game.location[receptacle] == self.location:
                return NOTHING_HAPPENS, False
            move = ("gotolocation", receptacle, "")
        name, receptacle, item = move
        action = game.domain.actions[name]
        values = {"a": game.agent, "l": self.location, "r": receptacle, "o": item, "co": item, "ko": self.held}
        values |= {"lstart": self.location, "lend": game.location.get(receptacle)}
        for predicate, *words in action.deletes:
            self._set(predicate, tuple(values[word] for word in words), False)
        for predicate, *words in action.adds:
            self._set(predicate, tuple(values[word] for word in words), True)
        if action.adds or action.deletes:
            self._look_around()
        bound = {word: values[word] for word in action.parameters if word in values}
        return game.texts.derive(game.texts.feedback[name], bound, game.names, self._rows), True

    @property
    def here(self) -> tuple[str, ...]:
        """Receptacles where the agent is, sorted by id."""
        return self.game.at.get(self.location, ())

    def contents(self, receptacle: str) -> list[str]:
        """Return the objects in or on a receptacle, seen or not, sorted by id."""
        return sorted(item for item, place in self.facts["inreceptacle"] if place == receptacle)

    def is_open(self, receptacle: str) -> bool:
        """Return whether a receptacle's contents can be reached: it is open or cannot be closed."""
        return receptacle not in self.game.properties["openable"] or (receptacle,) in self.facts["opened"]

    def true(self, predicate: str, *row: str) -> bool:
        """Return whether a fact holds now, e.g. `true("isclean", mug)`."""
        return row in self.facts.get(predicate, self.game.static.get(predicate, ()))

    def _start(self) -> None:
        self.facts: dict[str, set[Row]] = {name: set(rows) for name, rows in self.game.initial.items()}
        self.facts["not_inreceptacle"] = set()
        self._look_around()

    def _set(self, predicate: str, row: Row, value: bool) -> None:
        rows, denials = self.facts[predicate], self.facts.get(f"not_{predicate}", set())
        (rows.add if value else rows.discard)(row)
        (denials.discard if value else denials.add)(row)

    def _look_around(self) -> None:
        """Update everything that follows from the facts."""
        ((_, self.location),) = self.facts["atlocation"]
        self.held = next((item for _, item in self.facts["holds"]), None)
        self._moves = self._commands()
        away = [
            command
            for command, receptacle in self.game.travel.items()
            if self.game.location[receptacle] != self.location
        ]
        self.admissible = sorted([*self._moves, *away])
        self.won = self.game.goal.holds(self.facts)

    def _commands(self) -> dict[str, Move]:
        """Return the admissible commands except travel, after the preconditions in `alfred.pddl`.

        Of its examineObject only the alternative `holds` can ever be true: the other one misspells a type.
        """
        game, held, here = self.game, self.held, self.here
        properties, tools = game.properties, game.tools
        moves: list[Move] = [("look", "", ""), ("inventory", "", "")]
        if "help" in game.domain.actions:
            moves.append(("help", "", ""))
        for receptacle in here:
            moves.append(("examinereceptacle", receptacle, ""))
            if receptacle in properties["openable"]:
                moves.append(("closeobject" if (receptacle,) in self.facts["opened"] else "openobject", receptacle, ""))
            if held is not None:
                if held in game.accepts[receptacle] and self.is_open(receptacle):
                    moves.append(("putobject", receptacle, held))
                for action, able in (
                    ("cleanobject", "cleanable"),
                    ("heatobject", "heatable"),
                    ("coolobject", "coolable"),
                ):
                    if receptacle in tools[action] and held in properties[able]:
                        moves.append((action, receptacle, held))
        for item, receptacle in self.facts["inreceptacle"]:
            if receptacle in here:
                if held is None and item in properties["pickupable"] and self.is_open(receptacle):
                    moves.append(("pickupobject", receptacle, item))
                if item in properties["toggleable"]:
                    moves.append(("toggleobject", receptacle, item))
        if held is not None:
            moves.append(("examineobject", "", held))
            if held in tools["sliceobject"]:
                cut = (item for item, place in self.facts["objectatlocation"] if place == self.location)
                moves += [("sliceobject", "", item) for item in cut if item in properties["sliceable"]]
        words, name = game.texts.commands, game.names.get
        return {words[m[0]].format(r=name(m[1]), o=name(m[2]), co=name(m[2]), ko=name(held or "")): m for m in moves}

    def _rows(self, predicate: str, pattern: tuple[str | None, ...]) -> Iterator[Row]:
        """Return the facts of a predicate that fit the known arguments, sorted as TextWorld enumerates them."""
        rows = self.facts.get(predicate) or self.game.static.get(predicate, frozenset())
        if None not in pattern:
            return iter(rows & {pattern})
        known = [(at, value) for at, value in enumerate(pattern) if value is not None]
        return iter(sorted(row for row in rows if all(row[at] == value for at, value in known)))
