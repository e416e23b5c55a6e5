import copy

import pytest
import torch
from gloo import run_ranks
from tiny import VOCABULARY, random_rows, save_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from atod_fast import objective, ranks
from atod_fast.errors import UserError
from atod_fast.models import compare_tokenizers, load_model, resolve
from atod_fast.policy import checkpoint, sharding
from atod_fast.policy.learner import Learner
from atod_fast.policy.model import CausalPolicy, HeadJob
from atod_fast.policy.packing import collate
from atod_fast.policy.resync import stream_weights
from atod_fast.policy.sharding import shard
from atod_fast.settings import load
from atod_fast.trajectory import TurnTable


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for tied in (True, False):
        save_model(root / f"qwen3-{tied}", tied=tied)
        save_model(root / f"llama-{tied}", tied=tied, family="llama")
    save_model(root / "teacher", seed=7, hidden=48, tied=False)
    return root


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_packed_and_padded_rows_score_as_if_alone(folder, family, tied, packed):
    model = load_model(str(folder / f"{family}-{tied}"), torch.float32)
    rows = random_rows(6)
    expected, entropy = [], []
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for first, last in row.spans:
            expected += logits[range(first - 1, last - 1), row.ids[first:last]].tolist()
            entropy += torch.special.entr(logits[first - 1 : last - 1].exp()).sum(-1).tolist()
    policy = CausalPolicy(model)
    batch = collate(rows, packed=packed)
    out = policy(batch, HeadJob(batch.target, 1.0))
    torch.testing.assert_close(out.logp, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.entropy, torch.tensor(entropy), atol=1e-5, rtol=1e-5)


def test_only_positions_that_predict_action_tokens_get_a_gradient(folder):
    policy = CausalPolicy(load_model(str(folder / "qwen3-True"), torch.float32))
    seen = {}
    policy.model.norm.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.update(hidden=out))[0])
    batch = collate(random_rows(4), packed=False)
    policy(batch, HeadJob(batch.target, 0.7)).logp.sum().backward()
    touched = seen["hidden"].grad.flatten(0, 1).abs().sum(-1) > 0
    expected = torch.zeros_like(touched)
    expected[batch.index] = True
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_head_gradients_equal_those_of_materialised_logits(folder, tied):
    policy = CausalPolicy(load_model(str(folder / f"qwen3-{tied}"), torch.float32))
    plain = copy.deepcopy(policy)
    batch = collate(random_rows(5), packed=False)
    upstream = torch.randn(len(batch.target), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(VOCABULARY, dtype=torch.bool)
    valid[:2] = False
    out = policy(batch, HeadJob(batch.target, 0.5, valid))
    (out.logp * upstream + 0.1 * out.entropy).sum().backward()
    logits = (plain(batch, None) @ plain.lm_head.weight.T / 0.5).masked_fill(~valid, -1e30).log_softmax(-1)
    logp = logits.gather(1, batch.target[:, None])[:, 0]
    (logp * upstream - 0.1 * (logits.exp() * logits).sum(-1)).sum().backward()
    for (name, ours), theirs in zip(policy.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-5, rtol=2e-4, msg=name)


@pytest.mark.parametrize("extra", [-3, 4])
def test_a_teacher_padded_to_another_width_scores_the_common_columns(folder, tmp_path, extra):
    path = save_model(tmp_path / "padded", tied=False, vocabulary=VOCABULARY + extra)
    policy = CausalPolicy(load_model(path, torch.float32))
    batch = collate(random_rows(3), packed=False)
    batch.target.clamp_(max=VOCABULARY - 4)
    valid = torch.ones(VOCABULARY, dtype=torch.bool)
    batch.input_ids.clamp_(max=VOCABULARY - 4)
    out = policy(batch, HeadJob(batch.target, 1.0, valid))
    logits = (policy(batch, None) @ policy.lm_head.weight.T)[:, : min(VOCABULARY, VOCABULARY + extra)].log_softmax(-1)
    torch.testing.assert_close(out.logp, logits.gather(1, batch.target[:, None])[:, 0], atol=1e-5, rtol=1e-5)


def update(student, teacher, divergence, aggregation, budget, checkpointing):
    """One update of 20 made-up rows; what came of it as plain numbers."""
    keys = {
        "student.path": student,
        "teacher.path": teacher,
        "objective.divergence": divergence,
        "objective.aggregation": aggregation,
        "train.microbatch_tokens": budget,
        "student.gradient_checkpointing": checkpointing,
    }
    config = load(None, None, [*(f"{key}={value}" for key, value in keys.items()), "train.minibatch_rows=8", "turns.disagreement=exact"])
    if checkpointing == "true":  # as large models do: gather each block again for the backward pass
        sharding.RESHARD_PARAMETERS = 0
    device, mesh = ranks.start()
    learner = Learner(config, mesh, device, None)
    rows = random_rows(20)
    turns = 2 * len(rows)
    minibatches, members = learner.plan(rows, step=1)
    learner.score_teacher(minibatches)
    learner.score_student(minibatches, with_teacher=True)
    d, h = learner.turn_signals(minibatches, turns)
    table = TurnTable(
        disagreement=d,
        uncertainty=h,
        length=torch.tensor([b - a for row in rows for a, b in row.spans]),
        valid=torch.ones(turns, dtype=torch.bool),
        turn_reward=torch.zeros(turns),
        anchor=torch.zeros(turns, dtype=torch.int64),
        offsets=torch.arange(0, turns + 1, 4),
        reward=torch.randn(turns // 4, generator=torch.Generator().manual_seed(0)),
        success=torch.zeros(turns // 4, dtype=torch.bool),
        group=torch.arange(turns // 4) // 2,
    )
    weight, advantage = objective.weigh_turns(table, config.turns).weight, objective.rl_advantages(table, config.objective).turn
    parts = [torch.tensor([turn for row in part for turn in rows[row].turns]) for part in members]
    streams = [
        [
            objective.make_streams(
                config.objective,
                0.7,
                1.5,
                *s.facts,
                turn_weight=weight,
                rl_advantage=advantage,
                token_weight=objective.token_weights(aggregation, s.batch.turn, table, part),
            )
            for s in minibatch
        ]
        for minibatch, part in zip(minibatches, parts, strict=True)
    ]
    metrics = learner.update(minibatches, streams, 0.01)
    weights = {name: tensor.clone() for name, tensor in stream_weights(learner.student)}
    return {"metrics": metrics, "signals": [d.tolist(), h.tolist()], "weights": weights["model.layers.1.mlp.down_proj.weight"].tolist()}


def _close(a, b, tolerance):
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("model", "divergence", "aggregation", "checkpointing"),
    [("qwen3-True", "k1", "token", "false"), ("llama-False", "reverse_kl", "trajectory", "true"), ("qwen3-False", "k3", "turn", "false")],
)
def test_an_update_does_not_depend_on_ranks_or_micro_batches(folder, model, divergence, aggregation, checkpointing):
    arguments = str(folder / model), str(folder / "teacher"), divergence, aggregation
    (alone,) = run_ranks(1, update, *arguments, 4096, "false")
    (small,) = run_ranks(1, update, *arguments, 50, "false")
    pair = run_ranks(2, update, *arguments, 100, checkpointing)
    assert pair[0] == pair[1]
    for other in (small, pair[0]):
        _close(alone["signals"], other["signals"], 1e-5)
        assert alone["metrics"].keys() == other["metrics"].keys()
        for key, value in alone["metrics"].items():
            assert value == pytest.approx(other["metrics"][key], rel=2e-3, abs=1e-5), key
        _close(alone["weights"], other["weights"], 2e-4)
    assert alone["metrics"]["loss"] != 0


def stream(path, dtype):
    _, mesh = ranks.start()
    policy = shard(CausalPolicy(load_model(path, torch.float32)), mesh, dtype)
    source = load_model(path, torch.float32).state_dict()
    got = [(name, tensor.clone()) for name, tensor in stream_weights(policy)]
    names = [name for name, _ in got]
    return {
        "complete": sorted(names) == sorted(source) and len(set(names)) == len(names),
        "equal": all(torch.equal(tensor, source[name].to(dtype)) for name, tensor in got),
        "sharded after": all(isinstance(p, DTensor) for p in policy.parameters()),
    }


@pytest.mark.parametrize(("model", "dtype"), [("qwen3-True", torch.bfloat16), ("llama-False", torch.float32)])
def test_streamed_weights_are_the_checkpoint_name_by_name(folder, model, dtype):
    for found in run_ranks(2, stream, str(folder / model), dtype):
        assert all(found.values()), found


class Nameless:
    """A tokenizer with nothing to save."""

    def save_pretrained(self, path):
        pass


def save_and_load(path, run):
    _, mesh = ranks.start()

    def make():
        policy = shard(CausalPolicy(load_model(path, torch.float32)), mesh, torch.float32)
        return policy, torch.optim.AdamW(policy.parameters(), lr=0.1)

    def step(policy, optimizer):
        sum((p**2).sum() for p in policy.parameters()).full_tensor().backward()
        optimizer.step()
        optimizer.zero_grad()

    policy, optimizer = make()
    step(policy, optimizer)
    for number in (1, 2, 3):
        saved = checkpoint.save(run, number, policy, optimizer, {"note": number}, keep=2)
    left = sorted(p.name for p in saved.parent.iterdir())
    step(policy, optimizer)
    other, other_optimizer = make()
    state = checkpoint.load(saved, other, other_optimizer)
    step(other, other_optimizer)
    checkpoint.export(run / "hf", policy, Nameless(), torch.float32)
    return {
        "left": left,
        "state": state,
        "same": all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in zip(policy.parameters(), other.parameters(), strict=True)),
        "sum": sum(p.full_tensor().double().sum().item() for p in policy.parameters()),
    }


@pytest.mark.parametrize("model", ["qwen3-True", "llama-False"])
def test_a_saved_run_goes_on_bit_for_bit_and_its_export_loads_with_transformers(folder, tmp_path, model):
    found = run_ranks(2, save_and_load, str(folder / model), tmp_path)
    for line in found:
        assert line["left"] == ["step_000002", "step_000003"] and line["state"] == {"step": 3, "note": 3} and line["same"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert sum(p.double().sum().item() for p in exported.parameters()) == pytest.approx(found[0]["sum"], rel=1e-5)


def test_a_tokenizer_of_another_family_is_refused_by_its_first_differing_token():
    class Tokenizer:
        def __init__(self, words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    compare_tokenizers(Tokenizer("abc"), Tokenizer("abc"))
    with pytest.raises(UserError, match=r"2 tokens differ, first 'b'.*student id 1, teacher id 2"):
        compare_tokenizers(Tokenizer("abc"), Tokenizer("acb"))
    with pytest.raises(UserError, match="1 tokens differ, first 'd'"):
        compare_tokenizers(Tokenizer("abc"), Tokenizer("abcd"))


def test_a_missing_model_folder_is_one_clear_line(tmp_path):
    for path in (str(tmp_path / "nothing"), "demo:nothing", "./nowhere"):
        with pytest.raises(UserError, match="nothing|nowhere") as caught:
            resolve(path)
        assert "\n" not in str(caught.value)
