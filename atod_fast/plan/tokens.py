"""Rows and tokens of a training step: the most there can be, and what is usual."""

from __future__ import annotations

from dataclasses import dataclass

from atod_fast.config import Config
from atod_fast.envs.protocol import Usual


@dataclass(frozen=True, slots=True)
class Step:
    """Sizes of one training step over all ranks."""

    trajectories: int
    turns: int
    rows: int
    tokens: int
    action_tokens: int
    updates: int


def step_bounds(config: Config) -> Step:
    """Return a step's upper bounds: all turns are played, all prompts and responses have the greatest length."""
    train, rollout = config.train, config.rollout
    trajectories = train.tasks_per_step * train.group_size
    turns = trajectories * config.env.max_turns
    rows = turns if rollout.context == "window" else trajectories
    tokens = rows * rollout.longest
    updates = -(-rows // train.minibatch_rows) if train.minibatch_rows else 1
    return Step(trajectories, turns, rows, tokens, min(tokens, turns * rollout.response_tokens), updates * train.epochs)


def usual_step(config: Config, usual: Usual) -> Step | None:
    """Return the sizes of a step of usual episodes; None for a context other than `window`, which they are of."""
    if config.rollout.context != "window":
        return None
    most, rollout = step_bounds(config), config.rollout
    turns = round(most.trajectories * min(usual.turns, config.env.max_turns))
    response = min(usual.response_tokens, rollout.response_tokens)
    prompt = min(usual.prompt_tokens, rollout.prompt_tokens)
    updates = -(-turns // config.train.minibatch_rows) if config.train.minibatch_rows else 1
    tokens, actions = round(turns * (prompt + response)), round(turns * response)
    return Step(most.trajectories, turns, turns, tokens, actions, updates * config.train.epochs)
