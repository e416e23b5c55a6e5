"""Real vLLM on a CPU, colocated with the trainer: log-probs, resync, tensor parallelism, the whole loop."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chatml import make_tokenizer
from helpers.gloo import run_ranks
from helpers.runs import torchrun
from helpers.tiny import VOCABULARY, save_model
from helpers.vllm_engine import SIZES, STOP, answer, build, requests, sampling, weights

pytest.importorskip("vllm", reason="vLLM is not installed: see .ci/run")
pytestmark = pytest.mark.vllm

SMALL = (
    "train.tasks_per_step=2 train.group_size=4 train.minibatch_rows=4 eval.tasks=10 eval.every=2 "
    "observe.trajectories_every=2 train.steps=3"
).split()


def expected(folder: str, prompt: list[int], ids: list[int], temperature: float) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / (temperature or 1.0)
    logp = logits.masked_fill(~sampling(1.0).valid_columns, -torch.inf).log_softmax(-1)
    return logp.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


def check_engine(first: str, second: str) -> None:
    from atod_fast.errors import EngineFailure, GuardError, UserError
    from atod_fast.rollout.engines.protocol import Request
    from atod_fast.rollout.engines.transformers.engine import TransformersEngine

    torch.manual_seed(3)
    random.seed(3)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads(), torch.set_num_threads
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    engine = build(first)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (torch.get_num_threads(), torch.set_num_threads, torch.distributed.get_world_size()) == (*before[2:], 1)
    assert {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} == environment

    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(sampling(0.7))
    sampled = []
    for folder in (first, second, first):
        engine.load_weights(weights(folder))
        for temperature in (0.7, 0.0):
            engine.begin(sampling(temperature))
            done = answer(engine, requests())
            sampled.append([done[key].ids for key in sorted(done)])
            for request in requests():
                completion = done[request.key]
                assert completion.stopped == (completion.ids[-1] == STOP) and (
                    completion.stopped or len(completion.ids) == 12
                )
                assert not {0, 5, 60} & set(completion.ids) and STOP not in completion.ids[:-1]
                np.testing.assert_allclose(
                    completion.logprobs, expected(folder, request.prompt, completion.ids, temperature), atol=1e-4
                )
    assert sampled[:2] == sampled[4:] and sampled[0] != sampled[2], "seeds repeat, and other weights answer otherwise"

    peer = TransformersEngine(AutoModelForCausalLM.from_pretrained(first), slots=8, max_model_len=128, device="cpu")
    peer.begin(sampling(0.0))
    done = answer(peer, requests())
    assert [done[key].ids for key in sorted(done)] == sampled[1]

    # Prefixes: the next turn of a trajectory reads its past from the cache, which new weights empty.
    cached = []
    step = engine._engine.step
    engine._engine.step = lambda: [cached.append(output.num_cached_tokens) or output for output in step()]
    turn = Request(0, requests()[0].prompt * 2, seed=1)
    for reload in (True, False):
        if reload:
            engine.load_weights(weights(first))
        engine.begin(sampling(0.0))
        answer(engine, [turn, Request(1, [7] * 10, seed=2)])
    assert [max(pair) for pair in (cached[:2], cached[2:])] == [0, 64]
    engine._engine.step = step

    # Requests that were released or left over are gone.
    engine.begin(sampling(0.0))
    for request in requests():
        engine.add(request)
    engine.step()
    engine.release(0)
    engine.end()
    engine.begin(sampling(0.0))
    assert [done.ids for _, done in sorted(answer(engine, requests()).items())] == sampled[1]

    # A model runner that fails during a rollout: it serves no rollout until its weights are loaded again.
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    execute = runner.execute_model
    runner.execute_model = lambda *args, **options: 1 / 0
    engine.begin(sampling(0.0))
    with pytest.raises(EngineFailure, match="ZeroDivisionError: division by zero"):
        answer(engine, requests())
    runner.execute_model = execute
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(sampling(0.0))
    engine.load_weights(weights(first))
    engine.begin(sampling(0.0))
    assert [done.ids for _, done in sorted(answer(engine, requests()).items())] == sampled[1]

    with pytest.raises(GuardError, match="did not send 1 of the rollout engine's .* model.norm.weight"):
        engine.load_weights((name, weight) for name, weight in weights(first) if name != "model.norm.weight")
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(sampling(0.0))
    engine.load_weights(weights(first))
    engine.begin(sampling(0.0))
    with pytest.raises(UserError, match="rollout.prompt_tokens: a prompt of 120 tokens, the engine takes 1 to 116"):
        engine.add(Request(0, [6] * 120, seed=0))

    # vLLM itself only warns of a missing weight, and a trainer's model that lacks it still agrees with its own shapes.
    engine._shapes = {
        name: shape for name, shape in engine._shapes.items() if name != "model.layers.1.mlp.down_proj.weight"
    }
    with pytest.raises(
        GuardError, match="vLLM was not sent 1 of its weights, among them model.layers.1.mlp.down_proj.weight"
    ):
        engine.load_weights((name, weight) for name, weight in weights(first) if name in engine._shapes)

    # Both of vLLM's model runners take the mask: V1 runs here, V2 where Triton does.
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    processor = engine._mask.processor()
    assert (
        issubclass(processor, LogitsProcessor)
        and processor(None, None).apply(torch.zeros(2, VOCABULARY), None)[0, 5] == -torch.inf
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_engine_keeps_its_promises(tmp_path, family, tied):
    folders = [save_model(tmp_path / str(seed), family=family, tied=tied, seed=seed, **SIZES) for seed in range(2)]
    run_ranks(1, check_engine, *folders)


def chat_model(folder: Path, **options) -> str:
    """A tiny model that reads ALFWorld's prompts through a chat template."""
    tokenizer = make_tokenizer()
    save_model(folder, vocabulary=len(tokenizer) + 3, positions=4096, **(SIZES | options))
    tokenizer.save_pretrained(folder)
    return str(folder)


def demo_model(folder: Path, **options) -> str:
    """A tiny model with the demo's tokenizer."""
    from atod_fast.models import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("demo:student"))
    save_model(folder, vocabulary=len(tokenizer), **(SIZES | options))
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(arguments: list[str]) -> int:
    from atod_fast import ranks, train

    gather = ranks.gather_trajectories

    def once(mine):
        everyone = gather(mine)
        assert len({(t.group, t.member) for t in everyone}) == len(everyone), "no episode is played by two ranks"
        return everyone

    ranks.gather_trajectories = once
    return train.main(arguments)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


WINDOW = "rollout.context=window rollout.prompt_tokens=2000 rollout.response_tokens=6 env.max_turns=3".split()


@pytest.mark.parametrize(
    ("world", "together", "context", "family", "tied"),
    [
        (1, 1, "window", "qwen3", True),
        (2, 1, "full", "llama", False),
        (2, 2, "full", "qwen3", False),
        (2, 2, "window", "llama", True),
    ],
)
def test_a_run_s_rollouts_are_of_the_trainer_s_weights(tmp_path, world, together, context, family, tied):
    make = chat_model if context == "window" else demo_model
    folder, teacher = (
        make(tmp_path / name, family=family, tied=tied, seed=seed) for seed, name in enumerate(("model", "teacher"))
    )
    settings = [
        f"student.path={folder}",
        f"teacher.path={teacher}",
        "rollout.engine=vllm",
        "objective.tis_cap=2",
        f"rollout.tensor_parallel={together}",
    ]
    settings += WINDOW if context == "window" else []
    arguments = [*SMALL, *settings, "train.learning_rate=1e-2", "--run-dir", str(tmp_path / "run")]
    assert run_ranks(world, main, arguments) == [0] * world
    lines = read(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["sync/logprob_gap"] < 1e-4 and line["sync/bytes"] > 10_000 for line in lines[1:])
    weights = [line["policy/importance_weight"] for line in lines[1:]]
    assert weights == pytest.approx([1] * 3, abs=1e-4)
    exported, start = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "run" / "hf", folder))
    assert not torch.equal(exported.model.norm.weight, start.model.norm.weight), (
        "the weights that were synced had changed"
    )
    assert not list(Path("/dev/shm").glob("*cpushm*")), (
        "vLLM's shared memory between tensor-parallel ranks has no name that outlives a run"
    )


def test_the_embedded_job_runs_on_two_ranks(tmp_path):
    arguments = [*SMALL, "rollout.engine=vllm", "--run-dir", str(tmp_path / "run")]
    assert run_ranks(2, main, arguments) == [0, 0]
    lines = read(tmp_path / "run")
    assert "eval/teacher_success" in lines[0] and all(line["sync/logprob_gap"] < 1e-4 for line in lines[1:])


def evaluations(arguments: list[str]) -> list:
    """What was said, with what log-probs, in each evaluation of a run."""
    from atod_fast import train
    from atod_fast.rollout.player import Player

    played, real = [], Player.play

    def play(self, label, act):
        found = real(self, label, act)
        if label == "evaluating":
            played.append(
                [(list(turn.action), list(turn.logprobs)) for trajectory in found for turn in trajectory.turns]
            )
        return found

    Player.play = play
    assert train.main(arguments) == 0
    return played


def test_without_a_learning_rate_nothing_moves(tmp_path):
    settings = (
        "rollout.engine=vllm train.learning_rate=0.0 train.steps=10 eval.every=5 eval.temperature=0.0 "
        "eval.teacher=false"
    ).split()
    ((first, second),) = run_ranks(1, evaluations, [*SMALL, *settings, "--run-dir", str(tmp_path / "run")])
    assert first == second and len(first) > 50, "greedy rollouts, bit for bit"
    from atod_fast.models import resolve

    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (resolve("demo:student"), tmp_path / "run" / "hf")
    )
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def evaluate(arguments: list[str]) -> int:
    from atod_fast import evaluate

    return evaluate.main(arguments)


def test_a_checkpoint_is_evaluated_as_by_transformers(tmp_path):
    outcomes = []
    for engine in ("vllm", "transformers"):
        out = tmp_path / f"{engine}.json"
        assert run_ranks(
            1,
            evaluate,
            ["demo:teacher", f"rollout.engine={engine}", "eval.tasks=40", "eval.temperature=0", "--out", str(out)],
        ) == [0]
        outcomes.append(json.loads(out.read_text())["outcomes"])
    assert sum(a == b for a, b in zip(*outcomes, strict=True)) >= 38, "greedy games agree but for ties"


def test_a_model_that_vllm_cannot_run_is_refused_in_one_line(tmp_path):
    folder = demo_model(tmp_path / "model", head_dim=24)
    command = [
        sys.executable,
        "-m",
        "atod_fast.train",
        *SMALL,
        f"student.path={folder}",
        "rollout.engine=vllm",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stderr.splitlines() if line.startswith("atod_fast:")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert (
        len(lines) == 1
        and "rollout.engine=vllm cannot serve" in lines[0]
        and "head_dim=24" in lines[0]
        and "rollout.engine=transformers" in lines[0]
    )


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path, missing):
    """vLLM reads the checkpoint itself for an evaluation."""
    folder = demo_model(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    save_file(
        {name: weight for name, weight in load_file(file).items() if name != missing}, file, metadata={"format": "pt"}
    )
    command = [sys.executable, "-m", "atod_fast.evaluate", folder, "rollout.engine=vllm", "eval.tasks=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("atod_fast:")]
    assert done.returncode == 2 and f"lacks the weight {missing}" in line, done.stderr


def test_a_response_ends_at_each_token_that_the_generation_config_names(tmp_path):
    from helpers.chat_models import SHORT, always_says, save_chat_model
    from helpers.chat_tokenizers import tokenizer

    text = tokenizer("qwen").convert_tokens_to_ids("<|endoftext|>")
    sizes = {"hidden_size": 64, "num_key_value_heads": 2, "head_dim": 32}
    student = save_chat_model(tmp_path / "model", tie_word_embeddings=False, **sizes)
    always_says(student, text)
    (Path(student) / "generation_config.json").write_text(json.dumps({"eos_token_id": [text]}))
    settings = [*SHORT, f"student.path={student}", f"teacher.path={student}", "rollout.engine=vllm"]
    assert run_ranks(1, main, [*settings, "--run-dir", str(tmp_path / "run")]) == [0]
    records = [
        json.loads(line) for line in (tmp_path / "run" / "trajectories" / "step_000001.jsonl").read_text().splitlines()
    ]
    assert {tuple(turn["action"]) for record in records for turn in record["turns"]} == {(text,)}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("rollout.tensor_parallel=2", "rollout.tensor_parallel=2 cannot share the student's 3 heads"),
        ("rollout.kv_cache_gib=0.0001", "rollout.kv_cache_gib=0.0001 holds no sequence of 384 tokens"),
        ("eval.temperature=2.5", "eval.temperature=2.5: vLLM samples at 0.01 to 2"),
        ("rollout.temperature=0.001", "rollout.temperature=0.001: vLLM samples at 0.01 to 2"),
    ],
)
def test_settings_no_engine_can_have_are_refused(tmp_path, setting, words):
    world = 2 if "parallel" in setting else 1
    command = torchrun(world, *SMALL, "rollout.engine=vllm", setting)
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True, timeout=200)
    assert words in done.stderr and done.stderr.count("atod_fast: ") == 1, done.stderr
