"""Turn weights, the paper's equation, aggregation and the loss."""

from types import SimpleNamespace

import pytest
import torch
from atod_kernels import TokenDivergence, TokenLogprob, linear_divergence, linear_logprob, linear_token_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.batches import TurnTable
from atod_fast.config import Objective, Schedule, Slide, Turns
from atod_fast.objective import (
    FULL_VOCABULARY,
    diagnostics,
    loss_function,
    make_streams,
    profile,
    rl_advantages,
    token_loss,
    token_signals,
    token_weights,
    weigh_turns,
)
from atod_fast.schedules import make as make_schedule

torch.set_num_threads(1)


def make_table(sizes, lengths=None, seed=0, group_size=2, **columns):
    """Return a table of random turns; sizes: number of turns of each trajectory. `columns` override."""
    generator = torch.Generator().manual_seed(seed)
    count, trajectories = sum(sizes), len(sizes)
    rand = lambda: torch.rand(count, generator=generator)  # noqa: E731
    reward = torch.zeros(count)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    reward[offsets[1:][torch.tensor(sizes) > 0] - 1] = (
        torch.rand(trajectories, generator=generator)[torch.tensor(sizes) > 0] > 0.5
    ).float()
    table = dict(
        disagreement=rand() + 0.05,
        uncertainty=rand(),
        length=torch.tensor(lengths) if lengths is not None else torch.randint(1, 6, (count,), generator=generator),
        well_formed=(formed := rand() > 0.3),
        valid=formed & (rand() > 0.3),
        turn_reward=reward,
        anchor=torch.randint(0, 3, (count,), generator=generator),
        offsets=offsets,
        reward=torch.stack([part.sum() for part in reward.split(list(sizes))]),
        success=torch.zeros(trajectories, dtype=torch.bool),
        group=torch.arange(trajectories) // group_size,
    )
    return TurnTable(**(table | columns))


def tokens_of(table, seed=0, dtype=torch.float32):
    """Return random inputs for every action token of a table: turn numbers, then log-probs of at most 0."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.repeat_interleave(torch.arange(len(table.length)), table.length)
    logp = [-3 * torch.rand(len(turn), generator=generator, dtype=dtype) for _ in range(4)]
    return SimpleNamespace(turn=turn, logp=logp[0], old_logp=logp[1], teacher_logp=logp[2], rollout_logp=logp[3])


def statistics(logp, entropy=None, divergence=None):
    """Return the student's statistics, as the head does."""
    entropy = torch.zeros_like(logp) if entropy is None else entropy
    return TokenLogprob(logp, entropy) if divergence is None else TokenDivergence(divergence, entropy, logp, None, None)


# ---- turn weights -------------------------------------------------------------------------------------------------


def test_the_papers_worked_example():
    table = make_table(
        [5],
        disagreement=torch.tensor([0.101, 0.228, 0.022, 0.019, 0.138]),
        uncertainty=torch.tensor([0.037, 0.025, 0.010, 0.006, 0.008]),
    )
    weights = weigh_turns(table, Turns())
    assert weights.weight.tolist() == pytest.approx([1.00, 1.00, 0.142, 0.000, 0.597], abs=5e-4)
    assert (weights.unweighted, weights.fallbacks) == (0.0, 0)


def test_short_and_agreeing_trajectories_keep_weight_one_and_are_counted():
    table = make_table([2, 4, 4, 3])
    table.disagreement[2:6] = torch.tensor([0.0, 0.001, 0.009, 0.002])
    weights = weigh_turns(table, Turns())
    assert weights.weight[:6].tolist() == [1.0] * 6
    assert (weights.weight[6:] != 1).any()
    assert weights.unweighted == 0.5


def test_a_turn_without_tokens_is_compared_with_none():
    disagreement, uncertainty = torch.tensor([0.3, 0.0, 0.1, 0.2]), torch.tensor([0.5, 0.0, 0.3, 0.4])
    with_silence = weigh_turns(
        make_table([4], lengths=[2, 0, 2, 2], disagreement=disagreement, uncertainty=uncertainty), Turns()
    )
    acted = torch.tensor([0, 2, 3])
    without = weigh_turns(
        make_table([3], lengths=[2, 2, 2], disagreement=disagreement[acted], uncertainty=uncertainty[acted]), Turns()
    )
    assert with_silence.weight[acted].tolist() == without.weight.tolist() == pytest.approx([1.0, 0.0, 0.75])


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    scope=st.sampled_from(["trajectory", "batch"]),
)
def test_mean1_spends_the_budget_of_uniform_weights_wherever_a_scale_exists(sizes, seed, scope):
    """2/3 of the tokens at w = 0 and 1/3 at the cap of 2 is the last case with mean 1."""
    table = make_table(sizes, seed=seed)
    weight, raw = (weigh_turns(table, Turns(budget=budget, scope=scope)) for budget in ("mean1", "raw"))
    short = torch.repeat_interleave(torch.tensor(sizes) < 3, torch.tensor(sizes))
    assert (weight.weight[short] == 1).all()
    parts = (
        [~short]
        if scope == "batch"
        else [
            (torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)) == n) & ~short
            for n in range(len(sizes))
        ]
    )
    lost = 0
    for part in (part for part in parts if part.any()):
        length, w = table.length[part].double(), weight.weight[part].double()
        assert w.min() >= 0.5 and w.max() <= 2
        assert (length * w).sum() / length.sum() == pytest.approx(1, abs=1e-5)
        reachable = torch.where(raw.weight[part] > 0, 2.0, 0.5).double()
        lost += int((length * reachable).sum() / length.sum() < 1) * (
            1 if scope == "trajectory" else int((torch.tensor(sizes) >= 3).sum())
        )
    assert weight.fallbacks == lost


def test_a_mean1_budget_that_cannot_be_met_is_counted():
    """One short turn holds all the weight: even at the cap of 2 the mean stays below 1."""
    table = make_table(
        [3], lengths=[1, 20, 20], disagreement=torch.tensor([1.0, 0.0, 0.0]), uncertainty=torch.tensor([1.0, 0.0, 0.0])
    )
    weights = weigh_turns(table, Turns(budget="mean1"))
    assert weights.weight.tolist() == [1.0, 1.0, 1.0]
    assert weights.fallbacks == 1


def test_shuffled_weights_are_the_same_on_every_rank_and_depend_on_the_seed():
    table = make_table([6, 6])
    shuffled = [
        weigh_turns(table, Turns(fuse="shuffled"), torch.Generator().manual_seed(seed)).weight for seed in (1, 1, 2)
    ]
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])


def test_signals_are_sampled_or_exact():
    old, teacher, entropy, divergence = (torch.tensor(x) for x in ([-1.0, -2.0], [-3.0, -0.5], [0.7, 0.8], [0.3, 0.4]))
    assert [x.tolist() for x in token_signals(Turns(), old, teacher)] == [[2.0, 1.5], [1.0, 2.0]]
    exact = token_signals(Turns(disagreement="exact", uncertainty="exact"), old, teacher, entropy, divergence)
    assert exact == (divergence, entropy)


def test_profile_is_a_mean_over_the_trajectories_that_got_that_far():
    assert profile(torch.tensor([1.0, 2.0, 5.0, 3.0, 4.0, 9.0]), torch.tensor([0, 3, 3, 5, 6])) == pytest.approx(
        [13 / 3, 3.0, 5.0]
    )


# ---- the equation ---------------------------------------------------------------------------------------------------


def streams_of(table, tokens, objective, kappa=0.6, rho=1.5, weight=None, part=slice(None), turns=None):
    """Return streams of (a part of) a table's tokens as the loop makes them, all in one mini-batch."""
    weight = weigh_turns(table, turns or Turns(), torch.Generator().manual_seed(3)).weight if weight is None else weight
    turn = tokens.turn[part]
    return make_streams(
        objective,
        kappa,
        rho,
        turn,
        tokens.old_logp[part],
        tokens.teacher_logp[part],
        tokens.rollout_logp[part],
        weight,
        rl_advantages(table, objective).turn,
        token_weights(objective.aggregation, turn, table, torch.arange(len(table.length))),
    )


@given(seed=st.integers(0, 999), kappa=st.floats(0.01, 2), rho=st.floats(0, 3))
@settings(deadline=None, max_examples=20)
def test_the_hybrid_advantage_is_the_papers_equation(seed, kappa, rho):
    table = make_table([4, 3, 5, 2], seed=seed)
    tokens, objective = tokens_of(table, seed), Objective()
    w, rl = weigh_turns(table, Turns()).weight, rl_advantages(table, objective).turn
    streams = streams_of(table, tokens, objective, kappa, rho)
    for t in range(len(tokens.turn)):
        k = tokens.turn[t]
        expected = kappa * w[k] * (tokens.teacher_logp[t] - tokens.old_logp[t]) + rho * rl[k]
        assert streams.advantage[t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert not any(stream.requires_grad for stream in streams.tensors().values())


def test_uniform_weights_give_plain_distillation_plus_reward():
    table = make_table([4, 3, 5, 2])
    tokens, objective = tokens_of(table), Objective()
    streams = streams_of(table, tokens, objective, kappa=0.6, rho=1.5, turns=Turns(fuse="uniform"))
    plain = 0.6 * (tokens.teacher_logp - tokens.old_logp) + 1.5 * rl_advantages(table, objective).turn[tokens.turn]
    torch.testing.assert_close(streams.advantage, plain)


@pytest.mark.parametrize("divergence", ["k1", "k2", "k3", *FULL_VOCABULARY])
def test_kappa_zero_is_grpo_whatever_the_divergence_and_asks_nothing_of_the_teacher(divergence):
    table = make_table([4, 3, 5, 2])
    tokens, objective = (
        tokens_of(table),
        Objective(divergence=divergence, entropy_bonus=0.0, dual_clip=0.0, tis_cap=0.0),
    )
    tokens.teacher_logp = torch.full_like(tokens.old_logp, torch.nan)
    weight = torch.full_like(table.disagreement, torch.nan)
    streams = streams_of(table, tokens, objective, kappa=0.0, rho=1.0, weight=weight)
    logp = tokens.logp.clone().requires_grad_()
    loss = token_loss(statistics(logp), streams, objective).sum()

    advantage, ratio = rl_advantages(table, objective).turn[tokens.turn], (logp - tokens.old_logp).exp()
    grpo = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    torch.testing.assert_close(loss, grpo)
    torch.testing.assert_close(*(torch.autograd.grad(x, logp)[0] for x in (loss, grpo)))


@pytest.mark.parametrize("divergence", ["k1", "k2", "reverse_kl"])
def test_turn_weights_touch_the_imitation_term_alone(divergence):
    table = make_table([4, 3])
    tokens, objective = tokens_of(table), Objective(divergence=divergence)
    one, two = (streams_of(table, tokens, objective, weight=w * torch.ones(7)) for w in (0.25, 1.0))
    torch.testing.assert_close(one.reward_advantage, two.reward_advantage)
    for name in ("entropy_weight", "policy_weight", "weight"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    if divergence == "k1":
        torch.testing.assert_close(4 * (one.advantage - one.reward_advantage), two.advantage - two.reward_advantage)
        assert one.divergence_weight is None
    else:
        torch.testing.assert_close(one.advantage, two.advantage)
        torch.testing.assert_close(one.divergence_weight, torch.full_like(tokens.logp, 0.6 * 0.25))


def test_a_divergence_loss_is_added_to_the_clipped_reward_loss():
    """L = rho L_clip(A_RL) + kappa sum m w D / sum m."""
    table = make_table([4, 3, 3])
    tokens, objective = tokens_of(table), Objective(divergence="reverse_kl", entropy_bonus=0.0, tis_cap=0.0)
    divergence = torch.rand(len(tokens.turn))
    w, rl = weigh_turns(table, Turns()).weight[tokens.turn], rl_advantages(table, objective).turn[tokens.turn]
    loss = token_loss(
        statistics(tokens.logp, divergence=divergence), streams_of(table, tokens, objective, 0.6, 1.5), objective
    ).sum()
    ratio = (tokens.logp - tokens.old_logp).exp()
    surrogate = -torch.min(ratio * rl, ratio.clamp(0.8, 1.2) * rl)
    surrogate = torch.where(rl < 0, torch.min(surrogate, -3 * rl), surrogate)
    torch.testing.assert_close(loss, 1.5 * surrogate.mean() + 0.6 * (w * divergence).mean())


def test_log_ratio_clip_bounds_the_bracket_and_nothing_else():
    table = make_table([3, 3])
    tokens = tokens_of(table)
    tokens.teacher_logp[0], tokens.teacher_logp[1] = -torch.inf, tokens.old_logp[1] + 30
    weight = torch.ones_like(table.disagreement)
    clipped, free = (streams_of(table, tokens, Objective(log_ratio_clip=bound), weight=weight) for bound in (1.0, 0.0))
    bracket = (clipped.advantage - clipped.reward_advantage) / 0.6
    assert bracket[:2].tolist() == pytest.approx([-1.0, 1.0])
    inside = (tokens.teacher_logp - tokens.old_logp).abs() < 1
    torch.testing.assert_close(clipped.advantage[inside], free.advantage[inside])
    assert free.advantage[0] == -torch.inf
    assert free.advantage[1] == pytest.approx(0.6 * 30 + free.reward_advantage[1].item(), abs=1e-4)


def test_truncated_importance_weights_scale_the_policy_term_alone():
    table = make_table([3, 3])
    tokens, entropy = tokens_of(table), torch.rand(int(table.length.sum()))
    tokens.rollout_logp[0] = tokens.old_logp[0] - 5
    streams, off = (streams_of(table, tokens, Objective(divergence="k2", tis_cap=cap)) for cap in (2.0, 0.0))
    torch.testing.assert_close(streams.policy_weight, (tokens.old_logp - tokens.rollout_logp).exp().clamp(max=2))
    assert streams.policy_weight[0] == 2
    assert (off.policy_weight == 1).all()
    full, plain = (token_loss(statistics(tokens.logp, entropy), s, Objective(divergence="k2")) for s in (streams, off))
    policy = plain - off.weight * (
        off.divergence_weight * (tokens.logp - tokens.teacher_logp) ** 2 / 2 - off.entropy_weight * entropy
    )
    torch.testing.assert_close(full - plain, policy * (streams.policy_weight - 1))


def test_low_precision_log_probs_and_a_missing_teacher_are_refused():
    table = make_table([3])
    tokens = tokens_of(table)
    for divergence in ("k1", "k2", "k3"):
        with pytest.raises(ValueError, match=f"objective.divergence={divergence}"):
            make_streams(
                Objective(divergence=divergence),
                0.5,
                1.0,
                tokens.turn,
                tokens.old_logp,
                None,
                tokens.rollout_logp,
                *[torch.ones(3)] * 2,
                tokens.logp,
            )
    tokens.old_logp = tokens.old_logp.bfloat16()
    with pytest.raises(ValueError, match="fp32"):
        streams_of(table, tokens, Objective())


# ---- aggregation ----------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    aggregation=st.sampled_from(["token", "trajectory", "turn"]),
)
@settings(deadline=None, max_examples=40)
def test_aggregation_weights_average_what_they_say(sizes, seed, aggregation):
    """Over a mini-batch of some of the turns, as with rollout.context=window."""
    table = make_table(sizes, seed=seed)
    chosen = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))[: (sum(sizes) + 1) // 2]
    turn = torch.repeat_interleave(chosen, table.length[chosen])
    loss = torch.randn(len(turn), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = token_weights(aggregation, turn, table, chosen)
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)

    trajectory = torch.searchsorted(table.offsets, turn, right=True) - 1
    unit = {"token": torch.arange(len(turn)), "turn": turn, "trajectory": trajectory}[aggregation]
    means = torch.stack([loss[unit == u].mean() for u in unit.unique()])
    assert (weights * loss).sum().item() == pytest.approx(means.mean().item(), abs=1e-5)


def test_tokens_outside_the_minibatch_and_turns_without_tokens_count_nothing():
    table = make_table([3, 2], lengths=[2, 0, 3, 1, 4])
    for aggregation in ("token", "trajectory", "turn"):
        weights = token_weights(aggregation, torch.tensor([0, 0, 3, 4, 4, 4, 4]), table, torch.tensor([0, 1, 4]))
        assert weights[2] == 0
        assert weights.sum().item() == pytest.approx(1)
    assert token_weights("turn", torch.tensor([0, 4]), table, torch.tensor([0, 1, 4])).tolist() == pytest.approx(
        [1 / 4, 1 / 8]
    )


@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    aggregation=st.sampled_from(["token", "trajectory", "turn"]),
    divergence=st.sampled_from(["k1", "k3", "forward_kl"]),
)
@settings(deadline=None, max_examples=30)
def test_loss_gradient_and_diagnostics_do_not_depend_on_the_split_into_micro_batches(cuts, aggregation, divergence):
    table = make_table([4, 3, 5, 2])
    tokens, objective = tokens_of(table), Objective(divergence=divergence, aggregation=aggregation, tis_cap=2.0)
    count = len(tokens.turn)
    full_kl, entropy = torch.rand(2, count)

    def accumulate(borders):
        logp = tokens.logp.clone().requires_grad_()
        total, seen = 0.0, {}
        for start, end in zip([0, *borders], [*borders, count], strict=True):
            part = slice(start, end)
            streams = streams_of(table, tokens, objective, part=part)
            stats = statistics(logp[part], entropy[part], full_kl[part])
            losses = token_loss(stats, streams, objective)
            assert losses.shape == (end - start,)
            losses.sum().backward()
            total += losses.sum().item()
            for name, x in diagnostics(stats, streams, objective).items():
                seen[name] = seen.get(name, 0.0) + x.item()
        return total, logp.grad, seen

    whole, split = accumulate([]), accumulate(sorted(min(cut, count) for cut in cuts))
    assert split[0] == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(split[1], whole[1])
    assert split[2] == pytest.approx(whole[2], abs=1e-5)


# ---- the loss -------------------------------------------------------------------------------------------------------


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


# ---- every switch does something ------------------------------------------------------------------------------------

BASE = {
    "objective": Objective(advantage="gigpo", tis_cap=1.5, log_ratio_clip=2.5, entropy_bonus=0.01, invalid_penalty=0.2),
    "turns": Turns(budget="raw"),
    "kappa": Slide(start=1.0, end=0.1, horizon=80),
    "rho": Slide(start=1.0, end=2.0, horizon=80),
}
SWITCHES = {
    "objective": {
        "divergence": ["k2", "k3", "reverse_kl"],
        "log_ratio_clip": [0.5],
        "advantage": ["grpo"],
        "normalise_std": [False],
        "std_epsilon": [0.5],
        "baseline": ["trajectory"],
        "gigpo_omega": [0.3],
        "gigpo_gamma": [0.5],
        "invalid_penalty": [0.4],
        "invalid": ["accepted"],
        "clip": [0.05],
        "dual_clip": [1.5],
        "entropy_bonus": [0.2],
        "aggregation": ["trajectory", "turn"],
        "tis_cap": [1.0],
    },
    "turns": {
        "disagreement": ["exact"],
        "uncertainty": ["exact"],
        "normalise": ["rank", "none"],
        "fuse": ["mean", "max", "product", "disagreement", "uncertainty", "uniform", "shuffled"],
        "scope": ["batch"],
        "budget": ["mean1"],
        "min_turns": [4],
        "min_disagreement": [10.0],
    },
    "kappa": {
        "kind": ["cosine", "exponential", "step", "constant"],
        "start": [0.5],
        "end": [0.3],
        "horizon": [40],
        "hold": [10],
    },
    "rho": {
        "kind": ["cosine", "exponential", "step", "constant"],
        "start": [0.5],
        "end": [3.0],
        "horizon": [40],
        "hold": [10],
    },
}


def losses_of(objective, turns, kappa, rho, step=30):
    """Return the token losses of one small step, computed from signals to loss as the training loop does."""
    table = make_table([4, 3, 5, 2, 4, 3], group_size=3)
    tokens = tokens_of(table)
    full_kl, entropy = torch.rand(2, len(tokens.turn), generator=torch.Generator().manual_seed(1))
    signals = token_signals(turns, tokens.old_logp, tokens.teacher_logp, entropy, full_kl)
    table.disagreement[:], table.uncertainty[:] = (
        torch.bincount(tokens.turn, x.double()) / table.length for x in signals
    )
    streams = streams_of(
        table, tokens, objective, make_schedule(kappa).value(step), make_schedule(rho).value(step), turns=turns
    )
    return token_loss(statistics(tokens.logp, entropy, full_kl), streams, objective)


@pytest.mark.parametrize(
    ("section", "key", "choice"),
    [
        (section, key, choice)
        for section, keys in SWITCHES.items()
        for key, choices in keys.items()
        for choice in choices
    ],
)
def test_each_switch_changes_the_result(section, key, choice):
    changed = BASE | {section: BASE[section].model_copy(update={key: choice})}
    assert (losses_of(**BASE) - losses_of(**changed)).abs().max() > 1e-5


def test_no_key_of_the_method_is_left_out_of_the_switches():
    """`preset` is resolved before the objective is built; `alpha` belongs to the head that computes the divergence."""
    assert set(SWITCHES["objective"]) == set(Objective.model_fields) - {"preset", "alpha"}
    assert set(SWITCHES["turns"]) == set(Turns.model_fields)
    assert set(SWITCHES["kappa"]) == set(SWITCHES["rho"]) == set(Slide.model_fields)
    assert set(Schedule.model_fields) == {"kappa", "rho"}
