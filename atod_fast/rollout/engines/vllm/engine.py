"""The rollout engine vLLM, in the trainer's process and on its accelerator. Only this file knows vLLM's interface.

`build` makes one engine per rank, or with `tensor_parallel` one over that many neighbouring ranks, each of which then
needs the same calls in the same order (`lockstep.py`). Memory on CUDA:

    build            before the trainer's models; ends asleep: neither weights nor key/value cache are allocated
    load_weights     wakes the weights' memory, streams into it, wakes the cache's, and clears every cached prefix
    sleep            frees both

Waking without loading would generate from garbage, so only `load_weights` wakes. On a CPU vLLM cannot sleep and keeps
its memory; the order of calls is the same. Prefixes are cached by blocks: a trajectory's next turn computes what is
new.

Each request draws from a random stream of its own seed. But which requests share a batch, and so a row's rounding,
depends on how fast environments answer: rollouts repeat with instant environments on the same machine and versions.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from atod_fast import ranks
from atod_fast.errors import EngineFailure, GuardError, UserError
from atod_fast.models import load_config, one_as_saved, resolve, skeleton, weight_shapes
from atod_fast.rollout.engines.protocol import Completion, Request, Sampling, checked
from atod_fast.rollout.engines.vllm.limits import BLOCK
from atod_fast.rollout.engines.vllm.process import unchanged

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
# What torchrun sets.
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


class VllmEngine:
    """An `Engine` around a vLLM engine.

    `mask` is shared with its logits processor. `shapes` are the trainer's weights; vLLM gets them under the names, and
    in the parts, that `as_saved` gives them. `sleeps`: `sleep` frees its memory. `filled`: it holds the checkpoint's
    weights.
    """

    def __init__(
        self,
        engine: LLMEngine,
        mask: Mask,
        *,
        max_model_len: int,
        shapes: Mapping[str, torch.Size],
        sleeps: bool,
        filled: bool,
        as_saved: Callable[[str, Tensor], dict[str, Tensor]] = lambda name, weight: {name: weight},
    ) -> None:
        self._engine, self._mask, self._shapes, self._sleeps, self._filled = engine, mask, shapes, sleeps, filled
        self._as_saved = as_saved
        self.max_model_len = max_model_len
        self._running: dict[int, str] = {}  # vLLM's id of each request by key
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
        try:
            outputs = self._engine.step()
        except Exception as error:
            self._filled = False
            queue = getattr(getattr(self._engine.engine_core, "engine_core", None), "batch_queue", None)
            if queue:  # asynchronous scheduling: pending steps, which would fail again
                queue.clear()
            raise EngineFailure(f"{type(error).__name__}: {_reason(error)}") from error
        return [self._complete(output) for output in outputs if output.finished]

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
        del self._running[key]
        return Completion(key, ids, logprobs, sample.finish_reason == "stop")

    def release(self, key: int) -> None:
        if key in self._running:
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


class Mask:
    """The columns that are never sampled and left out of the softmax, the same for all requests.

    vLLM's own `allowed_token_ids` lists them per request: 150,000 numbers each.
    """

    def __init__(self) -> None:
        self._banned: Tensor | None = None

    def allow(self, valid_columns: Tensor | None) -> None:
        """Set the columns that may be sampled, bool [V]; None = all."""
        self._banned = None if valid_columns is None or valid_columns.all() else ~valid_columns

    def apply(self, logits: Tensor) -> Tensor:
        """Set the masked columns of `logits` to -inf, in place."""
        if self._banned is None:
            return logits
        self._banned = self._banned.to(logits.device)
        return logits.masked_fill_(self._banned, -torch.inf)

    def processor(self) -> type:
        """Return a logits processor class with this mask, for both model runners: V1 on a CPU, V2 where Triton runs."""
        from vllm.v1.sample.logits_processor import LogitsProcessor as OfV1
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as OfV2

        mask = self

        class Masked(OfV1, OfV2):
            def __init__(self, *_: object) -> None:
                pass

            def apply(self, logits: Tensor, *_: object) -> Tensor:
                return mask.apply(logits)

            def is_argmax_invariant(self) -> bool:
                return False

            def update_state(self, *_: object) -> None:
                pass

        return Masked


def build(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    concurrency: int,
    max_model_len: int,
    tensor_parallel: int,
    cache_bytes: int,
    filled: bool,
) -> VllmEngine:
    """Make an engine for the model at `path`: with its weights (`filled`), or empty and asleep until `load_weights`.

    concurrency: most requests in a batch; cache_bytes: size of the rank's key/value cache. Every rank must call it,
    after the default process group is made. Raises UserError if vLLM cannot run the model.
    """
    on_cpu, world, config, mask = device.type == "cpu", dist.get_world_size(), load_config(path), Mask()
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    torch._dynamo.config.disable |= on_cpu  # vLLM's few compiled helpers would need a C++ compiler there
    name = ranks.from_first(f"{os.getpid()}-{time.monotonic_ns()}")
    with unchanged(ALONE, keep="VLLM_"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            arguments = EngineArgs(
                model=resolve(path),
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                load_format="auto" if filled else "dummy",
                use_tqdm_on_load=False,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=tensor_parallel,
                seed=dist.get_rank() // tensor_parallel,
                max_model_len=max_model_len,
                max_num_seqs=concurrency,
                # A prompt taken in parts rewinds its request's generator, which a CPU's generator refuses.
                enable_chunked_prefill=not on_cpu,
                max_num_batched_tokens=max(4096 if on_cpu else 16384, max_model_len, concurrency),
                block_size=BLOCK,
                kv_cache_memory_bytes=cache_bytes,
                gpu_memory_utilization=0.1,  # only what must be free at the start: the cache's size is given
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                logits_processors=[mask.processor()],
                enforce_eager=on_cpu,
                enable_sleep_mode=not on_cpu,
                disable_log_stats=True,
            )
            with _named_apart(name):
                engine = LLMEngine.from_engine_args(arguments)
            ranks.before_stop(engine.engine_core.shutdown)
            engine.apply_model(_watch_loading)
            _try_out(engine)
        # Other errors are not the user's to fix.
        except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"rollout.engine=vllm cannot serve {path!r}: {_reason(error)}; use rollout.engine=transformers, "
                "or another model"
            ) from error
        finally:
            logging.disable(logging.NOTSET)
    if dist.get_world_size() != world:
        raise GuardError(
            f"vLLM left a process group of {dist.get_world_size()} ranks in place of {world}; "
            "set rollout.engine=transformers"
        )
    names = {"shapes": weight_shapes(config), "as_saved": one_as_saved(skeleton(config))}
    return VllmEngine(engine, mask, max_model_len=max_model_len, **names, sleeps=not on_cpu, filled=filled)


def _watch_loading(model: Any) -> None:
    """Make `model.load_weights` raise GuardError for missing weights; vLLM itself goes on with what memory held."""
    load = model.load_weights

    def load_weights(weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        loaded = load(weights)
        left = {name for name, _ in model.named_parameters()} - loaded if loaded is not None else set()
        if left:
            raise GuardError(
                f"weight sync: vLLM was not sent {len(left)} of its weights, among them {', '.join(sorted(left)[:3])}; "
                "use rollout.engine=transformers"
            )
        return loaded

    model.load_weights = load_weights


def _try_out(engine: LLMEngine) -> None:
    """Generate one token: some models turn out to be unsupported only when they run."""
    engine.add_request("0", {"prompt_token_ids": [0]}, sampling_params(Sampling(0.0, 1, ()), seed=0))
    while engine.has_unfinished_requests():
        engine.step()
    engine.reset_prefix_cache()


def _reason(error: Exception) -> str:
    """Return the line of an error's message that says what is wrong, without pydantic's headline and input."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    headed = len(lines) > 1 and "validation error" in lines[0]
    return lines[headed].removeprefix("Value error, ").partition(" [type=")[0]


@contextmanager
def _named_apart(name: str) -> Iterator[None]:
    """Give the shared memory of a tensor-parallel engine on a CPU a `name` of its own within the context.

    vLLM names it after the ranks' rendezvous, which is over by then. Under torchrun that is the same text for every
    run: two runs would share the memory, and a run that died would block the next.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    given = ExecutorWithExternalLauncher._distributed_args
    ExecutorWithExternalLauncher._distributed_args = lambda self: (f"env:{name}", *given(self)[1:])
    try:
        yield
        ranks.barrier()  # all ranks have mapped it: the files may go, whatever becomes of the processes
        for file in Path("/dev/shm").glob(f"{name}-*"):
            file.unlink(missing_ok=True)
    finally:
        ExecutorWithExternalLauncher._distributed_args = given
