"""Compiled blocks compute what eager ones do, sharded and recomputed, under the same names."""

from __future__ import annotations

import functools
import os
import shutil

import pytest
import torch

from atod_fast import ranks
from atod_fast.cli import parse
from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.models import load_model
from atod_fast.policy.learner import Learner
from atod_fast.policy.loading import compile_blocks
from atod_fast.policy.model import CausalPolicy, HeadJob
from atod_fast.policy.packing import collate
from atod_fast.policy.resync import stream_weights
from atod_fast.runtime import Runtime
from helpers.gloo import run_ranks
from helpers.learning import learn
from helpers.tiny import random_rows, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "student"), save_model(root / "teacher", seed=7, hidden=48, tied=False)


def learnt(student: str, teacher: str, attention: str, cases: list[str]) -> list[dict]:
    """Return what a step of updates gives in each case, traced as for a compiler and computed by torch's own operators.

    All that is compiled is so for every shape: micro-batches of other sizes add no variant.
    """
    graphs: list[object] = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile = functools.partial(torch.compile, backend=count)
    found = []
    device, mesh = ranks.start()
    for case in cases:
        graphs.clear()
        given = f"student.path={student}", f"teacher.path={teacher}", f"student.attention={attention}"
        sizes = "train.minibatch_rows=6", "train.microbatch_tokens=70", "student.gradient_checkpointing=true"
        config = load(None, None, [*given, *sizes, *case.split()])
        learner = Learner(config, Runtime.of(config, device, mesh=mesh), None)
        metrics, signals = learn(learner, random_rows(12), 0.01)
        traced = len(graphs)
        learn(learner, random_rows(16, seed=1, longest=30), 0.01)
        moments = {
            name: learner.optimizer.state[parameter]["exp_avg"].full_tensor().tolist()
            for name, parameter in learner.student.named_parameters()
        }
        names = [name for name, _ in stream_weights(learner.student)]
        found.append(
            {"metrics": metrics, "signals": torch.stack(signals).tolist(), "moments": moments, "names": names}
            | {"graphs": traced, "more": len(graphs) - traced}
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_compiled_blocks_learn_what_eager_ones_do(folders, attention):
    """Student and teacher on two ranks, whose blocks are gathered, recomputed and compiled."""
    cases = ["student.compile=false", "student.compile=true"]
    for eager, compiled in run_ranks(2, learnt, *folders, attention, cases):
        assert (eager["graphs"], eager["more"]) == (0, 0) and compiled["graphs"] > 2
        assert compiled["names"] == eager["names"]
        assert compiled["metrics"] == pytest.approx(eager["metrics"], rel=1e-4, abs=1e-6)
        torch.testing.assert_close(*(torch.tensor(case["signals"]) for case in (compiled, eager)), atol=1e-5, rtol=1e-5)
        for name, values in eager["moments"].items():
            expected = torch.tensor(values)
            bound = 2e-3 * expected.abs().max().item()
            torch.testing.assert_close(torch.tensor(compiled["moments"][name]), expected, atol=bound, rtol=0, msg=name)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler, which inductor needs")
def test_the_compiler_s_kernels_give_the_log_probs_and_gradients_of_eager_blocks(folders):
    results = []
    for compiled in (False, True):
        policy = CausalPolicy(load_model(folders[0], torch.float32))
        before = [name for name, _ in policy.named_parameters()]
        if compiled:
            compile_blocks(policy)
        assert [name for name, _ in policy.named_parameters()] == before == [*dict(policy.named_parameters())]
        found = []
        for count in (3, 5):
            batch = collate(random_rows(count), packed=False)
            logp = policy(batch, HeadJob(batch.target, 1.0)).logp
            logp.sum().backward()
            found.append(logp.detach())
        results.append((found, {name: p.grad for name, p in policy.named_parameters()}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=2e-3, rtol=1e-3)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    config = parse(["student.compile=true"]).config
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="student.compile=true needs a C.. compiler, and there is no no-such-compiler"):
        Runtime.of(config, CPU)
    assert not Runtime.of(parse([]).config, CPU).compiled
    monkeypatch.setattr("atod_fast.runtime.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="student.compile=true needs Triton, which is not installed"):
        Runtime.of(config, torch.device("cuda"))


def test_liger_is_left_to_the_compiler_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr("atod_fast.runtime.importlib.util.find_spec", lambda name: name)
    given = {"": True, "student.compile=true": False, "student.compile=true student.liger=on": True}
    for overrides, used in given.items():
        settings = [*overrides.split(), "student.attention=sdpa", "rollout.engine=transformers"]
        assert Runtime.of(load(None, None, settings), torch.device("cuda")).liger == used, overrides
