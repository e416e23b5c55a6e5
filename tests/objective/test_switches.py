"""Every switch of the method changes the result."""

from dataclasses import replace

import pytest
import torch

from atod_fast.config import Objective, Schedule, Slide, Turns
from atod_fast.objective import response_log_ratio, token_loss, token_signals
from atod_fast.schedules import make as make_schedule
from helpers.table import make_table, statistics, streams_of, tokens_of

torch.set_num_threads(1)


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
        "clip_high": [0.05, 0.5],
        "ratio": ["sequence"],
        "mismatch_mask": [1.3],
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
    if objective.ratio == "sequence":  # as the learner does
        streams = replace(streams, response_log_ratio=response_log_ratio(tokens.logp, tokens.old_logp, tokens.turn))
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
