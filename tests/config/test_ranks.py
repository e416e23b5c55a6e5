"""How many ranks share the parameters and an engine, and what a dry run says of it."""

import pytest

from atod_fast import train
from atod_fast.config.settings import check_ranks, from_toml, load, to_toml
from atod_fast.errors import UserError

VLLM = ["rollout.engine=vllm", "rollout.tensor_parallel=4"]


@pytest.mark.parametrize(
    ("settings", "ranks", "node", "shards"),
    [
        ([], 1, None, 1),
        ([], 8, None, 8),
        ([], 8, 8, 8),
        ([], 16, 8, 8),
        ([], 3, 1, 1),
        (["train.shard=all"], 16, 8, 16),
        (["train.shard=all"], 5, 3, 5),
        (["train.tasks_per_step=1"], 24, 8, 8),
        (VLLM, 16, 8, 8),
        (VLLM, 8, None, 8),
    ],
)
def test_parameters_are_shared_within_a_node_or_by_all(settings, ranks, node, shards):
    assert check_ranks(load(overrides=settings), ranks, node) == shards


@pytest.mark.parametrize(
    ("settings", "ranks", "node", "line"),
    [
        ([], 5, 3, "3 do not divide 5; start torchrun with the same --nproc_per_node everywhere, or set train.shard="),
        (VLLM, 6, None, "rollout.tensor_parallel=4 does not divide 6 ranks"),
        (VLLM, 12, 6, "rollout.tensor_parallel=4 does not divide the 6 ranks of a node"),
        ([*VLLM, "train.shard=all"], 4, 2, "rollout.tensor_parallel=4 does not divide the 2 ranks of a node"),
    ],
)
def test_nodes_that_share_neither_parameters_nor_engines_are_refused(settings, ranks, node, line):
    with pytest.raises(UserError, match=line) as refused:
        check_ranks(load(overrides=settings), ranks, node)
    assert "\n" not in str(refused.value)


def test_a_configuration_goes_through_text():
    config = load("searchqa-4b", None, ["objective.preset=exact", "objective.clip=0.3", "env.options.topk=5"])
    assert from_toml(to_toml(config)) == config


def masters(text):
    return float(next(line for line in text.splitlines() if line.startswith("# student, fp32 masters")).split()[-1])


def test_a_dry_run_divides_memory_by_the_ranks_that_share_it(capsys, monkeypatch):
    def planned(ranks, *settings, node=None):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        if node is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
        code = train.main(
            ["--preset", "alfworld-1.7b", "--dry-run", "env.train={generate=20, seed=0}", *OWN, *settings]
        )
        return code, *capsys.readouterr()

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    code, whole, _ = planned(4)
    assert code == 0 and "plan for 4 ranks on" in whole and "parameters sharded" not in whole
    _, two, _ = planned(4, node=2)
    assert "parameters sharded over the 2 ranks of a node, a copy on each of 2 (train.shard=node)" in two
    _, everyone, _ = planned(4, "train.shard=all", node=2)
    assert "parameters sharded over all ranks of 2 nodes (train.shard=all)" in everyone
    assert masters(two) == pytest.approx(2 * masters(whole), abs=0.02) and masters(everyone) == masters(whole)
    code, _, refused = planned(5, node=2)
    assert code == 2 and "train.shard='node' needs the same number of ranks on every node" in refused


OWN = ["env.eval={generate=200, seed=1}", "eval.tasks=10"]
