"""What the agent loop needs of a rollout engine: token ids in, token ids and log-probs out, one step at a time.

    load_weights -> begin -> (add | step | release)* -> end -> begin ... -> sleep -> load_weights -> ...

An engine shares its accelerator with the trainer. `sleep` frees its memory there if they do not fit together, weights
included, and only `load_weights` wakes it: rolling out without weights, or with others than the trainer's, is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from atod_fast.config import Config
from atod_fast.errors import GuardError, UserError
from atod_fast.models import Compute


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters, shared by all requests of a rollout."""

    temperature: float  # 0 = greedy
    max_tokens: int  # response length
    stop_ids: tuple[int, ...]
    valid_columns: Tensor | None = None  # bool [V]; False columns are never sampled and left out of the softmax


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue once. `key` names the trajectory: its next request may reuse the cached common prefix."""

    key: int
    prompt: list[int]
    seed: int  # of this request's random stream


@dataclass(frozen=True, slots=True)
class Completion:
    """The sampled response to a `Request`."""

    key: int
    ids: list[int]  # the stop token included
    logprobs: list[float]  # log softmax(z / temperature) over the valid columns; at temperature 0 of softmax(z)
    stopped: bool  # False: cut off at max_tokens


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine may hold on a rank."""

    concurrency: int  # trajectories at a time
    sleeps: bool = False  # `sleep` frees what the engine holds on the device
    cache_bytes: int = 0  # of vLLM's key/value cache


def share(config: Config, engines: int) -> int:
    """Return the most trajectories that fall to one of `engines` engines in a training step.

    Of an evaluation's, which may be many more, it counts 64.
    """
    played = config.train.tasks_per_step * config.train.group_size
    return max(-(-played // engines), min(64, -(-config.eval.tasks // engines)))


def may_sleep(config: Config, device: torch.device) -> bool:
    """Return whether an engine on this device may free its memory. Raises UserError if it must and cannot."""
    if config.rollout.sleep == "on" and device.type != "cuda":
        raise UserError("rollout.sleep=on frees memory of a GPU, and there is none here; set rollout.sleep=auto")
    return device.type == "cuda" and config.rollout.sleep != "off"


class Engine(Protocol):
    """A rollout engine. Requests may be added between steps and join the running batch."""

    max_model_len: int  # prompt + response tokens
    concurrency: int  # trajectories to play at a time

    def begin(self, sampling: Sampling) -> None:
        """Start a rollout with an empty queue. Raise RuntimeError without weights."""

    def add(self, request: Request) -> None:
        """Queue one request."""

    def step(self) -> list[Completion]:
        """Advance every running request (by about one token); return those that finished.

        Raise EngineFailure if the engine broke down: `load_weights` restores it, as far as possible.
        """
        ...

    def release(self, key: int) -> None:
        """Forget a trajectory that is over: its cache, and its request if there is one."""

    def end(self) -> None:
        """End the rollout, complete or not: forget all requests."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up and replace all weights, named as in the Hugging Face checkpoint.

        Raise GuardError for a missing or unknown weight.
        """

    def sleep(self) -> None:
        """End the rollout, and free accelerator memory if its `Room` says so. The next needs `load_weights` first."""


class Kind(Protocol):
    """A type of rollout engine: its checks, and how to make one."""

    def suits(self, device: torch.device) -> bool:
        """Return whether `rollout.engine=auto` may choose it on this device."""
        ...

    def check_model(self, config: Config, body: PreTrainedModel) -> None:
        """Raise UserError if it cannot run this model, whose weights are on the meta device."""

    def check(self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device) -> None:
        """Raise UserError if it does not support the settings.

        shape: the student's transformers configuration; None where a dry run does not have it.
        """

    def check_installed(self) -> None:
        """Raise UserError if it is not installed on this machine."""

    def room(
        self, config: Config, shape: PretrainedConfig | None, dtype: torch.dtype, device: torch.device, engines: int
    ) -> Room:
        """Return what one of `engines` engines takes if memory is no concern; `sleeps` unless rollout.sleep=off.

        shape: as in `check`. Raises UserError if rollout.sleep=on cannot be had on this device.
        """
        ...

    def make(
        self,
        config: Config,
        compute: Compute,
        device: torch.device,
        room: Room,
        *,
        filled: bool,
        say: Callable[[str], None],
    ) -> Engine:
        """Make an engine for the model `compute`. See `engines.make_engine`."""
        ...


def checked(weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Yield `weights` unchanged, checked against `shapes`.

    Raise GuardError for an unknown name, another shape and, at the end, names that did not come.
    """
    missing = dict(shapes)
    for name, weight in weights:
        if name not in shapes:
            raise GuardError(
                f"weight sync: the trainer sends {name!r}, which the rollout engine's model does not have; "
                f"its names begin with {_some(shapes)}"
            )
        if weight.shape != shapes[name]:
            raise GuardError(
                f"weight sync: {name} has shape {tuple(weight.shape)}, in the rollout engine {tuple(shapes[name])}; "
                "are the models the same?"
            )
        missing.pop(name, None)
        yield name, weight
    if missing:
        raise GuardError(
            f"weight sync: the trainer did not send {len(missing)} of the rollout engine's {len(shapes)} weights, "
            f"among them {_some(missing)}"
        )


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:3])
