"""`--dry-run`: the plan as text, and what it refuses."""

from __future__ import annotations

import pytest

from atod_fast.cli import parse
from atod_fast.config.settings import load
from atod_fast.dry_run import describe
from atod_fast.errors import UserError
from atod_fast.models import load_config, skeleton
from atod_fast.plan.memory import PHASES
from atod_fast.plan.shapes import shape_of
from atod_fast.rollout.engines.vllm import limits as vllm_limits
from helpers.planned import tiny_models


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    return tiny_models(tmp_path)


def test_heads_that_cannot_be_shared_and_a_vllm_that_is_not_here(tiny, monkeypatch):
    with pytest.raises(UserError, match="rollout.tensor_parallel=8 cannot share the student's 4 heads"):
        describe(parse([*tiny, "rollout.engine=vllm", "rollout.tensor_parallel=8"]).config, 8)
    config = parse([*tiny, "rollout.engine=vllm"]).config
    monkeypatch.setattr(vllm_limits, "installed", lambda: "0.32.0")
    assert "# total" in describe(config, 2)
    monkeypatch.setattr(vllm_limits, "installed", lambda: None)
    with pytest.raises(UserError, match="rollout.engine=vllm: vLLM is not installed"):
        describe(config, 2)


def test_the_output_is_a_configuration_with_the_plan_in_its_comments(tiny, tmp_path):
    config = parse([*tiny, "train.seed=5"]).config
    text = describe(config, 2)
    (tmp_path / "out.toml").write_text(text, encoding="utf-8")
    assert load(file=tmp_path / "out.toml") == config
    comments = [line for line in text.splitlines() if line.startswith("#")]
    parameters = shape_of(skeleton(load_config(config.teacher.path))).parameters
    assert any(f"{parameters:,} parameters" in line for line in comments)
    totals = next(line for line in comments if line.startswith("# total")).split()[2:]
    assert len(totals) == len(PHASES) and all(float(total) > 0 for total in totals)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("student.attention=varlen", "student varlen and teacher varlen; rows are packed without padding"),
        (
            "student.attention=auto",
            "student sdpa and teacher sdpa; rows are padded, as the student's does not pack them",
        ),
        ("objective.preset=grpo student.attention=varlen", "student varlen; rows are packed without padding"),
    ],
)
def test_the_attention_is_named_and_whether_it_packs_rows(tiny, override, line):
    assert f"\n# attention: {line}\n" in describe(parse([*tiny, *override.split()]).config, 1)


def test_no_column_for_a_teacher_that_does_not_play(tiny):
    text = describe(parse([*tiny, "eval.teacher=false"]).config, 1)
    assert PHASES[0] not in text and PHASES[1] in text


def test_a_hub_name_without_its_config_is_planned_without_parameters(tiny):
    text = describe(parse([tiny[0], "teacher.path=nobody-here/absent-model"]).config, 1)
    assert "hf download nobody-here/absent-model config.json" in text
    assert "# total" not in text and "# a step: " in text


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("teacher.path=.", "'.' holds no config.json"),
        ("teacher.path=some/other/folder", "neither a folder with a config.json nor a hub name"),
        ("rollout.prompt_tokens=2000", "exceeds the 1024 positions"),
        ("rollout.engine=vllm rollout.tensor_parallel=3", "rollout.tensor_parallel=3 does not divide 2 ranks"),
        ("rollout.engine=vllm rollout.kv_cache_gib=1e-6", "rollout.kv_cache_gib=1e-06 holds no sequence of 384 tokens"),
        ("rollout.engine=vllm eval.temperature=3", "eval.temperature=3: vLLM samples at 0.01 to 2"),
    ],
)
def test_what_could_not_run_is_refused(tiny, override, reason):
    with pytest.raises(UserError, match=reason) as error:
        describe(parse([*tiny, *override.split()]).config, 2)
    assert "\n" not in str(error.value)


def test_a_model_that_is_no_causal_language_model_is_refused(tiny, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="decoder-only causal language model"):
        describe(parse([tiny[0], f"teacher.path={tmp_path / 'other'}"]).config, 1)
