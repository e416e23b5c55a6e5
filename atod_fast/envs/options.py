"""Checks of an environment's options; each raises UserError with the option, its value and what it must be."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from atod_fast.errors import UserError


def require(option: str, value: object, right: bool, what: str) -> None:
    """Raise UserError unless `right` is true. what: what the value must be."""
    if not right:
        raise UserError(f"{option}={value!r} must be {what}")


def whole(**options: tuple[object, int]) -> None:
    """Raise UserError unless each option, (value, least), is a whole number of at least `least`."""
    for option, (value, least) in options.items():
        require(
            option,
            value,
            isinstance(value, int) and not isinstance(value, bool) and value >= least,
            f"a whole number of at least {least}",
        )


def goes_with(source: str, **options: tuple[object, object]) -> None:
    """Raise UserError for an option, (value, default), that is set although it makes sense only with `source`."""
    for option, (value, default) in options.items():
        if value != default:
            raise UserError(f"{option}={value!r} goes with {source}; leave it out")


def choice(option: str, value: object, known: Sequence[str]) -> None:
    """Raise UserError unless `value` is one of `known`."""
    if value not in known:
        near = get_close_matches(str(value), known, n=1)
        raise UserError(
            f"{option}={value!r} is not one of {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
        )
