"""Random turns, tokens and the student's statistics, for tests of the objective."""

from types import SimpleNamespace

import torch
from atod_kernels import TokenDivergence, TokenLogprob

from atod_fast.batches import TurnTable
from atod_fast.config import Turns
from atod_fast.objective import (
    kept_turns,
    make_streams,
    response_means,
    rl_advantages,
    token_weights,
    weigh_turns,
)


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


def streams_of(table, tokens, objective, kappa=0.6, rho=1.5, weight=None, part=slice(None), turns=None):
    """Return streams of (a part of) a table's tokens as the loop makes them, all in one mini-batch."""
    weight = weigh_turns(table, turns or Turns(), torch.Generator().manual_seed(3)).weight if weight is None else weight
    turn = tokens.turn[part]
    kept = None
    if objective.mismatch_mask:
        kept = kept_turns(response_means(tokens.old_logp - tokens.rollout_logp, tokens.turn)[1], objective)
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
        kept,
    )
