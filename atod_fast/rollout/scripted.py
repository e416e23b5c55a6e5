"""An expert in place of a model: an engine that answers as the expert of each environment says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from atod_fast.envs.experts import COMMAND
from atod_fast.envs.protocol import Info, Prompt
from atod_fast.records import Turn
from atod_fast.rollout.engines.protocol import Completion, Request, Sampling
from atod_fast.rollout.rendering import Message, Renderer, response_to


class Recorder:
    """A `Renderer` that keeps the text of each user message that `renderer` renders, by the tokens of the prompt."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer, self.stop_ids, self.valid_columns = renderer, renderer.stop_ids, renderer.valid_columns
        self.shown, self.action, self.tokens, self.parse = (
            renderer.shown,
            renderer.action,
            renderer.tokens,
            renderer.parse,
        )
        self.messages: dict[tuple[int, ...], str] = {}

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        message, ids = self.renderer.shown(turns, observation, info)
        self.messages[tuple(ids)] = message
        return ids


class Script(Recorder):
    """A recorder that is an `Engine` too. It answers a prompt with the `info[COMMAND]` that the prompt was made with.

    longest: tokens of a sequence. most: tokens of an answer. concurrency: episodes at a time.
    """

    def __init__(self, renderer: Renderer, *, longest: int, most: int, concurrency: int) -> None:
        super().__init__(renderer)
        self.max_model_len, self.concurrency, self._most = longest, concurrency, most
        self._answer: list[int] = []
        self._queue: list[Completion] = []

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        self._answer = self.renderer.action(info[COMMAND], info)  # pyright: ignore[reportGeneralTypeIssues]
        if len(self._answer) > self._most:
            raise ValueError(
                f"the expert's answer has {len(self._answer)} tokens; raise rollout.response_tokens={self._most}"
            )
        return super().prompt(turns, observation, info)

    def begin(self, sampling: Sampling) -> None:
        self._queue = []

    def add(self, request: Request) -> None:
        """Answer the prompt that was made last: the agent loop sends a request as soon as its prompt is made."""
        self._queue.append(Completion(request.key, self._answer, [0.0] * len(self._answer), True))

    def step(self) -> list[Completion]:
        finished, self._queue = self._queue, []
        return finished

    def release(self, key: int) -> None:
        pass

    def end(self) -> None:
        self._queue = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise RuntimeError("an expert has no weights")

    def sleep(self) -> None:
        pass


class Untokenized:
    """A `Renderer` without a tokenizer: each message is one token, its number in a list of texts.

    A prompt has any length. It is for experts alone, as no model has such tokens.
    """

    stop_ids: tuple[int, ...] = (0,)
    valid_columns: Tensor | None = None

    def __init__(self, prompt: Prompt, *, context: str, thinking: bool) -> None:
        self._words, self._context, self._thinking = prompt, context, thinking
        self._texts = [""]
        self._numbers = {"": 0}

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        return self.shown(turns, observation, info)[1]

    def shown(self, turns: Sequence[Turn], observation: str, info: Info) -> tuple[str, list[int]]:
        admissible = info.get("admissible_actions", [])
        if self._context == "window":
            first = turns[0].observation if turns else observation
            text = self._words.message(first, turns, observation, admissible)
        else:
            words: Callable[[str, Sequence[str]], str] = self._words.following if turns else self._words.first
            text = words(observation, admissible)
        return text, [self._number(text)]

    def action(self, command: str, info: Info | None = None) -> list[int]:
        text = response_to(self._words, command, self._thinking)
        if self._words.project(text) != (command, True):
            raise ValueError(f"the prompt's project does not read {command!r} from its response")
        return [self._number(text)]

    def tokens(self, messages: Sequence[Message], info: Info | None = None) -> list[tuple[list[int], list[int]]]:
        numbers = [[self._number(message["content"])] for message in messages]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def parse(self, ids: Sequence[int], stopped: bool, info: Info) -> tuple[str, str, bool]:
        text = self._texts[ids[0]]
        command, valid = self._words.project(text)
        return text, command, valid

    def _number(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        return number
