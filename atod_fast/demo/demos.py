"""The embedded demos: the environment, preset, dialect and supervision of each pair of tiny models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atod_fast.envs.alfworld import dialect as alfworld
from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.dialect import Dialect
from atod_fast.envs.searchqa import dialect as searchqa
from atod_fast.envs.searchqa.env import SearchQA
from atod_fast.envs.webshop import dialect as webshop
from atod_fast.envs.webshop.env import WebShop
from atod_fast.models import DEMO_WEIGHTS


@dataclass(frozen=True)
class Recipe:
    """How much supervision a model gets."""

    traces: int  # traces per task
    tokens: int  # training tokens over all epochs
    seed: int
    environments: int = 1  # the preset's, plus others with other seeds: the facts of a single one would be memorised


@dataclass(frozen=True)
class Demo:
    """The demo in one environment."""

    name: str
    env: type  # class of the environment
    preset: str
    folder: Path  # holds the shipped teacher/ and student/
    dialect: Dialect
    recipes: Mapping[str, Recipe]  # "teacher" and "student" -> recipe


DEMOS = {
    demo.name: demo
    for demo in (
        Demo(
            name="alfworld",
            env=AlfWorld,
            preset="demo",
            folder=DEMO_WEIGHTS,
            dialect=alfworld.DIALECT,
            recipes={
                "teacher": Recipe(traces=2, tokens=700_000, seed=0),
                "student": Recipe(traces=1, tokens=400_000, seed=1),
            },
        ),
        Demo(
            name="searchqa",
            env=SearchQA,
            preset="demo-searchqa",
            folder=DEMO_WEIGHTS / "searchqa",
            dialect=searchqa.DIALECT,
            recipes={
                "teacher": Recipe(traces=1, tokens=460_000, seed=2, environments=9),
                "student": Recipe(traces=1, tokens=290_000, seed=3, environments=9),
            },
        ),
        Demo(
            name="webshop",
            env=WebShop,
            preset="demo-webshop",
            folder=DEMO_WEIGHTS / "webshop",
            dialect=webshop.DIALECT,
            recipes={
                "teacher": Recipe(traces=1, tokens=800_000, seed=0, environments=6),
                "student": Recipe(traces=1, tokens=690_000, seed=0, environments=6),
            },
        ),
    )
}
