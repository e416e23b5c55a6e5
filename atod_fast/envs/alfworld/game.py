"""A game file, parsed once and shared by all episodes that play it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atod_fast.envs.alfworld import grammar, pddl
from atod_fast.envs.alfworld.goal import Goal, Task, compile_goal, describe
from atod_fast.envs.alfworld.pddl import FLUENTS, Domain, GameError, Row

# Denials that the grammar may ask for: TextWorld adds one when an action deletes a fact. Nothing deletes istoggled.
_DENIALS = {"not_inreceptacle", "not_istoggled"}
# Predicates that actions change, but that no text, goal or precondition asks for.
_UNTRACKED = {"checked", "examined", "ison"}


@dataclass(frozen=True, eq=False)
class Game:
    """Read-only facts of one game. Ids are the PDDL's (lower case); `names` holds their names in texts ("mug 2").

    Kinds are types without the suffix: "mug", "sinkbasin".
    """

    task_id: str
    task: Task
    data: Mapping[str, Any]  # the game file: pddl_domain, grammar, pddl_problem
    domain: Domain
    texts: grammar.Grammar
    names: dict[str, str]
    goal: Goal
    agent: str
    static: dict[str, frozenset[Row]]  # predicate -> rows that never change
    initial: dict[str, frozenset[Row]]  # fluent -> rows true at the start
    receptacles: tuple[str, ...]  # those that one can go to, sorted
    location: dict[str, str]  # receptacle -> location
    at: dict[str, tuple[str, ...]]  # location -> receptacles there, sorted
    kind: dict[str, str]  # object or receptacle -> kind
    accepts: dict[str, frozenset[str]]  # receptacle -> objects that may be put in or on it
    tools: dict[str, frozenset[str]]  # action -> receptacles (for sliceobject: knives) it works with
    # openable, pickupable, cleanable, heatable, coolable, toggleable, sliceable -> ids
    properties: dict[str, frozenset[str]]
    travel: dict[str, str]  # "go to ..." command -> receptacle

    @classmethod
    def parse(cls, data: Mapping[str, Any], task_id: str) -> Game:
        """Parse a game file's content. Raise GameError, naming what is damaged or not supported."""
        try:
            return cls._parse(data, task_id)
        except GameError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise GameError(f"malformed ({type(error).__name__}: {error})") from error

    @classmethod
    def _parse(cls, data: Mapping[str, Any], task_id: str) -> Game:
        for key in ("pddl_domain", "grammar", "pddl_problem"):
            if not isinstance(data.get(key), str):
                raise GameError(f"the game has no {key}")
        domain = pddl.domain(data["pddl_domain"])
        problem = pddl.problem(data["pddl_problem"], domain)
        texts = grammar.parse(data["grammar"], domain.actions)
        _check_predicates(texts, domain)

        facts = problem.facts
        location = {place: spot for place, spot in facts.get("receptacleatlocation", [])}
        if len(location) != len(set(facts.get("receptacleatlocation", []))):
            raise GameError("a receptacle is at several locations")
        agents = facts.get("atlocation", [])
        if len(agents) != 1 or facts.get("holds"):
            raise GameError("the agent does not start empty-handed at one place")
        at: dict[str, list[str]] = defaultdict(list)
        for receptacle in sorted(location):
            at[location[receptacle]].append(receptacle)
        receptacle_types, object_types = _sets(facts.get("receptacletype", [])), _sets(facts.get("objecttype", []))
        room_for = _sets(facts.get("cancontain", []))
        of_type = _sets([(kind, name) for name, kinds in object_types.items() for kind in kinds])
        names = _names({name for rows in facts.values() for row in rows for name in row})

        def fitting(receptacle: str) -> frozenset[str]:
            kinds = {fits for kind in receptacle_types.get(receptacle, ()) for fits in room_for.get(kind, ())}
            return frozenset().union(*(of_type.get(kind, ()) for kind in kinds))

        def usable(action: str, kinds: frozenset[str]) -> frozenset[str]:
            things = (
                object_types
                if action == "sliceobject"
                else {place: receptacle_types.get(place, set()) for place in location}
            )
            return frozenset(name for name, types in things.items() if types & kinds)

        return cls(
            task_id=task_id,
            task=describe(problem.goal),
            data=data,
            domain=domain,
            texts=texts,
            names=names,
            goal=compile_goal(problem),
            agent=agents[0][0],
            static={name: frozenset(rows) for name, rows in facts.items() if name not in FLUENTS},
            initial={name: frozenset(facts.get(name, [])) for name in FLUENTS},
            receptacles=tuple(sorted(location)),
            location=location,
            at={place: tuple(there) for place, there in at.items()},
            kind={name: min(types).removesuffix("type") for name, types in (object_types | receptacle_types).items()},
            accepts={place: fitting(place) for place in location},
            tools={action: usable(action, kinds) for action, kinds in domain.tools.items()},
            properties={
                name: frozenset(row[0] for row in facts.get(name, []))
                for name in ("openable", "pickupable", "cleanable", "heatable", "coolable", "toggleable", "sliceable")
            },
            travel={texts.commands["gotolocation"].format(r=names[r]): r for r in sorted(location)},
        )


def _sets(rows: list[Row]) -> dict[str, set[str]]:
    out: dict[str, set[str]] = defaultdict(set)
    for key, value in rows:
        out[key].add(value)
    return out


def _names(ids: set[str]) -> dict[str, str]:
    """Return display names as ALFWorld's demangler gives them: id -> name.

    Within a kind numbers fall as ids rise; ids without coordinates keep a trailing blank.
    """
    kinds = {name: name.split("_bar_", 1)[0] + ("basin" if "basin" in name else "") for name in ids if "_bar_" in name}
    left = Counter(kinds.values())
    names = {}
    for name in sorted(ids):
        kind = kinds.get(name)
        if kind is None:
            names[name] = f"{name} "
        else:
            names[name] = f"{kind} {left[kind]}"
            left[kind] -= 1
    return names


def _check_predicates(texts: grammar.Grammar, domain: Domain) -> None:
    """Raise GameError if the grammar asks for facts that the engine does not keep: they would read as false."""
    known = (domain.predicates.keys() - _UNTRACKED) | _DENIALS
    for sides in texts.rules.values():
        for side in sides:
            for query in (side.condition, *(piece.query for piece in side.pieces)):
                for predicate, _ in query:
                    if predicate not in known:
                        raise GameError(f"the grammar asks for {predicate}, which the fast engine does not keep")
