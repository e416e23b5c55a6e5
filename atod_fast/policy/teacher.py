"""The frozen teacher: scores under no_grad; its final hidden states are kept, never its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from atod_fast.batches import Batch
from atod_fast.config import Config
from atod_fast.models import dtype_of
from atod_fast.policy.model import CausalPolicy, HeadJob, build_teacher
from atod_fast.policy.sharding import reshard, shard


class TeacherHead(NamedTuple):
    """Plain, whole tensors: custom operators take no mixture of DTensors and tensors."""

    weight: Tensor  # [V_t, H_t]
    bias: Tensor | None  # [V_t]
    softcap: float | None  # of the unscaled logits
    scale: float


class Teacher:
    """FSDP2-sharded over the ranks, in CPU memory between uses with `teacher.offload`."""

    def __init__(self, config: Config, mesh: DeviceMesh, device: torch.device):
        policy = build_teacher(config.teacher, config.student.attention, device)
        self.policy: CausalPolicy = shard(policy, mesh, dtype_of(config.teacher.compute_dtype, device), offload=config.teacher.offload)

    @torch.no_grad()
    def logp(self, batch: Batch, job: HeadJob) -> Tensor:
        """[A] fp32 log-probs of the action tokens."""
        return self.policy(batch, job).logp

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """[A, H_t] final hidden states of the positions that predict the action tokens."""
        return self.policy(batch, None)

    @contextmanager
    def head(self) -> Iterator[TeacherHead]:
        """The whole head for as long as the context lasts. Collective."""
        head = self.policy.parts.head
        (self.policy if self.policy.tied else head).unshard()
        try:
            yield TeacherHead(head.weight.detach(), None if head.bias is None else head.bias.detach(), head.softcap, head.scale)
        finally:
            reshard(self.policy)
