"""ALFWorld's dialect: shortened texts, and a scripted expert that knows the state of the game."""

from __future__ import annotations

import re
from collections.abc import Iterable
from random import Random

from atod_fast.envs.alfworld.engine import NOTHING_HAPPENS, FastAlfWorld
from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.alfworld.expert import TREATMENT as CHANGES
from atod_fast.envs.alfworld.game import Game
from atod_fast.envs.dialect import Dialect, Player

_WORD = re.compile(r"[a-z]+|\d+")
_BOILERPLATE = re.compile(r"-= welcome.*?=-|you arrive at .*?\. |looking quickly around you|your (?=task is to)")
_DROPPED = frozenset("a the you and of it to next in on see is around middle room are from using some".split())

# Task type -> the action its object needs before it is put down, and the fact that this was done.
TREATMENT = {"pick_and_place_simple": None, **CHANGES}


def compact(observation: str) -> list[str]:
    """Return the words of an observation that tell states apart, lower-cased.

    They are letters or digits, so never a control token.
    """
    return [word for word in _WORD.findall(_BOILERPLATE.sub("", observation.lower())) if word not in _DROPPED]


def vocabulary(games: Iterable[Game]) -> list[str]:
    """Return, sorted, every word that a shortened observation or a command of `games` can hold."""
    words = set(compact(NOTHING_HAPPENS))
    for game in games:
        words.update(compact(FastAlfWorld(game).reset()))
        words.update(word for thing in game.kind for word in compact(game.names[thing]))
        words.update(
            word
            for sides in game.texts.rules.values()
            for side in sides
            for piece in side.pieces
            for word in compact(piece.literal)
        )
        words.update(
            word
            for action in game.domain.actions
            for word in _WORD.findall(re.sub(r"\{.*?\}", "", game.texts.commands[action]))
        )
    return sorted(words)


class Expert:
    """Plays one episode: finds the object, first in places that can hold it, treats it as the task asks, puts it down.

    It opens and searches places as a player would, but knows names, kinds and what has been done to an object. It can
    take over in any state. Raises ValueError for a task type that is not in TREATMENT.
    """

    def __init__(self, world: FastAlfWorld) -> None:
        self.world, self.game, self.task = world, world.game, world.game.task
        if self.task.type not in TREATMENT:
            raise ValueError(f"task type {self.task.type!r} is none of {', '.join(TREATMENT)}")
        self._treatment = TREATMENT[self.task.type]
        self._searched: set[str] = set()
        kinds = self.game.kind
        self._places = sorted(
            self.game.receptacles,
            key=lambda place: (all(kinds[item] != self.task.object for item in self.game.accepts[place]), place),
        )

    def command(self) -> str:
        """Return the next command; called before every turn."""
        world, held = self.world, self.world.held
        self._searched.update(place for place in world.here if world.is_open(place))
        if held is None:
            return self._search()
        if self.game.kind[held] != self.task.object:
            return self._put(held, [place for place in self.game.receptacles if held in self.game.accepts[place]])
        if self._treatment and not world.true(self._treatment[1], held):
            return self._treat(held, self._treatment[0])
        return self._put(
            held, [place for place in self.game.receptacles if self.game.kind[place] == self.task.receptacle]
        )

    def _search(self) -> str:
        for place in self.world.here:
            if not self.world.is_open(place):
                return self._say("openobject", r=place)
            for item in self.world.contents(place):
                if self.game.kind[item] == self.task.object:
                    return self._say("pickupobject", o=item, r=place)
        left = [place for place in self._places if place not in self._searched]
        if not left:  # an object was moved after its place was searched
            self._searched = set(self.world.here)
            left = [place for place in self._places if place not in self._searched]
        return self._say("gotolocation", r=left[0])

    def _treat(self, held: str, action: str) -> str:
        tools = self.game.tools[action]
        here = [place for place in self.world.here if place in tools]
        return self._say(action, o=held, r=here[0]) if here else self._say("gotolocation", r=min(tools))

    def _put(self, held: str, places: list[str]) -> str:
        """Put the object `held` down at one of `places`, here if possible."""
        for place in self.world.here:
            if place in places:
                return (
                    self._say("putobject", o=held, r=place)
                    if self.world.is_open(place)
                    else self._say("openobject", r=place)
                )
        return self._say("gotolocation", r=places[0])

    def _say(self, action: str, **ids: str) -> str:
        return self.game.texts.commands[action].format(**{key: self.game.names[value] for key, value in ids.items()})


def junk(world: FastAlfWorld, rng: Random) -> str:
    """Return a bad player's command: mostly inadmissible, always about things that are in the game."""
    if rng.random() < 0.4:
        return rng.choice(world.admissible)
    names = [world.game.names[thing] for thing in sorted(world.game.kind)]
    one, other = rng.choice(names), rng.choice(names)
    garbled = rng.choice(world.admissible).split()
    garbled[rng.randrange(len(garbled))] = rng.choice(one.split())
    verb = rng.choice(("clean", "heat", "cool"))
    sentences = (
        f"take {one} from {other}",
        f"move {one} to {other}",
        f"open {one}",
        f"{verb} {one} with {other}",
        one,
        f"go to {one}",
        " ".join(garbled),
    )
    return rng.choices(sentences, weights=(3, 2, 1, 1, 1, 1, 1))[0]


def _state(env: AlfWorld) -> FastAlfWorld:
    """Return the game of the last reset as it stands now; TextWorld's engine does not show it."""
    if not isinstance(env.engine, FastAlfWorld):
        raise TypeError("the dialect needs engine='fast', and a reset")
    return env.engine


def _games(env: AlfWorld, count: int) -> Iterable[Game]:
    for task in range(count):
        env.reset(0, task)
        yield _state(env).game


def _player(env: AlfWorld) -> Player:
    expert = Expert(_state(env))
    return lambda steps, observation: expert.command()


DIALECT = Dialect(
    read=compact,
    command=" ".join,
    words=str.split,
    vocabulary=lambda env, count: vocabulary(_games(env, count)),
    expert=_player,
    junk=lambda env, observation, rng: junk(_state(env), rng),
)
