"""Worlds for agents to act in. `make` finds one by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from atod_fast.envs.protocol import Environment
from atod_fast.errors import UserError

GROUP = "atod_fast.envs"  # entry points by which other packages offer their worlds
MEMBERS = ("instant", "__len__", "reset", "step", "clone", "close")  # of the protocol
BUILT_IN = {
    "alfworld": "atod_fast.envs.alfworld.env:AlfWorld",
    "webshop": "atod_fast.envs.webshop.env:WebShop",
    "searchqa": "atod_fast.envs.searchqa.env:SearchQA",
    "gymnasium": "atod_fast.envs.gymnasium_adapter:Gymnasium",
    "openenv": "atod_fast.envs.openenv_adapter:OpenEnv",
}


def make(name: str, **options: Any) -> Environment:
    """The environment `name` with its options.

    `name`: one of BUILT_IN, an entry point of group `atod_fast.envs`, or `module:Class`. UserError as `check`, and for what makes no
    `Environment`.
    """
    made = check(name, options)(**options)
    if missing := [member for member in MEMBERS if not hasattr(made, member)]:
        raise UserError(f"env.name={name!r} makes {type(made).__name__}, which lacks {', '.join(missing)}; docs/environments.md says what they owe")
    return made


def check(name: str, options: Mapping[str, Any]) -> Any:
    """What makes the environment `name`, which is not made yet; UserError for an unknown name or option, and for an option that is missing."""
    factory = find(name)
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"env.name={name!r} is no class of environments: {error}; docs/environments.md shows one") from error
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for option in options:
            if option not in parameters:
                near = get_close_matches(option, parameters, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(parameters) or 'none'}"
                raise UserError(f"env.name={name!r} has no option {option!r}; {hint}")
    for option, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if required and option not in options:
            raise UserError(f"env.name={name!r} needs the option {option!r}; give it in env.options, or in env.train and env.eval")
    return factory


def find(name: str) -> Any:
    """What makes the environment `name`; UserError where there is none."""
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
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"env.name={name!r} cannot be loaded: {error}") from error
    return found
