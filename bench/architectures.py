"""Test which of transformers' decoder-only families can be student, teacher or rollout model; make docs/models.md.

python bench/architectures.py              the table
python bench/architectures.py NAME ...     some rows
python bench/architectures.py --check      exit 1 if docs/models.md differs from a fresh run
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from atod_fast import ranks
from atod_fast.batches import Row
from atod_fast.config.settings import load as load_settings
from atod_fast.errors import UserError
from atod_fast.models import VARLEN, Compute, load_model, skeleton
from atod_fast.plan.shapes import shape_of
from atod_fast.policy import attention
from atod_fast.policy.export import export
from atod_fast.policy.layout import Logits
from atod_fast.policy.loading import load_student, load_teacher
from atod_fast.policy.model import CausalPolicy, Comparison, HeadJob, TeacherHead
from atod_fast.policy.packing import collate
from atod_fast.policy.resync import stream_weights
from atod_fast.policy.sharding import shard
from atod_fast.policy.teacher.local import LocalTeacher
from atod_fast.rollout.engines.protocol import Request, Sampling
from atod_fast.rollout.engines.transformers.engine import TransformersEngine
from atod_fast.rollout.engines.transformers.forward import AnewForward, CacheForward, SlotForward
from atod_fast.runtime import Runtime, attention_of

TABLE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
CPU = torch.device("cpu")
VOCABULARY, LONGEST = 67, 48
REASON = re.compile(r".* cannot run a \S+ model \((.*)\); use.*|a model of type '\S+' (.*); use.*")
WAYS = {SlotForward: "slot attention", CacheForward: "own cache", AnewForward: "own cache, turns anew"}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Family:
    """A tiny model of a family. `options` are added to `SIZES`; None leaves a size at the family's default."""

    name: str
    kind: str  # model_type
    options: dict[str, Any] = field(default_factory=dict)


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": None,
}
GPT = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "head_dim": None,
    "num_key_value_heads": None,
    "intermediate_size": None,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 16,
}
SLIDING = {"sliding_window": 8}

FAMILIES = [
    Family("Apertus", "apertus"),
    Family("Arcee", "arcee"),
    Family("Bamba", "bamba", MAMBA | {"attn_layer_indices": [1]}),
    Family("BitNet", "bitnet"),
    Family("BLOOM", "bloom", {"n_layer": 2, "n_head": 4}),
    Family("Cohere (Command R)", "cohere"),
    Family("Cohere 2 (Command R7B)", "cohere2", SLIDING | {"sliding_window_pattern": 2}),
    Family(
        "DeepSeek V3",
        "deepseek_v3",
        EXPERTS
        | MLA
        | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    Family(
        "dots.llm1",
        "dots1",
        EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe", EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0}),
    Family("EXAONE 4", "exaone4", SLIDING),
    Family("Falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}),
    Family("Falcon, ALiBi", "falcon", {"alibi": True, "head_dim": None}),
    Family("Falcon-H1", "falcon_h1", MAMBA | {"lm_head_multiplier": 0.3}),
    Family("Falcon Mamba", "falcon_mamba", {"state_size": 8}),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", SLIDING | {"query_pre_attn_scalar": 8}),
    Family(
        "Gemma 3, text",
        "gemma3_text",
        SLIDING | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    Family(
        "Gemma 3, with images",
        "gemma3",
        {
            "text_config": SIZES | SLIDING,
            "vision_config": {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    Family(
        "Gemma 3n, text",
        "gemma3n_text",
        SLIDING
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "intermediate_size": [48, 48],
        },
    ),
    Family("GLM", "glm"),
    Family("GLM-4", "glm4"),
    Family(
        "GLM-4 MoE",
        "glm4_moe",
        EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    ),
    Family("GPT-2", "gpt2", GPT),
    Family("GPT-BigCode", "gpt_bigcode", GPT),
    Family("GPT-J", "gptj", GPT | {"rotary_dim": 4}),
    Family(
        "GPT-Neo",
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    Family("GPT-NeoX (Pythia)", "gpt_neox"),
    Family("gpt-oss", "gpt_oss", EXPERTS | SLIDING),
    Family(
        "Granite",
        "granite",
        {"logits_scaling": 6.0, "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.3},
    ),
    Family("Granite MoE", "granitemoe", EXPERTS | {"logits_scaling": 6.0}),
    Family(
        "Granite 4, hybrid",
        "granitemoehybrid",
        EXPERTS
        | MAMBA
        | {"logits_scaling": 6.0, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    Family("Helium", "helium"),
    Family("Hunyuan, dense", "hunyuan_v1_dense"),
    Family("HyperCLOVA X", "hyperclovax", {"logits_scaling": 0.3}),
    Family(
        "Jamba",
        "jamba",
        EXPERTS
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48}),
    Family("LFM2 MoE", "lfm2_moe", EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    Family("Llama", "llama"),
    Family(
        "Llama 4, text",
        "llama4_text",
        EXPERTS
        | {
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
    Family("Mamba", "mamba", {"state_size": 8}),
    Family("Mamba 2", "mamba2", {"chunk_size": 16, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}),
    Family("MiniCPM3", "minicpm3", MLA | {"num_key_value_heads": 4}),
    Family("MiniMax", "minimax", EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 16}),
    Family("Ministral", "ministral", SLIDING),
    Family("Mistral, sliding window", "mistral", SLIDING),
    Family("Mixtral", "mixtral", EXPERTS),
    Family("MPT", "mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    Family("NanoChat", "nanochat"),
    Family("Nemotron", "nemotron"),
    Family(
        "Nemotron-H",
        "nemotron_h",
        EXPERTS
        | {
            "chunk_size": 16,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}),
    Family("OLMoE", "olmoe", EXPERTS),
    Family("OPT", "opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Family("Phi", "phi"),
    Family("Phi-3, sliding window", "phi3", SLIDING),
    Family("PhiMoE", "phimoe", EXPERTS),
    Family("Qwen2", "qwen2"),
    Family("Qwen2 MoE", "qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    Family("Qwen3", "qwen3"),
    Family("Qwen3 MoE", "qwen3_moe", EXPERTS),
    Family("Qwen3-Next", "qwen3_next", EXPERTS | LINEAR | {"shared_expert_intermediate_size": 24}),
    Family("Qwen3.5, text", "qwen3_5_text", LINEAR),
    Family("RecurrentGemma", "recurrent_gemma", {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32}),
    Family("RWKV", "rwkv", {"attention_hidden_size": 32}),
    Family("Seed-OSS", "seed_oss"),
    Family("SmolLM3", "smollm3"),
    Family("StableLM", "stablelm"),
    Family("StarCoder2, sliding window", "starcoder2", SLIDING),
    Family(
        "Zamba",
        "zamba",
        {
            "num_hidden_layers": 4,
            "head_dim": None,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "use_mamba_kernels": False,
        },
    ),
    Family(
        "Zamba 2",
        "zamba2",
        {
            "chunk_size": 16,
            "num_hidden_layers": 3,
            "hybrid_layer_ids": [1],
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": False,
        },
    ),
]


def make(family: Family, tied: bool = False) -> PreTrainedModel:
    """Return a random model with weights so large that every layer matters and distributions are far from uniform."""
    kind = type(AutoConfig.for_model(family.kind))
    options = {key: value for key, value in (SIZES | family.options).items() if value is not None}
    config = kind(**options, tie_word_embeddings=tied, dtype="float32")
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


class Nameless:
    """A tokenizer with nothing to save."""

    def save_pretrained(self, path: Path) -> None:
        pass


def batch_rows(seed: int = 1) -> list[Row]:
    """Return three rows of different length in which every token but the first is an action."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(3, VOCABULARY, length).tolist() for length in (21, 14, 9)]
    return [Row(row, [(1, len(row))], [i], [-1.0] * (len(row) - 1)) for i, row in enumerate(ids)]


def plain_logp(model: PreTrainedModel, rows: list[Row], temperature: float) -> Tensor:
    """Return the log-probs of the rows' tokens from transformers' own forward pass, row by row."""
    out = []
    for row in rows:
        ids = torch.tensor([row.ids])
        logp = (model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature).log_softmax(-1)
        out.append(logp.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(out)


def close(what: str, found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    apart, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    assert apart <= share * max(scale, 1e-3), f"{what}: {apart:.1e} apart of {scale:.1e}"


def alike(what: str, found: Tensor, expected: Tensor, least: float) -> None:
    """Raise unless the 16-bit results correlate with the 32-bit ones by at least `least`."""
    correlation = torch.corrcoef(torch.stack([found.detach().double(), expected.detach().double()]))[0, 1].item()
    assert correlation >= least, f"{what} in bf16: a correlation of {correlation:.3f}"


def teach(path: str, load: Callable[[], PreTrainedModel]) -> None:
    """Check a teacher: log-probs of right-padded rows, in bf16 too, and the exact divergence from a model with another
    logit scale."""
    policy, rows = CausalPolicy(load().requires_grad_(False)), batch_rows()
    batch = collate(rows, packed=False)
    with torch.no_grad():
        expected = plain_logp(load(), rows, 0.7)
        close("log-probs", policy(batch, HeadJob(batch.target, 0.7)).logp, expected)
        other = torch.randn(len(batch.target), 16, generator=torch.Generator().manual_seed(0))
        weight = torch.randn(VOCABULARY, 16, generator=torch.Generator().manual_seed(1))
        head = policy.parts.head
        whole = TeacherHead(head.weight, head.bias, head.softcap, head.scale)
        job = HeadJob(batch.target, 0.7, teacher=Comparison(policy(batch, None), whole))
        student = type(head)(nn.Linear(16, VOCABULARY, bias=False), Logits())
        student.weight = nn.Parameter(weight)
        close("a teacher's log-probs", student(other, job).teacher_logp, expected)
        _, mesh = ranks.start()
        settings = load_settings(None, None, [f"teacher.path={path}", "teacher.compute_dtype=bf16"])
        half = LocalTeacher(load_teacher(Runtime.of(settings, CPU).teacher, mesh, offload=False))
        alike("log-probs", half.logp(batch, HeadJob(batch.target, 0.7)), expected, 0.98)
        with half.head() as whole:
            job = job._replace(teacher=Comparison(half.hidden(batch), whole))
            alike("a teacher's log-probs", student.bfloat16()(other.bfloat16(), job).teacher_logp, expected, 0.98)


def learn(path: str, load: Callable[[], PreTrainedModel]) -> None:
    """Check a student against plain autograd: its sharded gradient (with checkpointing where supported, and in bf16),
    streamed weights, and an export that loads."""
    rows = batch_rows()
    batch, weight = collate(rows, packed=False), torch.linspace(-1, 1, sum(len(row.ids) - 1 for row in rows))
    plain = load()  # in eval mode, so without dropout
    (plain_logp(plain, rows, 0.7) * weight).sum().backward()
    _, mesh = ranks.start()
    student = load()
    if student.supports_gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = shard(CausalPolicy(student).train(), mesh, torch.float32)
    (policy(batch, HeadJob(batch.target, 0.7)).logp * weight).sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    assert gradients.keys() == dict(policy.named_parameters()).keys(), "names of parameters"
    for name, parameter in policy.named_parameters():
        expected = gradients[name]
        if expected is None or not expected.abs().max():
            assert parameter.grad is None or not parameter.grad.full_tensor().abs().max(), f"a gradient of {name}"
            continue
        close(f"gradient of {name}", parameter.grad.full_tensor(), expected, 2e-3)
    compute = Compute(path, torch.bfloat16, attention_of("auto", CPU, torch.bfloat16, student.config))
    checkpointing = student.supports_gradient_checkpointing
    half = load_student(compute, mesh, liger=False, checkpointing=checkpointing).train()
    (half(batch, HeadJob(batch.target, 0.7)).logp * weight).sum().backward()
    taught = [
        (p.grad.full_tensor(), gradients[name])
        for name, p in half.named_parameters()
        if p.grad is not None and gradients[name] is not None
    ]
    alike("gradients", *(torch.cat([tensor.flatten() for tensor in side]) for side in zip(*taught, strict=True)), 0.95)
    source = dict(plain.named_parameters(remove_duplicate=False))
    sent = {name: tensor.clone() for name, tensor in stream_weights(policy)}
    assert sent.keys() == source.keys(), "names of streamed weights"
    assert all(torch.equal(tensor, source[name]) for name, tensor in sent.items()), "streamed weights"
    folder = Path(path).with_name("exported")
    left_out = export(folder, policy, path, Nameless(), [0])
    assert not left_out, left_out
    assert names_in(folder) == names_in(Path(path)), f"names in the export: {names_in(folder) ^ names_in(Path(path))}"
    again = load_model(str(folder), torch.float32, plain.config._attn_implementation)
    assert all(torch.equal(p, source[name]) for name, p in again.named_parameters()), "exported weights"


def pack(path: str, load: Callable[[], PreTrainedModel]) -> str:
    """Return whether `student.attention=varlen` packs the model's rows, or why not; check log-probs and gradients of
    packed rows against each row alone, and that a model without weights tells the same."""
    if lacking := attention.lacks(AutoConfig.from_pretrained(path)):
        return f"no: {lacking}"
    policy = CausalPolicy(load_model(path, torch.float32, VARLEN).eval())
    assert policy.packs == CausalPolicy(skeleton(policy.config, path, VARLEN)).packs, "packing without weights"
    if not policy.packs:
        return "no: recurrent layers" if policy.recurrent else "no: its layers are not told where rows begin"
    rows, plain = batch_rows(), load()
    expected, batch = plain_logp(plain, rows, 0.7), collate(rows, packed=True)
    found = policy(batch, HeadJob(batch.target, 0.7)).logp
    close("log-probs", found, expected)
    weight = torch.linspace(-1, 1, len(found))
    for logp in (found, expected):
        (logp * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in policy.named_parameters():
        if gradients[name] is not None and gradients[name].abs().max():
            close(f"gradient of {name}", parameter.grad, gradients[name], 2e-3)
    return "verified"


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def roll_out(path: str, load: Callable[[], PreTrainedModel]) -> str:
    """Return how the engine runs the model; check its log-probs as sequences join, continue and change."""
    model, before = load(), torch.random.get_rng_state()
    engine = TransformersEngine(model, slots=2, max_model_len=LONGEST, device="cpu")
    assert torch.equal(before, torch.random.get_rng_state()), "the try-out draws random numbers"
    reference, draw = load(), np.random.default_rng(5)
    engine.begin(Sampling(1.0, 6, (1,)))
    asked = {key: draw.integers(3, VOCABULARY, length).tolist() for key, length in enumerate((5, 30, 12))}
    turns = dict.fromkeys(asked, 0)
    for key, prompt in asked.items():
        engine.add(Request(key, prompt, seed=key))
    while turns:
        for done in engine.step():
            prompt = asked[done.key]
            ids = torch.tensor([prompt + done.ids])
            with torch.no_grad():
                logits = reference(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            close("log-probs", torch.tensor(done.logprobs), expected, 5e-4)
            turns[done.key] += 1
            if turns[done.key] == 3:
                engine.release(done.key)
                del turns[done.key]
                continue
            more = draw.integers(3, VOCABULARY, 3).tolist()
            asked[done.key] = prompt[:4] + more if turns[done.key] == 2 else prompt[:30] + done.ids + more
            engine.add(Request(done.key, asked[done.key], seed=7))
    return WAYS[type(engine._forward)]


def verdict(check: Callable[..., str | None], *arguments: Any) -> str:
    try:
        return check(*arguments) or "verified"
    except UserError as error:
        match = REASON.fullmatch(str(error))
        return f"refused: {next(filter(None, match.groups())) if match else error}"
    except Exception as error:  # a fault, not a refusal: it must not reach the table
        return f"FAILS: {type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def row(family: Family) -> str:
    """Return a line of the table: family, model type, engine, teacher, student, packing. Test both an untied and a tied
    head; show both where they differ."""
    results = []
    for tied in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model")
            make(family, tied).save_pretrained(path)
            config = AutoConfig.from_pretrained(path)
            attention = attention_of("auto", CPU, torch.float32, config)

            def load(path: str = path, attention: str = attention) -> PreTrainedModel:
                return load_model(path, torch.float32, attention).eval()

            cells = [verdict(check, path, load) for check in (roll_out, teach, learn, pack)]
            planned = verdict(lambda: shape_of(skeleton(config)) and None)  # noqa: B023
            if planned.split(":")[0] != cells[2].split(":")[0]:  # a dry run must give the verdict of a run
                cells[2] += f"; its plan: {planned}"
            results.append(cells)
    cells = [one if one == other else f"{one}; tied: {other}" for one, other in zip(*results, strict=True)]
    return f"| {family.name} | `{family.kind}` | {' | '.join(cells)} |"


def table(families: list[Family]) -> Iterator[str]:
    yield f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU"
    yield ""
    yield "| family | model type | engine | teacher | student | packed by varlen |"
    yield "|---|---|---|---|---|---|"
    yield from map(row, families)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types or families")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    chosen = [f for f in FAMILIES if not options.names or {f.name, f.kind} & set(options.names)]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    torch.set_num_threads(1)
    fresh = []
    for line in table(chosen):
        fresh.append(line)
        if not options.check:
            print(line, flush=True)
    ranks.stop()
    if any("FAILS" in line for line in fresh):
        print("some rows fail", file=sys.stderr)
        return 1
    if options.check:
        written = TABLE.read_text(encoding="utf-8").splitlines()
        missing = [line for line in fresh if line not in written]
        print("\n".join([f"{TABLE.name} lacks:", *missing]) if missing else f"{TABLE.name} is as a fresh run")
        return int(bool(missing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
