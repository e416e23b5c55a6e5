"""A mix: several environments, the parts, as one `Environment`."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from atod_fast.envs.mix.parts import AT, Part, epoch, read_parts, shares
from atod_fast.envs.protocol import Environment, Info, Usual, copy_with
from atod_fast.errors import UserError

if TYPE_CHECKING:
    from numpy.random import Generator


class Mix:
    """Several environments as one. Each episode is an episode of one part, with that part's own prompt and parser.

    parts: {label: settings}; the label names the part in metrics. Settings of a part, all optional:
      name: its environment, as env.name takes it; by default the label.
      options: options of its environment in all splits.
      weight: its share of the tasks is its weight over the sum of all, 1.0 by default. With 0 it is left out.
      max_turns: turns after which its episodes are cut off, if fewer than env.max_turns.
      thinking, history: in the place of rollout.thinking and rollout.history.
    Further options are labels: LABEL={...} has options of a part's environment for one split.

    Training: an epoch is the shortest in which the parts' numbers of tasks are in proportion to the weights and every
    task of every part occurs. A part that has more places than tasks repeats them, each equally often or once more.
    Evaluation: each part's share of eval.tasks, and no task twice.

    info["part"] is the label; info["task_type"] is "LABEL/TYPE", or the label for a task without a type.
    """

    def __init__(self, *, parts: dict[str, Any], **split: Any) -> None:
        played = [part for part in _read(parts, split) if part.weight]
        opened = [part.open() for part in played]
        self.parts = {part.label: part for part in played}
        self.envs = {part.label: env for part, (env, _) in zip(played, opened, strict=True)}
        self._sizes = [size for _, size in opened]
        # The tasks of part i have the numbers from starts[i] up to starts[i + 1], the same on every rank.
        self._starts = [0, *accumulate(epoch(self._sizes, played))]
        self.instant = all(env.instant for env in self.envs.values())
        self._clones: dict[str, Environment] = {}
        self._label, self._turns = "", 0

    def __len__(self) -> int:
        return self._starts[-1]

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        if not 0 <= task < len(self):
            raise IndexError(f"task {task} of {len(self)}")
        part = bisect_right(self._starts, task) - 1
        self._label, self._turns = [*self.parts][part], 0
        if self._label not in self._clones:
            self._clones[self._label] = self.envs[self._label].clone()
        observation, info = self._clones[self._label].reset(seed, (task - self._starts[part]) % self._sizes[part])
        return observation, self._told(info)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if not self._label:
            raise RuntimeError("step before reset")
        observation, reward, terminated, truncated, info = self._clones[self._label].step(action)
        self._turns += 1
        cut_off = self._turns == self.parts[self._label].max_turns
        return observation, reward, terminated, bool(truncated) or (cut_off and not terminated), self._told(info)

    def clone(self) -> Mix:
        return copy_with(self, _clones={}, _label="")

    def close(self) -> None:
        with ExitStack() as stack:  # which closes all, even if one fails
            for env in self._clones.values():
                stack.callback(env.close)
            self._clones, self._label = {}, ""

    def evaluation_tasks(self, count: int, rng: Generator) -> list[int]:
        """Return the numbers of `count` tasks: each part's share by weight, drawn without repetition.

        Raises:
            UserError: a part has fewer tasks than its share.
        """
        drawn = []
        parts = list(self.parts.values())
        numbers = shares(count, [part.weight for part in parts])
        for part, share, size, start in zip(parts, numbers, self._sizes, self._starts, strict=False):
            if share > size:
                raise UserError(
                    f"eval.tasks={count}: the share of {AT}.{part.label} is {share} tasks, and it has {size}; "
                    "lower eval.tasks or its weight, or give it more"
                )
            drawn += [start + task for task in rng.permutation(size)[:share].tolist()]
        return drawn

    def _told(self, info: Info) -> Info:
        if not isinstance(info, dict):
            return info  # as every environment's, it is refused by the pool
        kind = info.get("task_type")
        return info | Info(part=self._label, task_type=f"{self._label}/{kind}" if kind else self._label)

    @staticmethod
    def described(options: Mapping[str, Any]) -> list[Part]:
        """Return the parts that the options of a mix describe. Constructs none.

        Raises:
            UserError: as `read_parts` and `check`, or a part is a mix.
        """
        return _read(options.get("parts", {}), {label: table for label, table in options.items() if label != "parts"})

    @staticmethod
    def usual_of(options: Mapping[str, Any]) -> Usual | None:
        """Return the mean of the parts' usual sizes, episodes weighed as the parts are; None if a part has none."""
        known = [(part, getattr(part.check(), "usual", None)) for part in Mix.described(options) if part.weight]
        sizes = [(part, usual) for part, usual in known if isinstance(usual, Usual)]
        if len(sizes) < len(known):
            return None
        turns = [float(part.weight) * min(usual.turns, part.max_turns or usual.turns) for part, usual in sizes]

        def of_a_turn(tokens: list[float]) -> float:
            return sum(taken * size for taken, size in zip(turns, tokens, strict=True)) / sum(turns)

        return Usual(
            turns=sum(turns) / float(sum(part.weight for part, _ in sizes)),
            prompt_tokens=of_a_turn([usual.prompt_tokens for _, usual in sizes]),
            response_tokens=of_a_turn([usual.response_tokens for _, usual in sizes]),
        )


def _read(parts: Mapping[str, Any], split: Mapping[str, Any]) -> list[Part]:
    found = read_parts(parts, split)
    for part in found:
        made = part.check()
        if inspect.isclass(made) and issubclass(made, Mix):
            raise UserError(f"{AT}.{part.label}: a mix cannot be a part of a mix; list its parts themselves")
    return found
