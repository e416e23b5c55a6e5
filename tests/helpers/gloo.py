"""Run a function on N gloo ranks and return their results.

The ranks are forked from a server that has imported the trainer and computed nothing, so that each starts quickly.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["atod_fast.train"])


def run_ranks(world: int, function: Callable, *arguments) -> list:
    """Return the results of `function(*arguments)` by rank, each run in torchrun's environment with one thread.

    An exception on a rank is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(world, mp_context=_context, max_tasks_per_child=1) as pool:
        return [
            future.result(timeout=240)
            for future in [pool.submit(_as_rank, rank, world, port, function, arguments) for rank in range(world)]
        ]


def _as_rank(rank: int, world: int, port: int, function: Callable, arguments: tuple):
    import torch

    from atod_fast import ranks

    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    try:
        return function(*arguments)
    finally:
        ranks.stop()
