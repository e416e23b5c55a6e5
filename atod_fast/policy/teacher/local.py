"""A teacher in this process: it scores without gradients and keeps final hidden states, never logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from atod_fast.batches import Batch
from atod_fast.models import Compute
from atod_fast.policy.loading import load_teacher
from atod_fast.policy.model import CausalPolicy, HeadJob, TeacherHead
from atod_fast.policy.sharding import reshard, sharded


class LocalTeacher:
    """A `Teacher` sharded over the ranks with FSDP2. The options are those of `load_teacher`."""

    def __init__(
        self,
        compute: Compute,
        mesh: DeviceMesh,
        *,
        offload: bool,
        liger: bool = False,
        gathered: bool = False,
        compiled: bool = False,
    ):
        how = {"liger": liger, "gathered": gathered, "compiled": compiled}
        self.policy: CausalPolicy = load_teacher(compute, mesh, offload=offload, **how)
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
