"""The rollout engine vLLM, in the trainer's process and on its accelerator. Only this folder knows vLLM's interface.

`start.py` makes one engine per rank, or with `tensor_parallel` one over that many neighbouring ranks, each of which
then needs the same calls in the same order (`lockstep.py`). Memory on CUDA, if the engine sleeps between rollouts:

    start            before the trainer's models; ends asleep: neither weights nor key/value cache are allocated
    load_weights     wakes the weights' memory, streams into it, wakes the cache's, and clears every cached prefix
    sleep            frees both

Waking without loading would generate from garbage, so only `load_weights` wakes. An engine that does not sleep, as on a
CPU, keeps its memory, and `load_weights` copies in place; the order of calls is the same. Prefixes are cached by
blocks: a trajectory's next turn computes what is new.

Each request draws from a random stream of its own seed. But which requests share a batch, and so a row's rounding,
depends on how fast environments answer: rollouts repeat with instant environments on the same machine and versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from atod_fast.errors import EngineFailure, GuardError, UserError
from atod_fast.rollout.engines.protocol import Completion, Request, Sampling, checked
from atod_fast.rollout.engines.vllm.mask import Mask

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine


class VllmEngine:
    """An `Engine` around a vLLM engine.

    `mask` is shared with its logits processor. `shapes` are the trainer's weights; vLLM gets them under the names, and
    in the parts, that `as_saved` gives them. `concurrency`: trajectories to play at a time. `sleeps`: `sleep` frees its
    memory. `filled`: it holds the checkpoint's weights.
    """

    def __init__(
        self,
        engine: LLMEngine,
        mask: Mask,
        *,
        max_model_len: int,
        concurrency: int,
        shapes: Mapping[str, torch.Size],
        sleeps: bool,
        filled: bool,
        as_saved: Callable[[str, Tensor], dict[str, Tensor]] = lambda name, weight: {name: weight},
    ) -> None:
        self._engine, self._mask, self._shapes, self._sleeps, self._filled = engine, mask, shapes, sleeps, filled
        self._as_saved = as_saved
        self.max_model_len, self.concurrency = max_model_len, concurrency
        self._running: dict[int, str] = {}  # vLLM's id of each request by key
        self._ended: set[str] = set()  # vLLM's ids of requests that ended since the last step
        if not filled:
            self.sleep()

    def begin(self, sampling: Sampling) -> None:
        if not self._filled:
            raise RuntimeError("the engine is asleep or empty: load_weights first")
        self.end()
        self._mask.allow(sampling.valid_columns)
        self._sampling = sampling

    def add(self, request: Request) -> None:
        if not self._filled:
            raise RuntimeError("the engine is asleep or empty: load_weights first")
        room = self.max_model_len - self._sampling.max_tokens
        if not 0 < len(request.prompt) <= room:
            raise UserError(
                f"rollout.prompt_tokens: a prompt of {len(request.prompt)} tokens, the engine takes 1 to {room}; "
                "raise it or show less"
            )
        if request.key in self._running:
            raise ValueError(f"request {request.key} is still being answered")
        params = sampling_params(self._sampling, request.seed)
        self._running[request.key] = self._engine.add_request(
            str(request.key), {"prompt_token_ids": request.prompt}, params
        )

    def step(self) -> list[Completion]:
        if not self._running:
            return []
        ended, self._ended = self._ended, set()
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._filled = False
            self._clean_up(ended)
            raise EngineFailure(f"{type(error).__name__}: {reason(error)}") from error
        return [self._complete(output) for output in outputs if output.finished]

    def _clean_up(self, ended: set[str]) -> None:
        """After a failed step, forget all requests, and have the model runner forget them at its next step.

        ended: the requests that had ended before that step. The scheduler tells the runner of them once, with the next
        step. If this one fails before the runner has read it, model runner V2 would keep their slots for ever.
        """
        client: Any = self._engine.engine_core  # in this process, and not vLLM's abstract one
        core = client.engine_core
        if core.batch_queue:  # asynchronous scheduling: pending steps, which would fail again
            core.batch_queue.clear()
        self.end()
        core.scheduler.finished_req_ids |= ended
        self._ended |= ended

    def _complete(self, output: Any) -> Completion:
        (sample,) = output.outputs
        if sample.finish_reason not in ("stop", "length"):
            self._filled = False
            raise EngineFailure(f"a request ended with finish_reason={sample.finish_reason!r}")
        ids = list(sample.token_ids)
        logprobs = [line[token].logprob for line, token in zip(sample.logprobs, ids, strict=True)]
        if not np.isfinite(logprobs).all():
            raise GuardError(
                "rollout: the student's logits are not finite; "
                "lower train.learning_rate and resume from an earlier checkpoint"
            )
        key = int(output.request_id)
        self._ended.add(self._running.pop(key))
        return Completion(key, ids, logprobs, sample.finish_reason == "stop")

    def release(self, key: int) -> None:
        if key in self._running:
            self._ended.add(self._running[key])
            self._engine.abort_request([self._running.pop(key)], internal=True)

    def end(self) -> None:
        for key in list(self._running):
            self.release(key)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.end()
        self._filled = False
        asleep = self._sleeps and self._engine.is_sleeping()
        if asleep:
            self._engine.wake_up(["weights"])
        # Copies: vLLM keeps what it gets until the whole layer has arrived, an embedding until the end.
        copies = (
            (name, part.clone())
            for sent, weight in checked(weights, self._shapes)
            for name, part in self._as_saved(sent, weight).items()
        )
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": copies})
        if asleep:
            self._engine.wake_up(["kv_cache"])
        if not self._engine.reset_prefix_cache():
            raise GuardError(
                "weight sync: vLLM kept prefixes cached under the old weights; use --resume auto, "
                "or rollout.engine=transformers"
            )
        self._filled = True

    def sleep(self) -> None:
        self.end()
        self._filled = False
        if self._sleeps:
            self._engine.sleep(level=2)


def sampling_params(sampling: Sampling, seed: int) -> Any:
    """Return vLLM's sampling parameters for one request."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        seed=seed,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_ids),
        ignore_eos=True,  # only our stop ids end a response
        logprobs=0,  # of the sampled token
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def reason(error: Exception) -> str:
    """Return the line of an error's message that says what is wrong, without pydantic's headline and input."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    headed = len(lines) > 1 and "validation error" in lines[0]
    return lines[headed].removeprefix("Value error, ").partition(" [type=")[0]
