"""atod_kernels' head against the readable reference in fp64: every divergence, every option, every gradient."""

from dataclasses import replace

import pytest
import torch
from atod_kernels import algebra, linear_divergence, linear_logprob, naive, operators, problem
from atod_kernels.names import DIVERGENCES
from atod_kernels.torch import backend as torch_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.gloo import run_ranks
from helpers.head import (
    SCHEDULES,
    as_double,
    assert_equal_runs,
    make,
    options,
    problem_of,
    problems,
    run,
)

pytestmark = pytest.mark.usefixtures("small_tiles")
torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(
    problem=problems,
    option=options,
    temperature=st.sampled_from((1.0, 0.6, "per token")),
    bias=st.booleans(),
    mask=st.booleans(),
)
def test_outputs_and_gradients_equal_the_reference(problem, option, temperature, bias, mask):
    # hypothesis runs its examples within one call of the fixture, so the small tiles are in place.
    case = make(**problem)
    g = torch.Generator().manual_seed(problem["seed"])
    common = min(problem["student"][0], problem["teacher"][0])
    if bias:
        case["student_bias"], case["teacher_bias"] = (
            torch.randn(case[f"{s}_weight"].shape[0], generator=g).double() for s in ("student", "teacher")
        )
    if mask:
        keep = torch.rand(common, generator=g) < 0.7
        keep[0] = True
        case["valid_columns"] = keep
        case["target"] = torch.where(keep[case["target"].clamp(min=0)] | (case["target"] < 0), case["target"], 0)
    case["temperature"] = (
        0.5 + torch.rand(problem["tokens"], generator=g).double() if temperature == "per token" else temperature
    )
    expected = run(naive.linear_divergence, case, **{k: v for k, v in option.items() if k != "schedule"})
    assert_equal_runs(run(linear_divergence, case, **option), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("softcap", (None, 5.0))
def test_logprob_and_entropy_equal_the_reference(schedule, softcap):
    case = make(19, student=(77, 5), seed=3)
    case = {
        "hidden": case["student_hidden"],
        "weight": case["student_weight"],
        "target": case["target"],
        "bias": torch.linspace(-1, 1, 77).double(),
    }
    names = ("hidden", "weight", "bias")
    expected = run(naive.linear_logprob, case, names=names, temperature=0.7, softcap=softcap)
    assert_equal_runs(
        run(linear_logprob, case, names=names, temperature=0.7, softcap=softcap, schedule=schedule), expected
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    case = make(3, student=(9, 2), teacher=(11, 3), seed=1, ignored=0.3)

    def f(hidden, weight, bias):
        out = linear_divergence(
            hidden,
            weight,
            case["teacher_hidden"],
            case["teacher_weight"],
            case["target"],
            student_bias=bias,
            divergence=divergence,
            softcap=3.0,
        )
        return out[:3]

    assert torch.autograd.gradcheck(
        f, [x.requires_grad_() for x in (case["student_hidden"], case["student_weight"], torch.randn(9).double())]
    )


def test_without_a_target_there_is_no_logprob_and_the_rest_is_the_same():
    case = make(11, ignored=0)
    with_target = run(linear_divergence, case)
    out = linear_divergence(**(case | {"target": None}))
    assert out.logp is None and out.teacher_logp is None
    assert torch.equal(out.divergence, with_target[0][0]) and torch.equal(out.entropy, with_target[0][1])


def test_the_teacher_never_gets_a_gradient():
    case = make(9)
    teacher = [case[k].requires_grad_() for k in ("teacher_hidden", "teacher_weight")]
    case["student_hidden"].requires_grad_()
    out = linear_divergence(**case)
    assert not out.teacher_logp.requires_grad and not out.teacher_entropy.requires_grad
    (out.divergence + out.logp).sum().backward()
    assert all(x.grad is None for x in teacher)


def test_strides_of_hidden_states_do_not_matter():
    case = make(20)
    strided = case | {k: case[k].T.contiguous().T for k in ("student_hidden", "teacher_hidden")}
    assert_equal_runs(run(linear_divergence, strided), run(linear_divergence, case))


def test_student_and_teacher_may_differ_in_dtype():
    case = make(9, dtype=torch.float32)
    half = case | {k: case[k].bfloat16() for k in ("teacher_hidden", "teacher_weight")}
    expected = run(naive.linear_divergence, as_double(half))
    assert_equal_runs([[x.double() for x in part] for part in run(linear_divergence, half)], expected, 1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tokens", (0, 1))
def test_no_token_and_one_token(tokens, divergence, schedule):
    case = make(tokens, ignored=0)
    expected = run(naive.linear_divergence, case, divergence=divergence)
    assert_equal_runs(run(linear_divergence, case, divergence=divergence, schedule=schedule), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_size_of_tiles_does_not_matter(schedule, monkeypatch):
    case = make(23, seed=8)
    expected = run(linear_divergence, case, schedule=schedule, divergence="jsd")
    for tile in ((1, 1), (2, 64), (23, 3), (64, 64)):
        monkeypatch.setitem(problem.TILE, "cpu", tile)
        for group in (1, 40, 4096):
            monkeypatch.setattr(torch_backend, "GROUP", group)
            assert_equal_runs(run(linear_divergence, case, schedule=schedule, divergence="jsd"), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_runs_are_equal_to_the_last_bit(divergence, schedule):
    case = make(40, student=(300, 16), teacher=(300, 16), dtype=torch.float32)
    a, b = (run(linear_divergence, case, divergence=divergence, schedule=schedule) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True))


def test_a_tied_embedding_gets_both_gradients():
    case = make(12, teacher=(50, 9), ignored=0)
    ids = torch.arange(12) * 3

    def gradient(function):
        weight = case["student_weight"].clone().requires_grad_()
        out = function(weight[ids] * 1.0, weight, case["teacher_hidden"], case["teacher_weight"], case["target"])
        (out.divergence - 0.1 * out.entropy).sum().backward()
        return weight.grad

    torch.testing.assert_close(gradient(linear_divergence), gradient(naive.linear_divergence))


def test_the_expected_k1_gradient_over_the_vocabulary_is_the_reverse_kl_gradient():
    """E_{y~p}[(log p(y) - log q(y)) grad log p(y)] = grad KL(p||q), here with every y of the vocabulary as one token
    (method.md, 1)."""
    case = make(1, student=(37, 6), teacher=(37, 9), ignored=0)
    full = run(linear_divergence, case)
    hidden, weight = (case[k].clone().requires_grad_() for k in ("student_hidden", "student_weight"))
    everything = torch.arange(37)
    teacher_logp = linear_logprob(case["teacher_hidden"].expand(37, -1), case["teacher_weight"], everything).logp
    logp = linear_logprob(hidden.expand(37, -1), weight, everything).logp
    (logp * (logp.exp() * (logp - teacher_logp)).detach()).sum().backward()
    kl = linear_divergence(
        *(x := [case["student_hidden"].requires_grad_(), case["student_weight"].requires_grad_()]),
        case["teacher_hidden"],
        case["teacher_weight"],
    )
    kl.divergence.sum().backward()
    torch.testing.assert_close(kl.divergence.detach(), full[0][0])
    torch.testing.assert_close(hidden.grad, x[0].grad)
    torch.testing.assert_close(weight.grad, x[1].grad)


def test_nothing_is_kept_for_backward_without_gradients_and_no_logits_with_them():
    case = make(30, student=(400, 6), teacher=(400, 6), dtype=torch.float32)
    case["student_weight"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        with torch.no_grad():
            assert not linear_divergence(**case).divergence.requires_grad
        assert not kept
        linear_divergence(**case)
    assert 0 < max(kept) <= 400 * 6


class Largest(TorchDispatchMode):
    """Records the largest number of elements of a tensor made within it."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def test_lean_holds_tiles_and_fast_a_chunk():
    case = make(70, student=(900, 4), teacher=(900, 4), dtype=torch.float32)
    largest = {}
    for lean in (False, True):
        with Largest() as mode:
            torch_backend.head_statistics(problem_of(case, lean=lean))
        largest[lean] = mode.elements
    assert largest[False] == 2 * 7 * 900  # both models' logits of 7 tokens
    assert largest[True] < 7 * 900


@pytest.mark.parametrize("tokens, hidden", ((1, 64), (5000, 64), (16, 4096), (5000, 16384)))
def test_a_tile_is_bounded_whatever_the_vocabulary_and_the_hidden_size(tokens, hidden, monkeypatch):
    """Bounded are its logits, its weight (fp32 even if the weight is 16-bit), and the columns that one fp32 product
    sums over: a sum of 150k loses digits."""
    monkeypatch.undo()
    case = {
        k: torch.empty(1).expand(n, hidden)
        for k, n in (("student_hidden", tokens), ("student_weight", 151936), ("teacher_weight", 151936))
    }
    p = problem_of(case | {"teacher_hidden": case["student_hidden"], "target": None})
    rows, columns = p.tile
    assert rows * columns <= 2**21 and columns * hidden <= 2**22 and columns <= 2**13


@pytest.mark.parametrize(
    "divergence, schedule, forward",
    (("reverse_kl", "fast", 2), ("reverse_kl", "lean", 2), ("jsd", "fast", 2), ("jsd", "lean", 4), ("jsd", "auto", 2)),
)
def test_products_are_those_of_the_schedule(flops, divergence, schedule, forward):
    """In units of G = 2 T V H, with equal models: statistics 2 G, twice that for a lean mixture; the backward 4 G."""
    case = make(21, student=(48, 5), teacher=(48, 5))
    g = 2 * 21 * 48 * 5
    with torch.no_grad():
        linear_divergence(**case, divergence=divergence, schedule=schedule)
    assert flops[0] == forward * g
    run(linear_divergence, case, divergence=divergence, schedule=schedule)
    assert flops[0] == (2 * forward + 4) * g


def test_a_target_out_of_range_that_was_not_checked_is_nan_and_has_no_gradient():
    """As on accelerators, where checking targets would synchronise; the test calls the operator without the check."""
    case = make(9, ignored=0, scale=300)
    case["target"][4] = 43
    weight = case["student_weight"].requires_grad_()
    out = operators.head(problem_of(case, "reverse_kl"))[: algebra.OUTPUTS]
    assert out[:, 4].isnan().all() and not out[:, torch.arange(9) != 4].isnan().any()
    out[:3].nan_to_num().sum().backward()
    gradient, weight.grad = weight.grad, None
    case["target"][4] = -100
    operators.head(problem_of(case, "reverse_kl"))[:3].sum().backward()
    assert torch.equal(gradient, weight.grad)


def test_operators_pass_opcheck_and_compile_to_one_graph():
    case = make(20, dtype=torch.float32)
    bias = torch.zeros(50)
    p = problem_of(case, lean=True, student_bias=bias)
    leaves = {name: getattr(p, name).clone().requires_grad_() for name in problem.PARAMETERS}
    torch.library.opcheck(operators.head_op, replace(p, **leaves).flat())
    statistics = operators.head(p)
    inputs = statistics, torch.randn_like(statistics), True, True, True, *p.flat()
    torch.library.opcheck(operators.head_backward_op, inputs)
    assert_equal_runs(
        run(torch.compile(linear_divergence, fullgraph=True, backend="aot_eager"), case),
        run(linear_divergence, case),
        0,
    )


def _sharded(case, option):
    """Return one rank's outputs, gradient of the hidden states and gradient of its weight shard, as arrays: tensors
    would die with their process."""
    torch.distributed.init_process_group("gloo")
    problem.TILE["cpu"] = (7, 16)
    rank = torch.distributed.get_rank()
    columns = slice(0, 20) if rank == 0 else slice(20, 43)
    shard = case | {k: case[k][columns] for k in ("student_weight", "teacher_weight", "valid_columns")}
    group = torch.distributed.group.WORLD.group_name
    return [
        [x.numpy() for x in part]
        for part in run(linear_divergence, shard, vocab_group=group, vocab_start=columns.start, **option)
    ]


@pytest.mark.parametrize(
    "option", ({"divergence": "reverse_kl"}, {"divergence": "jsd", "alpha": 0.3, "schedule": "lean"})
)
def test_a_vocabulary_sharded_over_ranks_gives_the_whole_ones_result(option):
    case = make(15, student=(43, 6)) | {"valid_columns": torch.arange(43) != 1}
    case["target"][case["target"] == 1] = 2
    outputs, (dx, dw) = run(linear_divergence, case, **option)
    ranks = [[[torch.from_numpy(x) for x in part] for part in rank] for rank in run_ranks(2, _sharded, case, option)]
    for rank in ranks:
        assert_equal_runs((rank[0], rank[1][:1]), (outputs, [dx]))
    torch.testing.assert_close(torch.cat([rank[1][1] for rank in ranks]), dw)


bad = {
    "student_hidden has shape": {"student_hidden": torch.zeros(4)},
    "student_hidden is torch.int64": {"student_hidden": torch.zeros(4, 6, dtype=torch.int64)},
    "student_weight is torch.float32; expected torch.float64": {"student_weight": torch.zeros(50, 6)},
    "student_weight has shape .* to fit student_hidden": {"student_weight": torch.zeros(50, 7).double()},
    "student_weight has shape .* at least one row": {"student_weight": torch.zeros(0, 6).double()},
    "student_bias has shape": {"student_bias": torch.zeros(49).double()},
    "teacher_hidden has shape .* as student_hidden": {"teacher_hidden": torch.zeros(5, 9).double()},
    "teacher_hidden is NoneType": {"teacher_hidden": None},
    "teacher_weight has shape": {"teacher_weight": torch.zeros(43, 8).double()},
    "teacher_hidden is on meta": {"teacher_hidden": torch.zeros(4, 9, device="meta").double()},
    "target has shape": {"target": torch.zeros(3, dtype=torch.int64)},
    "target is torch.float32": {"target": torch.zeros(4)},
    r"target\[2\] is 43; expected 0 to 42": {"target": torch.tensor([0, 1, 43, 2])},
    r"target\[0\] is -1": {"target": torch.tensor([-1, 1, 4, 2])},
    r"target\[1\] is 7, a column that valid_columns leaves out": {
        "target": torch.tensor([0, 7, 4, 2]),
        "valid_columns": torch.arange(43) != 7,
    },
    "valid_columns is torch.float32": {"valid_columns": torch.ones(43)},
    "valid_columns has shape": {"valid_columns": torch.ones(42, dtype=torch.bool)},
    "valid_columns is False everywhere": {"valid_columns": torch.zeros(43, dtype=torch.bool)},
    "temperature is 0": {"temperature": 0.0},
    "temperature has shape": {"temperature": torch.ones(3)},
    "temperature has an entry": {"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])},
    "temperature requires a gradient": {"temperature": torch.ones(4, requires_grad=True)},
    "softcap is -1": {"softcap": -1.0},
    "teacher_softcap is 0": {"teacher_softcap": 0.0},
    "teacher_scale is -1": {"teacher_scale": -1},
    "alpha is 1.5": {"alpha": 1.5},
    "divergence is 'kl'": {"divergence": "kl"},
    "schedule is 'slow'": {"schedule": "slow"},
    "student_weight is not contiguous": {"student_weight": torch.zeros(6, 50).double().T},
    "backend is 'cuda'": {"backend": "cuda"},
    "backend is 'triton' and an input is float64": {"backend": "triton"},
    "vocab_start is 8": {"vocab_start": 8},
    "vocab_group: student and teacher shards": {"vocab_group": "0"},
    "vocab_group is 'nobody'": {"vocab_group": "nobody", "teacher_weight": torch.zeros(50, 9).double()},
}


@pytest.mark.parametrize("message", bad)
def test_a_bad_argument_is_named(message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**(make(4, ignored=0) | bad[message]))


def test_the_single_model_function_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"^weight has shape \[5, 3\]; expected \[V, 2\] to fit hidden"):
        linear_logprob(torch.zeros(4, 2), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="^target is NoneType"):
        linear_logprob(torch.zeros(4, 2), torch.zeros(5, 2), None)


@pytest.mark.parametrize("frozen", ["hidden", "head", "target"])
def test_tensors_made_under_inference_mode_are_taken_like_any_other(frozen):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    given = {"hidden": torch.randn(4, 8), "head": torch.randn(20, 8), "target": torch.tensor([1, 2, 3, 4])}

    def gradients(teacher_hidden, teacher_weight, target):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_divergence(*leaves, teacher_hidden, teacher_weight, target)
        return torch.autograd.grad(out.divergence.sum() + out.logp.sum(), leaves)

    expected = gradients(*given.values())
    with torch.inference_mode():
        given[frozen] = given[frozen].clone()
    assert given[frozen].is_inference()
    for found, right in zip(gradients(*given.values()), expected, strict=True):
        assert torch.equal(found, right)
