"""Turn reductions and T-DUR weights against loops over trajectories that are written out."""

import math

import pytest
import torch
from atod_kernels import expand_turns, turn_reduce, turn_weight_report, turn_weights, turns, unweighted
from hypothesis import given, settings
from hypothesis import strategies as st

torch.set_num_threads(1)
FUSE = ("softor", "mean", "max", "product", "disagreement", "uncertainty", "uniform")


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


signal = st.one_of(st.sampled_from((0.0, 0.005, 0.1, 0.5, 2.0)), st.floats(0, 3, width=32))
batches = st.lists(st.lists(st.tuples(signal, signal, st.integers(0, 9)), max_size=7), max_size=5)


def unpack(batch):
    """disagreement, uncertainty, lengths [K] and trajectory offsets of a list of trajectories of (d, h, tokens)."""
    flat = torch.tensor([turn for trajectory in batch for turn in trajectory], dtype=torch.float64).reshape(-1, 3)
    return flat[:, 0].float(), flat[:, 1].float(), flat[:, 2].long(), offsets_of([len(x) for x in batch])


def normalised(values, how):
    """A signal of one scope as plain numbers in [0, 1]."""
    if how == "none":
        return [min(max(v, 0.0), 1.0) for v in values]
    if how == "minmax":
        low, high = min(values), max(values)
        return [0.5 if high - low < 1e-8 else (v - low) / (high - low) for v in values]
    n = len(values)
    below, equal = (
        [sum(test(u, v) for u in values) for v in values] for test in (lambda u, v: u < v, lambda u, v: u == v)
    )
    return [0.5 if n == 1 else (b + (e - 1) / 2) / (n - 1) for b, e in zip(below, equal, strict=True)]


def fused(d, h, fuse):
    return {
        "softor": d + h - d * h,
        "mean": (d + h) / 2,
        "max": max(d, h),
        "product": d * h,
        "disagreement": d,
        "uncertainty": h,
        "uniform": 1.0,
    }[fuse]


def by_hand(batch, normalise, fuse, scope):
    chosen = [
        len(trajectory) >= 3 and max(torch.tensor([t[0] for t in trajectory])).item() >= torch.tensor(0.01).item()
        for trajectory in batch
    ]
    scopes = (
        [[i] for i, c in enumerate(chosen) if c] if scope == "trajectory" else [[i for i, c in enumerate(chosen) if c]]
    )
    weights = [[1.0] * len(trajectory) for trajectory in batch]
    for members in scopes:
        turns_of = [(i, k) for i in members for k in range(len(batch[i]))]
        if turns_of:
            d, h = (normalised([torch.tensor(batch[i][k][s]).item() for i, k in turns_of], normalise) for s in (0, 1))
            for (i, k), dk, hk in zip(turns_of, d, h, strict=True):
                weights[i][k] = fused(dk, hk, fuse)
    return torch.tensor([w for trajectory in weights for w in trajectory])


def test_the_papers_worked_example():
    d = torch.tensor([0.101, 0.228, 0.022, 0.019, 0.138])
    h = torch.tensor([0.037, 0.025, 0.010, 0.006, 0.008])
    weights = turn_weights(d, h, torch.tensor([0, 5]))
    assert weights.dtype == torch.float32
    for w, paper in zip(weights.tolist(), (1.0, 1.0, 0.142, 0.0, 0.597), strict=True):
        assert math.isclose(w, paper, abs_tol=6e-4)


@settings(max_examples=80, deadline=None)
@given(
    batch=batches,
    normalise=st.sampled_from(turns.NORMALISE),
    fuse=st.sampled_from(FUSE),
    scope=st.sampled_from(("trajectory", "batch")),
)
def test_every_member_of_the_family_equals_the_loop_over_trajectories(batch, normalise, fuse, scope):
    d, h, _, offsets = unpack(batch)
    weights = turn_weights(d, h, offsets, normalise=normalise, fuse=fuse, scope=scope)
    torch.testing.assert_close(weights, by_hand(batch, normalise, fuse, scope), atol=2e-6, rtol=0)
    assert weights.numel() == 0 or (0 <= weights.min() and weights.max() <= 1)


def test_short_or_agreeing_trajectories_keep_weight_one_and_are_reported():
    d = torch.tensor([0.5, 0.1, 0.009, 0.008, 0.001, 0.4, 0.1, 0.2])
    offsets = offsets_of([2, 3, 3])
    report = turn_weight_report(d, d, offsets)
    assert report.unweighted.tolist() == [True, True, False]
    assert torch.equal(report.unweighted, unweighted(d, offsets))
    assert report.weights[:5].tolist() == [1.0] * 5 and report.weights[5:].tolist() == [
        1.0,
        0.0,
        pytest.approx(1 - (2 / 3) ** 2, abs=1e-6),
    ]
    assert not turn_weight_report(d, d, offsets, min_turns=2, min_disagreement=0.005).unweighted.any()


def test_a_flat_signal_is_one_half():
    weights = turn_weights(
        torch.tensor([0.1, 0.2, 0.3]), torch.full((3,), 0.7), torch.tensor([0, 3]), fuse="uncertainty"
    )
    assert weights.tolist() == [0.5] * 3


def test_weights_are_detached():
    d = torch.rand(4, requires_grad=True)
    assert not turn_weights(d, d, torch.tensor([0, 4])).requires_grad


@settings(max_examples=80, deadline=None)
@given(
    batch=batches,
    fuse=st.sampled_from(FUSE),
    scope=st.sampled_from(("trajectory", "batch")),
    clip=st.sampled_from(((0.5, 2.0), (0.0, 1.3), (1.0, 1.0))),
)
def test_mean1_has_token_weighted_mean_one_in_every_scope(batch, fuse, scope, clip):
    """Where no scale gives it, the weights are 1 and its mean is 1 as well; a fallback is reported only then."""
    d, h, lengths, offsets = unpack(batch)
    report = turn_weight_report(d, h, offsets, fuse=fuse, scope=scope, budget="mean1", turn_lengths=lengths, clip=clip)
    raw = turn_weights(d, h, offsets, fuse=fuse, scope=scope)
    weighted = [i for i in range(len(batch)) if not report.unweighted[i]]
    scopes = [[i] for i in weighted] if scope == "trajectory" else [weighted] if weighted else []
    for members in scopes:
        at = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in members])
        w, raw_w, n = report.weights[at].double(), raw[at].double(), lengths[at].double()
        if n.sum() > 0:
            assert math.isclose((w * n).sum() / n.sum(), 1, abs_tol=1e-6)
        assert w.min() >= clip[0] - 1e-6 and w.max() <= clip[1] + 1e-6
        order = raw_w.argsort()
        assert (w[order].diff() >= -1e-6).all()  # the order of the turns is kept
        reachable = (
            n.sum() > 0 and raw_w.max() > 0 and (n * torch.where(raw_w > 0, *clip[::-1])).sum() >= n.sum() * (1 - 1e-12)
        )
        assert report.fallback[members].tolist() == [not reachable] * len(members)
        if not reachable:
            assert (w == 1).all()
    assert not report.fallback[report.unweighted].any()


def test_mean1_falls_back_where_one_short_turn_would_have_to_carry_all():
    d = h = torch.tensor([0.0, 0.0, 0.0, 1.0])
    lengths = torch.tensor([10, 10, 10, 1])
    report = turn_weight_report(d, h, torch.tensor([0, 4]), budget="mean1", turn_lengths=lengths)
    assert report.fallback.tolist() == [True] and report.weights.tolist() == [1.0] * 4
    report = turn_weight_report(d, h, torch.tensor([0, 4]), budget="mean1", turn_lengths=lengths.flip(0))
    assert report.fallback.tolist() == [True]  # 30 tokens at 1/2 and one turn of 10 at 2 end below 1 too
    report = turn_weight_report(d, h, torch.tensor([0, 4]), budget="mean1", turn_lengths=torch.tensor([5, 5, 5, 20]))
    assert report.fallback.tolist() == [False]
    assert report.weights.tolist() == pytest.approx([0.5, 0.5, 0.5, 27.5 / 20])


def test_shuffled_is_a_permutation_within_each_trajectory_drawn_from_the_generator():
    d, h = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)).unbind()
    offsets = offsets_of([20, 2, 38])

    def draw(seed, scope="trajectory"):
        return turn_weights(d, h, offsets, fuse="shuffled", scope=scope, generator=torch.Generator().manual_seed(seed))

    softor = turn_weights(d, h, offsets)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1)) and not torch.equal(draw(0), softor)
    for a, b in ((0, 20), (20, 22), (22, 60)):
        assert torch.equal(draw(0)[a:b].sort().values, softor[a:b].sort().values)
    batch = turn_weights(d, h, offsets, scope="batch")
    mixed = draw(0, "batch")
    assert torch.equal(mixed.sort().values, batch.sort().values) and (mixed[20:22] == 1).all()
    assert not torch.equal(mixed[:20].sort().values, batch[:20].sort().values)


def test_no_trajectory_and_no_turn():
    nothing = torch.empty(0)
    assert turn_weights(nothing, nothing, torch.tensor([0])).shape == (0,)
    report = turn_weight_report(
        nothing, nothing, torch.tensor([0, 0]), scope="batch", budget="mean1", turn_lengths=nothing
    )
    assert report.weights.shape == (0,) and report.unweighted.tolist() == [True]


segments = st.lists(st.lists(st.integers(-3, 3), max_size=6), max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=segments, reduce=st.sampled_from(turns.REDUCTIONS))
def test_turn_reduce_equals_the_loop_over_turns(rows, reduce):
    values = torch.tensor([float(v) for row in rows for v in row], requires_grad=True)
    offsets = offsets_of([len(row) for row in rows])
    by_loop = {"sum": sum, "max": max, "min": min, "mean": lambda row: sum(row) / len(row)}[reduce]
    out = turn_reduce(values, offsets, reduce)
    torch.testing.assert_close(out, torch.tensor([float(by_loop(row)) if row else 0.0 for row in rows]))
    upstream = torch.arange(1.0, len(rows) + 1)
    (out * upstream).sum().backward()
    expected = []
    for row, g in zip(rows, upstream.tolist(), strict=True):
        best = by_loop(row) if row and reduce in ("max", "min") else None
        share = {"sum": 1, "mean": 1 / max(len(row), 1)}.get(reduce, 1 / max(row.count(best), 1))
        expected += [g * share if best is None or v == best else 0.0 for v in row]
    torch.testing.assert_close(values.grad, torch.tensor(expected))


@pytest.mark.parametrize("reduce", turns.REDUCTIONS)
def test_turn_reduce_passes_gradcheck_and_opcheck_and_compiles(reduce):
    values = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 4, 9])
    assert torch.autograd.gradcheck(lambda v: turn_reduce(v, offsets, reduce), values)
    torch.library.opcheck(turns._turn_reduce, (values, offsets, reduce))
    compiled = torch.compile(turn_reduce, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, offsets, reduce), turn_reduce(values, offsets, reduce))


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), max_size=8))
def test_expand_turns_undoes_the_mean_and_its_gradient_is_the_sum(lengths):
    offsets = offsets_of(lengths)
    values = torch.arange(1.0, len(lengths) + 1, requires_grad=True)
    tokens = expand_turns(values, offsets)
    assert tokens.tolist() == [i + 1.0 for i, n in enumerate(lengths) for _ in range(n)]
    assert torch.equal(
        turn_reduce(tokens.detach(), offsets), values.detach().masked_fill(torch.tensor(lengths) == 0, 0)
    )
    tokens.sum().backward()
    assert values.grad.tolist() == lengths


def weigh(**changes):
    arguments = {
        "disagreement": torch.rand(5),
        "uncertainty": torch.rand(5),
        "trajectory_offsets": torch.tensor([0, 2, 5]),
    }
    return turn_weights(**(arguments | changes))


bad = {
    "disagreement has shape": lambda: weigh(disagreement=torch.rand(5, 1)),
    r"uncertainty has shape \[4\]; expected \[5\]": lambda: weigh(uncertainty=torch.rand(4)),
    "uncertainty is torch.int64": lambda: weigh(uncertainty=torch.ones(5, dtype=torch.int64)),
    "turn_lengths has shape": lambda: weigh(turn_lengths=torch.ones(3), budget="mean1"),
    "turn_lengths is None": lambda: weigh(budget="mean1"),
    r"trajectory_offsets\[-1\] is 4; expected 5": lambda: weigh(trajectory_offsets=torch.tensor([0, 4])),
    "trajectory_offsets is torch.float32": lambda: weigh(trajectory_offsets=torch.tensor([0.0, 5.0])),
    "normalise is 'zscore'": lambda: weigh(normalise="zscore"),
    "fuse is 'sum'": lambda: weigh(fuse="sum"),
    "budget is 'mean'": lambda: weigh(budget="mean"),
    "scope is 'group'": lambda: weigh(scope="group"),
    "clip is": lambda: weigh(clip=(1.5, 2.0)),
    "generator is None": lambda: weigh(fuse="shuffled"),
    "values is torch.bfloat16": lambda: turn_reduce(torch.zeros(3).bfloat16(), torch.tensor([0, 3])),
    "reduce is 'median'": lambda: turn_reduce(torch.zeros(3), torch.tensor([0, 3]), "median"),
    "offsets is empty": lambda: turn_reduce(torch.zeros(3), torch.empty(0, dtype=torch.int64)),
    r"offsets\[0\] is 1": lambda: turn_reduce(torch.zeros(3), torch.tensor([1, 3])),
    "offsets is not sorted": lambda: turn_reduce(torch.zeros(3), torch.tensor([0, 5, 3])),
    r"offsets\[-1\] is 2; expected 3, the length of values": lambda: turn_reduce(torch.zeros(3), torch.tensor([0, 2])),
    "offsets is on meta": lambda: turn_reduce(torch.zeros(3), torch.tensor([0, 3], device="meta")),
    r"offsets has shape \[2\]; expected \[4\]": lambda: expand_turns(torch.zeros(3), torch.tensor([0, 3])),
}


@pytest.mark.parametrize("message", bad)
def test_a_bad_argument_is_named(message):
    with pytest.raises(ValueError, match=message):
        bad[message]()


def test_offsets_made_under_inference_mode_are_taken_like_any_other():
    values = torch.arange(5.0, requires_grad=True)
    with torch.inference_mode():
        offsets = torch.tensor([0, 2, 5])
    (gradient,) = torch.autograd.grad(turn_reduce(values, offsets, "mean").sum(), values)
    assert torch.equal(gradient, torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))
