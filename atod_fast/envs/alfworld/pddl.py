"""Parse PDDL as ALFWorld's game files use it: a problem's objects, facts and goal, and what varies between domains.

Names are lower-cased, as Fast Downward (the planner inside TextWorld) does.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

Row = tuple[str, ...]  # the arguments of a fact

# Predicates that a step can change and that texts, goals or preconditions ask for.
FLUENTS = frozenset(
    "atlocation inreceptacle objectatlocation opened holds holdsany isclean ishot iscool istoggled issliced".split()
)

_TOKEN = re.compile(r"[()]|[^\s()]+")
_SECTIONS = re.compile(
    r"\s*\(define\s.*?\(:objects\s(?P<objects>[^()]*)\)\s*\(:init\s(?P<init>.*)\)\s*(?P<goal>\(:goal\s.*\))\s*\)\s*",
    re.DOTALL,
)
_FACT = re.compile(r"\(([^()]+)\)")
_COMMENT = re.compile(r";[^\n]*")


class GameError(ValueError):
    """A game file is damaged, or asks for something that the fast engine does not support."""


def read(text: str) -> list:
    """Return the s-expression in `text` as nested lists of lower-case symbols."""
    stack: list[list] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            done = stack.pop()
            stack[-1].append(done)
        else:
            raise GameError("PDDL closes a parenthesis it never opened")
    if len(stack) != 1 or len(stack[0]) != 1 or isinstance(stack[0][0], str):
        raise GameError("PDDL text is not one closed expression")
    return stack[0][0]


def typed(symbols: list[str]) -> dict[str, str]:
    """Return `a b - t c - u` as {a: t, b: t, c: u}."""
    types: dict[str, str] = {}
    waiting: list[str] = []
    following = iter(symbols)
    for symbol in following:
        if symbol != "-":
            waiting.append(symbol)
            continue
        kind = next(following, None)
        if kind is None:
            raise GameError("a PDDL type list ends in '-'")
        for name in waiting:
            if types.setdefault(name, kind) != kind:
                raise GameError(f"{name} is declared both as {types[name]} and as {kind}")
        waiting = []
    if waiting:
        raise GameError(f"{waiting[0]} is declared without a type")
    return types


@dataclass(frozen=True)
class Problem:
    """A parsed `pddl_problem`."""

    types: dict[str, str]  # object -> type
    facts: dict[str, list[Row]]  # predicate -> argument rows true at the start
    goal: list


@dataclass(frozen=True)
class Action:
    """What an action does to the fluents; its precondition is in `engine.FastAlfWorld._commands`."""

    parameters: tuple[str, ...]
    adds: tuple[Row, ...]  # predicate and parameters
    deletes: tuple[Row, ...]


@dataclass(frozen=True)
class Domain:
    """The actions, and what differs between ALFWorld's domains. The rest must equal the shipped `alfred.pddl`."""

    predicates: dict[str, tuple[str, ...]]  # predicate -> types of its arguments
    actions: dict[str, Action]
    tools: dict[str, frozenset[str]]  # action -> possible types of the receptacle (or of the knife held)


@lru_cache(maxsize=16)
def domain(text: str) -> Domain:
    """Parse a game's `pddl_domain`. Raise GameError if an action is not the one that the engine implements."""
    actions, tools = _actions(text)
    shipped = resources.files("atod_fast.envs.alfworld").joinpath("data/alfred.pddl")
    known = _actions(shipped.read_text(encoding="utf-8"))[0]
    for name in known.keys() | actions.keys():
        if known.get(name) != actions.get(name) and (name != "help" or name in actions):
            raise GameError(f"the PDDL domain's action {name} is not ALFWorld's")
    (predicates,) = (part[1:] for part in read(text)[1:] if part[0] == ":predicates")
    declared = {name: tuple(typed(arguments).values()) for name, *arguments in predicates}
    return Domain(declared, {name: _effects(parts) for name, parts in actions.items()}, tools)


def _actions(text: str) -> tuple[dict[str, dict], dict[str, frozenset[str]]]:
    """Return the domain's actions, and for each the types that its precondition admits.

    These alternatives of receptacle or object types are taken out of the precondition.
    """
    tools: dict[str, frozenset[str]] = {}

    def skeleton(expression: list | str, action: str) -> list | str:
        if isinstance(expression, str):
            return expression
        if expression[:1] == ["or"] and all(part[0] in ("receptacletype", "objecttype") for part in expression[1:]):
            tools[action] = frozenset(part[2] for part in expression[1:])
            return ["or", expression[1][:2]]
        return [skeleton(part, action) for part in expression]

    actions = {}
    for part in read(text)[1:]:
        if part[0] == ":action":
            body = skeleton(part[2:], part[1])
            actions[part[1]] = dict(zip(body[::2], body[1::2], strict=True))
    return actions, tools


def _effects(action: dict[str, list]) -> Action:
    """Return an action's effects on fluents; none of them is conditional."""
    adds, deletes = [], []
    for effect in action[":effect"][1:]:
        negated = effect[0] == "not"
        predicate, *words = effect[1] if negated else effect
        if predicate in FLUENTS:
            (deletes if negated else adds).append((predicate, *(word.lstrip("?") for word in words)))
    return Action(tuple(name.lstrip("?") for name in typed(action[":parameters"])), tuple(adds), tuple(deletes))


def problem(text: str, domain: Domain) -> Problem:
    """Parse a game's `pddl_problem`.

    Its facts are flat, so they are read by pattern, several times faster than by `read`.
    """
    found = _SECTIONS.fullmatch(_COMMENT.sub("", text).lower())
    listed = _FACT.findall(found["init"]) if found else []
    if not found or not len(listed) == found["init"].count("(") == found["init"].count(")"):
        raise GameError("the PDDL problem is not (define ... (:objects ...) (:init ...) (:goal ...))")
    types = typed(found["objects"].split())
    facts: dict[str, list[Row]] = defaultdict(list)
    for fact in listed:
        predicate, *row = fact.split()
        if predicate == "=":
            continue
        if tuple(map(types.get, row)) != domain.predicates.get(predicate):
            raise GameError(
                f"the fact ({' '.join(fact.split())}) is not of the form the domain declares, "
                "or names what is not declared"
            )
        facts[predicate].append(tuple(row))
    return Problem(types, dict(facts), read(found["goal"])[1])
