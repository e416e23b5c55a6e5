"""Dynamic sampling: groups whose rewards do not differ give way to groups of other tasks (DAPO, arXiv 2503.14476).

Such a group has no advantage: nothing is learnt from its reward. verl-agent (filter_group_data) and verl's DAPO recipe
drop it and sample on, up to a number of rounds. Here a step keeps its number of groups: what is still flat after the
last round stays, as in verl-agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from atod_fast.records import Trajectory
from atod_fast.rollout.actor import Group

ROUNDING = 1e-6  # of the largest reward: a difference below it is no difference


@dataclass(frozen=True, slots=True)
class Resampled:
    """The trajectories of a step after dynamic sampling."""

    trajectories: list[Trajectory]  # ordered by group and member
    played: int  # groups that were played besides the step's own
    replaced: int  # groups of the step that gave way to one of them


def resample(
    trajectories: Sequence[Trajectory],
    spare: Iterable[int],
    rounds: int,
    play: Callable[[list[Group], list[Trajectory]], list[Trajectory]],
) -> Resampled:
    """Replace flat groups by groups of the tasks `spare`, in at most `rounds` rounds.

    In each round every group that is still flat has a further task played in its place, and gives way to it if that
    task's rewards differ. `play(groups, trajectories)` plays groups on all ranks, beside the step's trajectories so
    far. Ends early when no group is flat or no task is left. The same on every rank.
    """
    kept, tasks = list(trajectories), iter(spare)
    played = replaced = 0
    for attempt in range(1, rounds + 1):
        groups = [Group(number, task, attempt) for number, task in zip(flat_groups(kept), tasks, strict=False)]
        if not groups:
            break
        fresh = play(groups, kept)
        better = {group.number for group in groups} - set(flat_groups(fresh))
        kept = [t for t in kept if t.group not in better] + [t for t in fresh if t.group in better]
        kept.sort(key=lambda t: (t.group, t.member))
        played, replaced = played + len(groups), replaced + len(better)
    return Resampled(kept, played, replaced)


def flat_groups(trajectories: Sequence[Trajectory]) -> list[int]:
    """Return the numbers of the groups without two different rewards, ascending. Failed trajectories do not count."""
    rewards: dict[int, list[float]] = {trajectory.group: [] for trajectory in trajectories}
    for trajectory in trajectories:
        if trajectory.failure is None:
            rewards[trajectory.group].append(trajectory.reward)
    return sorted(group for group, values in rewards.items() if not _differ(values))


def _differ(values: Sequence[float]) -> bool:
    return bool(values) and max(values) - min(values) > ROUNDING * max(map(abs, values))
