"""linear_token_loss: value and gradient of token-separable losses equal autograd's through the materialised
statistics.
"""

import pytest
import torch
from atod_kernels import TokenLogprob, linear_divergence, linear_logprob, linear_token_loss, naive, operators, problem
from atod_kernels.torch import backend as torch_backend

from helpers.gloo import run_ranks

torch.set_num_threads(1)
NAMES = ("student_hidden", "student_weight", "student_bias")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Use tiles of 7 tokens and 16 columns, 2 tokens a group, so that small problems have many tiles, some of them
    ragged."""
    monkeypatch.setitem(problem.TILE, "cpu", (7, 16))
    monkeypatch.setattr(torch_backend, "GROUP", 32)


def make(tokens=23, student=(50, 6), teacher=(43, 9), *, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    target = torch.randint(0, 43, (tokens,), generator=g)
    target[torch.rand(tokens, generator=g) < 0.2] = -100
    head = {
        "student_hidden": normal(tokens, student[1]),
        "student_weight": normal(*student),
        "student_bias": normal(student[0]),
    }
    return head | {"teacher_hidden": normal(tokens, teacher[1]), "teacher_weight": normal(*teacher), "target": target}


def streams(tokens=23, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    old, advantage = (torch.randn(tokens, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    return {
        "old": old - 4,
        "advantage": advantage,
        "weight": torch.rand(tokens, generator=g).to(dtype),
        "count": torch.tensor(17.0, dtype=dtype),
    }


def policy_loss(stats, old, advantage, weight, count):
    """PPO with dual clip, a weighted divergence, an entropy bonus and a term of the teacher's log-probability."""
    ratio = (stats.logp - old).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    surrogate = torch.where(advantage < 0, torch.minimum(surrogate, -3 * advantage), surrogate)
    return (
        surrogate + weight * stats.divergence - 0.01 * stats.entropy + 0.1 * (stats.teacher_logp - stats.logp) ** 2
    ) / count


def gradients(case, function, upstream=1.0):
    """Return the value of function(**case) and its gradients by the parameters."""
    case = {k: v.detach().clone().requires_grad_() if k in NAMES else v for k, v in case.items()}
    loss = function(**case)
    (upstream * loss).backward()
    return [loss.detach(), *(case[k].grad for k in NAMES if k in case)]


def reference(case, **options):
    def total(**case):
        return policy_loss(naive.linear_divergence(**case, **options), **streams())[case["target"] != -100].sum()

    return total


@pytest.mark.parametrize("schedule", ("auto", "fast", "lean"))
@pytest.mark.parametrize("divergence", ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl"))
def test_value_and_gradients_equal_the_reference(divergence, schedule):
    case, options = make(), {"divergence": divergence, "temperature": 0.8, "softcap": 6.0, "alpha": 0.3}
    expected = gradients(case, reference(case, **options), upstream=-3.0)
    actual = gradients(
        case,
        lambda **c: linear_token_loss(policy_loss, **c, inputs=streams(), schedule=schedule, **options)[0],
        upstream=-3.0,
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("schedule", ("fast", "lean"))
def test_the_size_of_chunks_does_not_matter_and_runs_are_equal_to_the_last_bit(schedule, monkeypatch):
    def loss(**case):
        return linear_token_loss(policy_loss, **case, inputs=streams(), schedule=schedule)[0]

    first, second = gradients(make(), loss), gradients(make(), loss)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for tile in ((1, 5), (23, 50), (8, 64)):
        monkeypatch.setitem(problem.TILE, "cpu", tile)
        for a, b in zip(gradients(make(), loss), first, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("schedule", ("fast", "lean"))
def test_statistics_are_detached_and_those_of_the_differentiable_functions(schedule):
    case = make()
    case["student_weight"].requires_grad_()
    loss, stats = linear_token_loss(policy_loss, **case, inputs=streams(), schedule=schedule)
    assert loss.shape == () and loss.requires_grad
    for a, b in zip(stats, linear_divergence(**case), strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("schedule", ("fast", "lean"))
def test_without_a_teacher_it_is_a_loss_of_logprob_and_entropy(schedule):
    case = {k: v for k, v in make().items() if not k.startswith("teacher")}
    kept = case["target"] != -100

    def expected(student_hidden, student_weight, student_bias, target):
        out = linear_logprob(student_hidden, student_weight, target, bias=student_bias)
        return (out.entropy**2 - out.logp)[kept].sum()

    def actual(**case):
        loss, stats = linear_token_loss(lambda s: s.entropy**2 - s.logp, **case, schedule=schedule)
        assert isinstance(stats, TokenLogprob)
        return loss

    for a, b in zip(gradients(case, actual), gradients(case, expected), strict=True):
        torch.testing.assert_close(a, b)


def test_an_ignored_token_adds_nothing_whatever_the_loss_says():
    case = make()
    loss, _ = linear_token_loss(lambda s: torch.ones_like(s.logp), **case)
    assert loss == (case["target"] != -100).sum()


@pytest.mark.parametrize("schedule", ("fast", "lean"))
def test_bf16_parameters_get_bf16_gradients_of_fp32_logits(schedule):
    case = make(dtype=torch.bfloat16)
    inputs = streams(dtype=torch.float32)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in case.items()}
    expected = gradients(
        exact, lambda **c: policy_loss(naive.linear_divergence(**c), **inputs)[c["target"] != -100].sum()
    )
    actual = gradients(case, lambda **c: linear_token_loss(policy_loss, **c, inputs=inputs, schedule=schedule)[0])
    assert actual[0].dtype == torch.float32 and all(x.dtype == torch.bfloat16 for x in actual[1:])
    for a, b in zip(actual, expected, strict=True):
        assert (a.double() - b).norm() <= 4e-3 * b.norm()


@pytest.mark.parametrize("tokens", (23, 5), ids=("several chunks", "one chunk"))
@pytest.mark.parametrize("schedule", ("fast", "lean"))
def test_a_normaliser_taken_over_the_chunk_is_refused(schedule, tokens):
    case = make(tokens)
    weight = streams(tokens)["weight"]
    with pytest.raises(ValueError, match="loss_fn is not a function of one token at a time"):
        linear_token_loss(
            lambda s, weight: weight * s.divergence / weight.sum(), **case, inputs={"weight": weight}, schedule=schedule
        )
    linear_token_loss(
        lambda s, weight, total: weight * s.divergence / total,
        **case,
        inputs={"weight": weight, "total": weight.sum()},
        schedule=schedule,
    )


def test_a_gradient_that_depends_on_the_chunk_is_refused_though_values_do_not():
    case = make()
    case["student_weight"].requires_grad_()

    def loss(s):
        mean = s.divergence.mean()
        return s.divergence.detach() + mean - mean.detach()

    with pytest.raises(ValueError, match="not a function of one token"):
        linear_token_loss(loss, **case)


def test_a_second_backward_adds_the_same_gradient_again():
    case = make()
    weight = case["student_weight"].requires_grad_()
    loss, _ = linear_token_loss(policy_loss, **case, inputs=streams())
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)


def test_only_what_requires_a_gradient_gets_one():
    case = make()
    case["student_bias"].requires_grad_()
    linear_token_loss(policy_loss, **case, inputs=streams())[0].backward()
    assert case["student_bias"].grad is not None and case["student_hidden"].grad is None


@pytest.mark.parametrize(
    "divergence, schedule, expected",
    (("reverse_kl", "fast", 4), ("jsd", "auto", 4), ("reverse_kl", "lean", 6), ("jsd", "lean", 8)),
)
def test_fast_makes_each_logit_once(flops, divergence, schedule, expected):
    """In units of G = 2 T V H, with equal models: (3 + r) G fast, (4 + 2 r) G lean and for a mixture's second look; 2
    G without gradients."""
    case = make(21, student=(48, 5), teacher=(48, 5))
    del case["student_bias"]
    case["target"] %= 43
    g = 2 * 21 * 48 * 5
    gradients(
        case, lambda **c: linear_token_loss(lambda s: s.divergence, **c, divergence=divergence, schedule=schedule)[0]
    )
    assert flops[0] == expected * g
    loss, _ = linear_token_loss(lambda s: s.divergence, **case, divergence=divergence)
    assert not loss.requires_grad and flops[0] == (expected + 2) * g


@pytest.mark.parametrize("check", (False, True))
def test_it_compiles_to_one_graph_where_dynamo_traces_autograd(check):
    inputs = streams(dtype=torch.float32)

    def loss(**case):
        return linear_token_loss(policy_loss, **case, inputs=inputs, check=check)[0]

    case = make(dtype=torch.float32)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = gradients(case, torch.compile(loss, fullgraph=True, backend="aot_eager"), 2.0)
    for a, b in zip(compiled, gradients(case, loss, 2.0), strict=True):
        torch.testing.assert_close(a, b)


def test_the_inner_passes_pass_opcheck():
    case = make(dtype=torch.float32)
    p = problem.Problem(**case, kind="jsd")
    kept = torch.zeros(2, 7 * 43)
    torch.library.opcheck(operators.chunk_forward_op, (7, 14, kept, *p.flat()))
    stats = operators.chunk_forward(p, slice(7, 14), kept)
    sums = [torch.zeros_like(case[k]) for k in NAMES]
    torch.library.opcheck(operators.chunk_backward_op, (7, 14, kept, stats, torch.ones(3, 7), *sums, *p.flat()))


def _sharded(case, schedule):
    """Return one rank's loss and gradients, as arrays: tensors would die with their process."""
    torch.distributed.init_process_group("gloo")
    problem.TILE["cpu"] = (7, 16)
    columns = slice(0, 30) if torch.distributed.get_rank() == 0 else slice(30, 43)
    shard = case | {k: case[k][columns] for k in ("student_weight", "student_bias", "teacher_weight")}
    options = {
        "vocab_group": torch.distributed.group.WORLD.group_name,
        "vocab_start": columns.start,
        "schedule": schedule,
    }
    return [
        x.numpy()
        for x in gradients(shard, lambda **c: linear_token_loss(policy_loss, **c, inputs=streams(), **options)[0])
    ]


@pytest.mark.parametrize("schedule", ("fast", "lean"))
def test_a_vocabulary_sharded_over_ranks_gives_the_whole_ones_result(schedule):
    case = make(student=(43, 6))
    loss, dx, dw, db = gradients(case, reference(case))
    first, second = ([torch.from_numpy(x) for x in rank] for rank in run_ranks(2, _sharded, case, schedule))
    for rank in (first, second):
        torch.testing.assert_close(rank[0].squeeze(), loss)
        torch.testing.assert_close(rank[1], dx)
    torch.testing.assert_close(torch.cat((first[2], second[2])), dw)
    torch.testing.assert_close(torch.cat((first[3], second[3])), db)


def no_token_mean(stats, **_):
    return stats.divergence.mean()


bad = {
    r"loss_fn returned \[\]; expected one loss per token, \[7\]": {"loss_fn": no_token_mean},
    "loss_fn returned float": {"loss_fn": lambda s: 1.0},
    r"inputs\['x'\] has shape \[4\]; expected \[23, ...\]": {"inputs": {"x": torch.zeros(4)}},
    r"inputs\['x'\] requires a gradient": {"inputs": {"x": torch.zeros(23, requires_grad=True)}},
    "teacher_hidden and teacher_weight must be given together": {"teacher_weight": None},
    "target is None": {"teacher_hidden": None, "teacher_weight": None, "target": None},
    "teacher_bias and teacher_softcap need teacher_hidden": {
        "teacher_hidden": None,
        "teacher_weight": None,
        "teacher_softcap": 3.0,
    },
    "schedule is 'slow'": {"schedule": "slow"},
    "backend is 'triton'": {"backend": "triton"},
    "student_weight has shape": {"student_weight": torch.zeros(50, 7).double()},
}


@pytest.mark.parametrize("message", bad)
def test_a_bad_argument_is_named(message):
    case = make() | bad[message]
    case["student_hidden"].requires_grad_()
    with pytest.raises(ValueError, match=message):
        linear_token_loss(case.pop("loss_fn", lambda s, **_: s.logp), **case)
