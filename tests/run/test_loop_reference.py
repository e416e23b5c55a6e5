"""Two steps of a run, recomputed in fp64 (reference.py) from the engine's samples and the environments' answers."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

from atod_fast import train
from atod_fast.demo.tokenizer import ACT, BOS, CUT, PAD, UNK
from atod_fast.models import resolve
from atod_fast.policy.learner import Learner
from atod_fast.rollout.player import Player
from helpers import reference

TEMPERATURE = 0.7
STEPS, TASKS, GROUP = 2, 3, 4
FAILING = """
from atod_fast.envs.alfworld.env import AlfWorld

class Failing(AlfWorld):
    def __init__(self, *, fails=False, **options):
        super().__init__(**options)
        self.fails, self.episodes = fails, [0]  # episodes of all clones together

    def reset(self, seed, task):
        self.episodes[0] += 1
        self.number, self.steps = self.episodes[0], 0
        return super().reset(seed, task)

    def step(self, action):
        self.steps += 1
        if self.fails and self.number % 5 == 0 and self.steps == 3:
            raise ConnectionError("the world is gone")
        return super().step(action)
"""
SETTINGS = [
    "env.name=failing:Failing",
    "env.train={generate=200, seed=0, fails=true}",
    "env.eval={generate=12, seed=1}",
    "env.max_turns=9",
    f"rollout.temperature={TEMPERATURE}",
    "eval.temperature=0.4",
    "eval.tasks=10",
    "eval.teacher=false",
    f"train.steps={STEPS}",
    f"train.tasks_per_step={TASKS}",
    f"train.group_size={GROUP}",
    "train.minibatch_rows=4",
    "train.microbatch_tokens=400",
    "train.learning_rate=0.001",
    "train.warmup_steps=10",
    "train.final_learning_rate=0.2",
    "train.weight_decay=0.3",
    "train.grad_clip=0.2",
    "schedule.kappa={kind='linear', start=1.0, end=0.1, horizon=4, hold=0}",
    "schedule.rho={kind='linear', start=1.0, end=2.0, horizon=4, hold=0}",
    "objective.alpha=0.3",
    "objective.invalid_penalty=0.1",
    "objective.tis_cap=2",
    "objective.entropy_bonus=0.01",
]
CASES = {
    "sampled": ["objective.divergence=k1", "objective.advantage=grpo", "objective.baseline=rows"],
    "exact": [
        "objective.divergence=jsd",
        "objective.advantage=gigpo",
        "objective.invalid=accepted",
        "objective.baseline=trajectory",
        "objective.aggregation=trajectory",
        "turns.disagreement=exact",
        "turns.uncertainty=exact",
    ],
}


@pytest.fixture(scope="module", params=CASES)
def watched(request, tmp_path_factory):
    """A run of two steps: its configuration, metrics, trajectories by label, inputs of each step's update, and final
    weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "failing.py").write_text(FAILING)
    played, updates, draws, seen = {}, [], [], {}
    play, update, weigh_turns = Player.play, Learner.update, train.objective.weigh_turns

    def weights(learner):
        learner.make_room()  # reshard what a forward pass has gathered
        return {name: p.detach().full_tensor().double().clone() for name, p in learner.student.named_parameters()}

    def watched_play(player, label, act):
        played.setdefault(label, []).append(play(player, label, act))
        return played[label][-1]

    def watched_update(learner, minibatches, streams, learning_rate):
        updates.append((weights(learner), minibatches, streams, learning_rate))
        said = update(learner, minibatches, streams, learning_rate)
        seen.update(config=learner.config, weights=weights(learner))
        return said

    def watched_weigh_turns(table, config, generator):
        draws.append(generator.initial_seed())
        return weigh_turns(table, config, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(Player, "play", watched_play)
        patch.setattr(Learner, "update", watched_update)
        patch.setattr(train.objective, "weigh_turns", watched_weigh_turns)
        assert train.main([*SETTINGS, *CASES[request.param], "--run-dir", str(folder / "run")]) == 0
    assert len(set(draws)) == STEPS, "turns.fuse=shuffled draws anew each step"
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return seen["config"], metrics, played, updates, seen["weights"]


@pytest.fixture(scope="module")
def columns():
    """Return the words that an action may hold."""
    vocabulary = AutoTokenizer.from_pretrained(resolve("demo:student")).get_vocab()
    return torch.tensor(sorted(set(vocabulary.values()) - {vocabulary[token] for token in (PAD, ACT, BOS, UNK, CUT)}))


def test_groups_share_a_task_and_failures_are_marked(watched):
    _, metrics, played, _, _ = watched
    tasks = []
    for number in range(1, STEPS + 1):
        (everyone,) = played[f"step {number}"]
        assert [(t.group, t.member) for t in everyone] == [(g, m) for g in range(TASKS) for m in range(GROUP)]
        groups = [everyone[g * GROUP : (g + 1) * GROUP] for g in range(TASKS)]
        assert all(len({t.task for t in group}) == 1 for group in groups)
        said = [{tuple(i for turn in t.turns for i in turn.action) for t in group} for group in groups]
        assert min(len(different) for different in said) > 1, "each member draws its own"
        tasks += [group[0].task for group in groups]
        failed = [t for t in everyone if t.failure is not None]
        assert failed and all(len(t.turns) == 3 for t in failed), "they have turns, from which nothing is to be learnt"
        assert metrics[number]["rollout/failed_environments"] == len(failed)
        assert metrics[number]["train/success"] == pytest.approx(sum(t.success for t in everyone) / len(everyone))
    assert len(set(tasks)) == STEPS * TASKS


def test_reaching_the_goal_pays_ten(watched):
    _, _, played, _, _ = watched
    everyone = [t for rollouts in played.values() for rollout in rollouts for t in rollout if t.failure is None]
    assert {t.success for t in everyone} == {True, False}
    for t in everyone:
        assert [turn.reward for turn in t.turns] == [0.0] * (len(t.turns) - 1) + [10.0 * t.success]


def test_both_steps_are_the_methods(watched, columns):
    config, metrics, played, updates, last = watched
    o, how = config.objective, config.train
    model, teacher = (reference.model_of(resolve(name)) for name in ("demo:student", "demo:teacher"))
    adam = reference.AdamW(model, how.betas, how.weight_decay, how.grad_clip)
    assert len(updates) == STEPS
    for number, (before, minibatches, streams, learning_rate) in enumerate(updates, 1):
        model.load_state_dict(before, strict=False)
        trajectories = [t for t in played[f"step {number}"][0] if t.failure is None]
        turns = [turn for t in trajectories for turn in t.turns]
        kappa, rho = 1 - 0.9 * number / 4, 1 + number / 4
        assert (metrics[number]["schedule/kappa"], metrics[number]["schedule/rho"]) == pytest.approx((kappa, rho))
        assert learning_rate == pytest.approx(0.001 * number / 10 * (1 - 0.8 * number / STEPS))

        with torch.no_grad():
            logp, taught = (reference.distributions(m, trajectories, TEMPERATURE, columns) for m in (model, teacher))
        step = reference.look(config, kappa, rho, trajectories, logp, taught, columns)
        for turn, expected in zip(turns, step.old, strict=True):
            torch.testing.assert_close(
                torch.tensor(turn.logprobs).double(),
                expected,
                atol=1e-4,
                rtol=1e-4,
                msg="the engine's temperature and weights",
            )
        assert len(set(step.weight)) > 10 and min(step.weight) < 0.1, "T-DUR tells turns apart"
        assert len(set(step.rl)) > 2 and not all(turn.valid for turn in turns)

        parts = []
        for minibatch, wanted in zip(minibatches, streams, strict=True):
            part = [k for scored in minibatch for k in torch.unique_consecutive(scored.batch.turn).tolist()]
            parts.append(part)
            share = reference.token_weights(o.aggregation, trajectories, part)
            for scored, stream in zip(minibatch, wanted, strict=True):
                order = torch.unique_consecutive(scored.batch.turn).tolist()
                assert scored.batch.target.tolist() == [i for k in order for i in turns[k].action]
                expected = {
                    "advantage": step.advantage,
                    "old_logp": step.old,
                    "policy_weight": step.importance,
                    "weight": share,
                }
                if step.imitation is not None:
                    expected["divergence_weight"] = step.imitation
                found = stream.tensors()
                assert ("divergence_weight" in found) == (step.imitation is not None)
                for name, values in expected.items():
                    each = [torch.as_tensor(values[k], dtype=torch.float64).expand(len(step.old[k])) for k in order]
                    tokens = torch.cat(each)
                    torch.testing.assert_close(
                        found[name].double(),
                        tokens,
                        atol=2e-4,
                        rtol=1e-4,
                        msg=lambda text, name=name: f"{name}: {text}",
                    )
        assert sorted(k for part in parts for k in part) == list(range(len(turns))), "what did not fail, nothing else"
        rows = [sum(1 for k in part if k in firsts(trajectories)) for part in parts]
        assert max(rows) <= how.minibatch_rows and len(rows) > 1

        norms, losses = [], []
        for part in parts:
            logp = reference.distributions(model, trajectories, TEMPERATURE, columns, part)
            sampled = reference.of_actions(logp, trajectories, columns)
            share = reference.token_weights(o.aggregation, trajectories, part)
            loss = reference.loss_of(o, step, logp, taught, sampled, share)
            losses.append(loss.item())
            norms.append(adam.update(loss, learning_rate)[0])
        assert max(norms) > how.grad_clip
        assert metrics[number]["policy/gradient_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-3)
        assert metrics[number]["loss/total"] == pytest.approx(sum(losses) / len(losses), rel=1e-3, abs=1e-5)
        after = updates[number][0] if number < STEPS else last
        for name, parameter in adam.parameters.items():
            change = parameter.detach() - before[name]
            assert (after[name] - before[name] - change).norm() <= 5e-3 * change.norm(), f"step {number}: {name}"


def firsts(trajectories) -> set[int]:
    """Return the number of each trajectory's first turn."""
    sizes = [len(t.turns) for t in trajectories]
    return {sum(sizes[:n]) for n in range(len(sizes))}


def test_evaluations_play_at_their_own_temperature(watched, columns):
    _, _, played, updates, last = watched
    model = reference.model_of(resolve("demo:student"))
    for label, weights in (("evaluating the student", updates[0][0]), ("evaluating", last)):
        model.load_state_dict(weights, strict=False)
        trajectories = played[label][-1]
        assert len(trajectories) == len({t.task for t in trajectories}) == 10
        with torch.no_grad():
            whole = reference.distributions(model, trajectories, 0.4, columns)
        logp = reference.of_actions(whole, trajectories, columns)
        for turn, expected in zip((turn for t in trajectories for turn in t.turns), logp, strict=True):
            torch.testing.assert_close(torch.tensor(turn.logprobs).double(), expected, atol=2e-4, rtol=1e-4)
