"""Runs from the command line on two nodes: two torchruns, each with its own working folder."""

import json
import os
import socket
import subprocess
import sys

import pytest

from atod_fast import train
from helpers.gloo import run_ranks
from helpers.runs import read

SETTINGS = [
    "train.steps=2",
    "train.tasks_per_step=3",
    "train.group_size=5",
    "train.minibatch_rows=8",
    "train.microbatch_tokens=400",
    "eval.tasks=6",
    "eval.every=0",
    "eval.teacher=false",
    "observe.trajectories_every=1",
]


def on_two_nodes(folder, *arguments):
    """Run `python -m atod_fast.train` with two ranks on each of two nodes; return what the first one printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    nodes = []
    for node in range(2):
        (folder / str(node)).mkdir(exist_ok=True)
        command = [*torchrun, "--node_rank", str(node), "-m", "atod_fast.train", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        nodes.append(
            subprocess.Popen(command, cwd=folder / str(node), env=environment, stdout=pipe, stderr=pipe, text=True)
        )
    told = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    return told[0][0]


def trajectories(run, name):
    return [json.loads(line) for line in (run / "trajectories" / name).read_text().splitlines()]


def test_two_nodes_without_a_shared_file_system_do_what_one_rank_does(tmp_path):
    """With 15 trajectories a step, which four ranks do not divide."""
    told = on_two_nodes(tmp_path, *SETTINGS, "--run-dir", "run")
    assert train.main([*SETTINGS, "--run-dir", str(tmp_path / "alone")]) == 0
    first, alone = tmp_path / "0" / "run", tmp_path / "alone"
    assert told.count("run is not shared by all nodes (rank 2 does not see it): rank 0's node holds all of") == 1
    assert not (tmp_path / "1" / "run" / "metrics.jsonl").exists()
    assert (first / "checkpoints" / "step_000002" / "state.json").is_file() and (first / "hf" / "config.json").is_file()
    for name in ("eval_000000.jsonl", "step_000001.jsonl"):
        ours, theirs = (
            [(t["task_id"], [turn["command"] for turn in t["turns"]]) for t in trajectories(run, name)]
            for run in (first, alone)
        )
        assert ours == theirs and len(ours) in (6, 15)
    for ours, theirs in zip(read(first), read(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if not key.startswith(("time/", "perf/", "memory/", "sync/logprob_gap")):
                assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), key


def test_a_rank_without_a_trajectory_joins_in_all_the_same(tmp_path):
    sizes = ["train.tasks_per_step=1", "train.group_size=2", "eval.tasks=2", "train.steps=1"]
    assert run_ranks(3, train.main, [*SETTINGS, *sizes, "--run-dir", str(tmp_path / "run")]) == [0] * 3
    assert [len(trajectories(tmp_path / "run", f"{name}.jsonl")) for name in ("eval_000000", "step_000001")] == [2, 2]
