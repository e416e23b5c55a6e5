"""An agent in its worlds: environments and renderer put together once, then asked for trajectories with some engine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

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

Progress = Callable[[int, int, int, int], None]  # finished, total, turns, tokens

# Head of the seeds of a split's evaluation episodes: equal for every run, so that runs can be paired game by game.
EVALUATION = {"eval": 0xE7A1, "dev": 0xDE7A}


class Actor:
    """This rank's share of every rollout. Group g of a step belongs to rank g modulo their number, and so do an
    evaluation's tasks in turn.

    Ranks that are one engine together count as one, and their first plays. make_renderer: gets the environment of
    env.eval; its renderer shows all splits.
    """

    def __init__(self, config: Config, make_renderer: Callable[[Environment], Renderer], *, rank: int, ranks: int):
        self.config, self.rank, self.ranks = config, rank, ranks
        self._worlds: dict[str, Environment] = {}
        self.renderer = make_renderer(self.world("eval"))

    def world(self, split: str) -> Environment:
        """That of env.`split`, opened when first asked for: an evaluation needs no other than env.eval."""
        if split not in self._worlds:
            self._worlds[split] = open_split(self.config, split)
        return self._worlds[split]

    def _share(self, engine: Engine) -> tuple[int, int]:
        """Number of this rank's engine among all of its kind, and theirs."""
        together = self.config.rollout.tensor_parallel if isinstance(engine, Lockstep) else 1
        return self.rank // together, self.ranks // together

    def train(self, engine: Engine, step: int, progress: Progress | None = None) -> list[Trajectory]:
        """Groups of a step (counted from 1). Tasks come in a seeded order, each once an epoch; a pure function of the step."""
        train = self.config.train
        first, engines = self._share(engine)
        env = self.world("train")
        episodes = []
        for group in range(first, train.tasks_per_step, engines):
            epoch, place = divmod((step - 1) * train.tasks_per_step + group, len(env))
            task = int(np.random.default_rng([train.seed, epoch]).permutation(len(env))[place])
            world = _seed(train.seed, step, group)
            episodes += [
                Episode(task, group, member, seed=_seed(train.seed, step, group, member), env_seed=world)
                for member in range(train.group_size)
            ]
        return self._play(engine, env, episodes, self.config.rollout.temperature, progress)

    def evaluate(self, engine: Engine, split: str = "eval", progress: Progress | None = None) -> list[Trajectory]:
        """One episode of each of `eval.tasks` tasks of a split, "eval" or "dev", the same tasks and seeds in every run.

        They are drawn from all, as official games are listed by task type.
        """
        env, head = self.world(split), EVALUATION[split]
        drawn = np.sort(np.random.default_rng(head).permutation(len(env))[: self.config.eval.tasks])
        first, engines = self._share(engine)
        mine = drawn[first::engines].tolist()
        episodes = [Episode(task, task, 0, seed=_seed(head, task), env_seed=_seed(head, task)) for task in mine]
        return self._play(engine, env, episodes, self.config.eval.temperature, progress)

    def _play(
        self, engine: Engine, env: Environment, episodes: list[Episode], temperature: float, progress: Progress | None
    ) -> list[Trajectory]:
        if isinstance(engine, Lockstep) and not engine.leads:
            engine.follow()
            return []
        return rollout(engine, env, self.renderer, episodes, self.config, temperature=temperature, progress=progress)


def open_split(config: Config, split: str) -> Environment:
    """The environment of env.`split`: "train", "eval" or "dev".

    Raises:
        UserError: as `make`; it has no task to train on, or fewer than eval.tasks to evaluate on.
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
    if split != "train" and count < config.eval.tasks:
        raise UserError(
            f"eval.tasks={config.eval.tasks} exceeds the {count} tasks of env.{split}; lower it or give more"
        )
    return env


def _seed(*words: int) -> int:
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def dated(config: Config, day: str = "") -> Config:
    """`config` with a `rollout.date`: its own, else `day`, else rank 0's today, so that all prompts of a run show one. Collective."""
    shown = config.rollout.date or day or ranks.from_first(date.today().isoformat())
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"date": shown})})


def check_failures(trajectories: list[Trajectory], limit: float, label: str) -> None:
    """EnvironmentsLost where all environments failed, or a larger share than `limit`: what the others did stands for nothing then."""
    failures = [t.failure for t in trajectories if t.failure is not None]
    if failures and (len(failures) > limit * len(trajectories) or len(failures) == len(trajectories)):
        more = "" if len(failures) == len(trajectories) else ", or raise guard.failed_environments"
        raise EnvironmentsLost(
            f"{label}: {len(failures)} of {len(trajectories)} environments failed, first with: {failures[0]}; mend what env.* points to{more}"
        )
