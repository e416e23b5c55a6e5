"""Real vLLM on a CPU, in bf16 and after failures: its logits, and what its model runners are told."""

from __future__ import annotations

import math
from collections import deque
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.gloo import run_ranks
from helpers.tiny import save_model
from helpers.vllm_engine import SIZES, answer, build, requests, sampling, weights

pytest.importorskip("vllm", reason="vLLM is not installed: see .ci/run")
pytestmark = pytest.mark.vllm


def gap_to_fp32_logits(engine, folder: str, temperature: float = 1.0) -> float:
    """Return the mean |log-prob difference| between completions and a bf16 model whose head is computed in fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    banned, gaps = ~sampling(1.0).valid_columns, []
    engine.begin(sampling(temperature))
    for request in requests():
        (done,) = answer(engine, [request]).values()
        ids = torch.tensor([request.prompt + done.ids])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, len(request.prompt) - 1 : -1]
        logits = hidden.double() @ model.lm_head.weight.double().T / temperature
        logp = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
        plain = logp.gather(1, torch.tensor(done.ids)[:, None])[:, 0]
        gaps += (plain - torch.tensor(done.logprobs, dtype=torch.float64)).abs().tolist()
    return sum(gaps) / len(gaps)


def lifted(folder: str) -> str:
    """Add a vector to every row of the head: distributions stay, logits get a size at which bf16 rounds them visibly.

    What it adds to the logits of a token is the same for all columns, so that the backbone's rounding cancels.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.add_(2)
    model.save_pretrained(folder)
    return folder


def gaps(folders: list[str], head_dtype: str) -> list[tuple[float, float]]:
    """Return, with each folder's weights, synced one after the other: the gap, and the largest error of a logit.

    The error is from the product in fp64 of the hidden states that vLLM has and the weight that it was sent.
    """
    engine, found, seen = build(folders[0], torch.bfloat16, head_dtype=head_dtype), [], []

    def watch(model: torch.nn.Module) -> None:
        compute = model.compute_logits
        model.compute_logits = lambda hidden: seen.append((hidden.clone(), compute(hidden))) or seen[-1][1].clone()

    engine._engine.apply_model(watch)
    for folder in folders:
        sent = dict(weights(folder))
        engine.load_weights((name, weight.bfloat16()) for name, weight in sent.items())
        seen.clear()
        gap = gap_to_fp32_logits(engine, folder)
        head = sent["lm_head.weight"].bfloat16().double()
        found.append((gap, max(float((logits - hidden.double() @ head.T).abs().max()) for hidden, logits in seen)))
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_logits_bring_bf16_log_probs_closer_also_after_a_sync(tmp_path, tied):
    folders = [lifted(save_model(tmp_path / str(seed), tied=tied, seed=seed, **SIZES)) for seed in range(2)]
    (exact,), (rounded,) = (run_ranks(1, gaps, folders, head_dtype) for head_dtype in ("fp32", "model"))
    print(f"mean |log-prob gap| and largest error of a logit, tied={tied}: fp32 head {exact}, bf16 head {rounded}")
    for fine, coarse in zip(exact, rounded, strict=True):
        assert fine[0] < coarse[0] and fine[1] < 1e-3 < 0.01 < coarse[1]


class SlotsOfV2:
    """Model runner V2's own bookkeeping of requests and slots, without its tensors, on what the scheduler says."""

    def __init__(self, slots: int):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.states import RequestState

        table = MagicMock(spec=RequestState)
        table.max_num_reqs, table.free_indices = slots, list(range(slots))
        table.req_id_to_index, table.index_to_req_id = {}, {}
        table.max_seq_len = table.num_computed_prefill_tokens = table.num_computed_tokens_np = np.zeros(slots)
        for name in ("prompt_len", "prefill_len", "total_len", "all_token_ids", "num_computed_tokens", "draft_tokens"):
            setattr(table, name, MagicMock())
        table.add_request = lambda **given: RequestState.add_request(table, **given)
        table.remove_request = lambda name: RequestState.remove_request(table, name)
        runner = MagicMock(spec=GPUModelRunner)
        runner.req_states, runner.model_state, runner.block_tables = table, MagicMock(), MagicMock()
        runner.pooling_runner = runner.pp_handler = runner.encoder_cache = runner.adaptive_verification = None
        runner.lora_state, runner.is_last_pp_rank, runner.sampler = MagicMock(), False, None
        runner.prompt_logprobs_worker = None
        runner._remove_request = lambda name: GPUModelRunner._remove_request(runner, name)
        self.table, self._runner, self._methods = table, runner, GPUModelRunner

    def execute_model(self, scheduler_output) -> None:
        self._methods.finish_requests(self._runner, scheduler_output)
        self._methods.add_requests(self._runner, scheduler_output)


def fail_again_and_again(folder: str, queues: bool, cleans_up: bool) -> tuple[int, set]:
    """Let a step of one rollout after the other fail, then play one; return V2's used slots and V1's requests.

    queues: steps are queued, as in asynchronous scheduling, which vLLM turns off on a CPU.
    """
    from atod_fast.errors import EngineFailure
    from atod_fast.rollout.engines.protocol import Request

    engine = build(folder, filled=True)
    if queues:
        core = engine._engine.engine_core.engine_core
        core.batch_queue, core.batch_queue_size, core.step_fn = deque(maxlen=2), 2, core.step_with_batch_queue
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    execute, slots, left = runner.execute_model, SlotsOfV2(engine.concurrency), math.inf

    def execute_model(scheduler_output, *arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("injected")  # before either runner has read what finished
        # V1 does not tell V2 the prompt.
        for new in scheduler_output.scheduled_new_reqs:
            new.prefill_token_ids = new.prompt_token_ids
        slots.execute_model(scheduler_output)
        return execute(scheduler_output, *arguments, **options)

    runner.execute_model = execute_model
    if not cleans_up:
        engine._clean_up = lambda ended: engine.end()
    full = [Request(key, [7 + key] * 20, seed=key) for key in range(engine.concurrency)]
    for fails_at in (0, 1, 12, 5, 13, 0, 3):
        left = math.inf
        engine._filled = True  # its weights are right, and loading them is not what is tried here
        engine.begin(sampling(0.0))
        answer(engine, full)
        left = fails_at
        engine.begin(sampling(0.0))
        with pytest.raises(EngineFailure, match="RuntimeError: injected"):
            answer(engine, full)
            answer(engine, full)
        engine.end()
    left = math.inf
    engine._filled = True
    engine.begin(sampling(0.0))
    answer(engine, full)
    answer(engine, full[:1])
    return len(slots.table.req_id_to_index), set(runner.requests)


@pytest.mark.parametrize("queues", [True, False])
def test_after_failed_steps_no_request_is_left_in_a_model_runner(tmp_path, queues):
    folder = save_model(tmp_path / "model", **SIZES)
    ((used, known),) = run_ranks(1, fail_again_and_again, folder, queues, True)
    assert used <= 1 and len(known) <= 1, "the last one, whose end the next step will tell"


def test_without_cleaning_up_model_runner_v2_runs_out_of_slots(tmp_path):
    """The stand-in for V2 notices what V2 would."""
    folder = save_model(tmp_path / "model", **SIZES)
    with pytest.raises(Exception, match="No free indices"):
        run_ranks(1, fail_again_and_again, folder, False, False)
