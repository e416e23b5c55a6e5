"""Restores global state of the process after libraries that change it when they start."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def unchanged(lent: Mapping[str, str], keep: str) -> Iterator[None]:
    """On exit, restore RNG states, thread count and environment variables, except those starting with `keep`.

    Within the context, variables of `lent` that were not set are set. `torch.set_num_threads` is restored too.
    """
    before = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    os.environ |= dict(lent) | before
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        for name in [name for name in os.environ if not name.startswith(keep)]:
            del os.environ[name]
        os.environ |= {name: value for name, value in before.items() if not name.startswith(keep)}
