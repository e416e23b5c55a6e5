"""atod_kernels against the losses of TRL and Liger, and the replacements for them in kernels/README.md, run as
printed.

The packages come with the extra `peers`; without them these tests are skipped.
"""

import copy
import re

import pytest
import torch
from atod_kernels import linear_divergence, linear_token_loss
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.paths import ROOT

torch.set_num_threads(1)
README = ROOT / "kernels" / "README.md"
COLUMNS = 97


def block(defines: str) -> dict:
    """The namespace after running the README's block that holds `defines`."""
    blocks = [
        b for b in re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S) if defines in b
    ]
    assert len(blocks) == 1, f"kernels/README.md has {len(blocks)} blocks with {defines!r}"
    namespace = {}
    exec(compile(blocks[0], f"{README.name}: {defines}", "exec"), namespace)
    return namespace


def need(module: str):
    return pytest.importorskip(module, reason="the extra `peers` is not installed")


def trl_gkd_loss():
    return need("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss


def liger_jsd():
    return need("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss


def make(tokens=45, student=16, teacher=24, seed=0, dtype=torch.float32):
    """Student's and teacher's hidden states and weights, biases, and labels of which a third is ignored."""
    g = torch.Generator().manual_seed(seed)
    sizes = (tokens, student), (COLUMNS, student), (tokens, teacher), (COLUMNS, teacher), (COLUMNS,), (COLUMNS,)
    x, w, xt, wt, b, bt = (torch.randn(size, generator=g, dtype=dtype) for size in sizes)
    labels = torch.randint(0, COLUMNS, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < 1 / 3] = -100
    return x, w / 2, xt, wt / 3, labels, b, bt


def with_gradients(function, *parameters):
    """The function's value and its gradients with respect to copies of the parameters."""
    parameters = [p.detach().clone().requires_grad_() for p in parameters]
    value = function(*parameters)
    return value.detach(), *torch.autograd.grad(value, parameters)


def assert_same(got, expected, rtol=2e-5):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def kind_of(beta):
    return {"divergence": {0: "forward_kl", 1: "reverse_kl"}.get(beta, "jsd"), "alpha": beta}


@pytest.mark.peers
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_alpha_is_the_beta_of_gkd(beta, temperature, masked):
    gkd = trl_gkd_loss()
    x, w, xt, wt, labels, _, _ = make()
    target = labels if masked else torch.zeros_like(labels)

    def theirs(x, w):
        return gkd(
            (x @ w.T)[None], (xt @ wt.T)[None], labels=target[None], beta=beta, temperature=temperature, reduction="sum"
        )

    def ours(x, w):
        return linear_divergence(x, w, xt, wt, target, temperature=temperature, **kind_of(beta)).divergence.sum()

    def in_one_pass(x, w):
        return linear_token_loss(
            lambda s: s.divergence, x, w, xt, wt, target, temperature=temperature, **kind_of(beta)
        )[0]

    expected = with_gradients(theirs, x, w)
    assert_same(with_gradients(ours, x, w), expected)
    assert_same(with_gradients(in_one_pass, x, w), expected)


@pytest.mark.peers
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_per_token_upstreams_give_the_gradients_of_trl_s_chunked_divergence(beta):
    chunked = need("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    x, w, xt, wt, _, b, bt = make()
    upstream = torch.randn(len(x), generator=torch.Generator().manual_seed(1))

    def theirs(x, w, b):
        return (upstream * chunked.apply(x, w, b, xt, wt, bt, beta, 1.5, 1.0, 5.0, 1.0, 9.0)[0]).sum()

    def ours(x, w, b):
        options = {"temperature": 1.5, "student_bias": b, "teacher_bias": bt, "softcap": 5.0, "teacher_softcap": 9.0}
        return (upstream * linear_divergence(x, w, xt, wt, **options, **kind_of(beta)).divergence).sum()

    assert_same(with_gradients(ours, x, w, b), with_gradients(theirs, x, w, b), rtol=1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("hard", [0.0, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0, 0.5, 0.8, 1])
def test_the_readme_s_jsd_is_liger_s(beta, temperature, hard):
    theirs, ours = liger_jsd(), block("class FusedLinearJSDLoss")["FusedLinearJSDLoss"]
    x, w, xt, wt, labels, b, bt = make()
    labels = labels.masked_fill(labels == -100, -7)
    options = {
        "weight_hard_loss": hard,
        "weight_soft_loss": 0.7,
        "beta": beta,
        "ignore_index": -7,
        "temperature": temperature,
    }

    def of(module):
        return with_gradients(lambda x, w, b: module(x, w, xt, wt, labels, b, bt), x, w, b)

    assert_same(of(ours(**options)), of(theirs(**options, compiled=False, chunk_size=16)))


def models(**options):
    """A small student and a larger teacher with distributions far from uniform."""
    made = []
    for seed, hidden in enumerate((16, 32)):
        torch.manual_seed(seed)
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        made.append(
            LlamaForCausalLM(
                LlamaConfig(vocab_size=COLUMNS, max_position_embeddings=64, pad_token_id=0, **sizes, **options)
            )
        )
        for parameter in made[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made[0], made[1].requires_grad_(False).eval()


def batch(rows=3, length=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(3, COLUMNS, (rows, length), generator=g), torch.rand(rows, length, generator=g) < 0.6


@pytest.mark.parametrize("tied", [False, True])
def test_the_readme_s_training_step_is_the_step_from_full_logits(tied):
    step = block("def train_step")["train_step"]
    student, teacher = models(tie_word_embeddings=tied)
    ids, mask = batch()
    start, reference = copy.deepcopy(student.state_dict()), copy.deepcopy(student)
    step(student, teacher, torch.optim.SGD(student.parameters(), lr=1.0), ids, mask)

    log_p, log_q = reference(ids).logits[:, :-1].log_softmax(-1), teacher(ids).logits[:, :-1].log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1)[mask[:, 1:]].mean().backward()
    torch.optim.SGD(reference.parameters(), lr=1.0).step()
    moved, expected = ([state[k] - start[k] for k in start] for state in (student.state_dict(), reference.state_dict()))
    assert_same(moved, expected, rtol=1e-3)


def tokenizer():
    tokenizers, transformers = need("tokenizers"), need("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(COLUMNS)}, unk_token="w2"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")
    said = "{{ 'w3 ' if m['role'] == 'user' else 'w4 ' }}{{ m['content'] + ' w1 ' }}"
    made.chat_template = (
        f"{{% for m in messages %}}{said}{{% endfor %}}{{% if add_generation_prompt %}}w4 {{% endif %}}"
    )
    return made


@pytest.mark.peers
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore")
def test_the_readme_s_gkd_trainer_trains_as_trl_s(beta, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd, datasets = need("trl.experimental.gkd"), need("datasets")
    words = tokenizer()
    g = torch.Generator().manual_seed(0)

    def text(longest):
        return " ".join(
            f"w{i}"
            for i in torch.randint(5, COLUMNS, (int(torch.randint(3, longest, (), generator=g)),), generator=g).tolist()
        )

    data = [
        {"messages": [{"role": "user", "content": text(9)}, {"role": "assistant", "content": text(14)}]}
        for _ in range(8)
    ]

    def trained(trainer):
        student, teacher = models()
        args = gkd.GKDConfig(
            output_dir=str(tmp_path),
            beta=beta,
            lmbda=0.0,
            learning_rate=1e-2,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=False,
            max_length=48,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            seed=0,
        )
        made = trainer(
            model=student,
            teacher_model=teacher,
            args=args,
            processing_class=words,
            train_dataset=datasets.Dataset.from_list(data),
        )
        made.train()
        return [h["loss"] for h in made.state.log_history if "loss" in h], student.state_dict()

    losses, weights = trained(block("class FusedGKDTrainer")["FusedGKDTrainer"])
    expected_losses, expected = trained(gkd.GKDTrainer)
    assert len(losses) == 2 and losses == pytest.approx(expected_losses, rel=1e-4)
    assert_same(weights.values(), expected.values(), rtol=1e-3)
    start = models()[0].state_dict()
    assert any((weights[k] - start[k]).abs().max() > 1e-3 for k in start)
