"""How the teacher scores: joined micro-batches, gathered or block by block, and by liger-kernel's modules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from atod_fast import ranks
from atod_fast.config.settings import load
from atod_fast.models import Compute, skeleton
from atod_fast.policy import sharding
from atod_fast.policy.learner import Learner
from atod_fast.policy.loading import apply_liger, load_teacher
from atod_fast.policy.packing import collate, join
from atod_fast.runtime import Runtime
from helpers.gloo import run_ranks
from helpers.tiny import random_rows, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "student"), save_model(root / "teacher", seed=7, hidden=48, tied=False)


def test_joined_micro_batches_are_the_batch_of_all_their_rows():
    rows = random_rows(9)
    parts = [rows[:4], rows[4:5], [], rows[5:]]
    found, expected = join([collate(part, packed=True) for part in parts]), collate(rows, packed=True)
    assert torch.equal(found.target, expected.target) and torch.equal(found.turn, expected.turn)
    assert torch.equal(found.rollout_logp, expected.rollout_logp) and found.longest == expected.longest
    assert found.row_starts.dtype == torch.int32 and found.tokens == expected.tokens + 1, "an empty one is one token"
    assert found.row_starts.tolist()[-1] == found.tokens and found.row_starts.tolist() == sorted(found.row_starts)
    ids, positions = found.input_ids[0], found.position_ids[0]
    assert torch.equal(ids[found.index + 1], found.target)
    for start, stop in zip(found.row_starts[:-1].tolist(), found.row_starts[1:].tolist(), strict=True):
        assert positions[start:stop].tolist() == list(range(stop - start))
    one = collate(rows, packed=True)
    assert join([one]) is one


def scores(student: str, teacher: str, joined: int, gathered: bool, *settings: str) -> dict:
    """Return a teacher's scores of made-up rows by micro-batch, its passes, and what lies unsharded after each."""
    sharding.RESHARD_PARAMETERS = 0  # as in a large model
    given = (f"student.path={student}", f"teacher.path={teacher}", "student.attention=varlen", *settings)
    config = load(None, None, [*given, "train.minibatch_rows=3", "train.microbatch_tokens=40"])
    device, mesh = ranks.start()
    runtime = replace(Runtime.of(config, device, mesh=mesh), joined=joined, gathered=gathered)
    learner = Learner(config, runtime, None)
    minibatches, _ = learner.partition(random_rows(17), step=1)
    policy, after = learner.teacher.policy, []
    blocks = policy.parts.blocks

    def look(*_) -> None:
        after.append([not any(isinstance(p, DTensor) for p in block.parameters()) for block in blocks])

    policy.register_forward_hook(look)
    taught = learner.score_teacher(minibatches)
    batches = [batch for minibatch in minibatches for batch in minibatch]
    assert [len(score) for score in taught] == [len(batch.target) for batch in batches]
    return {
        "scores": [score.tolist() for score in taught],
        "sizes": [batch.tokens for batch in batches],
        "passes": len(after),
        "unsharded": after[-1],
        "at rest": [isinstance(p, DTensor) for p in policy.parameters()],
        "prefetched": [len(sharding.sharded(block)._get_fsdp_state()._states_to_forward_prefetch) for block in blocks],
    }


@pytest.mark.parametrize("how", ["objective.preset=paper", "objective.preset=exact"])
def test_joined_and_gathered_passes_score_as_separate_ones(folders, how):
    """On two ranks, with empty micro-batches on one of them; log-probs, or final hidden states."""
    separate = run_ranks(2, scores, *folders, 1, False, how)
    joined = run_ranks(2, scores, *folders, 3, True, how)
    count = len(separate[0]["scores"])
    assert any(1 in rank["sizes"] for rank in separate), "no empty micro-batch"
    for plain, found in zip(separate, joined, strict=True):
        assert (plain["passes"], found["passes"]) == (count, -(-count // 3)) and count % 3
        assert plain["sizes"] == found["sizes"]
        assert (plain["unsharded"], found["unsharded"]) == ([False, False], [True, True])
        assert all(plain["at rest"]) and all(found["at rest"]), "rest() frees what was gathered"
        assert (plain["prefetched"], found["prefetched"]) == ([1, 0], [0, 0])
        for one, other in zip(plain["scores"], found["scores"], strict=True):
            torch.testing.assert_close(torch.tensor(other), torch.tensor(one), atol=2e-5, rtol=1e-5)


def test_padded_micro_batches_are_not_joined(folders):
    plain, asked = run_ranks(1, both, *folders)[0]
    assert plain == asked


def both(student: str, teacher: str) -> list:
    return [scores(student, teacher, joined, False, "student.attention=sdpa")["scores"] for joined in (1, 3)]


def test_gathering_changes_no_score(folders):
    (plain,), (whole,) = (run_ranks(1, scores, *folders, 1, gathered) for gathered in (False, True))
    assert plain["scores"] == whole["scores"], "bit for bit"


# --- liger-kernel


def modules(kind: str, **sizes) -> dict[str, str]:
    """Return the names by which a model's modules go once liger-kernel is applied, by their own names."""
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = skeleton(AutoConfig.for_model(kind, **common, num_key_value_heads=1, head_dim=16, vocab_size=61, **sizes))
    apply_liger(model)
    return {name: module._get_name() for name, module in model.named_modules()}


@pytest.fixture
def restored(monkeypatch):
    """Undo what liger-kernel changes in transformers' modules."""
    pytest.importorskip("liger_kernel")
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    for module in (modeling_qwen3, modeling_qwen3_moe):
        for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP", "Qwen3MoeRMSNorm", "Qwen3MoeExperts"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    return modeling_qwen3, modeling_qwen3_moe


def test_liger_replaces_norms_rotation_and_gates_of_a_dense_model(restored):
    found = modules("qwen3")
    assert found["model.layers.0.mlp"] == "LigerSwiGLUMLP"
    assert {name for name in found if found[name] == "LigerRMSNorm"} == {
        "model.norm",
        *(f"model.layers.0.{part}" for part in ("input_layernorm", "post_attention_layernorm")),
        *(f"model.layers.0.self_attn.{part}" for part in ("q_norm", "k_norm")),
    }
    assert restored[0].apply_rotary_pos_emb.__name__ == "liger_rotary_pos_emb"


def test_liger_leaves_the_experts_of_a_mixture_alone(restored):
    experts, sizes = restored[1].Qwen3MoeExperts, {"num_experts": 4, "num_experts_per_tok": 2}
    found = modules("qwen3_moe", moe_intermediate_size=16, **sizes)
    assert found["model.layers.0.mlp.experts"] == "Qwen3MoeExperts" and restored[1].Qwen3MoeExperts is experts
    assert found["model.layers.0.self_attn.q_norm"] == found["model.norm"] == "LigerRMSNorm"
    assert restored[1].apply_rotary_pos_emb.__name__ == "liger_rotary_pos_emb"


def test_a_teacher_is_loaded_with_liger_modules_where_the_run_uses_them(restored, folders):
    _, mesh = ranks.start()
    try:
        compute = Compute(folders[1], torch.float32, "sdpa")
        found = [load_teacher(compute, mesh, offload=False, liger=liger) for liger in (False, True)]
    finally:
        ranks.stop()
    assert [policy.parts.backbone.norm._get_name() for policy in found] == ["Qwen3RMSNorm", "LigerRMSNorm"]
