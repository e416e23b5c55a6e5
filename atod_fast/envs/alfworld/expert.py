"""A scripted expert for ALFWorld, official and generated games of all six task types. It uses hidden state.

It searches as a player would: it visits places that can hold what it looks for, the first of each kind before the
second, and opens what is closed. Where a player would have to be lucky it looks at the game: it knows whether a place
that it has not visited holds the object, and after `LOOKS` places without it goes to one that does.
"""

from __future__ import annotations

from collections.abc import Callable

from atod_fast.envs.alfworld.engine import FastAlfWorld
from atod_fast.envs.protocol import Info

LOOKS = 6  # places searched in vain, before it goes where the object is
# Task type -> the action its object needs before it is put down, and the fact that this was done.
TREATMENT = {
    "pick_clean_then_place_in_recep": ("cleanobject", "isclean"),
    "pick_heat_then_place_in_recep": ("heatobject", "ishot"),
    "pick_cool_then_place_in_recep": ("coolobject", "iscool"),
}


class AlfWorldExpert:
    """Plays the game of `state` from where it stands: finds the object, treats it as the task asks, puts it down."""

    def __init__(self, state: FastAlfWorld) -> None:
        self.state, self.game, self.task = state, state.game, state.game.task
        self._treatment = TREATMENT.get(self.task.type)
        self._searched: set[str] = set()  # places whose contents were seen
        self._in_vain = 0

    def act(self, observation: str, info: Info) -> str:
        """Return the next command."""
        state, game, held = self.state, self.game, self.state.held
        for place in state.here:
            if state.is_open(place) and place not in self._searched:
                self._searched.add(place)
                self._in_vain += 1
        if held is None:
            return self._reach(self._wanted, lambda item, place: self._say("pickupobject", o=item, r=place))
        if game.kind[held] != self.task.object:
            return self._put(held, [place for place in game.receptacles if held in game.accepts[place]])
        if self.task.type == "look_at_obj_in_light":
            return self._reach(self._lamp, lambda item, place: self._say("toggleobject", o=item, r=place))
        if self._treatment and not state.true(self._treatment[1], held):
            action, tools = self._treatment[0], game.tools[self._treatment[0]]
            here = [place for place in state.here if place in tools]
            return self._say(action, o=held, r=here[0]) if here else self._say("gotolocation", r=min(tools))
        return self._put(held, self._targets())

    def _wanted(self, item: str, place: str) -> bool:
        """Return whether to take `item` from `place`: of the asked kind, and not where it shall be put anyway."""
        right = self.game.kind[item] == self.task.object and item in self.game.properties["pickupable"]
        return right and not (self.task.type == "pick_two_obj_and_place" and place == self._targets()[0])

    def _lamp(self, item: str, place: str) -> bool:
        return self.game.kind[item] == self.task.toggle

    def _targets(self) -> list[str]:
        """Return the places where the object shall be put, first the one where most of its kind are already."""
        places = [place for place in self.game.receptacles if self.game.kind[place] == self.task.receptacle]

        def there(place: str) -> int:
            return sum(self.game.kind[item] == self.task.object for item in self.state.contents(place))

        return sorted(places, key=lambda place: (-there(place), self._number(place)))

    def _reach(self, wanted: Callable[[str, str], bool], use: Callable[[str, str], str]) -> str:
        """Return the next command towards an object that is `wanted`, and at last `use` of it."""
        state, game = self.state, self.game
        holds = {place: [item for item in state.contents(place) if wanted(item, place)] for place in game.receptacles}
        for place in state.here:
            if not state.is_open(place) and place not in self._searched:
                return self._say("openobject", r=place)
            if holds[place]:
                return use(holds[place][0], place)
        seen = [place for place in game.receptacles if place in self._searched and holds[place]]
        if seen:
            self._in_vain = 0
            return self._say("gotolocation", r=seen[0])
        kinds = {game.kind[item] for items in holds.values() for item in items}
        left = [place for place in sorted(game.receptacles, key=self._number) if place not in self._searched]
        if self._in_vain < LOOKS:
            left = [place for place in left if any(game.kind[item] in kinds for item in game.accepts[place])] or left
        else:
            left = [place for place in left if holds[place]]
        return self._say("gotolocation", r=left[0])

    def _put(self, held: str, places: list[str]) -> str:
        """Put the object `held` down at one of `places`, here if possible."""
        for place in self.state.here:
            if place in places:
                opened = self.state.is_open(place)
                return self._say("putobject", o=held, r=place) if opened else self._say("openobject", r=place)
        return self._say("gotolocation", r=places[0])

    def _number(self, place: str) -> tuple[int, str]:
        kind, _, number = self.game.names[place].strip().rpartition(" ")
        return (int(number) if number.isdigit() else 0), kind

    def _say(self, action: str, **ids: str) -> str:
        return self.game.texts.commands[action].format(**{key: self.game.names[value] for key, value in ids.items()})
