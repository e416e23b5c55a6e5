"""A conversation as the tokenizer's own chat template writes and encodes it, where no environment can write a control token.

Text is what `tokenizer.apply_chat_template(..., tokenize=False)` returns, encoded in one piece: pieces encoded apart would
differ wherever a token reaches over their border (a line break of the template's before one of the message's).

The text of an environment may spell a control token: `<|im_end|>` or `<think>`. `quoted` marks it there, and a conversation
with such marks is encoded by a copy of the tokenizer in which each control token is spelled in characters that no text
holds. What the template or the prompt's own words wrote is respelled; what is marked goes back to how it was spelled, and
is there ordinary characters. Everything else of the copy is the original's.
"""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time
from functools import cached_property

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from atod_fast.errors import UserError

# Code points that Unicode reserves for use inside a program; an environment that says one is shown with U+FFFD in its place.
RESERVED = re.compile("[\ufdd0-\ufdef]")
QUOTED = "\ufdd0{}\ufdd1"  # stands, while the template is rendered, for a control token that an environment spelled
RESPELLED = "\ufdd2{}\ufdd3"  # how the copy of the tokenizer spells a control token
FIRST, ANSWER, NEXT = "\nFIRST-USER-MESSAGE\n\nof two lines", "ASSISTANT-MESSAGE", "\n\nNEXT-USER-MESSAGE\n"


class ChatTemplate:
    """Prompts of a chat model: `first` opens a conversation, `following` goes on after an answer that was sampled.

    Args:
        thinking: what the template is told as `enable_thinking`.
        day: what `strftime_now` of a template shows, so that all prompts of a run are of one day.
        continues: `following` will be used.

    Attributes:
        opening: what the template writes between the first message and where the model takes over.
        end: id of the token that ends an answer; None where the template writes none (refused with `continues`).

    Raises:
        UserError: the tokenizer has no chat template or none that shows a conversation, is not a fast one, or finds
            control tokens in plain text.
    """

    opening: str
    end: int | None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool, day: date, continues: bool) -> None:
        name = tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise UserError(f"student.path: tokenizer {name!r} has no chat template; use a chat or instruct model")
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise UserError(f"student.path: tokenizer {name!r} is not a fast one; give a model folder with a tokenizer.json")
        self._tokenizer, self._thinking, self._noon = tokenizer, thinking, datetime.combine(day, time(12))
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        # Added tokens that are blanks (runs of spaces, of line breaks) are text to the model like any other.
        self._control = {text: i for text, i in added.items() if text.strip(" \n\r\t\u2581")}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._rewritten = re.compile(QUOTED.format(r"(\d+)") + "|" + self._spelled.pattern)
        try:
            self._study(name, continues)
        except TemplateError as error:
            raise UserError(f"student.path: the chat template of {name!r} refuses a conversation ({error}); use another chat model") from None

    def _study(self, name: str, continues: bool) -> None:
        """Find what the template writes around messages, and make sure that both ways of encoding agree on it."""
        one, three = self._render([FIRST]), self._render([FIRST, ANSWER, NEXT])
        shown = [message.strip() for message in (FIRST, ANSWER, NEXT)]
        in_order = [three.find(message) for message in shown]
        if one.count(shown[0]) != 1 or -1 in in_order or sorted(in_order) != in_order or three.count(ANSWER) != 1:
            raise UserError(f"student.path: the chat template of {name!r} does not show a conversation as it is; use another chat model")
        self.opening = one.partition(shown[0])[2]
        if end := self._spelled.search(three.partition(ANSWER)[2]):
            self.end = self._control[end[0]]
        elif continues:
            raise UserError(
                f"student.path: the chat template of {name!r} ends a message without a special token; use another chat model, or rollout.context=window"
            )
        else:
            self.end = None
        leaked = set(self._control.values()).intersection(self._encode(" ".join(QUOTED.format(i) for i in self._control.values())))
        if leaked - {self._tokenizer.unk_token_id}:
            raise UserError(f"student.path: tokenizer {name!r} finds control tokens in plain text; use another chat model")
        plain = self._tokenizer(three, add_special_tokens=False)["input_ids"]
        if plain != self._encode_apart(three):
            raise UserError(
                f"student.path: tokenizer {name!r} cannot be copied with its control tokens spelled differently, which keeps "
                "those out of messages; use another chat model"
            )

    def quoted(self, text: str) -> str:
        """`text`, to be used in a message, with a mark in place of each control token that it spells."""
        text = RESERVED.sub("\ufffd", text)
        return self._spelled.sub(lambda found: QUOTED.format(self._control[found[0]]), text)

    def first(self, message: str) -> list[int]:
        """Tokens of a conversation that `message` opens, up to where the model answers."""
        return self._encode(self._render([message]))

    def following(self, answers: int, message: str) -> list[int]:
        """Tokens from the one that ends the last of `answers` answers, through `message`, up to where the model answers next."""
        past = [FIRST, "-"] * (answers - 1)
        text = self._render([*past, FIRST, ANSWER, message]).partition(ANSWER)[2]
        end = self._spelled.search(text)
        if end is None:
            raise ValueError(f"the chat template writes nothing that ends answer {answers}")
        return self._encode(text[end.start() :])

    def _render(self, messages: list[str]) -> str:
        """What the template writes of `messages`, of the user and the assistant in turn."""
        talk = [{"role": ("user", "assistant")[n % 2], "content": message} for n, message in enumerate(messages)]
        return self._tokenizer.apply_chat_template(
            talk,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self._thinking,
            strftime_now=self._noon.strftime,
        )

    def _encode(self, text: str) -> list[int]:
        if RESERVED.search(text):
            return self._encode_apart(text)
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _encode_apart(self, text: str) -> list[int]:
        """Ids of a rendered text in which what is quoted is ordinary characters."""
        copy, original = self._copy
        names = {i: spelled for spelled, i in self._control.items()}

        def rewrite(found: re.Match[str]) -> str:
            return names[int(found[1])] if found[1] else RESPELLED.format(self._control[found[0]])

        ids = copy.encode(self._rewritten.sub(rewrite, text), add_special_tokens=False).ids
        return [original.get(i, i) for i in ids]

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with its control tokens respelled, and the original id of each added token of it."""
        described = json.loads(self._tokenizer.backend_tokenizer.to_str())
        described |= {"truncation": None, "padding": None}
        spelled = {}
        for token in described["added_tokens"]:
            if token["content"] in self._control:
                token["content"] = RESPELLED.format(token["id"])
            spelled[token["content"]] = token["id"]
        copy = Tokenizer.from_str(json.dumps(described))
        return copy, {copy.token_to_id(text): i for text, i in spelled.items()}
