"""Token ids between the world's text and the model: what is shown, and what was said.

Nothing is ever re-encoded: a renderer encodes what the world says, the engine samples what the agent says, and the
concatenation of both is what is trained on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from atod_fast.envs.protocol import Info
from atod_fast.errors import UserError
from atod_fast.trajectory import Turn

if TYPE_CHECKING:
    from atod_fast.rollout.prompts import Prompt

CUT = " [... cut ...] "  # stands where text was left out to fit rollout.prompt_tokens


class Renderer(Protocol):
    """How one kind of model is shown a world. Stateless: equal arguments give equal ids."""

    stop_ids: tuple[int, ...]  # a sampled one ends the response
    valid_columns: Tensor | None  # bool [V]; False columns are never sampled; None = all may be

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        """Tokens to append before the next action, after the finished `turns` of this trajectory.

        Context `window`: the whole prompt. Context `full`: the tokens since the previous action, which begin by closing
        that action's message where it was cut off without a stop token. `info` came with `observation`.
        """

    def parse(self, ids: Sequence[int], stopped: bool) -> tuple[str, str, bool]:
        """Text of the response `ids`, the command to send to the environment, and whether the form was right.

        `stopped` tells that the last id is a stop token; it is no part of the text.
        """


class ChatRenderer:
    """A `Renderer` for any tokenizer with a chat template.

    The template's own text is encoded with special tokens; what comes from the world is not: `<|im_end|>` in an
    observation becomes ordinary characters' tokens. `prompt` words the messages. In context `window` a prompt longer than
    `prompt_tokens` loses observations of its history, oldest first, then the middle of the current one; `CUT` marks each.
    `columns` is the width of the model's head where it exceeds the tokenizer: ids without a token are never sampled.
    Raises UserError where the tokenizer has no usable chat template or cannot keep special tokens out of a text.
    """

    stop_ids: tuple[int, ...]
    valid_columns: Tensor | None

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, context: str, thinking: bool, prompt_tokens: int, columns: int | None = None
    ) -> None:
        self._tokenizer, self._words, self._context, self._limit = tokenizer, prompt, context, prompt_tokens
        head, opening, between = _template_pieces(tokenizer, thinking)
        specials = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        self._head, self._opening, self._between = (self._encode(text, special=True) for text in (head, opening, between))
        closing = next((place for place, i in enumerate(self._between) if i in specials), None)
        if closing is None:
            raise UserError(f"student.path: the chat template of {tokenizer.name_or_path!r} ends a message without a special token; use a chat model")
        self._between = self._between[closing:]
        end, eos = self._between[0], tokenizer.eos_token_id
        self.stop_ids = (end,) if eos in (None, end) else (end, eos)
        self._opened = "<think>" if opening.rstrip().endswith("<think>") else ""
        leaked = specials.intersection(self._encode("".join(tokenizer.convert_ids_to_tokens(sorted(specials))))) - {tokenizer.unk_token_id}
        if leaked:
            raise UserError(f"student.path: tokenizer {tokenizer.name_or_path!r} finds special tokens in plain text; use a fast tokenizer (tokenizer.json)")
        self.valid_columns = None
        if columns is not None:
            known = torch.zeros(columns, dtype=torch.bool)
            known[list(tokenizer.get_vocab().values())] = True
            self.valid_columns = None if known.all() else known

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        admissible = info.get("admissible_actions", [])
        if self._context == "window":
            return self._window(turns, observation, admissible)
        if not turns:
            return [*self._head, *self._encode(self._words.first(observation, admissible)), *self._opening]
        closed = turns[-1].action[-1:] == self._between[:1]
        return [*self._between[closed:], *self._encode(self._words.following(observation, admissible)), *self._opening]

    def _window(self, turns: Sequence[Turn], observation: str, admissible: list[str]) -> list[int]:
        """The whole prompt, with as little left out as makes it fit; longer than the limit where nothing helps."""
        task = turns[0].observation if turns else observation

        def prompt(cuts: int) -> list[int]:
            """With the observations of the `cuts` oldest turns left out; cuts beyond are characters of the current one."""
            past = [replace(turn, observation=CUT) for turn in turns[:cuts]] + list(turns[cuts:])
            kept = len(observation) - max(cuts - len(turns), 0)
            # Out of the middle: worlds tell the task at the beginning or at the end.
            shown = observation if kept == len(observation) else observation[: kept - kept // 2] + CUT + observation[len(observation) - kept // 2 :]
            return [*self._head, *self._encode(self._words.message(task, past, shown, admissible)), *self._opening]

        ids = prompt(0)
        if len(ids) > self._limit:
            most = len(turns) + len(observation)
            ids = prompt(bisect_left(range(most), True, key=lambda cuts: len(prompt(cuts)) <= self._limit))
        return ids

    def parse(self, ids: Sequence[int], stopped: bool) -> tuple[str, str, bool]:
        text = self._tokenizer.decode(list(ids[: len(ids) - stopped]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        command, valid = self._words.project(self._opened + text)
        return text, command, valid

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"]


def _template_pieces(tokenizer: PreTrainedTokenizerBase, thinking: bool) -> tuple[str, str, str]:
    """What the chat template writes before the first user message, between that and the answer, and between the answer
    and the next user message, found by rendering a conversation of placeholders.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"student.path: tokenizer {tokenizer.name_or_path!r} has no chat template; use a chat or instruct model")
    first, answer, second = "FIRST-USER-MESSAGE", "ASSISTANT-MESSAGE", "SECOND-USER-MESSAGE"
    talk = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}, {"role": "user", "content": second}]

    def render(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)

    one, three = render(talk[:1]), render(talk)
    if not (one.count(first) == three.count(answer) == three.count(second) == 1 and three.index(answer) < three.index(second)):
        raise UserError(f"student.path: the chat template of {tokenizer.name_or_path!r} does not show a conversation as it is; use another chat model")
    head, opening = one.split(first)
    return head, opening, three.split(answer)[1].split(second)[0]
