"""The paper's equation term by term, and the aggregation of its tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_fast.config import Objective, Turns
from atod_fast.objective import (
    FULL_VOCABULARY,
    diagnostics,
    make_streams,
    rl_advantages,
    token_loss,
    token_weights,
    weigh_turns,
)
from helpers.table import make_table, statistics, streams_of, tokens_of

torch.set_num_threads(1)


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
