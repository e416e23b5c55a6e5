"""Starts a vLLM engine in the trainer's process, and leaves the process otherwise as it was."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from atod_fast import ranks
from atod_fast.config.schema import Rollout
from atod_fast.errors import GuardError, UserError
from atod_fast.models import load_config, one_as_saved, resolve, skeleton, weight_shapes
from atod_fast.rollout.engines.protocol import Room, Sampling
from atod_fast.rollout.engines.vllm.engine import VllmEngine, reason, sampling_params
from atod_fast.rollout.engines.vllm.limits import BLOCK, batch_tokens
from atod_fast.rollout.engines.vllm.mask import Mask
from atod_fast.rollout.engines.vllm.process import unchanged

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
EXACT = {"TRITON_F32_DEFAULT": "ieee"}
# What torchrun sets.
ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def build(
    path: str, dtype: torch.dtype, device: torch.device, room: Room, rollout: Rollout, *, filled: bool
) -> VllmEngine:
    """Make an engine for the model at `path`: with its weights (`filled`), or empty and asleep until `load_weights`.

    Every rank must call it, after the default process group is made. Raises UserError if vLLM cannot run the model.
    """
    world, config, mask = dist.get_world_size(), load_config(path), Mask()
    for variable, value in environment(dtype, device).items():
        os.environ.setdefault(variable, value)
    # vLLM's few compiled helpers would need a C++ compiler on a CPU.
    torch._dynamo.config.disable |= device.type == "cpu"
    name = ranks.from_first(f"{os.getpid()}-{time.monotonic_ns()}")
    with unchanged(ALONE, keep="VLLM_"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.llm_engine import LLMEngine

            options = engine_options(path, dtype, device, room, rollout, filled=filled, rank=dist.get_rank())
            arguments = EngineArgs(**options, logits_processors=[mask.processor()])
            with _named_apart(name):
                engine = LLMEngine.from_engine_args(arguments)
            ranks.before_stop(engine.engine_core.shutdown)
            engine.apply_model(_watch_loading)
            _try_out(engine)
        # Other errors are not the user's to fix.
        except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
            raise UserError(
                f"rollout.engine=vllm cannot serve {path!r}: {reason(error)}; use rollout.engine=transformers, "
                "or another model"
            ) from error
        finally:
            logging.disable(logging.NOTSET)
    if dist.get_world_size() != world:
        raise GuardError(
            f"vLLM left a process group of {dist.get_world_size()} ranks in place of {world}; "
            "set rollout.engine=transformers"
        )
    return VllmEngine(
        engine,
        mask,
        max_model_len=rollout.longest,
        concurrency=room.concurrency,
        shapes=weight_shapes(config),
        as_saved=one_as_saved(skeleton(config)),
        sleeps=room.sleeps,
        filled=filled,
    )


def environment(dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Return the environment variables that vLLM needs to be set, unless they are.

    In fp32 on CUDA its attention is Triton's, whose products would otherwise be rounded to tf32.
    """
    return SETTINGS | (EXACT if dtype == torch.float32 and device.type == "cuda" else {})


def engine_options(
    path: str, dtype: torch.dtype, device: torch.device, room: Room, rollout: Rollout, *, filled: bool, rank: int
) -> dict[str, Any]:
    """Return the options of vLLM's `EngineArgs` for a model and these settings."""
    on_cpu, together = device.type == "cpu", rollout.tensor_parallel
    return {
        "model": resolve(path),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": dtype,
        # With bf16 logits, log-probs would differ from the trainer's by their rounding alone.
        "hf_overrides": {"head_dtype": {"fp32": "float32", "model": "model"}[rollout.head_dtype]},
        "load_format": "auto" if filled else "dummy",
        "use_tqdm_on_load": False,
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": together,
        "seed": rank // together,
        "max_model_len": rollout.longest,
        "max_num_seqs": room.concurrency,
        # A prompt taken in parts rewinds its request's generator, which a CPU's generator refuses.
        "enable_chunked_prefill": not on_cpu,
        "max_num_batched_tokens": batch_tokens(device, rollout.longest, room.concurrency),
        "block_size": BLOCK,
        "kv_cache_memory_bytes": room.cache_bytes,
        "gpu_memory_utilization": 0.1,  # only what must be free at the start: the cache's size is given
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": on_cpu or rollout.enforce_eager,
        "async_scheduling": {"auto": None, "on": True, "off": False}[rollout.async_scheduling],
        "enable_sleep_mode": room.sleeps,
        "disable_log_stats": True,
    }


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
