"""Encodes what the environment says as prompt tokens, and decodes the model's responses into commands.

Nothing is encoded twice: a renderer encodes the environment's text, the engine samples the response, and training uses
the concatenation of both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from logging import getLogger
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_fast.envs.protocol import Info, Prompt, copy_with
from atod_fast.envs.text import GAP, cut_middle
from atod_fast.errors import UserError
from atod_fast.records import Turn
from atod_fast.rollout.template import ChatTemplate

logger = getLogger(__name__)


THOUGHT = "I do what the task needs next."  # of a scripted expert, where thinking is asked for


class Message(TypedDict):
    """A message of a conversation, as chat templates take it."""

    role: str  # "user" or "assistant"
    content: str


def response_to(prompt: Prompt, command: str, thinking: bool) -> str:
    """Return the response that gives `command` in the form that `prompt` asks for, with a fixed thought if asked to."""
    own: Callable[[str], str] | None = getattr(prompt, "response", None)
    text = own(command) if own else f"<action>{command}</action>"
    return f"<think>\n{THOUGHT}\n</think>\n\n{text}" if thinking else text


class Renderer(Protocol):
    """Renders prompts and parses responses for one kind of model. Stateless: equal arguments give equal ids."""

    stop_ids: tuple[int, ...]  # sampling one of them ends the response
    valid_columns: Tensor | None  # bool [V]; False columns are never sampled; None = all may be

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        """Return the tokens to append before the next action, after the finished `turns` of this trajectory.

        Context `window`: the whole prompt. Context `full`: the tokens since the previous action; if that action was cut
        off without a stop token, they begin by closing its message. `info` belongs to `observation`.
        """
        ...

    def shown(self, turns: Sequence[Turn], observation: str, info: Info) -> tuple[str, list[int]]:
        """Return the text of the user message that `prompt` renders with these arguments, and what `prompt` returns."""
        ...

    def action(self, command: str, info: Info | None = None) -> list[int]:
        """Return the ids of a response that gives `command`, the stop token included. `info` as in `parse`.

        `parse` reads it. Raises ValueError if no response does.
        """
        ...

    def tokens(self, messages: Sequence[Message], info: Info | None = None) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of a conversation: of each answer, what the rollout appends before it, and its own.

        messages: alternately of the user, as `shown`, and of the assistant, as `parse` returns texts. Each answer is
        taken to end with the stop token. `info` names the part of a mix.
        """
        ...

    def parse(self, ids: Sequence[int], stopped: bool, info: Info) -> tuple[str, str, bool]:
        """Return the text of the response `ids`, the command for the environment, and whether the form is valid.

        `stopped`: the last id is a stop token, which is not part of the text. `info` belongs to the observation that
        was answered.
        """
        ...


class ChatRenderer:
    """A `Renderer` for any fast tokenizer with a chat template.

    Prompts are token for token those of `tokenizer.apply_chat_template` (see `ChatTemplate` for the one exception).
    `prompt` writes the text of the messages. In context `window`, a prompt longer than `prompt_tokens` loses the
    observations of its history, oldest first, then the middle of the current one; `GAP` marks each cut. In context
    `full`, answers stay as they were sampled and only the tokens that follow them are appended, even if the template
    would render past answers differently (without their reasoning, for example).

    Args:
        columns: width of the model's head. Ids that are no token, and tokens beyond the head, are never sampled.
        stop_ids: tokens that end a response, besides the template's end of an answer and the tokenizer's eos.
        day: the date for templates that write one; None is today.

    Raises:
        UserError: the tokenizer has no usable chat template, or cannot keep control tokens out of a text.
    """

    stop_ids: tuple[int, ...]
    valid_columns: Tensor | None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        *,
        context: str,
        thinking: bool,
        prompt_tokens: int,
        columns: int | None = None,
        stop_ids: Sequence[int] = (),
        day: date | None = None,
    ) -> None:
        self._tokenizer, self._words, self._context, self._limit = tokenizer, prompt, context, prompt_tokens
        self._thinking, self._cut_told = thinking, False
        self._template = ChatTemplate(
            tokenizer, thinking=thinking, day=day or date.today(), continues=context == "full"
        )
        self._opened = "<think>" if self._template.opening.rstrip().endswith("<think>") else ""
        ends = dict.fromkeys(i for i in (self._template.end, tokenizer.eos_token_id, *stop_ids) if isinstance(i, int))
        self.stop_ids = tuple(i for i in ends if columns is None or i < columns)
        if not self.stop_ids:
            raise UserError(
                f"student.path: nothing ends a response of {tokenizer.name_or_path!r}: its chat template, "
                "tokenizer and generation_config.json name no token that does; use a chat model"
            )
        self.valid_columns = None
        if columns is not None:
            known = torch.zeros(columns, dtype=torch.bool)
            known[[i for i in tokenizer.get_vocab().values() if i < columns]] = True
            self.valid_columns = None if known.all() else known

    def worded(self, prompt: Prompt) -> ChatRenderer:
        """Return a renderer that differs in who words its messages and parses its responses."""
        return copy_with(self, _words=prompt)

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        return self._rendered(turns, observation, info)[1]

    def shown(self, turns: Sequence[Turn], observation: str, info: Info) -> tuple[str, list[int]]:
        message, ids = self._rendered(turns, observation, info)
        return self._template.unquoted(message), ids

    def _rendered(self, turns: Sequence[Turn], observation: str, info: Info) -> tuple[str, list[int]]:
        """Return the message, with marks, and what `prompt` returns."""
        admissible = [self._template.quoted(action) for action in info.get("admissible_actions", [])]
        if self._context == "window":
            return self._window(turns, observation, admissible)
        observation = self._template.quoted(observation)
        if not turns:
            message = self._words.first(observation, admissible)
            return message, self._template.first(message)
        message = self._words.following(observation, admissible)
        following = self._template.following(len(turns), message)
        closed = turns[-1].action[-1:] == following[:1]
        return message, following[closed:]

    def _window(self, turns: Sequence[Turn], observation: str, admissible: list[str]) -> tuple[str, list[int]]:
        """Return the message and the whole prompt, cut as little as needed to fit.

        It is longer than the limit if no cut suffices.
        """
        quoted = self._template.quoted
        task = quoted(turns[0].observation if turns else observation)
        history = [
            replace(turn, observation=quoted(turn.observation), text=quoted(turn.text), command=quoted(turn.command))
            for turn in turns
        ]

        def prompt(cuts: int) -> tuple[str, list[int]]:
            """Return message and prompt after `cuts` cuts.

            They are of the oldest observations, then of the current one's characters.
            """
            past = [replace(turn, observation=GAP) for turn in history[:cuts]] + history[cuts:]
            kept = len(observation) - max(cuts - len(turns), 0)
            # Cut the middle: environments state the task at the beginning or at the end.
            shown = cut_middle(observation, kept)
            message = self._words.message(task, past, quoted(shown), admissible)
            return message, self._template.first(message)

        message, ids = prompt(0)
        if len(ids) > self._limit:
            if not self._cut_told:
                self._cut_told = True
                logger.warning(
                    "rollout.prompt_tokens=%d: a prompt of %d tokens is cut, "
                    "its history first and then the middle of the observation; "
                    "raise it where the model must see more (transcripts show what it saw)",
                    self._limit,
                    len(ids),
                )
            most = len(turns) + len(observation)
            cuts = bisect_left(range(most), True, key=lambda cuts: len(prompt(cuts)[1]) <= self._limit)
            message, ids = prompt(cuts)
        return message, ids

    def action(self, command: str, info: Info | None = None) -> list[int]:
        text = response_to(self._words, command, self._thinking or bool(self._opened))
        ids = self._answer(text.removeprefix(self._opened).removeprefix("\n" if self._opened else ""))
        _, read, valid = self.parse(ids, True, info or Info())
        if read != command or not valid:
            raise ValueError(f"the prompt's project reads {read!r} from a response that gives {command!r}")
        return ids

    def tokens(self, messages: Sequence[Message], info: Info | None = None) -> list[tuple[list[int], list[int]]]:
        found: list[tuple[list[int], list[int]]] = []
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            message = self._template.requoted(asked["content"])
            if found and self._context == "full":
                following = self._template.following(len(found), message)
                ids = following[found[-1][1][-1:] == following[:1] :]
            else:
                ids = self._template.first(message)
            found.append((ids, self._answer(answered["content"])))
        return found

    def _answer(self, text: str) -> list[int]:
        """Return the ids of an answer, with what ends it."""
        ids = self._template.answer(self._template.requoted(text))
        if text.startswith(" ") and self._decoded(ids) != text:
            # Some tokenizers put a blank before every text that they encode.
            shorter = self._template.answer(self._template.requoted(text[1:]))
            ids = shorter if self._decoded(shorter) == text else ids
        end = self._template.end
        return [*ids, self.stop_ids[0] if end is None else end]

    def _decoded(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(  # pyright: ignore[reportReturnType]
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def parse(self, ids: Sequence[int], stopped: bool, info: Info) -> tuple[str, str, bool]:
        text = self._decoded(ids[: len(ids) - stopped])
        command, valid = self._words.project(self._opened + text)
        return text, command, valid


class ByPart:
    """A `Renderer` of a mix: an episode is shown, and its responses are parsed, by the renderer of its part.

    renderers: {info["part"]: renderer}, at least one, all for the same model.
    """

    stop_ids: tuple[int, ...]
    valid_columns: Tensor | None

    def __init__(self, renderers: Mapping[str, Renderer]) -> None:
        self._renderers = dict(renderers)
        self.stop_ids = tuple(dict.fromkeys(i for renderer in renderers.values() for i in renderer.stop_ids))
        self.valid_columns = next(iter(renderers.values())).valid_columns

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        return self._of(info).prompt(turns, observation, info)

    def shown(self, turns: Sequence[Turn], observation: str, info: Info) -> tuple[str, list[int]]:
        return self._of(info).shown(turns, observation, info)

    def action(self, command: str, info: Info | None = None) -> list[int]:
        return self._of(info or Info()).action(command, info)

    def tokens(self, messages: Sequence[Message], info: Info | None = None) -> list[tuple[list[int], list[int]]]:
        return self._of(info or Info()).tokens(messages, info)

    def parse(self, ids: Sequence[int], stopped: bool, info: Info) -> tuple[str, str, bool]:
        return self._of(info).parse(ids, stopped, info)

    def _of(self, info: Info) -> Renderer:
        part = info.get("part", "")
        if part not in self._renderers:
            known = ", ".join(self._renderers)
            raise LookupError(f"env.eval has no part {part!r}, only {known}; give every split the same parts")
        return self._renderers[part]
