"""torch's varlen attention against sdpa on a GPU, forward and backward: the part `varlen` of `gpu_lane.py`.

    python bench/gpu_varlen.py
    python bench/gpu_varlen.py --dry     # the row-wise attention that stands in for it on a CPU

Rows of 470 tokens, and a rest, packed into 16,384 tokens; 16 query and 8 key heads of 128, as Qwen3 1.7B's. Outputs and
gradients are compared with the rows attended one by one in fp32; an error may be 4e-3 more than twice that of sdpa in
bf16 on the same rows. Times: sdpa attends the rows padded to the longest, as without packing.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from lane import Lane, arguments, seconds
from torch import Tensor, nn

from atod_fast.policy import attention

WINDOW = 128


def lengths(tokens: int, row: int) -> list[int]:
    """Return the rows' tokens: whole rows, and the rest."""
    return [row] * (tokens // row) + [tokens % row] * (tokens % row > 0)


def alone(q: Tensor, k: Tensor, v: Tensor, starts: list[int], window: int | None) -> Tensor:
    """Attend [1, heads, T, dim] row by row with sdpa; return [1, T, heads, dim]."""
    out = []
    for start, stop in pairwise(starts):
        place = torch.arange(stop - start, device=q.device)
        seen = place <= place[:, None]
        if window is not None:
            seen &= place > place[:, None] - window
        rows = (x[:, :, start:stop] for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*rows, attn_mask=seen, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2)


def gradients(function, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def compare(lane: Lane, inputs: list[Tensor], upstream: Tensor, starts: list[int], window: int | None) -> None:
    device = lane.device
    cu, longest = torch.tensor(starts, dtype=torch.int32, device=device), max(b - a for a, b in pairwise(starts))
    module = nn.Module()

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"cu_seq_lens_q": cu, "max_length_q": longest, "sliding_window": window}
        return attention.attend(module, q, k, v, None, **options)[0]

    exact = gradients(lambda *x: alone(*x, starts, window), [x.float() for x in inputs], upstream)
    plain = gradients(lambda *x: alone(*x, starts, window), inputs, upstream)
    got = gradients(varlen, inputs, upstream)
    for name, ours, sdpa, right in zip(("output", "d query", "d key", "d value"), got, plain, exact, strict=True):
        found, bound = error(ours, right), 2 * error(sdpa, right) + (4e-3 if ours.dtype == torch.bfloat16 else 1e-6)
        title = f"{name}, {'causal' if window is None else f'window of {window}'}"
        lane.check(title, found <= bound, f"error {found:.1e}, allowed {bound:.1e}")
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(varlen, inputs, upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        lane.check(f"no wait for the device, window {window}", True, "forward and backward")


def times(lane: Lane, inputs: list[Tensor], row: int, rounds: int) -> None:
    _, heads, tokens, dim = inputs[0].shape
    sizes = lengths(tokens, row)
    starts = torch.tensor([0, *sizes], device=lane.device).cumsum(0).int()
    module = nn.Module()
    padded = [x.new_zeros(len(sizes), x.shape[1], row, dim).normal_() for x in inputs]

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attend(module, q, k, v, None, cu_seq_lens_q=starts, max_length_q=row)[0]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # as transformers calls it: keys repeated, then transposed
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()

    for name, function, given in (("varlen", varlen, inputs), ("sdpa", sdpa, padded)):
        leaves = [x.detach().clone().requires_grad_() for x in given]

        def forward(function=function, leaves=leaves) -> None:
            with torch.no_grad():
                function(*leaves)

        def both(function=function, leaves=leaves) -> None:
            out = function(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        for title, work in (("forward", forward), ("forward+backward", both)):
            seconds(lane.device, work, 3)
            lane.measure(f"varlen: {title}, {name}", 1e3 * seconds(lane.device, work, rounds), "ms")


def main() -> int:
    args = arguments(__doc__)
    lane = Lane.of(args)
    tokens, row, heads, kv_heads, dim, rounds = (120, 33, 4, 2, 16, 1) if args.dry else (16384, 470, 16, 8, 128, 20)
    with lane.step("varlen"):
        if lacking := attention.missing(lane.device):
            raise ImportError(f"varlen needs {lacking}")
        draw = torch.Generator().manual_seed(0)
        inputs, dtype = [], torch.float32 if args.dry else torch.bfloat16
        for count in (heads, kv_heads, kv_heads):
            inputs.append(torch.randn(1, count, tokens, dim, generator=draw).to(lane.device, dtype))
        upstream = torch.randn(1, tokens, heads, dim, generator=draw).to(lane.device)
        starts = [0, *torch.tensor(lengths(tokens, row)).cumsum(0).tolist()]
        for window in (None, 10 if args.dry else WINDOW):
            compare(lane, inputs, upstream, starts, window)
        times(lane, inputs, row, rounds)
    return lane.finish()


if __name__ == "__main__":
    sys.exit(main())
