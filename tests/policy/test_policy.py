import pytest
import torch
from atod_kernels import naive
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from atod_fast import ranks
from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.models import compare_tokenizers, load_model, resolve
from atod_fast.objective import FULL_VOCABULARY
from atod_fast.policy import checkpoint, learner, sharding
from atod_fast.policy.export import export
from atod_fast.policy.learner import Learner
from atod_fast.policy.model import CausalPolicy, Comparison, HeadJob, Loss, TeacherHead
from atod_fast.policy.packing import collate
from atod_fast.policy.resync import stream_weights
from atod_fast.policy.sharding import shard
from atod_fast.runtime import Runtime
from helpers.gloo import run_ranks
from helpers.learning import learn
from helpers.tiny import VOCABULARY, random_rows, save_model


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


def gradients_of(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("divergence", [None, *FULL_VOCABULARY])
@pytest.mark.parametrize("schedule", ["fast", "lean"])
def test_the_heads_loss_and_gradients_are_those_of_materialised_logits(folder, tied, divergence, schedule):
    """With a teacher of another width, a temperature and excluded columns; for statistics alone, and with a loss in
    the same pass."""
    policy = CausalPolicy(load_model(str(folder / f"qwen3-{tied}"), torch.float32))
    batch = collate(random_rows(5), packed=False)
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, len(batch.target), generator=generator)
    valid = torch.ones(VOCABULARY, dtype=torch.bool)
    valid[:2] = False
    job = HeadJob(batch.target, 0.5, valid)
    if divergence:
        hidden, weight = (torch.randn(n, 20, generator=generator) for n in (len(batch.target), VOCABULARY + 3))
        job = job._replace(teacher=Comparison(hidden, TeacherHead(weight), divergence, alpha=0.3))

    def loss(stats, a, b, c):
        return a * stats.logp - b * stats.entropy + (c * stats.divergence if divergence else 0)

    out, stats = policy(batch, job._replace(loss=Loss(loss, {"a": a, "b": b, "c": c}, schedule, check=True)))
    ours = gradients_of(policy, out)

    operands = policy(batch, None), policy.lm_head.weight
    if divergence:
        plain = naive.linear_divergence(
            *operands,
            hidden,
            weight,
            batch.target,
            divergence=divergence,
            alpha=0.3,
            temperature=0.5,
            valid_columns=valid,
        )
    else:
        plain = naive.linear_logprob(*operands, batch.target, temperature=0.5, valid_columns=valid)
    expected = loss(plain, a, b, c).sum()
    theirs = gradients_of(policy, expected)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-5)
    for found in (stats, policy(batch, job)):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=5e-4)


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


def update(student, teacher, *settings):
    """Run one step of updates on 12 made-up rows of two turns; return the results as plain numbers."""
    config = load(
        None, None, [f"student.path={student}", f"teacher.path={teacher}", "train.minibatch_rows=6", *settings]
    )
    # With checkpointing as large models do: gather each block again for the backward pass.
    sharding.RESHARD_PARAMETERS = 0 if config.student.gradient_checkpointing else 50_000_000
    device, mesh = ranks.start()
    trainer = Learner(config, Runtime.of(config, device, mesh=mesh), None)
    rows = random_rows(12)
    metrics, (d, h) = learn(trainer, rows, 0.01)
    parameters = dict(trainer.student.named_parameters())
    moments = {name: trainer.optimizer.state[parameter]["exp_avg"] for name, parameter in parameters.items()}
    whole = [
        {name: tensor.detach().full_tensor().tolist() for name, tensor in tensors.items()}
        for tensors in (parameters, moments)
    ]
    return {"metrics": metrics, "signals": [d.tolist(), h.tolist()], "weights": whole[0], "gradients": whole[1]}


def updates(student, teacher, cases):
    return [update(student, teacher, *case) for case in cases]


def assert_same(ours, theirs, signals=1e-5, metrics=2e-3, gradients=1e-3, weights=2e-4):
    """Compare two results. `gradients` are AdamW's running means, relative to a parameter's largest; a weight moves by
    up to 0.01 an update."""
    torch.testing.assert_close(
        torch.tensor(ours["signals"]), torch.tensor(theirs["signals"]), atol=signals, rtol=signals
    )
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=metrics, abs=1e-5)
    for name, gradient in theirs["gradients"].items():
        expected = torch.tensor(gradient)
        torch.testing.assert_close(
            torch.tensor(ours["gradients"][name]),
            expected,
            atol=gradients * expected.abs().max().item(),
            rtol=0,
            msg=name,
        )
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(
        torch.tensor(ours["weights"][name]), torch.tensor(theirs["weights"][name]), atol=weights, rtol=weights
    )
    assert theirs["metrics"]["loss"] != 0 and theirs["metrics"]["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("model", "method", "checkpointing"),
    [
        ("qwen3-True", ["objective.divergence=k1", "objective.aggregation=token"], "false"),
        ("llama-False", ["objective.divergence=reverse_kl", "objective.aggregation=trajectory"], "true"),
        ("qwen3-False", ["objective.divergence=k3", "objective.aggregation=turn"], "false"),
        ("llama-True", ["objective.ratio=sequence", "objective.clip=0.02", "objective.mismatch_mask=60"], "true"),
    ],
)
def test_an_update_does_not_depend_on_ranks_or_micro_batches(folder, model, method, checkpointing):
    """With mini-batches of one row the other rank only has passes without an action token."""
    arguments, method = (str(folder / model), str(folder / "teacher")), [*method, "turns.disagreement=exact"]
    row = [*method, "train.minibatch_rows=1"]
    ((alone, small, rows),) = run_ranks(1, updates, *arguments, [method, [*method, "train.microbatch_tokens=50"], row])
    again = f"student.gradient_checkpointing={checkpointing}"
    first, second = run_ranks(2, updates, *arguments, [[*method, "train.microbatch_tokens=100", again], [*row, again]])
    assert first == second
    assert_same(small, alone)
    assert_same(first[0], alone)
    assert_same(first[1], rows)


DIVERGENCES = [
    [f"objective.divergence={name}", "objective.entropy_bonus=0.05"] for name in ("k1", "k2", "k3", *FULL_VOCABULARY)
]
PRESETS = [[f"objective.preset={name}"] for name in ("paper", "exact", "opd", "grpo", "fixed", "sequential")]


@pytest.mark.parametrize(
    ("world", "model", "methods"), [(1, "qwen3-True", DIVERGENCES + PRESETS), (2, "llama-False", DIVERGENCES)]
)
def test_every_method_learns_the_same_whether_logits_are_kept_or_computed_again(folder, world, model, methods):
    cases = [
        [*method, f"student.head={head}", "rollout.temperature=0.8"] for method in methods for head in ("fast", "lean")
    ]
    found = run_ranks(world, updates, str(folder / model), str(folder / "teacher"), cases)[0]
    for fast, lean in zip(found[::2], found[1::2], strict=True):
        assert_same(fast, lean)


@pytest.mark.parametrize("method", [["objective.divergence=k1"], ["objective.divergence=jsd"]])
def test_bf16_learns_what_fp32_learns(folder, method):
    """One update from the same weights: on one rank and on two, both ways through the head."""
    arguments, method = (
        (str(folder / "qwen3-True"), str(folder / "teacher")),
        [*method, "train.minibatch_rows=0", "objective.tis_cap=0"],
    )
    bf16 = [*method, "student.compute_dtype=bf16", "teacher.compute_dtype=bf16"]
    ((exact, fast, lean),) = run_ranks(1, updates, *arguments, [method, bf16, [*bf16, "student.head=lean"]])
    pair = run_ranks(2, updates, *arguments, [bf16])[0][0]
    for found in (fast, lean, pair):
        assert found["metrics"] == pytest.approx(exact["metrics"], rel=2e-2)
        for name, gradient in exact["gradients"].items():
            expected = torch.tensor(gradient)
            assert (torch.tensor(found["gradients"][name]) - expected).norm() < 0.1 * expected.norm(), name
    assert fast["metrics"] != exact["metrics"]


def update_towards(loss, student, teacher):
    """What an update says to a loss of one's own, and how often it asked for it in its first and in its second step."""
    calls = []

    def counted(objective):
        return lambda stats, **inputs: (calls.append(len(stats.logp)), loss(stats.logp))[1]

    learner.loss_function, before = counted, learner.loss_function
    try:
        update(student, teacher, "train.minibatch_rows=12", "train.epochs=2")
    except ValueError as error:
        return str(error)
    finally:
        learner.loss_function = before
    return calls


def centred(logp):
    return logp - logp.mean()


def test_a_loss_that_sees_more_than_its_token_is_refused_at_the_first_update(folder):
    arguments = str(folder / "qwen3-True"), str(folder / "teacher")
    (refused,) = run_ranks(1, update_towards, centred, *arguments)
    assert "not a function of one token at a time" in refused
    (calls,) = run_ranks(1, update_towards, torch.square, *arguments)
    whole = max(calls)
    assert calls.count(whole) == 2 and sum(calls) == 3 * whole, "checked with the tokens in two parts, once"


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
        saved = checkpoint.save(run, number, policy, optimizer, {"before": {"eval/success": number}}, keep=2)
    left = sorted(p.name for p in saved.parent.iterdir())
    step(policy, optimizer)
    other, other_optimizer = make()
    state = checkpoint.load(saved, other, other_optimizer)
    step(other, other_optimizer)
    assert export(run / "hf", policy, path, Nameless(), [1]) == []
    return {
        "left": left,
        "state": state,
        "same": all(
            torch.equal(a.full_tensor(), b.full_tensor())
            for a, b in zip(policy.parameters(), other.parameters(), strict=True)
        ),
        "sum": sum(p.full_tensor().double().sum().item() for p in policy.parameters()),
    }


@pytest.mark.parametrize("model", ["qwen3-True", "llama-False"])
def test_a_saved_run_goes_on_bit_for_bit_and_its_export_loads_with_transformers(folder, tmp_path, model):
    found = run_ranks(2, save_and_load, str(folder / model), tmp_path)
    for line in found:
        assert (
            line["left"] == ["step_000002", "step_000003"]
            and line["state"] == {"step": 3, "before": {"eval/success": 3}}
            and line["same"]
        )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert sum(p.double().sum().item() for p in exported.parameters()) == pytest.approx(found[0]["sum"], rel=1e-5)


def test_a_tokenizer_of_another_family_is_refused_by_its_first_differing_token():
    class Tokenizer:
        added_tokens_decoder = {}

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
