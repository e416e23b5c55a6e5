"""Renders and tokenizes conversations with the tokenizer's chat template, safe from injected control tokens.

The text is what `tokenizer.apply_chat_template(..., tokenize=False)` returns. It is encoded in one piece: pieces
encoded apart would differ wherever a token spans their border (a line break of the template before one of the message).

A copy of the tokenizer encodes it. In the copy each control token is spelled with characters that no environment can
write. Control tokens that the template or the prompt's own words write are respelled; those in an environment's text
are not, and so are ordinary characters to the copy. `quoted` marks them, to tell the two apart in a message.
"""

from __future__ import annotations

import json
import re
from datetime import date, datetime, time

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from atod_fast.errors import UserError

# Code points that Unicode reserves for use inside a program; in an environment's text they become U+FFFD.
RESERVED = re.compile("[\ufdd0-\ufdef]")
QUOTED = "\ufdd0{}\ufdd1"  # mark for a control token in an environment's text
RESPELLED = "\ufdd2{}\ufdd3"  # spelling of a control token in the copy of the tokenizer
# First a mark, as it is or as `repr` or JSON in a user's own prompt escapes it; then the remains of a mark cut in two.
# At most nine digits: without a bound, a long number in a text would take quadratic time.
MARKS = r"(?:\ufdd0|\\ufdd0)(\d{1,9})(?:\ufdd1|\\ufdd1)", "\ufdd0\\d{0,9}|\\d{0,9}\ufdd1|[\ufdd0-\ufdef]"
FIRST, ANSWER, NEXT = "\nFIRST-USER-MESSAGE\n\nof two lines", "ASSISTANT-MESSAGE", "\n\nNEXT-USER-MESSAGE\n"


class ChatTemplate:
    """Encodes prompts of a chat model: `first` opens a conversation, `following` continues it after a sampled answer.

    Args:
        thinking: passed to the template as `enable_thinking`.
        day: the date that a template's `strftime_now` shows, the same in all prompts of a run.
        continues: `following` will be used.

    Attributes:
        opening: what the template writes between the first message and the model's answer.
        end: id of the token that ends an answer; None where the template writes none (refused with `continues`).

    Raises:
        UserError: the tokenizer has no chat template, is not a fast one or cannot be copied; or the template does not
            show a conversation.
    """

    opening: str
    end: int | None

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool, day: date, continues: bool) -> None:
        name = tokenizer.name_or_path
        if tokenizer.chat_template is None:
            raise UserError(f"student.path: tokenizer {name!r} has no chat template; use a chat or instruct model")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"student.path: tokenizer {name!r} is not a fast one; give a model folder with a tokenizer.json"
            )
        self._tokenizer, self._backend, self._thinking = tokenizer, backend, thinking
        self._noon = datetime.combine(day, time(12))
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Added tokens of white space alone (spaces, line breaks) are ordinary text to the model.
        self._control = {text: i for text, i in added.items() if text.strip(" \n\r\t\u2581")}
        self._names = {i: text for text, i in self._control.items()}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        mark, rest = MARKS
        self._rewritten = re.compile(f"{mark}|({self._spelled.pattern})|{rest}")
        try:
            one, three = self._render([FIRST]), self._render([FIRST, ANSWER, NEXT])
        except Exception as error:  # a template is a program
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"student.path: the chat template of {name!r} refuses a conversation ({reason}); use another chat model"
            ) from None
        self._study(name, one, three, continues)
        try:
            self._copy, self._original = self._respelled()
            same = self._encode(three) == tokenizer(three, add_special_tokens=False)["input_ids"]
        except Exception:  # the tokenizers library raises no other class
            same = False
        if not same:
            raise UserError(
                f"student.path: tokenizer {name!r} cannot be copied with its control tokens spelled differently, "
                "which keeps those out of what environments say; use another chat model"
            )

    def _study(self, name: str, one: str, three: str, continues: bool) -> None:
        """Find what the template writes around messages, from rendered conversations of one and three messages."""
        shown = "FIRST-USER-MESSAGE", ANSWER, "NEXT-USER-MESSAGE"
        in_order = [three.find(message) for message in shown]
        if one.count(shown[0]) != 1 or -1 in in_order or sorted(in_order) != in_order or three.count(ANSWER) != 1:
            raise UserError(
                f"student.path: the chat template of {name!r} does not show a conversation as it is; "
                "use another chat model"
            )
        self.opening = one.rpartition("of two lines")[2]
        end = self._spelled.search(three.partition(ANSWER)[2])
        self.end = self._control[end[0]] if end else None
        if continues and end is None:
            raise UserError(
                f"student.path: the chat template of {name!r} ends a message without a special token; "
                "use another chat model, or rollout.context=window"
            )

    def quoted(self, text: str) -> str:
        """Return `text` for use in a message: each control token that it spells is replaced by a mark."""
        text = RESERVED.sub("\ufffd", text)
        return self._spelled.sub(lambda found: QUOTED.format(self._control[found[0]]), text)

    def first(self, message: str) -> list[int]:
        """Return the tokens of a conversation that `message` opens, up to where the model answers."""
        return self._encode(self._render([message]))

    def following(self, answers: int, message: str) -> list[int]:
        """Return the tokens after `answers` answers: the end of the last one, `message`, and what opens the next."""
        past = [FIRST, "-"] * (answers - 1)
        text = self._render([*past, FIRST, ANSWER, message]).partition(ANSWER)[2]
        end = self._spelled.search(text)
        if end is None:
            raise ValueError(f"the chat template writes nothing that ends answer {answers}")
        return self._encode(text[end.start() :])

    def answer(self, text: str) -> list[int]:
        """Return the tokens of an answer, without what ends it. `text` is as for `first`."""
        return self._encode(text)

    def unquoted(self, message: str) -> str:
        """Return `message` with its marks replaced by the control tokens that they stand for."""
        mark, _ = MARKS
        return re.sub(mark, lambda found: self._names.get(int(found[1]), ""), message)

    def requoted(self, message: str) -> str:
        """Return an unquoted message with its special tokens marked, which no prompt's own words spell.

        Other control tokens, such as `<think>`, are taken for words of the prompt.
        """
        text = RESERVED.sub("\ufffd", message)

        def mark(found: re.Match[str]) -> str:
            token = self._control[found[0]]
            return QUOTED.format(token) if token in self._special else found[0]

        return self._spelled.sub(mark, text)

    def _render(self, messages: list[str]) -> str:
        """Return what the template writes for `messages`, alternately of the user and the assistant."""
        talk = [{"role": ("user", "assistant")[n % 2], "content": message} for n, message in enumerate(messages)]
        return self._tokenizer.apply_chat_template(  # pyright: ignore[reportReturnType]
            talk,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self._thinking,
            strftime_now=self._noon.strftime,
        )

    def _encode(self, text: str) -> list[int]:
        """Return the ids of a rendered text; marks become ordinary characters."""

        def rewrite(found: re.Match[str]) -> str:
            mark, control = found.groups()
            return (
                RESPELLED.format(self._control[control]) if control else self._names.get(int(mark), "") if mark else ""
            )

        ids = self._copy.encode(self._rewritten.sub(rewrite, text), add_special_tokens=False).ids
        return [self._original.get(i, i) for i in ids]

    def _respelled(self) -> tuple[Tokenizer, dict[int, int]]:
        """Return the tokenizer with its control tokens respelled, and the original id of each of its added tokens."""
        described = json.loads(self._backend.to_str())
        described |= {"truncation": None, "padding": None}
        spelled = {}
        for token in described["added_tokens"]:
            if token["content"] in self._control:
                token["content"] = RESPELLED.format(token["id"])
            spelled[token["content"]] = token["id"]
        # A vocabulary may list control tokens as words: an environment's text must not match them there either.
        model = described["model"]
        words = self._control.keys() - {model.get("unk_token")}
        if isinstance(vocabulary := model.get("vocab"), dict):
            model["vocab"] = {
                RESPELLED.format(self._control[word]) if word in words else word: i for word, i in vocabulary.items()
            }
        elif isinstance(vocabulary, list):
            model["vocab"] = [
                [RESPELLED.format(self._control[word]) if word in words else word, score] for word, score in vocabulary
            ]
        copy = Tokenizer.from_str(json.dumps(described))
        ids = ((copy.token_to_id(text), i) for text, i in spelled.items())
        return copy, {respelled: i for respelled, i in ids if respelled is not None}
