"""The time limit for ranks that wait for each other after a rollout: no healthy rollout takes longer."""

from __future__ import annotations

from math import ceil

from atod_fast.config import Config

LEAST = 1800.0  # seconds, whatever the settings
INSTANT_STEP = 1.0  # seconds; an environment that says it is instant takes milliseconds
TOKEN = 1.0  # seconds a decoding step of all sequences in flight may take


def limit(config: Config, engines: int, concurrency: int, instant: bool) -> float:
    """Return the limit in seconds: `guard.wait_minutes`, or an upper bound on a step's rollout and an evaluation.

    Each of `engines` engines plays its episodes in waves of `concurrency`. In a wave, every turn may wait for its
    environment, which waits for those on the same threads, each for at most `env.step_timeout`; and every token may
    take a second.
    """
    if config.guard.wait_minutes:
        return config.guard.wait_minutes * 60
    env, settings = config.env, config.rollout
    longest = LEAST
    for played in (config.train.tasks_per_step * config.train.group_size, config.eval.tasks):
        episodes = ceil(played / engines)
        together = min(concurrency, episodes)
        call = together * INSTANT_STEP if instant else ceil(together / env.workers) * env.step_timeout
        wave = (env.max_turns + 1) * call + env.max_turns * settings.response_tokens * TOKEN
        longest = max(longest, ceil(episodes / together) * wave)
    return longest
