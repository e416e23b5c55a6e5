"""What the agent loop asks of a generator: token ids in, token ids and log-probs out, one step at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """Shared by all requests of a rollout."""

    temperature: float  # 0 = greedy
    max_tokens: int  # response length
    stop_ids: tuple[int, ...]
    valid_columns: Tensor | None = None  # bool [V]; False columns are never sampled and left out of the softmax


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `prompt` once. `key` names the trajectory: its next request may reuse the cached common prefix."""

    key: int
    prompt: list[int]
    seed: int  # of this request's random stream


@dataclass(frozen=True, slots=True)
class Completion:
    key: int
    ids: list[int]  # the stop token included
    logprobs: list[float]  # log softmax(z / temperature) over the valid columns; at temperature 0 of softmax(z)
    stopped: bool  # False: cut off at max_tokens


class Engine(Protocol):
    """Requests may be added between steps and join the running batch."""

    max_model_len: int  # prompt + response tokens

    def begin(self, sampling: Sampling) -> None:
        """Start a rollout: nothing is cached or queued from the one before."""

    def add(self, request: Request) -> None:
        """Queue one continuation."""

    def step(self) -> list[Completion]:
        """Advance every running request (by about one token); return those that finished."""

    def release(self, key: int) -> None:
        """The trajectory is over: forget its cache."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights; names as in the Hugging Face checkpoint. A missing or unknown name is an error."""

    def sleep(self) -> None:
        """Free accelerator memory between rollouts (a no-op where nothing is held)."""

    def wake(self) -> None:
        """Undo `sleep`; weights must be loaded before the next rollout."""
