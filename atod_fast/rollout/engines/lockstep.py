"""Runs one tensor-parallel engine on several ranks: the first plays, the others repeat its calls.

Each rank of a tensor-parallel vLLM schedules for itself and meets the others in the model's collectives, so all need
the same requests in the same order. Environments may answer in any order; only the first rank runs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from atod_fast import ranks
from atod_fast.rollout.engines.protocol import Completion, Engine, Request, Sampling


class Lockstep:
    """An `Engine` on the first rank of `group`; the others `follow` it through each rollout.

    Every rank itself calls `load_weights` and `sleep`.
    """

    def __init__(self, engine: Engine, group: ProcessGroup) -> None:
        self._engine, self._group = engine, group
        self.leads = group.rank() == 0
        self.max_model_len, self.concurrency = engine.max_model_len, engine.concurrency
        self._calls: list[list] = []  # made here and not yet sent
        self._whole = True

    def begin(self, sampling: Sampling) -> None:
        columns = sampling.valid_columns
        told = None if columns is None else [len(columns), (~columns).nonzero()[:, 0].tolist()]
        self._engine.begin(sampling)
        self._whole = True
        self._calls.append(["begin", sampling.temperature, sampling.max_tokens, sampling.stop_ids, told])

    def add(self, request: Request) -> None:
        self._engine.add(request)
        self._calls.append(["add", request.key, request.prompt, request.seed])

    def release(self, key: int) -> None:
        self._engine.release(key)
        self._calls.append(["release", key])

    def step(self) -> list[Completion]:
        self._tell(["step"])
        try:
            return self._engine.step()
        except BaseException:
            self._whole = False
            raise

    def end(self) -> None:
        """An error inside `step` occurs on all ranks; any other ending is broadcast."""
        self._engine.end()
        if self._whole:
            self._tell(["end"])
        self._calls = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._engine.load_weights(weights)

    def sleep(self) -> None:
        self._engine.sleep()

    def follow(self) -> None:
        """Repeat the leader's calls until its rollout ends."""
        while True:
            for name, *arguments in json.loads(ranks.tell(None, self._group)):
                match name:
                    case "begin":
                        temperature, max_tokens, stop_ids, told = arguments
                        columns = None
                        if told is not None:
                            columns = torch.ones(told[0], dtype=torch.bool)
                            columns[told[1]] = False
                        self._engine.begin(Sampling(temperature, max_tokens, tuple(stop_ids), columns))
                    case "add":
                        self._engine.add(Request(*arguments))
                    case "release":
                        self._engine.release(*arguments)
                    case "step":
                        self._engine.step()
                    case "end":
                        self._engine.end()
                        return

    def _tell(self, call: list) -> None:
        ranks.tell(json.dumps([*self._calls, call]), self._group)
        self._calls = []
