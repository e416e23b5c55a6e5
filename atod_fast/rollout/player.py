"""Plays a rollout on all ranks: each plays its share, then all get every trajectory or all stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from atod_fast import ranks
from atod_fast.config import Config
from atod_fast.errors import EngineFailure, GuardError, RankLost
from atod_fast.interrupt import Interrupt, Interrupted
from atod_fast.records import Trajectory
from atod_fast.rollout.actor import Progress, check_failures

# (label) -> a context that yields the progress callback.
ShowProgress = Callable[[str], AbstractContextManager[Progress]]


class Player:
    """Plays rollouts on all ranks together, for training and evaluation.

    refill: reloads the weights of an engine that broke down; without it nothing is replayed. say: prints a line.
    """

    def __init__(
        self,
        config: Config,
        *,
        progress: ShowProgress,
        interrupt: Interrupt,
        say: Callable[[str], None],
        refill: Callable[[], object] | None = None,
    ):
        self.config, self._progress, self._interrupt, self._say, self._refill = config, progress, interrupt, say, refill

    def play(
        self, label: str, act: Callable[..., list[Trajectory]], beside: Sequence[Trajectory] = ()
    ) -> list[Trajectory]:
        """Call `act(progress=...)` on every rank; return the trajectories of all ranks. Collective.

        beside: trajectories of the same step, among which failed environments are counted.

        An engine that breaks down is refilled, once, and the same episodes are replayed from the start: nothing of the
        interrupted rollout is used.

        Raises:
            Exception: an error of `act` on one rank is raised on all: one of atod_fast.errors, or Interrupted.
            EngineFailure: the engine broke down and cannot be refilled.
            GuardError: the engine did not take its weights, or broke down twice.
            EnvironmentsLost: more environments failed than guard.failed_environments allows.
            RankLost: a rank has died, or did not arrive within guard.wait_minutes.
        """
        try:
            return self._once(label, act, beside)
        except EngineFailure as failure:
            if self._refill is None:
                raise
            again = "it gets its weights anew, and the episodes begin again"
            self._say(f"{label}: the rollout engine broke down ({failure}); {again}")
        try:
            self._refill()
        except RuntimeError as failure:  # the device itself may be lost, on this rank alone
            raise GuardError(f"{label}: the rollout engine did not take its weights anew ({failure})") from failure
        try:
            return self._once(label, act, beside)
        except EngineFailure as failure:
            raise GuardError(f"{label}: the rollout engine broke down twice ({failure})") from failure

    def _once(self, label: str, act: Callable[..., list[Trajectory]], beside: Sequence[Trajectory]) -> list[Trajectory]:
        mine: list[Trajectory] = []
        failure: Exception | None = None
        with self._progress(label) as show:

            def progress(*counts: int) -> None:
                if self._interrupt.requested:
                    raise Interrupted
                show(*counts)

            try:
                mine = act(progress=progress)
            except Interrupted:
                pass
            except (Exception, SystemExit) as error:
                failure = ranks.understood(error)
                if isinstance(failure, EngineFailure) and self.config.rollout.tensor_parallel > 1:
                    # The engine's other ranks may still wait inside it for this one, and would never learn of it.
                    raise GuardError(f"{label}: the rollout engine broke down ({error})") from error
        if isinstance(failure, RankLost):
            raise failure
        ranks.wait()
        ranks.raise_together(failure)
        if ranks.any_rank(self._interrupt.requested):
            raise Interrupted
        everyone = ranks.gather_trajectories(mine)
        check_failures([*beside, *everyone], self.config.guard.failed_environments, label)
        return everyone
