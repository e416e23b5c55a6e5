"""Plays this rank's share of the training and evaluation episodes, with any rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise

import numpy as np

from atod_fast import ranks
from atod_fast.config import Config
from atod_fast.envs import make
from atod_fast.envs.protocol import Environment
from atod_fast.envs.text import one_line
from atod_fast.errors import EnvironmentsLost, UserError
from atod_fast.records import Trajectory
from atod_fast.rollout.agent import Episode, rollout
from atod_fast.rollout.engines.lockstep import Lockstep
from atod_fast.rollout.engines.protocol import Engine
from atod_fast.rollout.rendering import Renderer

Progress = Callable[[int, int, int, int], None]  # (episodes finished, episodes, turns, tokens)

# First word of the seeds of a split's evaluation episodes: equal in every run, so that runs can be paired task by task.
EVALUATION = {"eval": 0xE7A1, "dev": 0xDE7A}
COLLECTED = 0xC011  # third word of the seeds of collected episodes
SPARE = 0x5BA6  # last word of the seed of a step's spare tasks


@dataclass(frozen=True, slots=True)
class Group:
    """A group of a training step to play: `train.group_size` trajectories of one task."""

    number: int  # in the step
    task: int
    attempt: int = 0  # round of dynamic sampling that plays it, with random streams of its own; 0: the step itself


class Actor:
    """Plays this rank's share of every rollout: trajectories of a training step, tasks of an evaluation.

    Which rank plays a trajectory changes neither its task nor its seeds. The ranks of one tensor-parallel engine count
    as one, and the first of them plays. make_renderer gets the environment of env.`split`; its renderer serves all
    splits.
    """

    def __init__(
        self,
        config: Config,
        make_renderer: Callable[[Environment], Renderer],
        *,
        rank: int,
        ranks: int,
        split: str = "eval",
    ):
        self.config, self.rank, self.ranks = config, rank, ranks
        self._worlds: dict[str, Environment] = {}
        self.renderer = make_renderer(self.world(split))

    def world(self, split: str) -> Environment:
        """Return the environment of env.`split`, opened on first use: an evaluation needs env.eval alone."""
        if split not in self._worlds:
            self._worlds[split] = open_split(self.config, split)
        return self._worlds[split]

    def _share(self, engine: Engine) -> tuple[int, int]:
        """Return the index of this rank's engine and the number of engines."""
        together = self.config.rollout.tensor_parallel if isinstance(engine, Lockstep) else 1
        return self.rank // together, self.ranks // together

    def groups(self, step: int) -> list[Group]:
        """Return the groups of a step (counted from 1), the same on every rank.

        The tasks are a pure function of the step: all tasks in a seeded order, each once per epoch.
        """
        train, tasks = self.config.train, len(self.world("train"))
        places = [divmod((step - 1) * train.tasks_per_step + group, tasks) for group in range(train.tasks_per_step)]
        orders = {epoch: np.random.default_rng([train.seed, epoch]).permutation(tasks) for epoch in dict(places)}
        return [Group(group, int(orders[epoch][place])) for group, (epoch, place) in enumerate(places)]

    def spare_tasks(self, step: int) -> list[int]:
        """Return the tasks that are not in a step's groups, in a seeded order of the step, the same on every rank."""
        own = {group.task for group in self.groups(step)}
        rng = np.random.default_rng([self.config.train.seed, step, SPARE])
        return [task for task in rng.permutation(len(self.world("train"))).tolist() if task not in own]

    def train(
        self,
        engine: Engine,
        step: int,
        progress: Progress | None = None,
        groups: Sequence[Group] | None = None,
    ) -> list[Trajectory]:
        """Play this rank's share of a step's groups, or of other `groups` in it; return their trajectories."""
        train = self.config.train
        first, engines = self._share(engine)
        episodes, groups = [], self.groups(step) if groups is None else groups
        for index, member in deal(len(groups), train.group_size, engines)[first]:
            group = groups[index]
            place = train.seed, step, group.number
            again = (group.attempt,) if group.attempt else ()
            # The first free number of a member stands for the environment of a further attempt.
            world = _seed(*place, train.group_size, *again) if again else _seed(*place)
            seeds = {"seed": _seed(*place, member, *again), "env_seed": world}
            episodes.append(Episode(group.task, group.number, member, **seeds))
        return self._play(engine, self.world("train"), episodes, self.config.rollout.temperature, progress)

    def evaluate(self, engine: Engine, split: str = "eval", progress: Progress | None = None) -> list[Trajectory]:
        """Play this rank's share of `eval.tasks` tasks of a split, "eval" or "dev", one episode each.

        Every run has the same tasks and seeds.
        """
        env, head = self.world(split), EVALUATION[split]
        first, engines = self._share(engine)
        mine = held_out(env, split, self.config.eval.tasks)[first::engines]
        episodes = [Episode(task, task, 0, seed=_seed(head, task), env_seed=_seed(head, task)) for task in mine]
        return self._play(engine, env, episodes, self.config.eval.temperature, progress)

    def to_collect(self, split: str, count: int) -> list[Episode]:
        """Return `count` episodes of a split, the same on every rank: all its tasks in a seeded order, and again."""
        seed, tasks = self.config.train.seed, len(self.world(split))
        episodes = []
        for number in range(count):
            epoch, place = divmod(number, tasks)
            if not place:
                order = np.random.default_rng([seed, epoch]).permutation(tasks)
            own, world = (_seed(seed, number, COLLECTED, last) for last in (0, 1))
            episodes.append(Episode(int(order[place]), number, 0, seed=own, env_seed=world))
        return episodes

    def collect(
        self,
        engine: Engine,
        env: Environment,
        renderer: Renderer,
        episodes: Sequence[Episode],
        progress: Progress | None = None,
    ) -> list[Trajectory]:
        """Play this rank's share of `episodes` in clones of `env` at rollout.temperature; return their trajectories."""
        first, engines = self._share(engine)
        mine = list(episodes[first::engines])
        return self._play(engine, env, mine, self.config.rollout.temperature, progress, renderer)

    def _play(
        self,
        engine: Engine,
        env: Environment,
        episodes: list[Episode],
        temperature: float,
        progress: Progress | None,
        renderer: Renderer | None = None,
    ) -> list[Trajectory]:
        if isinstance(engine, Lockstep) and not engine.leads:
            engine.follow()
            return []
        renderer = renderer or self.renderer
        return rollout(engine, env, renderer, episodes, self.config, temperature=temperature, progress=progress)


def deal(groups: int, members: int, engines: int) -> list[list[tuple[int, int]]]:
    """Deal the trajectories (group, member) of a step evenly to engines; return each engine's.

    An engine reads a group's first prompt only once, so few groups are split: none where engines divide them.
    """
    order = [group for first in range(engines) for group in range(first, groups, engines)]
    whole = [(group, member) for group in order for member in range(members)]
    cuts = [-(-len(whole) * engine // engines) for engine in range(engines + 1)]
    return [whole[start:stop] for start, stop in pairwise(cuts)]


def held_out(env: Environment, split: str, count: int) -> list[int]:
    """Return the `count` tasks of an evaluation, ascending: drawn from all, as official games are listed by type.

    A mix draws its own: each part's share. Raises UserError if a part has fewer tasks.
    """
    rng = np.random.default_rng(EVALUATION[split])
    draw: Callable[[int, np.random.Generator], list[int]] | None = getattr(env, "evaluation_tasks", None)
    return sorted(draw(count, rng)) if draw is not None else np.sort(rng.permutation(len(env))[:count]).tolist()


def open_split(config: Config, split: str) -> Environment:
    """Open the environment of env.`split`: "train", "eval" or "dev".

    Raises:
        UserError: as `make`; or there is no task to train on, none beside a step's for train.resample_flat, or fewer
            than eval.tasks to evaluate on (in a mix: fewer than a part's share of them).
    """
    env = make(config.env.name, **(config.env.options | getattr(config.env, split)))
    try:
        count = len(env)
    except Exception as error:
        raise UserError(
            f"env.name={config.env.name!r}: __len__ fails: {one_line(error)}; it returns the number of tasks"
        ) from error
    if split == "train" and not count:
        raise UserError("env.train holds no tasks; give it some")
    train = config.train
    if split == "train" and train.resample_flat and count <= train.tasks_per_step:
        raise UserError(
            f"train.resample_flat={train.resample_flat} finds no other tasks: env.train holds {count}, a step plays "
            f"train.tasks_per_step={train.tasks_per_step}; give more tasks, or set it to 0"
        )
    if split != "train" and count < config.eval.tasks:
        raise UserError(
            f"eval.tasks={config.eval.tasks} exceeds the {count} tasks of env.{split}; lower it or give more"
        )
    if split != "train":
        held_out(env, split, config.eval.tasks)
    return env


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def dated(config: Config, day: str = "") -> Config:
    """Return `config` with `rollout.date` set: its own, else `day`, else rank 0's today. Collective.

    All prompts of a run, resumed or not, show one date.
    """
    shown = config.rollout.date or day or ranks.from_first(date.today().isoformat())
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"date": shown})})


def check_failures(trajectories: list[Trajectory], limit: float, label: str) -> None:
    """Raise EnvironmentsLost if all environments failed, or a larger share than `limit`.

    The trajectories that are left would not stand for the tasks.
    """
    failures = [t.failure for t in trajectories if t.failure is not None]
    if failures and (len(failures) > limit * len(trajectories) or len(failures) == len(trajectories)):
        more = "" if len(failures) == len(trajectories) else ", or raise guard.failed_environments"
        raise EnvironmentsLost(
            f"{label}: {len(failures)} of {len(trajectories)} environments failed, first with: {failures[0]}; "
            f"correct the environment or its options (env.*){more}"
        )
