"""Several nodes, of two gloo ranks each: parameters are sharded within a node and copied between nodes."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from atod_fast import ranks, rundir
from atod_fast.config.settings import load
from atod_fast.errors import UserError
from atod_fast.policy import checkpoint
from atod_fast.policy.learner import Learner
from atod_fast.policy.resync import stream_weights
from atod_fast.runtime import Runtime
from helpers import learning
from helpers.gloo import run_ranks
from helpers.tiny import random_rows, save_model

UPDATES = 3  # of twelve rows each


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    student = save_model(root / "student", tied=False)
    return student, save_model(root / "teacher", seed=7, hidden=48, tied=False)


def live_on_nodes(*sizes):
    """Set this rank's environment as torchrun does on nodes with these numbers of ranks."""
    first = 0
    for size in sizes:
        if first <= ranks.rank() < first + size:
            os.environ |= {"LOCAL_WORLD_SIZE": str(size), "LOCAL_RANK": str(ranks.rank() - first)}
        first += size


def make_learner(models, *settings):
    named = [f"{role}.path={path}" for role, path in zip(("student", "teacher"), models, strict=True)]
    sizes = ["train.minibatch_rows=12", "train.microbatch_tokens=16", "train.learning_rate=1e-4"]
    config = load(None, None, [*named, *sizes, *settings])
    device, _ = ranks.start()
    return Learner(config, Runtime.of(config, device, mesh=ranks.mesh(device, config.train.shard)), None)


def update(learner):
    """Run one step of `UPDATES` updates on made-up rows, in several micro-batches each; return its metrics."""
    rows = random_rows(12 * UPDATES)
    minibatches, _ = learner.partition(rows, step=1)
    assert len(minibatches) == UPDATES and all(len(minibatch) > 1 for minibatch in minibatches)
    metrics, _ = learning.learn(learner, rows, learner.config.train.learning_rate)
    return metrics


def weights(learner):
    return {name: p.detach().full_tensor().clone().numpy() for name, p in learner.student.named_parameters()}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(abs(ours[name] - theirs[name]).max().item() for name in ours)


def learn(models, nodes, shards):
    """Learn with each `train.shard`, by plain gradient descent: AdamW makes steps of gradients that are rounding."""
    live_on_nodes(*nodes)
    return [learn_once(models, len(nodes), f"train.shard={shard}") for shard in shards]


def learn_once(models, nodes, *settings):
    method = "turns.disagreement=exact", "objective.divergence=jsd", "objective.entropy_bonus=0.05"
    learner = make_learner(models, "train.learning_rate=0.1", *method, *settings)
    learner.optimizer = torch.optim.SGD(learner.student.parameters(), lr=0.1)
    before = weights(learner)
    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor, *arguments, group=None, **options):
        sizes.append(dist.get_world_size(group))
        return all_reduce(tensor, *arguments, group=group, **options)

    dist.all_reduce = counted
    metrics = update(learner)
    dist.all_reduce = all_reduce
    sent = {name: tensor.clone().numpy() for name, tensor in stream_weights(learner.student)}
    after = weights(learner)
    return {
        "mesh": learner.student.lm_head.weight.device_mesh.shape,
        "metrics": metrics,
        "weights": after,
        "moved": largest_difference(before, after),
        "sent": largest_difference(sent, after),
        "between": sizes.count(nodes),
    }


def test_two_nodes_of_two_ranks_learn_what_four_ranks_and_one_learn(models):
    (((alone,),), everyone) = (
        run_ranks(1, learn, models, [1], ["node"]),
        run_ranks(4, learn, models, [2, 2], ["all", "node"]),
    )
    assert alone["mesh"] == (1,) and alone["moved"] > 1e-2
    for flat, nodes in everyone:
        assert (flat["mesh"], nodes["mesh"]) == ((4,), (2, 2))
        units = 5  # two blocks, embedding, head, root
        assert flat["between"] == 0 and nodes["between"] == units * UPDATES, "with the last micro-batches alone"
        assert largest_difference(nodes["weights"], everyone[0][1]["weights"]) == 0, "the copies are equal"
        for found in (flat, nodes):
            assert found["sent"] == 0
            assert largest_difference(found["weights"], alone["weights"]) < 1e-6
            assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-7)


def state(learner):
    """The weights, and AdamW's running means under names of their own."""
    running = learner.optimizer.state
    means = {f"mean of {name}": running[p]["exp_avg"].full_tensor() for name, p in learner.student.named_parameters()}
    return weights(learner) | {name: mean.clone().numpy() for name, mean in means.items()}


def keep(learner, folder, step, apart=False):
    facts = {"before": {"eval/success": 0.5}}
    return checkpoint.save(folder, step, learner.student, learner.optimizer, facts, keep=2, apart=apart)


def resumed(models, nodes, path):
    live_on_nodes(*nodes)
    learner = make_learner(models)
    checkpoint.load(path, learner.student, learner.optimizer)
    return state(learner)


def save_on_two_nodes(models, folder):
    live_on_nodes(2, 2)
    learner = make_learner(models)
    update(learner)
    keep(learner, folder, 1)
    return state(learner)


def test_a_run_of_two_nodes_is_saved_once_and_goes_on_with_other_nodes(models, tmp_path):
    saved = run_ranks(4, save_on_two_nodes, models, tmp_path)[0]
    path = checkpoint.folder(tmp_path, 1)
    assert {file.name for file in path.glob("*.distcp") if file.stat().st_size} == {"__0_0.distcp", "__1_0.distcp"}
    for nodes in ([1], [1, 1], [3]):
        for found in run_ranks(sum(nodes), resumed, models, nodes, path):
            assert largest_difference(found, saved) == 0


def keep_apart(models, root, shard):
    """Save three checkpoints where each node has its own file system, and load one before and after it is copied."""
    live_on_nodes(2, 2)
    learner = make_learner(models, f"train.shard={shard}")
    rundir.SEEN_WITHIN = 0.5
    shared = rundir.apart(root)
    node = ranks.rank() // 2
    os.chdir(root / f"node{node}")
    run = Path("run")
    missing = rundir.apart(run)
    update(learner)
    for step in (1, 2, 3):
        path = keep(learner, run, step, apart=ranks.rank() in missing)
    whole = sorted(file.parent.name for file in run.glob("checkpoints/*/.metadata"))
    files = {
        path.name: sorted(file.name for file in path.glob("*.distcp") if file.stat().st_size)
        for path in run.glob("checkpoints/*")
    }
    error, saved = "", state(learner)
    try:
        checkpoint.load(path, learner.student, learner.optimizer)
    except UserError as refused:
        error = str(refused)
    if ranks.rank() == 0:
        for source, target in ((1, 0), (0, 1)):
            shutil.copytree(root / f"node{source}/run", root / f"node{target}/run", dirs_exist_ok=True)
    ranks.barrier()
    update(learner)
    checkpoint.load(path, learner.student, learner.optimizer)
    return {
        "shared": shared,
        "missing": missing,
        "whole": whole,
        "files": files,
        "error": error,
        "difference": largest_difference(state(learner), saved),
        "probes": [str(file) for file in root.rglob(".seen-*")],
    }


@pytest.mark.parametrize("shard", ["node", "all"])
def test_nodes_without_a_shared_file_system_keep_what_their_ranks_write(models, tmp_path, shard):
    for node in range(2):
        (tmp_path / f"node{node}" / "run").mkdir(parents=True)
    found = run_ranks(4, keep_apart, models, tmp_path, shard)
    for rank, told in enumerate(found):
        assert told["shared"] == told["probes"] == [] and told["missing"] == [2]
        assert "rank 2 does not find .metadata there" in told["error"] and "\n" not in told["error"]
        assert told["difference"] == 0
        first = rank < 2
        assert told["whole"] == (["step_000002", "step_000003"] if first else [])
        mine = (
            [] if shard == "node" and not first else [f"__{number}_0.distcp" for number in ((0, 1), (2, 3))[rank // 2]]
        )
        assert told["files"] == ({f"step_00000{step}": mine for step in (2, 3)} if mine else {})


def uneven(shard):
    live_on_nodes(2, 1)
    device, _ = ranks.start()
    try:
        return ranks.mesh(device, shard).shape
    except UserError as error:
        return str(error)


def test_nodes_of_different_sizes_cannot_hold_a_copy_each():
    assert run_ranks(3, uneven, "all") == [(3,)] * 3
    lines = run_ranks(3, uneven, "node")
    assert len(set(lines)) == 1 and "same number of ranks on every node, and they have 2, 1; " in lines[0]
