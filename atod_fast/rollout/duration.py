"""How long a rollout may take without anything being wrong: the limit for ranks that wait for each other after it."""

from __future__ import annotations

from math import ceil

from atod_fast.config import Config

LEAST = 1800.0  # seconds, whatever the settings
INSTANT_STEP = 1.0  # seconds; a world that says it is instant takes milliseconds
TOKEN = 1.0  # seconds a decoding step of all sequences in flight may take


def limit(config: Config, engines: int, instant: bool) -> float:
    """Seconds: `guard.wait_minutes`, or an upper bound of the longer of a step's rollout and an evaluation.

    An engine's episodes go in waves of `rollout.concurrency`. In each, every turn may wait for its world, which waits
    for those that share its threads, each for `env.step_timeout` at most; and every token may take a second.
    """
    if config.guard.wait_minutes:
        return config.guard.wait_minutes * 60
    env, how = config.env, config.rollout
    longest = LEAST
    for played in (config.train.tasks_per_step * config.train.group_size, config.eval.tasks):
        episodes = ceil(played / engines)
        together = min(how.concurrency, episodes)
        call = together * INSTANT_STEP if instant else ceil(together / env.workers) * env.step_timeout
        wave = (env.max_turns + 1) * call + env.max_turns * how.response_tokens * TOKEN
        longest = max(longest, ceil(episodes / together) * wave)
    return longest
