"""Trainer and rollout engine on one accelerator: who holds memory when, how weights are sent, what a broken engine
costs.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from atod_fast import run as running
from atod_fast.config import Config
from atod_fast.errors import EngineFailure, GuardError, UserError
from atod_fast.policy.learner import Learner
from atod_fast.rollout.engines.lockstep import Lockstep
from atod_fast.rollout.engines.protocol import Completion, Request, Sampling, checked
from atod_fast.rollout.engines.vllm import engine as vllm_engine
from atod_fast.rollout.engines.vllm import limits as vllm_limits
from atod_fast.rollout.engines.vllm.engine import VllmEngine
from atod_fast.rollout.engines.vllm.mask import Mask
from atod_fast.runtime import engine_of
from helpers.gloo import run_ranks
from helpers.runs import run

SHAPES = {"model.embed.weight": torch.Size([5, 2]), "lm_head.weight": torch.Size([5, 2])}
WEIGHTS = [(name, torch.ones(shape)) for name, shape in SHAPES.items()]
SAMPLING = Sampling(1.0, 4, (1,))


class FakeVllm:
    """Allows what vLLM does on CUDA; answers each request with one token after two steps. `awake`: the allocated
    memory."""

    def __init__(self):
        self.awake, self.loaded, self.prefixes, self.running = {"weights", "kv_cache"}, False, 0, {}
        core = SimpleNamespace(batch_queue=None, scheduler=SimpleNamespace(finished_req_ids=set()))
        self.engine_core = SimpleNamespace(engine_core=core)

    def is_sleeping(self):
        return self.awake != {"weights", "kv_cache"}

    def sleep(self, level):
        assert level == 2 and self.awake == {"weights", "kv_cache"} and not self.running
        self.awake, self.loaded, self.prefixes = set(), False, 0

    def wake_up(self, tags):
        assert not self.awake & set(tags) and (tags == ["weights"] or (tags == ["kv_cache"] and self.loaded))
        self.awake |= set(tags)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and "weights" in self.awake and kwargs["weights_iterator"] is not None
        assert all(weight.sum() == 10 for _, weight in list(kwargs["weights_iterator"])), (
            "each was copied before the next came"
        )
        self.loaded = True

    def reset_prefix_cache(self):
        assert self.awake == {"weights", "kv_cache"}
        self.prefixes = 0
        return not self.running

    def add_request(self, request_id, prompt, params):
        assert self.loaded and self.awake == {"weights", "kv_cache"} and params == (SAMPLING, 7)
        self.running[f"{request_id}-x"] = 0
        return f"{request_id}-x"

    def abort_request(self, ids, internal):
        assert internal
        for name in ids:
            del self.running[name]

    def step(self):
        self.running = {name: steps + 1 for name, steps in self.running.items()}
        done = [name for name, steps in self.running.items() if steps == 2]
        self.running = {name: steps for name, steps in self.running.items() if steps < 2}
        self.prefixes += len(done)
        sample = SimpleNamespace(token_ids=[1], logprobs=[{1: SimpleNamespace(logprob=-0.5)}], finish_reason="stop")
        return [SimpleNamespace(finished=True, request_id=name.removesuffix("-x"), outputs=[sample]) for name in done]


def reused(weights):
    """Yield weights in one buffer for all, as a resync may: what the engine does not copy is overwritten."""
    buffer = torch.empty(5, 2)
    for name, weight in weights:
        yield name, buffer.copy_(weight)
        buffer.fill_(0)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(vllm_engine, "sampling_params", lambda sampling, seed: (sampling, seed))
    sizes = {"max_model_len": 16, "concurrency": 4}
    return VllmEngine(FakeVllm(), Mask(), **sizes, shapes=SHAPES, sleeps=True, filled=False)


def test_memory_is_held_only_from_the_sync_to_the_next_sleep(engine):
    vllm = engine._engine
    assert vllm.awake == set(), "built asleep: the trainer's models come next"
    for _ in range(2):
        engine.load_weights(reused(WEIGHTS))
        assert vllm.awake == {"weights", "kv_cache"}
        for _ in range(2):
            engine.begin(SAMPLING)
            engine.add(Request(3, [2, 2], 7))
            assert engine.step() == [] and engine.step() == [Completion(3, [1], [-0.5], True)]
            engine.end()
        engine.load_weights(reused(WEIGHTS))  # awake: loaded in place
        engine.begin(SAMPLING)
        engine.add(Request(3, [2, 2], 7))
        engine.sleep()  # what was left over is aborted first
        assert vllm.awake == set()


def test_an_engine_that_does_not_sleep_keeps_its_memory_and_still_wants_new_weights(monkeypatch):
    monkeypatch.setattr(vllm_engine, "sampling_params", lambda sampling, seed: (sampling, seed))
    vllm = FakeVllm()
    engine = VllmEngine(vllm, Mask(), max_model_len=16, concurrency=4, shapes=SHAPES, sleeps=False, filled=False)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="load_weights first"):
            engine.begin(SAMPLING)
        engine.load_weights(reused(WEIGHTS))
        engine.begin(SAMPLING)
        engine.add(Request(3, [2, 2], 7))
        assert engine.step() == [] and engine.step() == [Completion(3, [1], [-0.5], True)]
        assert vllm.prefixes == 1
        engine.sleep()
        assert vllm.awake == {"weights", "kv_cache"} and not vllm.running
    engine.load_weights(reused(WEIGHTS))
    assert vllm.prefixes == 0


def test_a_rollout_without_the_trainer_s_weights_is_refused(engine):
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(SAMPLING)
    engine.load_weights(WEIGHTS)
    engine.begin(SAMPLING)
    engine.sleep()
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.add(Request(0, [2], 7))
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(SAMPLING)
    with pytest.raises(GuardError, match="did not send 1 .* lm_head.weight"):
        engine.load_weights(WEIGHTS[:1])
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(SAMPLING)


def test_prefixes_of_old_weights_are_never_kept(engine, monkeypatch):
    monkeypatch.setattr(engine._engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(GuardError, match="kept prefixes"):
        engine.load_weights(WEIGHTS)


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_a_request_that_did_not_end_by_itself_is_no_answer(engine, reason):
    engine.load_weights(WEIGHTS)
    engine.begin(SAMPLING)
    engine.add(Request(0, [2], 7))
    sample = SimpleNamespace(token_ids=[], logprobs=[], finish_reason=reason)
    engine._engine.step = lambda: [SimpleNamespace(finished=True, request_id="0", outputs=[sample])]
    with pytest.raises(EngineFailure, match="finish_reason"):
        engine.step()
    with pytest.raises(RuntimeError, match="load_weights first"):
        engine.begin(SAMPLING)


def test_masked_columns_are_left_out_of_the_logits():
    mask = Mask()
    logits = torch.arange(6.0).view(2, 3)
    assert torch.equal(mask.apply(logits.clone()), logits)
    mask.allow(torch.tensor([True, False, True]))
    assert mask.apply(logits.clone()).tolist() == [[0, -torch.inf, 2], [3, -torch.inf, 5]]
    mask.allow(None)
    assert torch.equal(mask.apply(logits.clone()), logits)


def test_a_sync_is_whole_or_an_error():
    assert list(checked(iter(WEIGHTS), SHAPES)) == WEIGHTS
    for weights, message in (
        (WEIGHTS[1:], "did not send 1 of the rollout engine's 2 weights, among them model.embed.weight"),
        ([("model.extra", torch.ones(1))], "sends 'model.extra', which .* does not have"),
        ([("lm_head.weight", torch.ones(4, 2))], r"lm_head.weight has shape \(4, 2\), in the rollout engine \(5, 2\)"),
    ):
        with pytest.raises(GuardError, match=message):
            list(checked(iter(weights), SHAPES))


@pytest.mark.parametrize(
    ("found", "word"),
    [(None, "vLLM is not installed"), ("0.33.0", "vLLM 0.33.0 is installed"), ("0.3", "vLLM 0.3 is installed")],
)
def test_a_vllm_that_is_missing_or_of_another_version_is_named(tmp_path, capfd, monkeypatch, found, word):
    monkeypatch.setattr(vllm_limits, "installed", lambda: found)
    run(tmp_path / "run", "rollout.engine=vllm", code=2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("atod_fast:")]
    assert word in line and "atod_fast[vllm]" in line and "rollout.engine=transformers" in line
    assert not (tmp_path / "run").exists()


def test_auto_takes_vllm_on_cuda_where_the_version_fits(monkeypatch):
    config, cuda, cpu = Config(), torch.device("cuda"), torch.device("cpu")
    for found, kind in (("0.32.1", "vllm"), ("0.31.0", "transformers"), (None, "transformers")):
        monkeypatch.setattr(vllm_limits, "installed", lambda found=found: found)
        assert [engine_of(config.rollout.engine, device) for device in (cuda, cpu)] == [kind, "transformers"]


class Sentinel:
    """Wraps a real engine and knows whether it may hold memory."""

    def __init__(self, engine, trace):
        self.inner, self.trace, self.asleep, self.max_model_len = engine, trace, True, engine.max_model_len
        trace.append("built")

    def begin(self, sampling):
        assert not self.asleep
        self.inner.begin(sampling)

    def load_weights(self, weights):
        self.inner.load_weights(weights)
        self.asleep = False
        self.trace.append("loaded")

    def sleep(self):
        self.inner.sleep()
        self.asleep = True
        self.trace.append("asleep")

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_the_trainer_s_models_live_while_the_engine_sleeps(tmp_path, monkeypatch):
    trace, engines, real = [], [], running.make_engine

    def make(*arguments, **options):
        engine = real(*arguments, **options)
        if options.get("filled", True):
            return engine  # the teacher's
        engines.append(Sentinel(engine, trace))
        return engines[-1]

    def watched(name, method):
        def wrapper(self, *arguments, **options):
            assert engines[0].asleep, f"{name} while the engine holds memory"
            trace.append(name)
            return method(self, *arguments, **options)

        return wrapper

    monkeypatch.setattr(running, "make_engine", make)
    for name in ("__init__", "score_teacher", "score_student", "update"):
        monkeypatch.setattr(Learner, name, watched(name, getattr(Learner, name)))
    run(tmp_path / "run", "train.steps=2")
    step = ["asleep", "score_teacher", "score_student", "update", "loaded"]
    teacher_s_evaluation = ["asleep", "loaded"]
    assert trace == ["built", "__init__", "loaded", *teacher_s_evaluation, *step, *step]


def break_once(monkeypatch, times: int):
    """Make `times` engine steps fail, after some have succeeded."""
    from atod_fast.rollout.engines.transformers.engine import TransformersEngine

    real, taken, broken = TransformersEngine.step, [], []

    def step(self):
        taken.append(1)
        if len(taken) > 150 and len(broken) < times:
            broken.append(1)
            raise EngineFailure("RuntimeError: device-side assert")
        return real(self)

    monkeypatch.setattr(TransformersEngine, "step", step)
    return broken


def test_a_rollout_that_broke_down_is_repeated_with_the_same_seeds(tmp_path, monkeypatch, capfd):
    settings = "train.steps=2", "eval.teacher=false", "eval.every=0", "eval.tasks=2"
    whole = run(tmp_path / "whole", *settings)
    broken = break_once(monkeypatch, 1)
    again = run(tmp_path / "again", *settings)
    assert broken and "broke down (RuntimeError: device-side assert)" in capfd.readouterr().out
    assert [line["train/success"] for line in again[1:]] == [line["train/success"] for line in whole[1:]]
    assert [line["loss/total"] for line in again[1:]] == [line["loss/total"] for line in whole[1:]]


def test_an_engine_that_breaks_down_twice_stops_the_run_and_leaves_its_checkpoint(tmp_path, monkeypatch, capfd):
    break_once(monkeypatch, 10**6)
    run(
        tmp_path / "run",
        "train.steps=50",
        "checkpoint.every=1",
        "eval.teacher=false",
        "eval.every=0",
        "eval.tasks=2",
        code=3,
    )
    out, error = capfd.readouterr()
    assert "broke down twice" in error and "saved after step 1; go on with" in out and "--resume auto" in out
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    done = int(saved[-1].name.removeprefix("step_"))
    assert done >= 1 and (saved[-1] / "state.json").is_file()
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == done


class Recorder:
    """An engine that records its calls and fails at a given step."""

    max_model_len, concurrency = 16, 4

    def __init__(self, fails_at: int):
        self.calls, self.fails_at = [], fails_at

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *map(plain, arguments)))
            if name == "step" and sum(done[0] == "step" for done in self.calls) == self.fails_at:
                raise EngineFailure("gone")
            return []

        return call


def plain(value):
    return value.valid_columns.tolist() if isinstance(value, Sampling) else repr(value)


def play_in_lockstep(fails_at: int, raises: str) -> tuple[bool, list, str]:
    from atod_fast import ranks

    ranks.start()
    engine = Lockstep(Recorder(fails_at), ranks.neighbours(2))
    outcome = "whole"
    try:
        if not engine.leads:
            engine.follow()
        else:
            try:
                if raises == "before":
                    raise UserError("no weights")
                engine.begin(Sampling(0.5, 4, (1, 2), torch.tensor([True, False, True])))
                for key in range(3):
                    engine.add(Request(key, [5, key], seed=2**62 + key))
                    engine.step()
                engine.release(1)
                if raises == "midway":
                    raise UserError("no room")
                engine.step()
            finally:
                engine.end()
    except (EngineFailure, UserError) as error:
        outcome = type(error).__name__
    return engine.leads, engine._engine.calls, outcome


@pytest.mark.parametrize(("fails_at", "raises"), [(0, ""), (0, "midway"), (0, "before"), (2, "")])
def test_ranks_that_are_one_engine_do_the_same(fails_at, raises):
    (leads, calls, outcome), (follows, repeated, other) = run_ranks(2, play_in_lockstep, fails_at, raises)
    assert leads and not follows
    assert repeated == calls[: len(repeated)] and len(calls) > (0 if raises == "before" else 3)
    if fails_at:
        assert (outcome, other) == ("EngineFailure", "EngineFailure")
    else:
        assert repeated == calls and other == "whole" and outcome == ("UserError" if raises else "whole")


def fail_on_one_rank(kind: str) -> tuple[str, str]:
    from atod_fast import errors, ranks

    ranks.start()
    try:
        ranks.raise_together(getattr(errors, kind)("why: because") if ranks.rank() == 1 else None)
    except (UserError, GuardError) as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("kind", ["UserError", "GuardError", "EngineFailure"])
def test_what_ends_one_rank_ends_all_alike(kind):
    assert run_ranks(2, fail_on_one_rank, kind) == [(kind, "why: because")] * 2
