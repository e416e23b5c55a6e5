"""The contenders of bench/head.py: atod_kernels, other libraries, the bare matrix products.

Each loader returns a function of (student_hidden [T, H_s], student_weight [V, H_s], teacher_hidden [T, H_t],
teacher_weight [V, H_t]) that returns the reverse KL, mean over tokens, to be backpropagated to the two student
tensors; the products return nothing. Each peer is used at its best: no mask, no hard loss, no bias, no logits
returned. A peer's package is imported when the peer is loaded, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from atod_kernels import linear_divergence, linear_token_loss
from plot_head import BOTH, FORWARD
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor | None]


def divergence(schedule: str, backend: str) -> Loss:
    return lambda *inputs: linear_divergence(*inputs, schedule=schedule, backend=backend).divergence.mean()


def token_loss(schedule: str, backend: str) -> Loss:
    return lambda *inputs: linear_token_loss(
        lambda s: s.divergence / len(inputs[0]), *inputs, schedule=schedule, backend=backend
    )[0]


def naive() -> Loss:
    """Load the obvious implementation: both models' full logits, fp32 softmaxes, torch's autograd."""

    def loss(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
        log_p = (x @ w.T).float().log_softmax(-1)
        with torch.no_grad():
            log_q = (xt @ wt.T).float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    return loss


def trl_gkd() -> Loss:
    """Load trl.experimental.gkd's GKDTrainer.generalized_jsd_loss, on full logits; beta 1 is KL(student || teacher)."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    def loss(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = xt @ wt.T
        return GKDTrainer.generalized_jsd_loss(x @ w.T, teacher, beta=1)

    return loss


def trl_chunked() -> Loss:
    """Load trl.kernels.chunked_divergence, the loss of DistillationTrainer, in tiles of 2048 x 8192; beta 1 is
    KL(student || teacher)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(x, w, None, xt, wt, None, 1.0)[0].mean()

    return loss


def liger(compiled: bool, chunk: int) -> Loss:
    """Load liger_kernel.chunked_loss's JSD; beta 1 is KL(student || teacher). Its forward always computes the
    gradients."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1, compiled=compiled, chunk_size=chunk
    )

    def loss(x: Tensor, w: Tensor, xt: Tensor, wt: Tensor) -> Tensor:
        return module(x, w, xt, wt, torch.zeros(len(x), dtype=torch.long, device=x.device))

    return loss


def products(student: int, gradients: bool) -> Loss:
    """Return a function that computes both models' logits `student` times, into buffers, and the products of the two
    gradients."""

    def run(*inputs: Tensor) -> None:
        x, w, xt, wt = (t.detach() for t in inputs)
        rows = 2048 if x.is_cuda else 256
        logits, dx, dw = (
            x.new_empty(min(rows, len(x)), len(w)),
            torch.empty_like(x),
            torch.empty_like(w) if gradients else None,
        )
        for i in range(0, len(x), rows):
            part = slice(i, min(i + rows, len(x)))
            z = logits[: part.stop - i]
            for _ in range(student):
                torch.mm(xt[part], wt.T, out=z)
                torch.mm(x[part], w.T, out=z)
            if gradients:
                torch.mm(z, w, out=dx[part])
                torch.addmm(dw, z.T, x[part], beta=float(i > 0), out=dw)

    return run


@dataclass(frozen=True)
class Contender:
    role: str  # ours, peer, chunked peer or floor
    load: Callable[[], Loss]
    passes: tuple[str, ...] = (FORWARD, BOTH)
    compiled: bool = False


def contenders(device: str) -> dict[str, Contender]:
    found = {}
    for backend in ("torch", "triton") if device == "cuda" else ("torch",):
        suffix = f", {backend}" if device == "cuda" else ""
        for schedule in ("fast", "lean"):
            found[f"linear_divergence {schedule}{suffix}"] = Contender("ours", partial(divergence, schedule, backend))
            found[f"linear_token_loss {schedule}{suffix}"] = Contender(
                "ours", partial(token_loss, schedule, backend), (BOTH,)
            )
    found["naive torch"] = Contender("peer", naive)
    found["TRL GKD loss, beta=1"] = Contender("peer", trl_gkd)
    found["TRL ChunkedDivergence, beta=1"] = Contender("chunked peer", trl_chunked)
    for compiled in (False, True):
        for chunk in (
            1024,
            256,
        ):  # 1024 is Liger's default, but makes one chunk of fewer than 2048 tokens: measure a smaller one too
            name = f"Liger JSD beta=1, {'compiled' if compiled else 'eager'}, chunk {chunk}"
            found[name] = Contender("chunked peer", partial(liger, compiled, chunk), (BOTH,), compiled)
    found["products (1+r)G"] = Contender("floor", partial(products, 1, gradients=False), (FORWARD,))
    found["products (3+r)G"] = Contender("floor", partial(products, 1, gradients=True), (BOTH,))
    found["products (4+2r)G"] = Contender("floor", partial(products, 2, gradients=True), (BOTH,))
    return found
