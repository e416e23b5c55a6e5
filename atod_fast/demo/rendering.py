"""Render an environment for the demo's word-level models, as one growing sequence of few words.

    <bos> cabinet 1 countertop 1 ... task put mug shelf <act> go to countertop 1 <eoa> countertop 1 mug 1 <act> take ...

Only context `full` is supported. Actions are free text, as the model wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_fast.config import Config
from atod_fast.demo.demos import DEMOS
from atod_fast.demo.tokenizer import ACT, BOS, CUT, EOA, PAD, UNK
from atod_fast.envs.dialect import Dialect
from atod_fast.envs.protocol import Environment, Info
from atod_fast.errors import UserError
from atod_fast.records import Turn
from atod_fast.rollout.rendering import Message

OBSERVATION_TOKENS = 60  # a longer observation is cut there and ends in CUT


class CompactRenderer:
    """The `Renderer` of tokenizers built by `atod_fast.demo.tokenizer`, for the environment of `dialect`."""

    stop_ids: tuple[int, ...]
    valid_columns: Tensor | None  # bool [V]: False for tokens that an action may not contain

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dialect: Dialect) -> None:
        self._dialect = dialect
        self._ids = tokenizer.get_vocab()
        self._words = {i: word for word, i in self._ids.items()}
        self.stop_ids = (self._ids[EOA],)
        self.valid_columns = torch.ones(len(self._ids), dtype=torch.bool)
        self.valid_columns[[self._ids[token] for token in (PAD, ACT, BOS, UNK, CUT)]] = False

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        """Return the tokens that follow the previous action; the first prompt begins with <bos>.

        An action that was cut off is closed first.
        """
        return self.shown(turns, observation, info)[1]

    def shown(self, turns: Sequence[Turn], observation: str, info: Info) -> tuple[str, list[int]]:
        """Return the words of the observation, blanks between, and the tokens that `prompt` returns."""
        words = self._dialect.read(observation)
        if len(words) > OBSERVATION_TOKENS:
            words = [*words[: OBSERVATION_TOKENS - 1], CUT]
        ids = self._asked(words, first=not turns)
        if turns and tuple(turns[-1].action[-1:]) != self.stop_ids:
            ids = [*self.stop_ids, *ids]
        return " ".join(words), ids

    def tokens(self, messages: Sequence[Message], info: Info | None = None) -> list[tuple[list[int], list[int]]]:
        """Return of each answer of a conversation the tokens before it, and its own with the stop token."""
        texts = [message["content"].split() for message in messages]
        return [
            (self._asked(asked, first=not number), [*self._encode(answered), *self.stop_ids])
            for number, (asked, answered) in enumerate(zip(texts[::2], texts[1::2], strict=True))
        ]

    def _asked(self, words: Sequence[str], first: bool) -> list[int]:
        return [*([self._ids[BOS]] if first else []), *self._encode(words), self._ids[ACT]]

    def parse(self, ids: Sequence[int], stopped: bool, info: Info) -> tuple[str, str, bool]:
        """Return the action's text, its command, and whether it is well formed: finished and not empty.

        An unfinished action has a command too.
        """
        words = [self._words[i] for i in ids if i not in self.stop_ids]
        return " ".join(words), self._dialect.command(words), stopped and bool(words)

    def action(self, command: str, info: Info | None = None) -> list[int]:
        """Return the ids of a command as the model should write it, with the stop token; the inverse of `parse`."""
        return [*self._encode(self._dialect.words(command)), *self.stop_ids]

    def _encode(self, words: Sequence[str]) -> list[int]:
        return [self._ids.get(word, self._ids[UNK]) for word in words]


def compact_renderer(config: Config, tokenizer: PreTrainedTokenizerBase, env: Environment) -> CompactRenderer:
    """Return the renderer for a demo model, whose tokenizer_config.json names its environment as `atod_environment`.

    Raises:
        UserError: rollout.context is not `full`, or the model is not one for `env`.
    """
    if config.rollout.context != "full":
        raise UserError(
            f"rollout.context={config.rollout.context!r} needs a chat model; "
            "the demo's models read whole trajectories: use full"
        )
    name = tokenizer.init_kwargs.get("atod_environment")
    if name not in DEMOS:
        file, known = f"tokenizer_config.json of {tokenizer.name_or_path!r}", ", ".join(DEMOS)
        raise UserError(f"student.path: atod_environment={name!r} in {file} is none of {known}; correct it")
    demo = DEMOS[name]
    if not isinstance(env, demo.env):
        preset = next((other.preset for other in DEMOS.values() if isinstance(env, other.env)), None)
        others = (
            f"--preset {preset} for models of this environment"
            if preset
            else "set student.path and teacher.path to chat models"
        )
        raise UserError(
            f"env.name={config.env.name!r}: the demo's model speaks of {name} only; "
            f"use --preset {demo.preset} for that, or {others}"
        )
    return CompactRenderer(tokenizer, demo.dialect)
