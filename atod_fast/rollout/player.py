"""A rollout played by all ranks: each plays its share, and all get everyone's trajectories, or all stop."""

from __future__ import annotations

from collections.abc import Callable

from atod_fast import ranks
from atod_fast.config import Config
from atod_fast.errors import EngineFailure, GuardError, RankLost
from atod_fast.interrupt import Interrupt, Interrupted
from atod_fast.observe.console import Console
from atod_fast.records import Trajectory
from atod_fast.rollout.actor import check_failures


def play(act: Callable[..., list[Trajectory]], label: str, config: Config, console: Console, interrupt: Interrupt) -> list[Trajectory]:
    """Returns the trajectories of `act(progress=...)` on every rank, those of all ranks. Collective.

    Raises:
        Exception: what ended `act` on one rank is raised on all: one of atod_fast.errors, or Interrupted.
        EnvironmentsLost: more environments failed than guard.failed_environments allows.
        RankLost: a rank is gone, or did not come within guard.wait_minutes.
    """
    mine: list[Trajectory] = []
    failure: Exception | None = None
    with console.progress(label) as show:

        def progress(*counts: int) -> None:
            if interrupt.requested:
                raise Interrupted
            show(*counts)

        try:
            mine = act(progress=progress)
        except Interrupted:
            pass
        except (Exception, SystemExit) as error:
            failure = ranks.understood(error)
            if isinstance(failure, EngineFailure) and config.rollout.tensor_parallel > 1:
                # The engine's other ranks may still wait inside it for this one, and would never hear of it.
                raise GuardError(f"{label}: the rollout engine broke down ({error})") from error
    if isinstance(failure, RankLost):
        raise failure
    ranks.wait()
    ranks.raise_together(failure)
    if ranks.any_rank(interrupt.requested):
        raise Interrupted
    everyone = ranks.gather_trajectories(mine)
    check_failures(everyone, config.guard.failed_environments, label)
    return everyone
