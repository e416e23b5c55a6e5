"""Random inputs of the head, runs of it with their gradients, and comparisons of two runs."""

import torch
from atod_kernels import problem
from atod_kernels.names import DIVERGENCES
from hypothesis import strategies as st

SCHEDULES = ("fast", "lean")


def make(tokens, student=(50, 6), teacher=(43, 9), *, seed=0, dtype=torch.float64, scale=1.5, ignored=0.25):
    """Random hidden states, weights and targets; the targets are columns of both vocabularies."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    (vs, hs), (vt, ht) = student, teacher
    case = {
        "student_hidden": scale * normal(tokens, hs),
        "student_weight": normal(vs, hs) / hs**0.5,
        "teacher_hidden": scale * normal(tokens, ht),
    }
    case = {k: v.to(dtype) for k, v in (case | {"teacher_weight": normal(vt, ht) / ht**0.5}).items()}
    target = torch.randint(0, min(vs, vt), (tokens,), generator=g)
    target[torch.rand(tokens, generator=g) < ignored] = -100
    return case | {"target": target}


def close_pair(tokens=24, columns=700, width=32, *, spread=3.0, kl=5e-3, seed=0, dtype=torch.float32):
    """A student near its teacher: logits of standard deviation `spread`, reverse KL about `kl`."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    weight = torch.randn(columns, width, generator=g, dtype=torch.float64) * spread / width**0.5
    moved = weight + torch.randn(columns, width, generator=g, dtype=torch.float64) * (2 * kl / width) ** 0.5
    target = torch.randint(0, columns, (tokens,), generator=g)
    case = {"student_hidden": hidden, "student_weight": weight, "teacher_hidden": hidden, "teacher_weight": moved}
    return {k: v.to(dtype) for k, v in case.items()} | {"target": target}


def as_double(case):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in case.items()}


def run(function, case, seed=0, names=("student_hidden", "student_weight", "student_bias"), **options):
    """Return outputs, and their gradients under a random signed upstream for every token of every differentiable
    output."""
    case = {k: v.detach().clone().requires_grad_() if k in names and v is not None else v for k, v in case.items()}
    out = function(**case, **options)
    g = torch.Generator().manual_seed(seed)
    out = [x for x in out if x is not None]
    upstream = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in out]
    sum((u * x).sum() for u, x in zip(upstream, out, strict=True) if x.requires_grad).backward()
    return [x.detach() for x in out], [case[k].grad for k in names if case.get(k) is not None]


def assert_equal_runs(actual, expected, tolerance=1e-10):
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


problems = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 20),
        "student": st.tuples(st.integers(2, 60), st.integers(1, 9)),
        "teacher": st.tuples(st.integers(2, 60), st.integers(1, 9)),
        "seed": st.integers(0, 2**20),
    }
)
options = st.fixed_dictionaries(
    {
        "divergence": st.sampled_from(DIVERGENCES),
        "alpha": st.sampled_from((0.0, 0.1, 0.5, 1.0)),
        "schedule": st.sampled_from(SCHEDULES),
        "softcap": st.sampled_from((None, 4.0)),
        "teacher_softcap": st.sampled_from((None, 6.0)),
        "teacher_scale": st.sampled_from((1.0, 0.3)),
    }
)


def problem_of(case, divergence="jsd", lean=False, **fields):
    """Return the operators' arguments, without the checks of the public functions."""
    case = {"valid" if k == "valid_columns" else k: v for k, v in case.items()}
    return problem.Problem(**(case | {"kind": divergence, "lean": lean} | fields))
