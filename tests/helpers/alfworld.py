"""A player that knows the way, games in the older wording, and official games where they are at hand."""

from __future__ import annotations

from atod_fast.envs.alfworld.engine import FastAlfWorld
from helpers.paths import DATA, ROOT

TRANSCRIPTS = ROOT / "tests" / "envs" / "alfworld" / "data" / "transcripts.json"
OFFICIAL = DATA / "alfworld_official_2.1.1.tar.xz"
TREATMENT = {
    "pick_clean_then_place_in_recep": ("cleanobject", "isclean"),
    "pick_heat_then_place_in_recep": ("heatobject", "ishot"),
    "pick_cool_then_place_in_recep": ("coolobject", "iscool"),
}


def next_command(world: FastAlfWorld) -> str:
    """Return the next command towards the task's goal, from any state, for a player that sees everything."""
    game, task, held = world.game, world.game.task, world.held

    def say(action: str, **ids: str) -> str:
        return game.texts.commands[action].format(**{word: game.names[name] for word, name in ids.items()})

    def at(place: str, command: str) -> str:
        if place not in world.here:
            return say("gotolocation", r=place)
        return command if world.is_open(place) else say("openobject", r=place)

    lies = sorted(world.facts["inreceptacle"])
    wanted = [
        (item, place)
        for item, place in lies
        if game.kind[item] == task.object and item in game.properties["pickupable"]
    ]
    targets = [place for place in game.receptacles if game.kind[place] == task.receptacle]
    targets.sort(key=lambda place: -sum(where == place for _, where in wanted))
    if held is None:
        item, place = next(pair for pair in wanted if task.type != "pick_two_obj_and_place" or pair[1] != targets[0])
        return at(place, say("pickupobject", o=item, r=place))
    if game.kind[held] != task.object:
        place = next(place for place in game.receptacles if held in game.accepts[place])
        return at(place, say("putobject", o=held, r=place))
    if task.type == "look_at_obj_in_light":
        lamp, place = next(pair for pair in lies if game.kind[pair[0]] == task.toggle)
        return say("toggleobject", o=lamp) if place in world.here else say("gotolocation", r=place)
    action, fact = TREATMENT.get(task.type, (None, None))
    if action and not world.true(fact, held):
        tool = min(game.tools[action])
        return say(action, o=held, r=tool) if tool in world.here else say("gotolocation", r=tool)
    return at(targets[0], say("putobject", o=held, r=targets[0]))


def as_2_1_1(data: dict) -> dict:
    """A generated game in the older wording, with the older domain's two differences."""
    grammar = data["grammar"][: data["grammar"].index("action help")]
    for new, old in (
        ("arrive at {r.name}.", "arrive at {lend.name}."),
        ("move {o} to {r}", "put {o} in/on {r}"),
        ("You move the {o.name} to the {r.name}.", "You put the {o.name} in/on the {r.name}."),
    ):
        assert new in grammar
        grammar = grammar.replace(new, old)
    domain = data["pddl_domain"].replace(";(receptacleType ?r SinkType)", "(receptacleType ?r SinkType)")
    return data | {"grammar": grammar, "pddl_domain": domain[: domain.index("(:action help")] + ")"}
