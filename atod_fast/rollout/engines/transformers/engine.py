"""The rollout engine for any device: a transformers model with its own decode loop over a cache divided into slots.

Each trajectory owns a cache slot until it is released, so a growing sequence computes only its uncached suffix. A step
is one forward pass (`forward.py`) over one token of every row being decoded and the prompt tokens of rows that just
joined; every row whose prompt is complete samples a token.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, takewhile

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atod_fast.errors import GuardError, UserError
from atod_fast.rollout.engines.protocol import Completion, Request, Sampling, checked
from atod_fast.rollout.engines.transformers.captured import CapturedForward, Record
from atod_fast.rollout.engines.transformers.forward import Forward, MakeForward, SlotForward
from atod_fast.rollout.engines.transformers.tryout import choose


def draw(logits: Tensor, temperature: float, banned: Tensor | None, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverting the cumulative distribution.

    logits [n, V] fp32 (overwritten); temperature 0 = greedy; banned bool [V], never sampled and left out of the
    softmax; uniform [n] fp64 in [0, 1). Returns ids [n] int64 and their log-probs [n] fp32 under
    softmax(logits / temperature), at temperature 0 under softmax(logits).
    """
    if temperature not in (0, 1):
        logits = logits.div_(temperature)
    if banned is not None:
        logits = logits.masked_fill_(banned, -torch.inf)
    logp = logits.log_softmax(-1)
    if temperature == 0:
        ids = logp.argmax(-1, keepdim=True)
    else:
        cdf = logp.exp().cumsum(-1, dtype=torch.float64)
        total = cdf[:, -1:]
        # Below the total even after rounding, so that the first column above the target has a probability above 0.
        target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
        ids = torch.searchsorted(cdf, target, right=True).clamp_(max=logits.shape[1] - 1)
    return ids[:, 0], logp.gather(1, ids)[:, 0]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading tokens that `a` and `b` share."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class TransformersEngine:
    """An `Engine` around a transformers causal LM.

    The engine owns `model` and its config: a replica beside the trainer's, in evaluation mode without gradients. At
    most `slots` trajectories hold a cache at a time; requests of others wait until one is released. A pass holds at
    most `pass_tokens` tokens (or one per running slot, if those are more): a longer prompt takes several passes, if the
    forward can split it. `sleeps`: `sleep` frees the cache. `forward` makes the forward passes; without it, the engine
    takes the fastest that a try-out finds correct (UserError: none is). `record`: replay decode steps (captured.py) if
    the forward allows it; new prompts may then wait some steps for others. `say` gets a line if that ends.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        slots: int,
        max_model_len: int,
        device: torch.device | str,
        pass_tokens: int = 4096,
        sleeps: bool = False,
        forward: MakeForward | None = None,
        record: Callable[[], Record] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or max_model_len
        if max_model_len > limit:
            raise UserError(
                f"rollout.prompt_tokens: sequences of {max_model_len} tokens exceed the model's {limit} positions; "
                "lower it"
            )
        self.max_model_len = max_model_len
        self._device = torch.device(device)
        model.to(self._device)  # pyright: ignore[reportArgumentType]
        self._model = model.eval().requires_grad_(False)
        self._pass_tokens = pass_tokens
        if forward is None:
            small = partial(TransformersEngine, model, slots=2, device=device)
            forward = choose(
                model, max_model_len, lambda candidate, length: small(forward=candidate, max_model_len=length)
            )
        made = forward(model, slots, max_model_len)
        self._forward: Forward = made
        if record is not None and isinstance(made, SlotForward):
            self._forward = CapturedForward(made, record, say)
        self.concurrency = slots
        self._sleeps = sleeps
        self._filled = True
        self._reset()

    @property
    def slower(self) -> str | None:
        """Why rollouts are slower than they could be; None if they are not."""
        return self._forward.slower

    def _reset(self) -> None:
        slots = self.concurrency
        # Each slot's latest prompt and response, also after its release.
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._cached = np.zeros(slots, np.int64)  # tokens of `_held` whose keys and values are cached
        self._waiting: list[Request] = []
        self._slot_of: dict[int, int] = {}
        self._free = list(range(slots))  # a heap: low slots first keeps the rows of a pass close together
        self._busy: dict[int, Request] = {}  # by slot
        self._filling: list[int] = []  # slots whose prompt is not cached yet, in order of arrival
        self._waited = 0  # steps for which they have waited
        self._running = np.zeros(slots, bool)
        self._count = np.zeros(slots, np.int64)  # tokens sampled so far
        self._token = np.zeros(slots, np.int64)  # the token to feed next

    def begin(self, sampling: Sampling) -> None:
        if not self._filled:
            raise RuntimeError("the engine was put to sleep: load_weights first")
        head = self._model.get_output_embeddings()
        assert head is not None, "a causal LM has a head"
        vocabulary = head.get_parameter("weight").shape[0]
        valid = sampling.valid_columns
        if valid is not None and (valid.shape != (vocabulary,) or not valid.any()):
            raise ValueError(
                f"valid_columns: {int(valid.sum())} true in shape {tuple(valid.shape)}; "
                f"the model has {vocabulary} columns"
            )
        self._reset()
        self._sampling = sampling
        self._banned = None if valid is None or valid.all() else ~valid.to(self._device)
        self._stops = np.zeros(vocabulary, bool)
        self._stops[list(sampling.stop_ids)] = True
        shape = self.concurrency, sampling.max_tokens
        self._uniform, self._ids, self._logprobs = (
            np.zeros(shape),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.float32),
        )

    def add(self, request: Request) -> None:
        if not self._filled:
            raise RuntimeError("the engine was put to sleep: load_weights first")
        room = self.max_model_len - self._sampling.max_tokens
        if not 0 < len(request.prompt) <= room:
            raise UserError(
                f"rollout.prompt_tokens: a prompt of {len(request.prompt)} tokens, the engine takes 1 to {room}; "
                "raise it or show less"
            )
        if self._slot_of.get(request.key) in self._busy or any(request.key == other.key for other in self._waiting):
            raise ValueError(f"request {request.key} is still being answered")
        self._waiting.append(request)

    def release(self, key: int) -> None:
        self._waiting = [request for request in self._waiting if request.key != key]
        slot = self._slot_of.pop(key, None)
        if slot is None:
            return
        if self._busy.pop(slot, None):
            self._running[slot] = False
            self._filling = [other for other in self._filling if other != slot]
        heapq.heappush(self._free, slot)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self._admit()
        return self._sample() if self._busy else []

    def _admit(self) -> None:
        """Assign free slots to waiting requests, and find how much of each prompt is cached there."""
        waiting = []
        for request in self._waiting:
            slot = self._slot_of.get(request.key)
            if slot is None:
                if not self._free:
                    waiting.append(request)
                    continue
                slot = self._slot_of[request.key] = heapq.heappop(self._free)
            shared = common_prefix(self._held[slot][: self._cached[slot]], request.prompt[:-1])
            self._cached[slot] = self._forward.kept(int(self._cached[slot]), shared)
            self._held[slot] = list(request.prompt)
            self._busy[slot] = request
            self._waited = self._waited if self._filling else 0
            self._filling.append(slot)
            self._count[slot] = 0
            self._uniform[slot] = np.random.Generator(np.random.Philox(key=request.seed)).random(
                self._sampling.max_tokens
            )
        self._waiting = waiting

    def _sample(self) -> list[Completion]:
        """Run one pass: a token of every running slot, and prompt tokens of slots being filled, in order of arrival."""
        feed = {
            slot: [token]
            for slot, token in zip(
                np.flatnonzero(self._running).tolist(), self._token[self._running].tolist(), strict=True
            )
        }
        budget = self._pass_tokens - len(feed)
        for slot in self._to_fill():
            start = self._cached[slot]
            feed[slot] = self._held[slot][start : start + max(budget, 1) if self._forward.splits else None]
            budget -= len(feed[slot])
            if budget <= 0:
                break
        slots = np.array(sorted(feed))
        starts = self._cached[slots]
        counts = np.array([len(feed[slot]) for slot in slots.tolist()])
        ids = np.fromiter(chain.from_iterable(feed[slot] for slot in slots.tolist()), np.int64, counts.sum())
        self._cached[slots] += counts
        filled = [slot for slot in self._filling if self._cached[slot] == len(self._held[slot])]
        if filled:
            self._running[filled] = True
            self._filling = [slot for slot in self._filling if not self._running[slot]]

        drawing = self._running[slots]
        logits = self._forward(slots, starts, counts, ids, drawing)
        return self._advance(slots[drawing], logits) if drawing.any() else []

    def _to_fill(self) -> list[int]:
        """Return the slots whose prompts the next pass may fill: all, or none while it is better to wait for more."""
        if len(self._filling) < self._running.sum() and self._waited < self._forward.patience:
            self._waited += 1
            return []
        self._waited = self._forward.patience  # once begun, passes go on until all prompts are filled
        return self._filling

    def _advance(self, slots: np.ndarray, logits: Tensor) -> list[Completion]:
        """Sample the next token of the running `slots` [n] from logits [n, V]; return the completions."""
        counts = self._count[slots]
        uniform = self._tensor(self._uniform[slots, counts])
        ids, logprobs = (
            out.numpy(force=True) for out in draw(logits.float(), self._sampling.temperature, self._banned, uniform)
        )
        if not np.isfinite(logprobs).all():
            raise GuardError(
                "rollout: the student's logits are not finite; "
                "lower train.learning_rate and resume from an earlier checkpoint"
            )
        self._ids[slots, counts] = ids
        self._logprobs[slots, counts] = logprobs
        self._token[slots] = ids
        self._count[slots] = counts + 1
        stopped = self._stops[ids]
        done = stopped | (counts + 1 == self._sampling.max_tokens)
        return [
            self._complete(slot, stop) for slot, stop in zip(slots[done].tolist(), stopped[done].tolist(), strict=True)
        ]

    def _complete(self, slot: int, stopped: bool) -> Completion:
        self._running[slot] = False
        request, count = self._busy.pop(slot), self._count[slot]
        ids = self._ids[slot, :count].tolist()
        self._held[slot] = request.prompt + ids
        return Completion(request.key, ids, self._logprobs[slot, :count].tolist(), stopped)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def end(self) -> None:
        self._reset()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._filled = False
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        for name, weight in checked(weights, {name: parameter.shape for name, parameter in parameters.items()}):
            parameters[name].copy_(weight)
        self._filled = True

    def sleep(self) -> None:
        """End the rollout and, if the engine sleeps, free the key/value cache; the model stays on its device."""
        self._filled = False
        if self._sleeps:
            self._reset()
            self._forward.free()
            torch.cuda.empty_cache()
