"""The whole learner, sharded and in micro-batches, against plain transformers in fp64 (reference.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atod_fast import objective, ranks
from atod_fast.batches import rows, turn_table
from atod_fast.config.settings import load
from atod_fast.policy.learner import Learner
from atod_fast.records import Trajectory, Turn
from atod_fast.runtime import Runtime
from atod_fast.schedules import LearningRate
from helpers import reference
from helpers.tiny import VOCABULARY, save_model

KAPPA, RHO, TEMPERATURE = 0.7, 1.4, 0.7
BANNED = (0, 5, 17)  # ids that no action may hold
COLUMNS = torch.tensor([i for i in range(VOCABULARY) if i not in BANNED])
COMMON = [
    f"rollout.temperature={TEMPERATURE}",
    "objective.alpha=0.3",
    "objective.invalid_penalty=0.1",
    "objective.entropy_bonus=0.01",
    "objective.tis_cap=1.2",
    "train.learning_rate=0.003",
    "train.steps=10",
    "train.warmup_steps=4",
    "train.final_learning_rate=0.5",
    "train.weight_decay=0.5",
    "train.betas=[0.8,0.97]",
    "train.grad_clip=0.1",
]
EXACT = ["turns.disagreement=exact", "turns.uncertainty=exact"]
MASK = ["objective.mismatch_mask=1.15"]
CASES = {
    "window": ["objective.divergence=k1", "objective.log_ratio_clip=0", "objective.baseline=rows"],
    "full": ["objective.divergence=k1", "objective.log_ratio_clip=1.5", "objective.aggregation=turn", *EXACT],
    "window, jsd": ["objective.divergence=jsd", "objective.aggregation=trajectory", *EXACT],
    "full, jsd": [
        "objective.divergence=jsd",
        "objective.advantage=gigpo",
        "objective.gigpo_omega=0.7",
        "objective.invalid=accepted",
        *EXACT,
        "train.epochs=2",
    ],
    "window, skew": [
        "objective.divergence=skew_forward_kl",
        "turns.uncertainty=exact",
        "objective.baseline=trajectory",
    ],
    "full, reverse": ["objective.divergence=reverse_kl", "turns.disagreement=exact", "train.microbatch_tokens=16"],
    "window, k3": ["objective.divergence=k3", "objective.normalise_std=false", "train.minibatch_rows=0"],
    "full, GSPO": [
        "objective.preset=grpo",
        "objective.ratio=sequence",
        "objective.tis_cap=0",
        "objective.aggregation=turn",
        "objective.clip=0.03",
        "objective.clip_high=0.05",
        "train.grad_clip=0.02",
        "train.epochs=2",
    ],
    "window, GSPO-token": ["objective.divergence=k1", "objective.ratio=sequence", "objective.clip_high=0.1"],
    "full, GSPO-token, skew": [
        "objective.divergence=skew_reverse_kl",
        "objective.ratio=sequence",
        "train.microbatch_tokens=16",
    ],
    "window, turns left out": ["objective.divergence=k2", "objective.clip_high=0.02", *MASK],
    "full, turns left out": ["objective.divergence=k1", "objective.aggregation=turn", *MASK],
    "full, reward alone": ["objective.preset=grpo", "objective.dual_clip=1.1", "objective.clip=0.05", "train.epochs=2"],
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Folders of a student and of a teacher with more columns; device and mesh of a single rank."""
    root = tmp_path_factory.mktemp("models")
    student = save_model(root / "student")
    teacher = save_model(root / "teacher", seed=7, hidden=48, tied=False, vocabulary=VOCABULARY + 3)
    yield student, teacher, *ranks.start()
    ranks.stop()


def make_trajectories(context: str, model) -> list[Trajectory]:
    """Two groups of three, one of two turns alone; the rollout engine's log-probs are near the model's."""
    rng = np.random.default_rng(3)
    made = []
    for n, size in enumerate((4, 3, 5, 2, 4, 3)):
        trajectory = Trajectory(0, n // 3, n % 3, context)
        for k in range(size):
            action = rng.choice(COLUMNS.numpy(), int(rng.integers(1, 6))).tolist()
            prompt = rng.integers(0, VOCABULARY, int(rng.integers(2, 7))).tolist()
            reward = 0.5 * (k == 1) * (n % 2) + 10.0 * (k == size - 1) * (n in (0, 4))
            seen, well_formed, accepted = f"seen {rng.integers(0, 2)}", bool(rng.random() > 0.3), k != 1
            trajectory.turns.append(Turn(prompt, action, [], seen, "", "", well_formed, accepted, float(reward)))
        made.append(trajectory)
    sample(made, model, rng)
    return made


@torch.no_grad()
def sample(trajectories: list[Trajectory], model, rng: np.random.Generator) -> None:
    """Write down log-probs of the rollout engine: the model's, and noise."""
    logp = reference.distributions(model, trajectories, TEMPERATURE, COLUMNS)
    turns = (turn for trajectory in trajectories for turn in trajectory.turns)
    for turn, values in zip(turns, reference.of_actions(logp, trajectories, COLUMNS), strict=True):
        turn.logprobs = (values + 0.4 * torch.from_numpy(rng.standard_normal(len(values)))).float().tolist()


def close(found, expected, message, rtol=1e-5, atol=2e-5):
    torch.testing.assert_close(
        torch.as_tensor(found).double(),
        torch.as_tensor(expected).double(),
        rtol=rtol,
        atol=atol,
        msg=lambda text: f"{message}: {text}",
    )


def same_tensors(found, expected, bound, what):
    """Assert that no tensor is missing and each is within `bound` of the expected one's norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].double() - tensor).norm() <= bound * tensor.norm(), f"{what} of {name}"
    assert any(tensor.norm() > 0 for tensor in expected.values())


def whole(learner):
    return {name: parameter.detach().full_tensor().clone() for name, parameter in learner.student.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_two_steps_are_those_of_plain_transformers(setting, case):
    student, teacher, device, mesh = setting
    context = case.split(",")[0]
    sizes = {"window": (8, 40), "full": (4, 70)}[context]
    batches = [f"train.minibatch_rows={sizes[0]}", f"train.microbatch_tokens={sizes[1]}"]
    own = [f"student.path={student}", f"teacher.path={teacher}", f"rollout.context={context}"]
    config = load(None, None, [*own, *batches, *COMMON, *CASES[case]])
    kappa = 0.0 if config.objective.preset == "grpo" else KAPPA

    valid = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, COLUMNS, True)
    learner = Learner(config, Runtime.of(config, device, mesh=mesh), valid)
    clipped = []  # the gradients that AdamW gets

    def watch(*_):
        parameters = learner.student.named_parameters()
        clipped.append({name: parameter.grad.full_tensor().clone() for name, parameter in parameters})

    learner.optimizer.register_step_pre_hook(watch)

    model = reference.model_of(student)
    how = config.train
    adam = reference.AdamW(model, how.betas, how.weight_decay, how.grad_clip)
    trajectories = make_trajectories(context, model)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    sequences = rows(trajectories)
    taught = None
    if kappa:
        with torch.no_grad():
            taught = reference.distributions(reference.model_of(teacher), trajectories, TEMPERATURE, COLUMNS)

    orders = []
    for number in (1, 2):
        if config.objective.mismatch_mask:  # else those of the first step, from which the model moves away
            sample(trajectories, model, np.random.default_rng(number))
            sequences = rows(trajectories)
        # --- the product
        minibatches, wholes = learner.partition(sequences, number)
        scores = learner.score_teacher(minibatches) if kappa else None
        minibatches = learner.score_student(minibatches, scores)
        signals = learner.turn_signals(minibatches, len(turns))
        table = turn_table(trajectories, *signals)
        weights = objective.weigh_turns(table, config.turns).weight
        rl = objective.rl_advantages(table, config.objective).turn
        parts = [whole.tolist() for whole in wholes]
        tokens = [[scored.tokens for scored in minibatch] for minibatch in minibatches]
        weighed = {"table": table, "kappa": kappa, "rho": RHO, "turn_weight": weights, "rl_advantage": rl}
        if config.objective.mismatch_mask:
            weighed["kept"] = objective.kept_turns(learner.mismatch(minibatches, len(turns)), config.objective)
        streams = objective.step_streams(config.objective, tokens, wholes, **weighed)
        gap = learner.logprob_gap(minibatches)
        before = len(clipped)
        said = learner.update(minibatches, streams, LearningRate(how).value(number))

        # --- what was to come out
        with torch.no_grad():
            logp = reference.distributions(model, trajectories, TEMPERATURE, COLUMNS)
        step = reference.look(config, kappa, RHO, trajectories, logp, taught, COLUMNS)
        close(signals[0], step.d, "d")
        close(signals[1], step.h, "h")
        close(weights, step.weight, "T-DUR's weights", atol=1e-4)
        close(rl, step.rl, "A_RL")
        if config.turns.fuse == "softor":
            assert min(step.weight) < 0.3 and len(set(step.weight)) > 5
        played = torch.tensor([value for turn in turns for value in turn.logprobs])
        apart = (torch.cat(step.old) - played).abs()
        close(gap, [apart.mean(), apart.max()], "gap between rollout and trainer")

        if config.objective.mismatch_mask:
            assert 3 < sum(step.inside) < len(turns) - 3
        assert sorted(turn for part in parts for turn in part) == list(range(len(turns)))
        orders.append([sorted(part) for part in parts])
        assert how.minibatch_rows == 0 or len(minibatches) > 1
        assert max(len(minibatch) for minibatch in minibatches) > 1, "several micro-batches"
        for minibatch, part, wanted in zip(minibatches, parts, streams, strict=True):
            share = reference.token_weights(config.objective.aggregation, trajectories, part)
            seen = []
            for scored, stream in zip(minibatch, wanted, strict=True):
                order = torch.unique_consecutive(scored.batch.turn).tolist()
                seen += order
                compare_streams(scored, stream, step, order, share, config.objective)
            assert sorted(seen) == sorted(part)

        rate = how.learning_rate * number / 4 * (1 - 0.5 * number / 10)
        losses, norms = [], []
        for part in parts * how.epochs:
            logp = reference.distributions(model, trajectories, TEMPERATURE, COLUMNS, part)
            sampled = reference.of_actions(logp, trajectories, COLUMNS)
            share = reference.token_weights(config.objective.aggregation, trajectories, part)
            loss = reference.loss_of(config.objective, step, logp, taught, sampled, share)
            losses.append(loss.item())
            norm, gradients = adam.update(loss, rate)
            norms.append(norm)
            where = f"step {number}, update {len(norms)}"
            same_tensors(clipped[before + len(norms) - 1], gradients, 1e-4, f"{where}: the gradient")
        assert len(clipped) - before == len(norms)
        assert min(norms) > how.grad_clip, "every gradient was clipped"
        close(said["loss"], np.mean(losses), "loss", rtol=1e-4)
        close(said["gradient_norm"], np.mean(norms), "gradient norm", rtol=1e-4)
        if number == 2 and len(norms) > 1:
            assert said["clip_fraction"] > 0, "the surrogate's clip was in use"
        start = reference.model_of(student).state_dict()
        moved = {name: weight.double() - start[name] for name, weight in whole(learner).items()}
        same_tensors(
            moved,
            {name: p.detach() - start[name] for name, p in adam.parameters.items()},
            1e-3,
            f"step {number}: the change",
        )
    assert len(parts) == 1 or orders[0] != orders[1], "each step has mini-batches of its own"


def compare_streams(scored, stream, step, order, share, o):
    """Compare a micro-batch's streams and scores, whose tokens are those of the turns `order`."""

    def wanted(values):
        return torch.cat([torch.as_tensor(values[k], dtype=torch.float64).expand(len(step.old[k])) for k in order])

    def inside(values):
        return [value * stays for value, stays in zip(values, step.inside, strict=True)]

    close(scored.logp, wanted(step.old), "log pi_old")
    close(scored.entropy, wanted(step.entropy), "entropy")
    if step.teacher is None:
        assert scored.teacher_logp is None
    else:
        close(scored.teacher_logp, wanted(step.teacher), "log pi_T")
    expected = {
        "advantage": wanted(inside(step.advantage)),
        "old_logp": wanted(step.old),
        "weight": wanted(share),
        "policy_weight": wanted(step.importance),
        "entropy_weight": wanted(inside([o.entropy_bonus] * len(step.old))),
    }
    expected["reward_advantage"] = wanted(inside([RHO * a for a in step.rl]))
    if step.imitation is not None:
        expected["divergence_weight"] = wanted(inside(step.imitation))
        if o.divergence in ("k2", "k3"):
            expected["teacher_logp"] = wanted(step.teacher)
    found = stream.tensors()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        close(found[name], values, name, atol=1e-4)
