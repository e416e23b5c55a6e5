"""Which rank plays which trajectory: any number of ranks shares what one plays."""

import pytest

from atod_fast.config.settings import load
from atod_fast.rollout.actor import deal
from atod_fast.rollout.engines import protocol


@pytest.mark.parametrize("engines", [1, 2, 3, 4, 5, 7, 24, 40])
@pytest.mark.parametrize(("groups", "members"), [(1, 1), (3, 5), (4, 8), (16, 8)])
def test_every_trajectory_is_dealt_once_and_evenly(groups, members, engines):
    dealt = deal(groups, members, engines)
    whole = [(group, member) for group in range(groups) for member in range(members)]
    assert len(dealt) == engines and sorted(sum(dealt, [])) == whole
    counts = [len(share) for share in dealt]
    assert max(counts) - min(counts) <= 1
    split = sum(len({group for group, _ in share}) for share in dealt) - groups
    assert split < engines, "a cut between two engines splits one group at most"


@pytest.mark.parametrize(("groups", "engines"), [(8, 1), (8, 2), (8, 8), (12, 3)])
def test_groups_stay_whole_where_engines_divide_them(groups, engines):
    for engine, share in enumerate(deal(groups, 3, engines)):
        assert share == [(group, member) for group in range(engine, groups, engines) for member in range(3)]


@pytest.mark.parametrize("engines", [1, 3, 7, 24, 200])
def test_an_engine_has_room_for_the_most_that_is_dealt_to_one(engines):
    config = load(None, None, ["train.tasks_per_step=16", "train.group_size=8", "eval.tasks=1"])
    assert protocol.share(config, engines) == max(map(len, deal(16, 8, engines)))
