"""The Triton backend in Triton's interpreter, against an fp64 reference on the same rounded inputs. It is slow: small
shapes.
"""

import importlib.util
import itertools

import pytest
import torch
from atod_kernels import (
    algebra,
    linear_divergence,
    linear_logprob,
    linear_token_loss,
    naive,
    operators,
    problem,
    turn_reduce,
    turn_weight_report,
    turns,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.gloo import run_ranks
from helpers.head import (
    DIVERGENCES,
    SCHEDULES,
    as_double,
    assert_equal_runs,
    close_pair,
    make,
    problem_of,
    problems,
    relative,
    run,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # log and division in lanes beyond the last row
]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Two tiles of tokens and of columns, the second ragged."""
    monkeypatch.setitem(problem.TILE, "cpu", (6, 48))


def triton(case, **options):
    return run(linear_divergence, case, backend="triton", **options)


def reference(case, **options):
    return run(naive.linear_divergence, as_double(case), **options)


@pytest.mark.parametrize("schedule, divergence", list(itertools.product(SCHEDULES, DIVERGENCES)))
def test_near_the_teacher_values_and_gradients_equal_the_reference(schedule, divergence):
    """KL about 5e-3, ragged tokens and columns, a masked row, random signed upstream on all outputs at once."""
    case = close_pair(tokens=9, columns=75, width=12)
    case["teacher_weight"] = case["teacher_weight"][:70]
    case["target"] = case["target"].clamp(max=69)
    case["target"][4] = -100
    (out, grads), (expected, gradients) = (
        triton(case, divergence=divergence, alpha=0.3, schedule=schedule),
        reference(case, divergence=divergence, alpha=0.3),
    )
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-4)
    assert max(relative(a, b) for a, b in zip(grads, gradients, strict=True)) < 2e-4


@pytest.mark.parametrize("width", (8, 12, 9))
def test_operands_through_descriptors(width, monkeypatch):
    """As on sm_90 and later: a hidden size of whole blocks, a padded one, and one whose rows no descriptor can
    describe."""
    configs = pytest.importorskip("atod_kernels.triton.configs")
    monkeypatch.setitem(configs.INTERPRETER, "fused", configs.INTERPRETER["fused"] | {"TMA": True, "BK": 8})
    case = make(5, student=(50, width), teacher=(45, 8), dtype=torch.float32)
    assert_equal_runs([[x.double() for x in part] for part in triton(case, schedule="lean")], reference(case), 2e-5)


@settings(max_examples=8, deadline=None)
@given(
    problem=problems,
    schedule=st.sampled_from(SCHEDULES),
    divergence=st.sampled_from(DIVERGENCES),
    alpha=st.sampled_from((0.0, 0.3, 1.0)),
)
def test_any_shape(problem, schedule, divergence, alpha):
    case = make(**problem | {"tokens": min(problem["tokens"], 8)}, dtype=torch.float32)
    actual, expected = (
        triton(case, divergence=divergence, alpha=alpha, schedule=schedule),
        reference(case, divergence=divergence, alpha=alpha),
    )
    assert_equal_runs([[x.double() for x in part] for part in actual], expected, 2e-5)


@pytest.mark.parametrize(
    "schedule, divergence",
    (("fast", "reverse_kl"), ("lean", "reverse_kl"), ("fast", "skew_forward_kl"), ("lean", "jsd")),
)
def test_bf16_operands_cost_the_rounding_of_the_results(schedule, divergence):
    """Logits stay fp32: the gradients are as near to fp64 on the rounded inputs as rounding them to bf16 allows."""
    case = close_pair(tokens=9, columns=75, width=16, dtype=torch.bfloat16)
    (out, grads), (expected, gradients) = (
        triton(case, schedule=schedule, divergence=divergence),
        reference(case, divergence=divergence),
    )
    torch.testing.assert_close(out[0].double(), expected[0], atol=2e-6, rtol=2e-4)
    assert max(relative(a, b) for a, b in zip(grads, gradients, strict=True)) < 4e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_small_gradients_of_fp16_are_not_lost(schedule):
    """Those of logits are about 1e-9, below the smallest fp16 number; hidden states of 1e6 scale results up again."""
    case = make(9, student=(60, 8), teacher=(60, 8), dtype=torch.float16)
    case["student_hidden"] = case["student_hidden"].requires_grad_()

    def gradient(case, **options):
        out = linear_divergence(**case, **options)
        return torch.autograd.grad(1e-7 * out.divergence.sum(), case["student_hidden"])[0]

    reference = gradient(case | {"backend": "torch"})
    assert reference.count_nonzero() > 0
    torch.testing.assert_close(gradient(case, backend="triton", schedule=schedule), reference, atol=6e-8, rtol=2e-2)


options = {
    "everything": {"temperature": 0.7, "softcap": 5.0, "teacher_softcap": 4.0, "teacher_scale": 1.7},
    "per token": {"temperature": torch.linspace(0.5, 2, 9), "softcap": 5.0},
    "no target": {"target": None},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("option", options)
def test_options(option, schedule):
    case = make(9, student=(60, 8), teacher=(75, 5), dtype=torch.float32) | options[option]
    case["student_bias"], case["teacher_bias"] = torch.linspace(-1, 1, 60), torch.linspace(1, -1, 75)
    case["valid_columns"] = (torch.arange(60) % 7 != 3) | (torch.arange(60) == 59)
    if case["target"] is not None:
        case["target"] = torch.where(
            case["valid_columns"][case["target"].clamp(min=0)] | (case["target"] < 0), case["target"], 0
        )
    divergence = "jsd" if option == "everything" else "forward_kl"
    expected = reference(case, divergence=divergence)
    actual = triton(case, divergence=divergence, schedule=schedule)
    assert_equal_runs([[x.double() for x in part] for part in actual], expected, 2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strided_operands_and_models_of_two_dtypes(schedule):
    """Column slices of larger tensors and expanded scalars: kernels read pointers, so strides are resolved before the
    launch."""
    case = make(7, student=(40, 8), teacher=(40, 5), dtype=torch.float32)
    case |= {k: case[k].bfloat16() for k in ("teacher_hidden", "teacher_weight")}
    case |= {
        "student_bias": torch.linspace(-1, 1, 40),
        "teacher_bias": torch.tensor(0.5).expand(40),
        "valid_columns": torch.ones(40, dtype=torch.bool),
    }
    case |= {"temperature": torch.tensor(0.7).expand(7), "softcap": 5.0}
    strided = case | {
        k: torch.stack((case[k], case[k].roll(1)), -1)[..., 0]
        for k in ("student_hidden", "student_bias", "target", "valid_columns")
    }
    assert not strided["target"].is_contiguous()
    expected = triton(case, schedule=schedule)
    assert_equal_runs(triton(strided, schedule=schedule), expected, 0)
    assert_equal_runs([[x.double() for x in part] for part in expected], reference(case), 2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_bias_of_minus_infinity_is_a_probability_of_zero(schedule):
    """Also for a whole tile, the first one included."""
    case = make(5, student=(100, 6), teacher=(100, 6), dtype=torch.float32)
    cut = {k: v[64:] if k.endswith("weight") else v for k, v in case.items()} | {"target": case["target"] % 36}
    cut["target"][case["target"] < 0] = -100
    case["student_bias"] = case["teacher_bias"] = torch.where(torch.arange(100) < 64, -torch.inf, 0.0)
    case["target"] = torch.where(cut["target"] < 0, -100, cut["target"] + 64)
    names = ("student_hidden",)
    for divergence in ("reverse_kl", "skew_forward_kl"):
        actual = run(linear_divergence, case, names=names, divergence=divergence, schedule=schedule, backend="triton")
        assert_equal_runs(actual, run(linear_divergence, cut, names=names, divergence=divergence), 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logits_of_ten_thousand_keep_what_fp32_leaves_them(schedule):
    """Their last bit is worth 1e-3, which bounds the precision of probabilities; the order of summation decides it."""
    case = make(5, student=(60, 8), teacher=(60, 8), dtype=torch.float32, scale=8000)
    actual, expected = triton(case, schedule=schedule), run(linear_divergence, case)
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_model_alone(schedule):
    case = make(9, student=(60, 8), dtype=torch.float32)
    case = {
        "hidden": case["student_hidden"],
        "weight": case["student_weight"],
        "target": case["target"],
        "bias": torch.linspace(-1, 1, 60),
    }
    names = ("hidden", "weight", "bias")
    expected = run(naive.linear_logprob, as_double(case), names=names, temperature=0.7)
    actual = run(linear_logprob, case, names=names, temperature=0.7, schedule=schedule, backend="triton")
    assert_equal_runs([[x.double() for x in part] for part in actual], expected, 2e-5)


@pytest.mark.parametrize(
    "schedule, divergence, dtype",
    (("fast", "jsd", torch.float32), ("fast", "reverse_kl", torch.bfloat16), ("lean", "reverse_kl", torch.float32)),
)
def test_a_token_loss_equals_the_same_loss_of_the_statistics(schedule, divergence, dtype):
    case = make(9, student=(60, 8), teacher=(75, 5), dtype=dtype)
    weight = torch.linspace(-1, 1, 9)

    def loss(stats, weight):
        return weight * (stats.divergence - 0.1 * stats.entropy + stats.logp.exp() * stats.teacher_logp)

    def one_pass(**case):
        return linear_token_loss(
            loss, **case, inputs={"weight": weight}, divergence=divergence, schedule=schedule, backend="triton"
        )[:1]

    def two_steps(**case):
        stats = naive.linear_divergence(**case, divergence=divergence)
        return (loss(stats, weight.double()).sum(),)

    (value, grads), (expected, gradients) = run(one_pass, case), run(two_steps, as_double(case))
    torch.testing.assert_close(value[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    assert max(relative(a, b) for a, b in zip(grads, gradients, strict=True)) < (
        2e-5 if dtype == torch.float32 else 1e-2
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_runs_are_equal_to_the_last_bit_and_the_cut_does_not_matter(schedule, monkeypatch):
    case = make(5, student=(70, 8), teacher=(70, 5), dtype=torch.float32)
    first = triton(case, schedule=schedule)
    assert_equal_runs(triton(case, schedule=schedule), first, 0)
    monkeypatch.setitem(problem.TILE, "cpu", (3, 64))
    assert_equal_runs(triton(case, schedule=schedule), first, 2e-6)


@pytest.mark.parametrize("tokens", (0, 1))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_token_and_one_token(tokens, schedule):
    case = make(tokens, dtype=torch.float32, ignored=0)
    assert_equal_runs([[x.double() for x in part] for part in triton(case, schedule=schedule)], reference(case), 2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_an_ignored_row_holds_reaches_nothing(schedule):
    case = make(9, student=(60, 8), dtype=torch.float32, ignored=0.4)
    expected = triton(case, schedule=schedule)
    for k in ("student_hidden", "teacher_hidden"):
        case[k][case["target"] < 0] = torch.nan
    assert_equal_runs(triton(case, schedule=schedule), expected, 0)


@pytest.mark.parametrize("lean", (False, True))
@pytest.mark.parametrize("target", (43, 2**32 + 5, 7))
@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_a_target_out_of_range_or_left_out_is_nan_and_has_no_gradient(target, lean, backend):
    """A GPU's targets are not read before the launch; the test calls the operator without the check for CPU tensors."""
    case = make(5, ignored=0, dtype=torch.float32)
    case["valid_columns"] = torch.arange(43) != 7
    case["target"][case["target"] == 7] = 8
    case["target"][2] = target
    weight = case["student_weight"].requires_grad_()
    p = problem_of(case, "jsd", lean, triton=backend == "triton")
    out = operators.head(p)[: algebra.OUTPUTS]
    assert out[:, 2].isnan().all() and not out[:, torch.arange(5) != 2].isnan().any()
    out[:3].nan_to_num().sum().backward()
    gradient, weight.grad = weight.grad, None
    case["target"][2] = -100
    operators.head(p)[:3].sum().backward()
    assert torch.equal(gradient, weight.grad)


def test_the_operators_pass_opcheck_and_compile_to_one_graph():
    case = make(2, dtype=torch.float32)
    torch.library.opcheck(operators.head_op, problem_of(case, "reverse_kl", triton=True).flat())
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    assert_equal_runs(run(compiled, case, backend="triton"), triton(case), 0)


def _sharded(case, schedule):
    """Return one rank's outputs and gradients, as arrays: tensors would die with their process."""
    torch.distributed.init_process_group("gloo")
    problem.TILE["cpu"] = (3, 48)
    columns = slice(0, 20) if torch.distributed.get_rank() == 0 else slice(20, 43)
    shard = case | {k: case[k][columns] for k in ("student_weight", "teacher_weight")}
    group = torch.distributed.group.WORLD.group_name
    out = run(
        linear_divergence,
        shard,
        backend="triton",
        divergence="jsd",
        vocab_group=group,
        vocab_start=columns.start,
        schedule=schedule,
    )
    return [[x.numpy() for x in part] for part in out]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_shards_of_the_vocabulary_equal_the_whole(schedule):
    case = make(4, student=(43, 6), dtype=torch.float32)
    case["target"][:2] = torch.tensor([3, 40])
    outputs, (hidden, weight) = run(linear_divergence, case, divergence="jsd")
    ranks = run_ranks(2, _sharded, case, schedule)
    for out, (dx, _) in ranks:
        for a, b in zip((*out, dx), (*outputs, hidden), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(torch.cat([torch.from_numpy(dw) for _, (_, dw) in ranks]), weight, atol=2e-5, rtol=2e-5)


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setattr(turns, "on_triton", lambda x: True)


lengths = st.lists(st.sampled_from((0, 1, 3, 127, 130)), min_size=0, max_size=4)


@pytest.mark.parametrize("reduce", turns.REDUCTIONS)
@settings(max_examples=6, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 99))
def test_turn_reduce_and_its_gradient_equal_the_torch_backend(reduce, lengths, seed):
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    values = torch.randint(-3, 4, (sum(lengths),), generator=g).float()  # with ties
    upstream = torch.randn(len(lengths), generator=g)
    offsets = torch.stack((offsets, offsets), 1)[:, 0]  # strided

    def both():
        x = values.clone().requires_grad_()
        out = turn_reduce(x, offsets, reduce)
        return out.detach(), torch.autograd.grad((out * upstream).sum(), x)[0]

    expected = both()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "on_triton", lambda x: True)
        actual = both()
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_turn_with_impossible_offsets_is_nan(on_triton):
    """A GPU's offsets are not read before the launch; the test calls the operator without the check for CPU tensors."""
    values = torch.ones(6)
    for offsets, bad in (([0, 2, 6], []), ([1, 2, 6], [0]), ([0, 4, 2, 6], [1]), ([0, 2, 7], [1]), ([0, 2, 5], [1])):
        out = torch.ops.atod_kernels.turn_reduce(values, torch.tensor(offsets), "sum")
        assert out.isnan().nonzero()[:, 0].tolist() == bad


weighings = [("minmax", "raw", fuse) for fuse in turns.FUSE if fuse != "shuffled"] + [
    ("none", "raw", "softor"),
    ("minmax", "mean1", "product"),
]


@pytest.mark.parametrize("normalise, budget, fuse", weighings)
def test_turn_weights_equal_the_torch_backend(normalise, budget, fuse):
    """Trajectories of all kinds: weighted, too short, agreeing, flat in a signal, empty, longer than a block."""
    sizes = [5, 2, 4, 4, 0] + [130] * (budget == "raw")
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    g = torch.Generator().manual_seed(0)
    d, h = torch.rand(2, sum(sizes), generator=g)
    d[7:11] = 0.001
    h[11:15] = 0.4
    n = torch.randint(1, 50, (sum(sizes),), generator=g)
    common = {"turn_lengths": n, "normalise": normalise, "budget": budget, "fuse": fuse}
    expected = turn_weight_report(d, h, offsets, **common)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "on_triton", lambda x: True)
        actual = turn_weight_report(d, h, offsets, **common)
    torch.testing.assert_close(actual.weights, expected.weights, atol=1e-6, rtol=1e-6)
    assert torch.equal(actual.unweighted, expected.unweighted) and torch.equal(actual.fallback, expected.fallback)


def test_float32_tensors_on_a_cpu_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend is 'triton' and the tensors are on cpu"):
        linear_divergence(**make(4, dtype=torch.float32), backend="triton")
