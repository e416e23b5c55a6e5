"""The goal of a game, compiled so that a step only looks up a few facts that can change.

Existential quantifiers are expanded over the static facts when a game is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import product

from atod_fast.envs.alfworld.pddl import FLUENTS, GameError, Problem, Row, typed

Binding = dict[str, str]


@dataclass(frozen=True)
class Task:
    """What the goal asks for, as ALFWorld names it: kinds in lower case, "" if the task has none."""

    type: str
    object: str
    receptacle: str
    toggle: str


@dataclass(frozen=True)
class Goal:
    """A conjunction of clauses; a clause holds if all facts of one of its groundings are true."""

    clauses: tuple[tuple[tuple[tuple[str, Row], ...], ...], ...]

    def holds(self, facts: Mapping[str, Set[Row]]) -> bool:
        """Return whether the goal is reached in a state with these facts, by predicate."""
        return all(any(all(row in facts[name] for name, row in ground) for ground in clause) for clause in self.clauses)


def compile_goal(problem: Problem) -> Goal:
    """Return a PDDL problem's goal, its variables replaced by objects. Raise GameError if there are none."""
    clauses = tuple(tuple(_ground(part, problem)) for part in _parts(problem.goal))
    if not all(clauses):
        raise GameError("the goal asks for things that are not in the game")
    return Goal(clauses)


def _ground(part: list, problem: Problem) -> Iterator[tuple[tuple[str, Row], ...]]:
    variables, atoms, different = _flatten(part)
    static = [atom for atom in atoms if atom[0] not in FLUENTS]
    changing = [atom for atom in atoms if atom[0] in FLUENTS]
    # Atoms with few rows come first, so that the join below stays small.
    tables = sorted(((atom[1:], _fitting(atom, problem)) for atom in static), key=lambda table: len(table[1]))
    for joined in _join(tables, {}):
        free = [name for name in variables if name not in joined]
        for values in product(*(_objects(variables[name], problem) for name in free)):
            bound = joined | dict(zip(free, values, strict=True))
            if any(problem.types[bound[name]] != kind for name, kind in variables.items()):
                continue
            if all(bound.get(a, a) != bound.get(b, b) for a, b in different):
                yield tuple((atom[0], tuple(bound.get(word, word) for word in atom[1:])) for atom in changing)


def _fitting(atom: Row, problem: Problem) -> list[Row]:
    """Return the facts of the atom's predicate that agree with its constants."""
    constants = [(at, word) for at, word in enumerate(atom[1:]) if not word.startswith("?")]
    return [row for row in problem.facts.get(atom[0], []) if all(row[at] == word for at, word in constants)]


def _join(tables: list[tuple[Row, list[Row]]], bound: Binding) -> Iterator[Binding]:
    if not tables:
        yield bound
        return
    (words, rows), rest = tables[0], tables[1:]
    for row in rows:
        extended = dict(bound)
        if all(
            not word.startswith("?") or extended.setdefault(word, value) == value
            for word, value in zip(words, row, strict=True)
        ):
            yield from _join(rest, extended)


def _objects(kind: str, problem: Problem) -> list[str]:
    return [name for name, of in problem.types.items() if of == kind]


def _parts(goal: list) -> list[list]:
    return goal[1:] if goal[0] == "and" else [goal]


def _flatten(expression: list) -> tuple[dict[str, str], list[Row], list[tuple[str, str]]]:
    """Return variables with types, atoms and inequalities of a positive existential formula."""
    variables: dict[str, str] = {}
    atoms: list[Row] = []
    different: list[tuple[str, str]] = []

    def walk(part: list) -> None:
        if part[0] == "and":
            for inner in part[1:]:
                walk(inner)
        elif part[0] == "exists":
            new = typed(part[1])
            if new.keys() & variables.keys():
                raise GameError("the goal quantifies one variable twice")
            variables.update(new)
            walk(part[2])
        elif part[0] == "not" and part[1][0] == "=":
            different.append((part[1][1], part[1][2]))
        elif part[0] in ("not", "or", "imply", "forall", "="):
            raise GameError(f"the goal uses ({part[0]} ...), which the fast engine does not model")
        else:
            atoms.append(tuple(part))

    walk(expression)
    return variables, atoms, different


_TYPE_OF_CHANGE = {
    "istoggled": "look_at_obj_in_light",
    "isclean": "pick_clean_then_place_in_recep",
    "ishot": "pick_heat_then_place_in_recep",
    "iscool": "pick_cool_then_place_in_recep",
}


def describe(goal: list) -> Task:
    """Return the task that a goal stands for. Raise GameError if it is none of ALFWorld's six types."""
    atoms: list[Row] = []
    different: list[tuple[str, str]] = []
    for part in _parts(goal):
        _, some, unequal = _flatten(part)
        atoms += some
        different += unequal
    names = {atom[0] for atom in atoms}
    if names & {"issliced", "inreceptacleobject"}:
        raise GameError(
            "the goal asks for a sliced object or a movable receptacle, which are not among the six task types"
        )
    kind = next((task for name, task in _TYPE_OF_CHANGE.items() if name in names), None)
    if kind is None:
        kind = "pick_two_obj_and_place" if different else "pick_and_place_simple"
    toggled = {atom[1] for atom in atoms if atom[0] == "istoggled"}
    things = {atom[1] in toggled: atom[2].removesuffix("type") for atom in atoms if atom[0] == "objecttype"}
    places = [atom[2].removesuffix("type") for atom in atoms if atom[0] == "receptacletype"]
    return Task(kind, things.get(False, ""), places[0] if places else "", things.get(True, ""))
