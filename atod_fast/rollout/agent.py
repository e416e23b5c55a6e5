"""The agent loop: a model acts in its environments until every episode is over.

    environment answers -> renderer: prompt -> engine: tokens -> renderer: command -> environment

Trajectories advance independently: as soon as an environment has answered, its next request joins the engine's running
batch. Training and evaluation use the same loop.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np

from atod_fast.config import Config
from atod_fast.envs.protocol import Environment, Info
from atod_fast.envs.text import one_line
from atod_fast.errors import UserError
from atod_fast.records import Trajectory, Turn
from atod_fast.rollout.engines.protocol import Completion, Engine, Request, Sampling
from atod_fast.rollout.pool import Answer, Pool
from atod_fast.rollout.rendering import Renderer

logger = logging.getLogger(__name__)
_MESSAGE = re.compile(r": .*(?= \([^()]+:\d+\)$)")  # of an error that says where it was raised


@dataclass(frozen=True, slots=True)
class Episode:
    """One trajectory to play."""

    task: int
    group: int
    member: int
    seed: int  # of sampling: each turn draws from a random stream of (seed, turn) alone
    env_seed: int  # passed to the environment's reset


def rollout(
    engine: Engine,
    env: Environment,
    renderer: Renderer,
    episodes: Sequence[Episode],
    config: Config,
    *,
    temperature: float | None = None,
    progress: Callable[[int, int, int, int], None] | None = None,
) -> list[Trajectory]:
    """Play `episodes` in clones of `env`; return the trajectories in the same order.

    `temperature` replaces rollout.temperature. A trajectory ends when its environment terminates it, and is `truncated`
    after env.max_turns turns or when the next turn might not fit rollout.prompt_tokens. If its environment raises or
    hangs, its first prompt does not fit, or a reply or response cannot be rendered or parsed, its `failure` is set;
    the others go on. `progress` is called with (episodes finished, episodes, turns taken, tokens sampled).
    Raises UserError if the configuration needs longer sequences than the engine holds.
    """
    settings = config.rollout
    if engine.max_model_len < settings.longest:
        raise UserError(
            f"rollout.prompt_tokens={settings.prompt_tokens}: sequences of {settings.longest} tokens, "
            f"the engine holds {engine.max_model_len}; lower it"
        )
    plays = [_Play(key, episode, renderer, config) for key, episode in enumerate(episodes)]
    waiting = deque(plays)
    live = asked = finished = tokens = 0
    failures: set[str] = set()
    sampling = Sampling(
        settings.temperature if temperature is None else temperature,
        settings.response_tokens,
        renderer.stop_ids,
        renderer.valid_columns,
    )

    def end(play: _Play) -> None:
        nonlocal live, finished
        trajectory = play.trajectory
        # One warning for each error of a line of code: the trajectories themselves hold all failures.
        if trajectory.failure is not None and (kind := _MESSAGE.sub("", trajectory.failure)) not in failures:
            failures.add(kind)
            logger.warning(
                "task %d, turn %d: the trajectory failed: %s",
                trajectory.task,
                len(trajectory.turns),
                trajectory.failure,
            )
        engine.release(play.key)
        pool.release(play.key)
        live -= 1
        finished += 1

    with closing(Pool(env, workers=config.env.workers, timeout=config.env.step_timeout)) as pool, ExitStack() as last:
        last.callback(engine.end)
        engine.begin(sampling)
        while waiting or live:
            while waiting and live < engine.concurrency:
                play = waiting.popleft()
                pool.reset(play.key, play.episode.env_seed, play.episode.task)
                live += 1
            for answer in pool.ready(wait=not asked):
                request = plays[answer.key].next(answer)
                if request is not None:
                    engine.add(request)
                    asked += 1
                else:
                    end(plays[answer.key])
            completions = engine.step() if asked else []
            for completion in completions:
                command = plays[completion.key].act(completion)
                asked -= 1
                tokens += len(completion.ids)
                if command is not None:
                    pool.step(completion.key, command)
                else:
                    end(plays[completion.key])
            if progress is not None:
                progress(finished, len(plays), sum(len(play.trajectory.turns) for play in plays), tokens)
    return [play.trajectory for play in plays]


@dataclass(slots=True)
class _Play:
    """A trajectory in progress."""

    key: int
    episode: Episode
    renderer: Renderer
    config: Config
    trajectory: Trajectory = field(init=False)
    sequence: list[int] = field(default_factory=list)  # context `full`: all tokens so far
    prompt: list[int] = field(default_factory=list)  # of the action being sampled
    observation: str = ""
    info: Info = field(default_factory=Info)  # of that observation

    def __post_init__(self) -> None:
        self.trajectory = Trajectory(
            self.episode.task, self.episode.group, self.episode.member, self.config.rollout.context
        )

    def next(self, answer: Answer) -> Request | None:
        """Record the environment's answer; return the next request, or None if the trajectory is over or failed."""
        trajectory, settings = self.trajectory, self.config.rollout
        turns = trajectory.turns
        if answer.failure is not None:
            trajectory.failure = answer.failure
        if turns:
            turns[-1].reward = answer.reward
            turns[-1].accepted = answer.failure is None and bool(answer.info.get("is_action_valid", True))
        else:
            trajectory.task_id, trajectory.task_type = answer.info.get("task_id", ""), answer.info.get("task_type", "")
            trajectory.part = answer.info.get("part", "")
        trajectory.success = answer.info.get("won", False)
        trajectory.score = answer.info.get("score", trajectory.score)
        if answer.failure is not None or answer.terminated:
            return None
        if answer.truncated or len(turns) == self.config.env.max_turns:
            trajectory.truncated = True
            return None
        self.observation, self.info = answer.observation, answer.info
        try:
            self.prompt = self.renderer.prompt(turns, answer.observation, answer.info)
        except Exception as error:  # the user's own prompt may fail on what this environment alone says
            trajectory.failure = f"its observation could not be made a prompt: {one_line(error)}"
            return None
        ids = self.sequence + self.prompt
        room = settings.longest - settings.response_tokens
        if 0 < len(ids) <= room:
            seed = np.random.SeedSequence((self.episode.seed, len(turns))).generate_state(1, np.uint64)[0] >> 1
            return Request(self.key, ids, int(seed))
        if turns:
            trajectory.truncated = True
        else:
            trajectory.failure = (
                f"its first prompt has {len(ids)} tokens, room is for 1 to {room}: "
                f"rollout.prompt_tokens={settings.prompt_tokens} may be raised"
            )
        return None

    def act(self, completion: Completion) -> str | None:
        """Record the model's response; return the command for the environment, or None if it cannot be parsed."""
        try:
            text, command, well_formed = self.renderer.parse(completion.ids, completion.stopped, self.info)
            if not isinstance(command, str):
                raise TypeError(f"the command is {type(command).__name__}; text is due")
        except Exception as error:
            self.trajectory.failure = f"its answer could not be read: {one_line(error)}"
            return None
        turn = Turn(
            self.prompt,
            completion.ids,
            completion.logprobs,
            self.observation,
            text,
            command,
            bool(well_formed),
            stopped=completion.stopped,
        )
        self.trajectory.turns.append(turn)
        if self.trajectory.context == "full":
            self.sequence = self.sequence + self.prompt + completion.ids
        return command
