"""A teacher in this process: it scores without gradients and keeps final hidden states, never logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from atod_fast.batches import Batch
from atod_fast.policy.model import CausalPolicy, HeadJob, TeacherHead
from atod_fast.policy.sharding import reshard, sharded


class LocalTeacher:
    """A `Teacher` that is a policy sharded over the ranks with FSDP2, as `load_teacher` returns one."""

    def __init__(self, policy: CausalPolicy):
        self.policy = policy
        self.columns, self.packs = self.policy.parts.head.weight.shape[0], self.policy.packs

    @torch.no_grad()
    def logp(self, batch: Batch, job: HeadJob) -> Tensor:
        return self.policy(batch, job).logp

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        return self.policy(batch, None)

    @contextmanager
    def head(self) -> Iterator[TeacherHead]:
        head = self.policy.parts.head
        sharded(self.policy if self.policy.tied else head).unshard()
        try:
            bias = None if head.bias is None else head.bias.detach()
            yield TeacherHead(head.weight.detach(), bias, head.softcap, head.scale)
        finally:
            reshard(self.policy)

    def rest(self) -> None:
        reshard(self.policy)
