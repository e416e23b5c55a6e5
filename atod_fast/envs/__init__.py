"""Environments that agents act in: `make` constructs one by name, `check` validates name and options."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from atod_fast.envs.protocol import Environment, Usual
from atod_fast.errors import NotHere, UserError

GROUP = "atod_fast.envs"  # entry points through which other packages offer environments
OPTIONS = "env.options, env.train, env.eval or env.dev"  # where options are given
MEMBERS = ("instant", "__len__", "reset", "step", "clone", "close")  # of `Environment`
BUILT_IN = {
    "alfworld": "atod_fast.envs.alfworld.env:AlfWorld",
    "webshop": "atod_fast.envs.webshop.env:WebShop",
    "searchqa": "atod_fast.envs.searchqa.env:SearchQA",
    "gymnasium": "atod_fast.envs.adapters.gymnasium:Gymnasium",
    "openenv": "atod_fast.envs.adapters.openenv:OpenEnv",
    "mix": "atod_fast.envs.mix.env:Mix",
}


def make(name: str, **options: Any) -> Environment:
    """Construct the environment `name` with its options.

    name: one of BUILT_IN, an entry point of group `atod_fast.envs`, or `module:Class`.

    Raises:
        UserError: as `check`; or the constructor raised, reported in one line; or its result is no `Environment`.
        NotHere: the constructor did not find a file or a server.
    """
    factory = check(name, options)
    try:
        made = factory(**options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        kind = NotHere if isinstance(error, FileNotFoundError | ConnectionError) else UserError
        raise kind(
            f"env.name={name!r} cannot be made with {given or 'no options'}: {reason} "
            f"({os.path.basename(at.filename)}:{at.lineno}); correct {OPTIONS}"
        ) from error
    if missing := [member for member in MEMBERS if not hasattr(made, member)]:
        raise UserError(
            f"env.name={name!r} makes {type(made).__name__}, which lacks {', '.join(missing)}; "
            "docs/environments.md says what they owe"
        )
    return made


def check(name: str, options: Mapping[str, Any]) -> Any:
    """Return the class, or other callable, that constructs the environment `name`, without calling it.

    Raises:
        UserError: the name or an option is unknown, a required option is missing, or a value is not of the type that
            the option is annotated with; or so it is with a part of a mix.
    """
    factory = find(name)
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise UserError(
            f"env.name={name!r} is no class of environments: {error}; docs/environments.md shows one"
        ) from error
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                near = get_close_matches(option, parameters, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(parameters) or 'none'}"
                raise UserError(f"env.name={name!r} has no option {option!r}; {hint}")
    hints = _hints(factory)
    for option, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if option not in options:
            if parameter.default is parameter.empty:
                raise UserError(
                    f"env.name={name!r} needs the option {option!r}; give it in env.options, or in those of each split"
                )
        elif options[option] is not parameter.default and not _fits(options[option], hints.get(option)):
            must = _named(hints[option])
            raise UserError(f"env.name={name!r}: {option}={options[option]!r} must be {must}; correct {OPTIONS}")
    parts_of(name, options)
    return factory


def parts_of(name: str, options: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return name and options of each environment that is played: by label those of a mix, else itself by "".

    Raises:
        UserError: a part of the mix has a wrong setting, or a wrong name or option of its environment.
    """
    if name != "mix":
        return {"": (name, options)}
    return {part.label: (part.name, part.options) for part in find(name).described(options)}


def usual_of(name: str, options: Mapping[str, Any]) -> Usual | None:
    """Return the usual sizes of the environment's episodes, or None if it does not say."""
    factory = find(name)
    return factory.usual_of(options) if name == "mix" else getattr(factory, "usual", None)


def find(name: str) -> Any:
    """Return the class, or other callable, that constructs the environment `name`. Raise UserError if it is unknown."""
    if name in BUILT_IN:
        return _load(BUILT_IN[name], name)
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name in offered:
        return _load(offered[name].value, name)
    if ":" in name:
        return _load(name, name)
    known = [*BUILT_IN, *offered]
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, or module:Class"
    raise UserError(f"env.name={name!r} is not known; {hint}")


def _load(target: str, name: str) -> Any:
    module, _, attribute = target.partition(":")
    try:
        found = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"env.name={name!r} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    return found


def _hints(factory: Any) -> dict[str, Any]:
    """Return the annotations of the arguments of `factory`, or {} if they cannot be resolved."""
    try:
        return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of an annotated type: a plain type, a container or a union of these. True for others.

    Does not look into containers. An integer counts as float, a path as str; true and false do not count as numbers.
    """
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if origin in (int, float):
        return isinstance(value, Integral if origin is int else Real) and not isinstance(value, bool)
    plain = {
        bool: bool,
        str: (str, os.PathLike),
        list: (list, tuple),
        tuple: (list, tuple),
        dict: Mapping,
        NoneType: NoneType,
    }
    return isinstance(value, plain.get(origin, object)) if isinstance(origin, type) else True


def _named(kind: Any) -> str:
    """Return a type's name in words that a user of the configuration understands."""
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return " or ".join(_named(part) for part in get_args(kind) if part is not NoneType)  # TOML has no word for None
    if origin is Literal:
        return " | ".join(map(repr, get_args(kind)))
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        tuple: "a list",
        dict: "a table",
    }
    return words.get(origin, inspect.formatannotation(kind)) if isinstance(origin, type) else str(kind)
