"""The text grammar of a game file (TextWorld's `.twl2`): which sentence follows which action, and how it is filled in.

A rule `name -> [(condition, right-hand side)]` derives to the first side whose condition holds. Sides mix literals,
`#rule#`, `{var.name}` and lists `[{expression | query}]`. Conditions and queries are conjunctions of atoms. `derive`
solves them over the current facts (`facts`), starting from the variables that the action binds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from atod_fast.envs.alfworld.pddl import GameError

Binding = dict[str, str]  # grammar variable -> object id
Query = tuple[tuple[str, tuple[str, ...]], ...]  # predicate and its variables, for each atom
# Predicate and pattern -> the rows that fit it, sorted.
Facts = Callable[[str, tuple[str | None, ...]], Iterator[tuple[str, ...]]]

_TASK = re.compile(r'(?<="rhs": ")Your task is to: (?:[^"\\]|\\.)*(?=")')
_BLOCK = re.compile(
    r'grammar\s*::\s*"""(?P<rules>.*?)"""\s*;'
    r'|action\s+(?P<action>\w+)\s*\{\s*template\s*::\s*"(?P<template>[^"]*)"\s*;\s*feedback\s*::\s*"(?P<feedback>[^"]*)"\s*;'
    r'(?:\s*grammar\s*::\s*"""(?P<own>.*?)"""\s*;)?\s*\}',
    re.DOTALL,
)
_PIECE = re.compile(
    r"\[\{(?P<element>[^|\[\]{}]+)\|(?P<query>[^{}\[\]]+)\}\]"  # one element for each solution of the query
    r"|\{(?P<value>[^|\[\]{}]+)\}"
    r"|#(?P<rule>[^#]+)#"
    r"|(?P<literal>[^\[\]{}#]+)"
)
_VALUE = re.compile(r"\s*(?:(?P<var>\w+)\.(?P<field>name|indefinite)(?:\s+or\s+\w+\.id)?|'(?P<text>[^']*)')\s*")
_ATOM = re.compile(r"\s*(\w+)\(([^()]*)\)\s*")


@dataclass(frozen=True)
class Piece:
    """Part of a right-hand side. Exactly one of literal, name, rule is set; `query` makes it a list of `element`s."""

    literal: str = ""
    name: str = ""  # the variable whose display name stands here
    rule: str = ""
    query: Query = ()
    element: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Side:
    condition: Query
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Grammar:
    rules: dict[str, tuple[Side, ...]]
    commands: dict[str, str]  # action -> format string of its command over its parameters, "take {o} from {r}"
    feedback: dict[str, str]  # action -> rule

    def derive(self, rule: str, bound: Binding, names: dict[str, str], facts: Facts) -> str:
        """Return the text of `rule`. Of several applicable sides the first is taken, as TextWorld does."""
        for side in self.rules[rule]:
            if not side.condition or next(solve(side.condition, bound, facts), None) is not None:
                return "".join(self._text(piece, bound, names, facts) for piece in side.pieces)
        raise GameError(f"no production of the grammar's #{rule}# applies")

    def _text(self, piece: Piece, bound: Binding, names: dict[str, str], facts: Facts) -> str:
        if piece.literal:
            return piece.literal
        if piece.name:
            return names[bound[piece.name]]
        if piece.rule:
            return self.derive(piece.rule, bound, names, facts)
        found = [
            "".join(self._text(part, solution, names, facts) for part in piece.element)
            for solution in solve(piece.query, bound, facts)
        ]
        if not found:
            return self.derive("list_empty", bound, names, facts)
        if len(found) == 1:
            return found[0]
        comma, last = (self.derive(rule, bound, names, facts) for rule in ("list_separator", "list_last_separator"))
        return comma.join(found[:-1]) + last + found[-1]


def solve(query: Query, bound: Binding, facts: Facts) -> Iterator[Binding]:
    """Yield the bindings that extend `bound` and make every atom a fact, in the order of the facts.

    Different variables have different values.
    """
    if not query:
        yield bound
        return
    (predicate, variables), rest = query[0], query[1:]
    for row in facts(predicate, tuple(map(bound.get, variables))):
        extended = dict(bound)
        for variable, value in zip(variables, row, strict=True):
            if extended.get(variable) == value:
                continue
            if variable in extended or value in extended.values():
                break
            extended[variable] = value
        else:
            yield from solve(rest, extended, facts)


def parse(text: str, actions: Iterable[str]) -> Grammar:
    """Parse the part of a game's `grammar` that `actions` need. Raise GameError if it cannot be derived exactly."""
    sentence = _TASK.search(text)
    if not sentence:
        raise GameError('the grammar has no "Your task is to: "')
    # Grammars differ in this sentence alone, so the rest is parsed once for all games.
    shared = _parse(_TASK.sub("", text), tuple(actions))
    if "task" not in shared.rules:
        raise GameError("the grammar's task sentence is not in its rule #task#")
    task = (Side((), _pieces(json.loads(f'"{sentence[0]}"'))),)
    return Grammar(shared.rules | {"task": task}, shared.commands, shared.feedback)


@lru_cache(maxsize=16)
def _parse(text: str, actions: tuple[str, ...]) -> Grammar:
    raw: dict[str, list[dict[str, str]]] = {}
    commands: dict[str, str] = {}
    feedback: dict[str, str] = {}
    for block in _BLOCK.finditer(text):
        sides = block["rules"] or block["own"]
        if sides:
            raw.update(json.loads("\n".join(line for line in sides.split("\n") if not line.lstrip().startswith("#"))))
        if block["action"]:
            action = block["action"].lower()
            commands[action] = re.sub(r"\[\{(\w+)\.name \|[^\]]*\}\]", r"{\1}", block["template"])
            feedback[action] = block["feedback"].strip("#")
    missing = [action for action in actions if action not in commands]
    if missing:
        raise GameError(f"the grammar has no text for the action {missing[0]}")

    rules: dict[str, tuple[Side, ...]] = {}
    wanted = ["intro", *(feedback[action] for action in actions)]
    while wanted:
        name = wanted.pop()
        if name in rules:
            continue
        if name not in raw:
            raise GameError(f"the grammar has no #{name}#")
        rules[name] = tuple(_side(side.get("condition", ""), side["rhs"]) for side in raw[name])
        for piece in (piece for side in rules[name] for piece in side.pieces):
            wanted.extend(part.rule for part in (piece, *piece.element) if part.rule)
            wanted.extend(("list_empty", "list_separator", "list_last_separator") if piece.query else ())
    return Grammar(rules, commands, feedback)


def _side(condition: str, rhs: str) -> Side:
    # TextWorld's reader drops white space in front of a right-hand side.
    return Side(_query(condition), _pieces(rhs.lstrip()))


def _pieces(text: str) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    at = 0
    while at < len(text):
        found = _PIECE.match(text, at)
        if not found:
            raise GameError(f"cannot read the grammar from {text[at : at + 40]!r} on")
        if found["literal"]:
            pieces.append(Piece(literal=found["literal"]))
        elif found["rule"]:
            pieces.append(Piece(rule=found["rule"]))
        elif found["value"]:
            pieces.extend(_value(found["value"]))
        else:
            element = found["element"].strip()
            inner = (Piece(rule=element[1:-1]),) if element.startswith("#") else _value(element)
            pieces.append(Piece(query=_query(found["query"]), element=inner))
        at = found.end()
    return tuple(pieces)


def _value(expression: str) -> tuple[Piece, ...]:
    """Parse `o.indefinite + ' ' + o.name`. The indefinite article of every ALFWorld thing is "a"."""
    pieces = []
    for term in expression.split("+"):
        found = _VALUE.fullmatch(term)
        if not found:
            raise GameError(f"the grammar computes {expression!r}, which the fast engine does not")
        if found["var"]:
            pieces.append(Piece(name=found["var"]) if found["field"] == "name" else Piece(literal="a"))
        else:
            pieces.append(Piece(literal=found["text"]))
    return tuple(pieces)


def _query(text: str) -> Query:
    atoms = []
    for part in filter(str.strip, text.split("&")):
        found = _ATOM.fullmatch(part)
        if not found:
            raise GameError(f"the grammar asks {part.strip()!r}, which the fast engine does not")
        atoms.append((found[1], tuple(argument.split(":")[0].strip() for argument in found[2].split(","))))
    return tuple(atoms)
