"""What a chat model is told about a world, and how its answer becomes a command. A file a world.

Wording and projections follow verl-agent (Apache-2.0, agent_system/environments and agent_system/memory), with which the
paper trained. Where verl-agent always asks for `<think>`, the wording without it is ours, and so is everything for context
`full`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from atod_fast.envs.alfworld.env import AlfWorld
from atod_fast.envs.alfworld.prompt import AlfWorldPrompt
from atod_fast.envs.searchqa.env import SearchQA
from atod_fast.envs.searchqa.prompt import SearchPrompt
from atod_fast.envs.text import one_line
from atod_fast.envs.webshop.env import WebShop
from atod_fast.envs.webshop.prompt import WebShopPrompt
from atod_fast.errors import UserError
from atod_fast.records import Turn


class Prompt(Protocol):
    """The user's side of the conversation about one kind of world, and the reading of the answers.

    Context `window` asks with `message` at every turn; context `full` opens with `first` and goes on with `following`.
    """

    def message(self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]) -> str:
        """The whole user message. `task_observation`: the episode's first. `history`: all finished turns, none at first."""

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        """The first user message."""

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        """A later user message."""

    def project(self, text: str) -> tuple[str, bool]:
        """The command in a response, and whether the response had the required form."""


MEMBERS = ("message", "first", "following", "project")  # of `Prompt`
PROMPTS = {AlfWorld: AlfWorldPrompt, WebShop: WebShopPrompt, SearchQA: SearchPrompt}


def prompt_for(name: str, env: object, thinking: bool, history: int) -> Prompt:
    """The prompt of `env`, the world that `name` made: its own `prompt(thinking, history)` if it has one."""
    own = getattr(env, "prompt", None)
    if callable(own):
        try:
            made = own(thinking, history)
        except Exception as error:
            raise UserError(f"env.name={name!r}: prompt(thinking, history) fails: {one_line(error)}; docs/environments.md shows one") from error
        if missing := [member for member in MEMBERS if not callable(getattr(made, member, None))]:
            raise UserError(f"env.name={name!r}: prompt(thinking, history) returns {type(made).__name__}, which lacks {', '.join(missing)}")
        return made
    for world, prompt in PROMPTS.items():
        if isinstance(env, world):
            return prompt(thinking, history)
    raise UserError(
        f"env.name={name!r} has no prompt; give its class a method prompt(thinking, history), such as one that returns "
        "envs.prompt.PlainPrompt (docs/environments.md)"
    )
