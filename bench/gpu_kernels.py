"""Check every kernel on a GPU, and time it: the parts `kernels` and `times` of `gpu_lane.py`.

    python bench/gpu_kernels.py --out kernels.json               # both
    python bench/gpu_kernels.py --dry --only checks              # at tiny sizes on the CPU in Triton's interpreter

Checks compare with torch in fp64 on the same rounded inputs: a student close to the teacher (KL 1e-3 to 1e-2), logits
of standard deviation 2 and 30, random signed upstream gradients on all outputs at once, ragged sizes, vocabularies
that differ either way, ignored tokens. Errors are relative, in the 2-norm. A value passes if its error is at most
twice that of plain torch in fp32, plus 2e-4. A gradient passes within 4e-3 (16-bit inputs) or 2e-4 (fp32); at a
standard deviation of 30, where rounding to fp32 alone moves logits by 1e-5, twice torch's own fp32 error is added. For
bf16 the interpreter is allowed twice as much, because it truncates where a GPU rounds.

Then it measures times (median of ten, cold cache) and peak memory of the contenders of `head.py` at --shape. A step
that fails is reported and the others run, unless the failure took the device down: then they are skipped. Exit 0 if
all checks pass, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from atod_kernels import algebra, linear_divergence, linear_token_loss, naive, problem, turns
from atod_kernels.names import DIVERGENCES, REDUCTIONS
from lane import Lane, arguments
from torch import Tensor

GRADIENT_BOUND = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 4e-3}
VALUE_EPS = 2e-4
OUTPUTS = ("divergence", "entropy", "logp", "teacher_logp", "teacher_entropy", "d hidden", "d weight", "d bias")


@dataclass(frozen=True)
class Case:
    """One comparison; the lane scales its sizes."""

    kind: str
    schedule: str
    dtype: torch.dtype
    spread: float = 2.0  # standard deviation of the logits
    options: bool = False  # bias, softcap, temperature, valid columns
    target: bool = True
    wider: str = "student"  # the model with the larger vocabulary

    def __str__(self) -> str:
        extra = [f"{self.wider} wider"] + ["options"] * self.options + ["no target"] * (not self.target)
        return (
            f"{self.kind} {self.schedule} {str(self.dtype).removeprefix('torch.')} std {self.spread:g} "
            f"({', '.join(extra)})"
        )


def cases(interpreted: bool) -> Iterator[Case]:
    for schedule in ("fast", "lean"):
        for kind in DIVERGENCES:
            yield Case(kind, schedule, torch.bfloat16, options=kind == "jsd")
            yield Case(
                kind,
                schedule,
                torch.float32,
                spread=2.0 if interpreted else 30.0,
                options=kind == "reverse_kl",
                wider="teacher",
            )
        yield Case("reverse_kl", schedule, torch.bfloat16, spread=30.0, target=False)
        if not interpreted:
            for kind in DIVERGENCES:
                yield Case(kind, schedule, torch.bfloat16, spread=30.0, options=True, wider="teacher")
            yield Case("reverse_kl", schedule, torch.float16, options=True)


@dataclass(frozen=True)
class Inputs:
    tensors: dict[str, Tensor]  # the tensor arguments of linear_divergence
    options: dict[str, Any]  # its other arguments
    upstream: Tensor  # [3, T], gradients by divergence, entropy and logp


def make(case: Case, device: torch.device, interpreted: bool, seed: int = 0) -> Inputs:
    """Return inputs whose teacher shares the student's features and weights, plus 8 (GPU: 64) of its own that change
    its logits by 0.1."""
    g = torch.Generator().manual_seed(seed)
    t, v, h, more = (9, 83, 24, 8) if interpreted else (777, 20011, 256, 64)
    hidden, weight = torch.randn(t, h + more, generator=g), torch.randn(v + 13, h + more, generator=g)
    weight[:, :h] *= case.spread / h**0.5
    weight[:, h:] *= 0.1 / more**0.5
    hidden, weight = hidden.to(case.dtype), weight.to(case.dtype)
    sizes = (v + 13, v) if case.wider == "student" else (v, v + 13)
    tensors = {
        "student_hidden": hidden[:, :h],
        "student_weight": weight[: sizes[0], :h],
        "teacher_hidden": hidden,
        "teacher_weight": weight[: sizes[1]],
    }
    valid = torch.ones(v, dtype=torch.bool)
    options: dict[str, Any] = {"divergence": case.kind, "alpha": 0.3}
    if case.options:
        valid[3:17] = False
        bias = torch.randn(v + 13, generator=g).to(case.dtype)
        tensors |= {
            "student_bias": bias[: sizes[0]],
            "teacher_bias": bias[: sizes[1]],
            "temperature": torch.rand(t, generator=g) + 0.5,
            "valid_columns": valid,
        }
        options |= {"softcap": 2 * case.spread, "teacher_softcap": 2 * case.spread}
    if case.target:
        target = torch.randint(17, v, (t,), generator=g)
        target[torch.rand(t, generator=g) < 0.2] = -100
        tensors["target"] = target
    tensors = {k: x.clone(memory_format=torch.contiguous_format).to(device) for k, x in tensors.items()}
    return Inputs(tensors, options, torch.randn(3, t, generator=g).to(device))


def plain(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str,
    alpha: float,
    temperature: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    valid_columns: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute linear_divergence in plain torch, the reference and yardstick: products in the inputs' dtype, the rest
    in fp32 (fp64 for fp64)."""
    columns = min(len(student_weight), len(teacher_weight))

    def log_probabilities(x: Tensor, w: Tensor, bias: Tensor | None, cap: float | None) -> Tensor:
        z = x @ w[:columns].T
        z = z if z.dtype == torch.float64 else z.float()
        z = z if bias is None else z + bias[:columns]
        z = z if cap is None else cap * torch.tanh(z / cap)
        z = z if temperature is None else z / temperature[:, None]
        return (z if valid_columns is None else z[:, valid_columns]).log_softmax(-1)

    log_p = log_probabilities(student_hidden, student_weight, student_bias, softcap)
    with torch.no_grad():
        log_q = log_probabilities(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
    local = target
    if target is not None and valid_columns is not None:
        local = (valid_columns.cumsum(0) - 1)[target.clamp(min=0)]
    entropy, teacher_entropy = naive.entropy_of(log_p), naive.entropy_of(log_q)
    logp, teacher_logp = (None if local is None else naive.sampled(x, local) for x in (log_p, log_q))
    out = (naive.divergence_of(log_p, log_q, divergence, alpha), entropy, logp, teacher_logp, teacher_entropy)
    return tuple(x if x is None or target is None else x.masked_fill(target == -100, 0) for x in out)


def results(
    function: Callable[..., Any], inputs: Inputs, dtype: torch.dtype | None = None, **more: Any
) -> list[Tensor | None]:
    """Return the outputs, then the gradients of hidden, weight and bias for the upstream gradients. `dtype` converts
    the inputs first."""
    tensors = {k: x.to(dtype) if dtype and x.is_floating_point() else x for k, x in inputs.tensors.items()}
    tensors = {k: x.detach().clone().requires_grad_(k.startswith("student")) for k, x in tensors.items()}
    out = function(**tensors, **inputs.options, **more)
    sum((u.to(x.dtype) * x).sum() for u, x in zip(inputs.upstream, out[:3], strict=True) if x is not None).backward()
    parameters = [tensors.get(f"student_{name}") for name in ("hidden", "weight", "bias")]
    return [None if x is None else x.detach() for x in out] + [None if x is None else x.grad for x in parameters]


def token_loss(upstream: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
    """Call linear_token_loss with a loss whose gradients by the statistics are `upstream` [3, T]."""
    keys = ("divergence", "entropy", "logp")

    def loss_fn(stats: Any, rows: Tensor) -> Tensor:
        return sum(u * x for u, x in zip(rows.T, (getattr(stats, k) for k in keys), strict=True) if x is not None)

    return linear_token_loss(loss_fn, inputs={"rows": upstream.T.contiguous()}, **arguments)


def error(a: Tensor, b: Tensor) -> float:
    """Return the relative error in the 2-norm, or inf if it is not finite."""
    value = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
    return value if math.isfinite(value) else math.inf


def compare(lane: Lane, name: str, got: list[Tensor | None], inputs: Inputs, case: Case) -> None:
    reference = results(plain, inputs, torch.float64)
    single = results(plain, inputs, torch.float32)
    worst, passed = [], True
    for label, a, b, d in zip(OUTPUTS, got, reference, single, strict=True):
        if b is None:
            continue
        ours, torchs = error(a, b), error(d, b)
        bound = 2 * torchs + VALUE_EPS
        if label.startswith("d "):
            bound = GRADIENT_BOUND[case.dtype] + (2 * torchs if case.spread > 2 else 0)
            if lane.device.type == "cpu" and case.dtype == torch.bfloat16:
                bound *= 2  # the interpreter truncates to bf16 where a GPU rounds
        passed &= ours <= bound
        worst.append((ours / bound, f"{label} {ours:.1e} (bound {bound:.1e}, torch {torchs:.1e})"))
    kl = float(reference[0].mean())
    lane.check(name, passed, f"worst: {max(worst)[1]}; mean divergence {kl:.1e}")


def correctness(lane: Lane, interpreted: bool) -> None:
    for case in cases(interpreted):
        if not lane.ready(str(case)):
            continue
        with lane.step(str(case)):
            inputs = make(case, lane.device, interpreted)
            got = results(linear_divergence, inputs, schedule=case.schedule, backend="triton")
            compare(lane, str(case), got, inputs, case)
            if not interpreted or case.kind == "jsd":
                again = results(linear_divergence, inputs, schedule=case.schedule, backend="triton")
                equal = all(a is b or torch.equal(a, b) for a, b in zip(got, again, strict=True))
                lane.check(f"{case}: run to run", equal, "equal to the last bit" if equal else "differs")
    for kind, schedule, dtype in (
        ("reverse_kl", "fast", torch.bfloat16),
        ("jsd", "fast", torch.float32),
        ("forward_kl", "lean", torch.bfloat16),
    ):
        case = Case(kind, schedule, dtype)
        if not lane.ready(f"token loss {case}"):
            continue
        with lane.step(f"token loss {case}"):
            inputs = make(case, lane.device, interpreted)
            leaves = {k: x.detach().clone().requires_grad_(k.startswith("student")) for k, x in inputs.tensors.items()}
            loss, stats = token_loss(inputs.upstream, **leaves, **inputs.options, schedule=schedule, backend="triton")
            loss.backward()
            compare(
                lane,
                f"token loss {case}",
                [*stats, leaves["student_hidden"].grad, leaves["student_weight"].grad, None],
                inputs,
                case,
            )


def single_model(lane: Lane, interpreted: bool, target: Tensor | None, lean: bool) -> problem.Problem:
    """Return a problem of a student alone, with logits of standard deviation 30; skips the public functions' checks."""
    inputs = make(Case("reverse_kl", "lean", torch.bfloat16, spread=30.0), lane.device, interpreted)
    hidden, weight = inputs.tensors["student_hidden"], inputs.tensors["student_weight"]
    return problem.Problem(hidden, weight, target=target, lean=lean, triton=True)


def recompute(lane: Lane, interpreted: bool) -> None:
    """Check that the fused gradient recomputes the forward's logits exactly: at a row's largest logit u = z - max is 0
    to the last bit, so that p is exp(-log S)."""
    from atod_kernels.triton import backend

    p = single_model(lane, interpreted, None, lean=True)
    stats = backend.head_statistics(p)
    t, v = p.tokens, p.columns
    upstream = torch.zeros(3, t, device=lane.device)
    upstream[1] = 1  # entropy: the gradient is -p (u - log S + entropy), at u = 0 p (log S - entropy)
    fused = backend.Fused(p)
    dz = torch.empty(t, v, device=lane.device)
    for rows in (slice(0, t // 3), slice(t // 3, t)):  # blocks other than the forward's
        for columns in (slice(0, v // 2), slice(v // 2, v)):
            tile = torch.empty_like(
                dz[rows, columns], memory_format=torch.contiguous_format
            )  # a buffer of its own: the kernel writes whole rows
            dz[rows, columns] = fused.gradient(rows, columns, tile, stats, upstream)
    logits = p.student_hidden.double() @ p.student_weight.double().T
    at = logits.argmax(1)
    sure = logits.topk(2).values.diff(dim=1)[:, 0].abs() > 1e-3
    entropy, log_s = stats[algebra.ENTROPY].double(), stats[algebra.LOG_S].double()
    expected = (log_s - entropy) * (-log_s).exp()
    got = dz.gather(1, at[:, None])[:, 0].double()
    slack = (
        4e-7 * (log_s.abs() + entropy.abs()) + 1e-9
    )  # of fp32 in this formula; a logit off by its last bit moves the result by 4e-6 p
    off = ((got - expected).abs() / slack)[sure].max().item()
    lane.check(
        "fused recompute equals its forward",
        off <= 1,
        f"{int(sure.sum())} rows, largest difference {off:.2f} of what rounding allows",
    )


def out_of_range(lane: Lane, interpreted: bool) -> None:
    from atod_kernels.triton import backend

    for lean in (False, True):
        p = single_model(lane, interpreted, None, lean)
        target = torch.full((p.tokens,), 1, device=lane.device)
        target[2], target[3] = p.columns, -100
        p = single_model(lane, interpreted, target, lean)
        stats = backend.head_statistics(p)
        logp = stats[algebra.LOGP].isnan().cpu()
        upstream = torch.ones(3, p.tokens, device=lane.device)
        dx, _, _ = backend.head_gradients(p, stats, upstream, True, True, False)
        passed = bool(logp[2]) and int(logp.sum()) == 1 and not dx[2:4].any() and bool(dx.isfinite().all())
        lane.check(
            f"target out of range, {'lean' if lean else 'fast'}",
            passed,
            f"NaN in {logp.nonzero()[:, 0].tolist()}, expected [2]; no gradient there",
        )


def turn_kernels(lane: Lane, interpreted: bool) -> None:
    from atod_kernels.triton import turns as triton_turns

    g = torch.Generator().manual_seed(0)
    count = 12 if interpreted else 5000
    lengths = torch.randint(0, 300, (count,), generator=g)
    lengths[1] = 0
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    values, upstream = torch.randn(int(offsets[-1]), generator=g), torch.randn(count, generator=g)
    there = [x.to(lane.device) for x in (values, offsets, upstream)]
    for reduce in REDUCTIONS:
        leaf = values.double().requires_grad_()
        expected = turns.turn_reduce(leaf, offsets, reduce)
        expected.backward(upstream.double())
        got = triton_turns.turn_reduce(there[0], there[1], reduce)
        dx = triton_turns.turn_reduce_backward(there[2], there[0], there[1], got, reduce)
        errors = error(got.cpu(), expected.detach()), error(dx.cpu(), leaf.grad)
        equal = torch.equal(got, triton_turns.turn_reduce(there[0], there[1], reduce))
        lane.check(
            f"turn_reduce {reduce}",
            max(errors) < 1e-6 and equal,
            f"value {errors[0]:.1e}, gradient {errors[1]:.1e}, run to run {'equal' if equal else 'differs'}",
        )
    trajectories = torch.tensor([0, 2, 7, 7, count])
    d, h, n = torch.rand(count, generator=g), torch.rand(count, generator=g), lengths
    for budget in ("raw", "mean1"):
        for fuse in ("softor", "product"):
            expected = turns.turn_weight_report(d, h, trajectories, turn_lengths=n, budget=budget, fuse=fuse)
            arguments = [x.to(lane.device) for x in (d, h, trajectories)]
            lengths = n.to(lane.device) if budget == "mean1" else None
            options = {
                "normalise": "minmax",
                "fuse": fuse,
                "clip": (0.5, 2.0),
                "min_turns": 3,
                "min_disagreement": 0.01,
            }
            weights, left, fallback = triton_turns.turn_weights(*arguments, lengths, **options)
            same = torch.equal(left.cpu(), expected.unweighted) and torch.equal(fallback.cpu(), expected.fallback)
            off = error(weights.cpu(), expected.weights)
            lane.check(
                f"turn_weights {budget} {fuse}",
                off < 1e-6 and same,
                f"weights {off:.1e}, flags {'equal' if same else 'differ'}",
            )


def timing(lane: Lane, sizes: str, dtype: torch.dtype) -> None:
    """Measure the contenders of `head.py` at one shape: ours, the bare products, the installed peers; compiled ones
    last."""
    import head

    shape = head.Shape.parse(sizes)
    inputs = head.make_inputs(shape, "cuda", dtype)
    found = sorted(
        head.contenders("cuda").items(),
        key=lambda item: (item[1].compiled, item[1].role not in ("ours", "floor"), item[1].role != "floor"),
    )
    for which in (head.BOTH, head.FORWARD):
        for name, contender in found:
            if which not in contender.passes:
                continue
            if not lane.ready(f"{name}, {which}"):
                continue
            with lane.step(f"{name}, {which}"):
                try:
                    loss = contender.load()
                    milliseconds = sorted(head.samples(loss, inputs, which))
                    peak = head.peak_cuda(loss, inputs, which)
                except torch.OutOfMemoryError:
                    raise ImportError("not enough memory for it") from None
                finally:
                    head.clear(inputs)
                    torch.cuda.empty_cache()
                row = {
                    "pass": which,
                    "contender": name,
                    "role": contender.role,
                    "milliseconds": milliseconds[len(milliseconds) // 2],
                    "peak_mib": peak,
                }
                lane.times.append(row)
                lane.save()
                print(f"timed   {name}, {which}: {row['milliseconds']:.1f} ms, {peak:.0f} MiB", flush=True)


def table(lane: Lane) -> str:
    """Return the times relative to the bare products of the same pass, and the failed checks."""
    lines = []
    for which in dict.fromkeys(row["pass"] for row in lane.times):
        rows = [row for row in lane.times if row["pass"] == which]
        floor = min((row["milliseconds"] for row in rows if row["role"] == "floor"), default=math.nan)
        lines += [f"\n{which:48} {'ms':>8} {'x floor':>8} {'MiB':>8}"]
        lines += [
            f"{row['contender']:48} {row['milliseconds']:8.1f} {row['milliseconds'] / floor:8.2f} "
            f"{row['peak_mib']:8.0f}"
            for row in rows
        ]
    passed = sum(check["passed"] for check in lane.checks)
    lines.append(
        f"\nchecks: {passed} of {len(lane.checks)} passed; failures: {len(lane.failures)}; skipped: {len(lane.skipped)}"
    )
    lines += [f"  FAILED {text}" for text in lane.failures] + [f"  skipped {text}" for text in lane.skipped]
    return "\n".join(lines)


def main() -> int:
    args = arguments(
        __doc__,
        only={"choices": ("checks", "times"), "help": "default: both"},
        shape={"default": "8192,151936,2048,4096", "help": "tokens,columns,student_hidden,teacher_hidden of the times"},
        dtype={"choices": ("bfloat16", "float16"), "default": "bfloat16"},
    )
    if args.dry:
        torch.set_num_threads(1)
        problem.TILE["cpu"] = (16, 48)
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # from numpy, for intended infinities and NaN
    lane = Lane.of(args)
    if args.only != "times":
        for name, run in (
            ("recompute", recompute),
            ("out of range", out_of_range),
            ("turns", turn_kernels),
            ("correctness", correctness),
        ):
            if lane.ready(name):
                with lane.step(name):
                    run(lane, args.dry)
    if args.only != "checks" and not args.dry and lane.ready("times"):
        with lane.step("times"):
            timing(lane, args.shape, getattr(torch, args.dtype))
    print(table(lane), flush=True)
    return lane.finish()


if __name__ == "__main__":
    sys.exit(main())
