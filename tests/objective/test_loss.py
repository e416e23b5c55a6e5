"""The loss of a token: surrogate, clips, divergences and their expected gradients."""

from types import SimpleNamespace

import pytest
import torch
from atod_kernels import linear_divergence, linear_logprob, linear_token_loss

from atod_fast.config import Objective
from atod_fast.objective import (
    FULL_VOCABULARY,
    diagnostics,
    loss_function,
    make_streams,
    token_loss,
)
from helpers.table import make_table, statistics, streams_of, tokens_of

torch.set_num_threads(1)


def one_token(advantage, ratio, objective):
    """Return loss and d loss / d ratio of one token."""
    table = make_table([1], lengths=[1])
    old = torch.tensor([-1.0], dtype=torch.float64)
    tokens = SimpleNamespace(turn=torch.tensor([0]), old_logp=old, teacher_logp=old + advantage, rollout_logp=old)
    streams = streams_of(table, tokens, objective, kappa=1.0, rho=0.0, weight=torch.ones(1))
    logp = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    loss = token_loss(statistics(logp), streams, objective).sum()
    loss.backward()
    return (
        loss.item(),
        logp.grad.item() / ratio,
        diagnostics(statistics(logp), streams, objective)["clip_fraction"].item(),
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "clipped"),
    [
        (2.0, 1.0, -2.0, -2.0, 0),
        (2.0, 0.5, -1.0, -2.0, 0),  # the student drifted away from a good action: free to return
        (2.0, 1.5, -2.4, 0.0, 1),  # far enough towards it
        (-2.0, 1.0, 2.0, 2.0, 0),
        (-2.0, 0.5, 1.6, 0.0, 1),  # far enough away from a bad one
        (-2.0, 2.5, 5.0, 2.0, 0),
        (-2.0, 4.0, 6.0, 0.0, 1),  # dual clip: at most 3 |A|
        (0.0, 4.0, 0.0, 0.0, 0),
    ],
)
def test_the_surrogate_and_its_two_clips(advantage, ratio, loss, slope, clipped):
    assert one_token(advantage, ratio, Objective(clip=0.2, dual_clip=3.0)) == pytest.approx((loss, slope, clipped))


def test_dual_clip_off_lets_a_bad_token_grow():
    assert one_token(-2.0, 4.0, Objective(dual_clip=0.0)) == pytest.approx((8.0, 2.0, 0))


def test_an_extreme_ratio_stays_finite():
    table = make_table([3])
    tokens, objective = tokens_of(table), Objective()
    tokens.old_logp[0] = -1000.0
    streams = streams_of(table, tokens, objective, weight=torch.zeros(3))
    logp = tokens.logp.clone().requires_grad_()
    loss = token_loss(statistics(logp), streams, objective).sum()
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


def test_the_entropy_bonus_is_subtracted():
    table = make_table([3, 3])
    tokens, entropy = tokens_of(table), torch.rand(int(table.length.sum()), requires_grad=True)
    loss = token_loss(
        statistics(tokens.logp, entropy), streams_of(table, tokens, Objective(entropy_bonus=0.01)), Objective()
    ).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], torch.full_like(entropy, -0.01 / len(entropy)))


def test_diagnostics_are_the_minibatch_means():
    table = make_table([3, 3])
    tokens, objective, entropy = tokens_of(table), Objective(tis_cap=2.0), torch.rand(int(table.length.sum()))
    streams = streams_of(table, tokens, objective)
    seen = diagnostics(statistics(tokens.logp, entropy), streams, objective)
    log_ratio = tokens.logp - tokens.old_logp
    expected = {
        "clip_fraction": None,
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
        "entropy": entropy.mean(),
        "opd": (streams.advantage - streams.reward_advantage).abs().mean(),
        "rl": streams.reward_advantage.abs().mean(),
        "importance": (tokens.old_logp - tokens.rollout_logp).exp().clamp(max=objective.tis_cap).mean(),
    }
    assert set(seen) == set(expected)
    assert 0 < seen.pop("clip_fraction") < 1
    for name, x in seen.items():
        torch.testing.assert_close(x, expected[name])


def expected_gradient(divergence, vocabulary=11):
    """Return the gradient by the logits of the loss's exact expectation over the student's own actions, in fp64.

    Every action is one token; its aggregation weight is its probability under the policy that sampled it, so that the
    sum over tokens is the expectation. Also return both KL gradients by autograd.
    """
    generator = torch.Generator().manual_seed(5)
    student, teacher = 2 * torch.randn(2, vocabulary, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    logp, teacher_logp = student.log_softmax(0), teacher.log_softmax(0)
    old = logp.detach()
    objective = Objective(divergence=divergence, entropy_bonus=0.0, clip=0.2)
    one = torch.ones(1)
    streams = make_streams(
        objective, 1.0, 0.0, torch.zeros(vocabulary, dtype=torch.int64), old, teacher_logp, old, one, one, old.exp()
    )
    loss = token_loss(statistics(logp), streams, objective).sum()
    reverse = (logp.exp() * (logp - teacher_logp)).sum()
    forward = (teacher_logp.exp() * (teacher_logp - logp)).sum()
    return [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, reverse, forward)]


@pytest.mark.parametrize("divergence", ["k1", "k2"])
def test_the_expected_gradient_of_k1_as_an_advantage_and_of_k2_is_the_full_reverse_kls(divergence):
    gradient, reverse, forward = expected_gradient(divergence)
    torch.testing.assert_close(gradient, reverse, atol=1e-12, rtol=1e-10)
    assert (gradient - forward).norm() > 0.1 * forward.norm()


def test_the_expected_gradient_of_k3_on_policy_is_the_forward_kls():
    gradient, reverse, forward = expected_gradient("k3")
    torch.testing.assert_close(gradient, forward, atol=1e-12, rtol=1e-10)
    assert (gradient - reverse).norm() > 0.1 * reverse.norm()


def test_k2_and_k3_as_values():
    """k3 is an unbiased estimate of the reverse KL that is never negative; k2 is half the squared log-ratio."""
    student, teacher = torch.randn(2, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(1)
    one, sampled = torch.ones(1), torch.zeros(9, dtype=torch.int64)
    losses = {}
    for divergence in ("k2", "k3"):
        objective = Objective(divergence=divergence, entropy_bonus=0.0)
        streams = make_streams(objective, 1.0, 0.0, sampled, student, teacher, student, one, one, torch.ones(9))
        losses[divergence] = token_loss(statistics(student, student), streams, objective)
    assert losses["k3"].min() >= 0
    torch.testing.assert_close((student.exp() * losses["k3"]).sum(), (student.exp() * (student - teacher)).sum())
    torch.testing.assert_close(losses["k2"], (student - teacher) ** 2 / 2)


@pytest.mark.parametrize("divergence", ["k1", "k2", "k3", *FULL_VOCABULARY])
@pytest.mark.parametrize("schedule", ["fast", "lean"])
def test_the_head_that_forms_the_gradient_in_its_forward_learns_the_same(divergence, schedule):
    """One operator with the loss inside equals autograd through the loss and the statistics."""
    table = make_table([4, 3])
    tokens, objective = tokens_of(table), Objective(divergence=divergence, tis_cap=1.5, entropy_bonus=0.02)
    streams, count = streams_of(table, tokens, objective), len(tokens.turn)
    generator = torch.Generator().manual_seed(1)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(n, h, generator=generator) for n, h in ((count, 8), (13, 8), (count, 6), (13, 6))
    )
    target = torch.randint(0, 13, (count,), generator=generator)
    teacher = (teacher_hidden, teacher_weight) if divergence in FULL_VOCABULARY else (None, None)
    options = {"divergence": divergence} if divergence in FULL_VOCABULARY else {}
    parameters = hidden.requires_grad_(), weight.requires_grad_()

    fused, stats = linear_token_loss(
        loss_function(objective),
        hidden,
        weight,
        *teacher,
        target,
        inputs=streams.tensors(),
        schedule=schedule,
        **options,
    )
    apart = (
        linear_divergence(hidden, weight, *teacher, target, **options)
        if options
        else linear_logprob(hidden, weight, target)
    )
    loss = token_loss(apart, streams, objective).sum()
    torch.testing.assert_close(fused, loss)
    for ours, theirs in zip(torch.autograd.grad(fused, parameters), torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not any(x.requires_grad for x in stats if x is not None)
    torch.testing.assert_close(diagnostics(stats, streams, objective), diagnostics(apart, streams, objective))
