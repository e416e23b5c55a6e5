"""The embedded demo: tiny models that learn in minutes on a CPU, in three worlds."""

from __future__ import annotations

from collections.abc import Container

from atod_fast.envs.alfworld.dialect import ALFWORLD
from atod_fast.envs.dialect import World
from atod_fast.envs.searchqa.dialect import SEARCHQA
from atod_fast.envs.webshop.dialect import WEBSHOP

WORLDS = {world.name: world for world in (ALFWORLD, SEARCHQA, WEBSHOP)}


def world_of(vocabulary: Container[str]) -> World | None:
    """The world that a tokenizer with this vocabulary speaks of; None for one that is not the demo's."""
    return next((world for world in WORLDS.values() if all(verb in vocabulary for verb in world.dialect.verbs)), None)
