"""The exactness of the head in 32 and 16 bits, and with logits that are huge, masked or infinite."""

import pytest
import torch
from atod_kernels import algebra, linear_divergence, naive, problem, products
from atod_kernels.names import DIVERGENCES
from atod_kernels.torch import backend as torch_backend

from helpers.head import (
    SCHEDULES,
    as_double,
    assert_equal_runs,
    close_pair,
    make,
    problem_of,
    relative,
    run,
)

pytestmark = pytest.mark.usefixtures("small_tiles")
torch.set_num_threads(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_fp32_gradients_are_within_2e_4_of_fp64_where_student_is_close_to_teacher(divergence, schedule, monkeypatch):
    monkeypatch.setitem(problem.TILE, "cpu", (8, 128))
    case = close_pair()
    exact = run(naive.linear_divergence, as_double(case), divergence=divergence)
    assert 1e-3 < naive.linear_divergence(**as_double(case)).divergence.mean() < 1e-2
    outputs, grads = run(linear_divergence, case, divergence=divergence, schedule=schedule)
    assert all(x.dtype == torch.float32 for x in outputs)
    assert all(relative(a, b) < 2e-4 for a, b in zip(grads, exact[1], strict=True))
    assert all(relative(a, b) < 2e-4 for a, b in zip(outputs, exact[0], strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_divergence_alone_is_as_exact_as_torch_with_logits_of_deviation_30(divergence):
    """Only the divergence has an upstream gradient: with others, that of the log-probability would drown it."""
    case = close_pair(spread=30.0, seed=2)

    def gradient(function, case):
        case = case | {"student_weight": case["student_weight"].clone().requires_grad_()}
        signs = torch.randn(24, generator=torch.Generator().manual_seed(0)).to(case["student_weight"].dtype)
        (function(**case, divergence=divergence).divergence * signs).sum().backward()
        return case["student_weight"].grad

    exact = gradient(naive.linear_divergence, as_double(case))
    torch_error = relative(gradient(naive.linear_divergence, case), exact)
    assert relative(gradient(linear_divergence, case), exact) <= 2 * torch_error + 1e-6


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("cut", ((700, 700), (700, 610), (590, 700)))
def test_logits_of_16_bit_inputs_are_not_rounded(dtype, schedule, divergence, cut):
    """Rounding the logits to bf16 makes this gradient wrong by tenths; one rounding of the result by about 2e-3."""
    case = close_pair(dtype=dtype)
    case |= {
        f"{model}_weight": case[f"{model}_weight"][:rows]
        for model, rows in zip(("student", "teacher"), cut, strict=True)
    }
    case["target"] %= min(cut)
    exact = run(naive.linear_divergence, as_double(case), divergence=divergence)
    outputs, grads = run(linear_divergence, case, schedule=schedule, divergence=divergence)
    assert all(x.dtype == torch.float32 for x in outputs) and all(x.dtype == dtype for x in grads)
    assert all(relative(a, b) < 2e-4 for a, b in zip(outputs, exact[0], strict=True))
    assert all(relative(a, b) < 4e-3 for a, b in zip(grads, exact[1], strict=True))


@pytest.mark.parametrize("dtype, expected", ((torch.bfloat16, "bf16"), (torch.float32, "none")))
def test_products_of_bf16_inputs_use_a_cpu_s_matrix_unit_and_leave_the_process_s_setting_as_it_was(
    dtype, expected, monkeypatch
):
    used, product = set(), products.product

    def watched(*args, **options):
        used.add(torch.backends.mkldnn.matmul.fp32_precision)
        return product(*args, **options)

    monkeypatch.setattr(torch_backend, "AMX", True)
    for module in (torch_backend, products):
        monkeypatch.setattr(module, "product", watched)
    for schedule in SCHEDULES:
        run(linear_divergence, close_pair(dtype=dtype), schedule=schedule)
    assert used == {expected}
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gigantic_logits_keep_probabilities_that_sum_to_one(divergence, schedule):
    """The gradients of a token's logits sum to 0 only if the backward recomputes logits and normalisers to the last
    bit."""
    case = make(1, dtype=torch.float32, scale=3e4, ignored=0) | {"student_bias": torch.zeros(50)}
    case["teacher_hidden"] = torch.nn.functional.pad(case["student_hidden"], (0, 3))
    case["teacher_weight"] = torch.nn.functional.pad(case["student_weight"][:43], (0, 3)) * (1 + 1e-5)
    outputs, grads = run(linear_divergence, case, divergence=divergence, schedule=schedule)
    assert all(x.isfinite().all() for x in outputs + grads)
    assert case["student_hidden"].mm(case["student_weight"].T).abs().max() > 1e4
    assert grads[2].sum().abs() <= 1e-6 * (1 + grads[2].abs().sum())


@pytest.mark.parametrize("divergence", ("reverse_kl", "jsd"))
def test_a_bias_of_minus_infinity_in_both_models_is_a_masked_column(divergence):
    case = make(13, student=(40, 6), teacher=(40, 9), ignored=0)
    case["target"] %= 20
    masked = torch.zeros(40).double().masked_fill(torch.arange(40) >= 20, -torch.inf)
    expected = run(
        linear_divergence,
        case | {"valid_columns": masked == 0, "student_bias": torch.zeros(40).double()},
        divergence=divergence,
    )
    assert_equal_runs(
        run(linear_divergence, case | {"student_bias": masked, "teacher_bias": masked}, divergence=divergence), expected
    )


def test_a_whole_tile_of_masked_columns_changes_nothing():
    case = make(13, student=(64, 6), teacher=(64, 9))
    case["target"] = case["target"].clamp(max=15)
    keep = torch.arange(64) < 16
    expected = run(
        linear_divergence,
        case | {"student_weight": case["student_weight"][:16], "teacher_weight": case["teacher_weight"][:16]},
    )
    outputs, (dx, dw) = run(linear_divergence, case | {"valid_columns": keep})
    assert_equal_runs((outputs, [dx, dw[:16]]), expected)
    assert not dw[16:].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ignored_tokens_are_zero_and_touch_no_gradient_whatever_they_hold(schedule):
    case = make(20)
    ignored = case["target"] == -100
    clean = run(
        linear_divergence,
        {k: v if k.endswith("weight") else v[~ignored] for k, v in case.items()}
        | {"student_bias": torch.ones(50).double()},
        seed=5,
    )
    for k in ("student_hidden", "teacher_hidden"):
        case[k][ignored] = torch.nan
    dirty = {k: v.clone().requires_grad_() if k.startswith("student") else v for k, v in case.items()}
    out = linear_divergence(**dirty, schedule=schedule)
    assert all((x[ignored] == 0).all() for x in out)
    for a, b in zip(out, clean[0], strict=True):
        torch.testing.assert_close(a[~ignored].detach(), b)
    sum(x.sum() for x in out).backward()
    assert not dirty["student_hidden"].grad[ignored].any() and dirty["student_weight"].grad.isfinite().all()


def test_all_tokens_ignored_with_logits_that_exp_would_overflow():
    case = make(10, dtype=torch.float32) | {"student_bias": torch.full((50,), 200.0)}
    case["target"][:] = -100
    outputs, grads = run(linear_divergence, case)
    assert not any(x.any() for x in outputs + grads)


@pytest.mark.parametrize("lean", (False, True))
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_products_of_16_bit_operands_have_fp32_results_of_the_right_shape(divergence, lean, monkeypatch):
    """CUDA products take 16-bit operands: that path on meta tensors, shapes and dtypes only."""
    for module in (torch_backend, products):
        monkeypatch.setattr(module, "operand", lambda x, dtype: x)
    case = {k: v.to("meta") for k, v in make(30, dtype=torch.bfloat16).items()}
    p = problem_of(case, divergence, lean, student_bias=torch.empty(50, device="meta"))
    stats = torch_backend.head_statistics(p)
    assert stats.shape == (algebra.STATISTICS, 30) and stats.dtype == torch.float32
    grads = torch_backend.head_gradients(p, stats, stats, True, True, True)
    assert [(x.shape, x.dtype) for x in grads] == [
        ((30, 6), torch.bfloat16),
        ((50, 6), torch.bfloat16),
        ((50,), torch.float32),
    ]
