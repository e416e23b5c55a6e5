"""Tiny environments, and the renderer that shows them to a tiny model, for tests of the agent loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from atod_fast.envs.prompt import PlainPrompt
from atod_fast.envs.protocol import Info
from atod_fast.records import Turn

VOCABULARY, STOP, CLOSE = 53, 1, 2


class Corridor:
    """Task t is over after 2 + t % 5 steps and won if the last command was longer than `goal` characters.

    Observations tell the task, the seed, the step and the command, so that a mix-up shows. `faults` maps a task to what
    its world does at the second step before answering.
    """

    def __init__(
        self,
        tasks: int = 20,
        *,
        instant: bool = True,
        faults: dict[int, Callable[[], object]] | None = None,
        goal: int = 3,
    ) -> None:
        self.instant, self.faults, self.goal, self.tasks = instant, faults or {}, goal, tasks
        self.family: list[Corridor] = []
        self.closed = False

    def __len__(self) -> int:
        return self.tasks

    def clone(self) -> Corridor:
        other = Corridor(self.tasks, instant=self.instant, faults=self.faults, goal=self.goal)
        self.family.append(other)
        return other

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        assert not self.closed
        self.task, self.seed, self.count = task, seed, 0
        return f"task {task} seed {seed} start", self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        assert not self.closed
        self.count += 1
        if self.count == 2 and self.task in self.faults:
            self.faults[self.task]()
        over = self.count == 2 + self.task % 5
        self.won = over and len(action) > self.goal
        return (
            f"task {self.task} step {self.count} said {action}",
            float(self.won),
            over,
            False,
            self._info(len(action) != 4),
        )

    def _info(self, valid: bool) -> Info:
        return {
            "won": self.count > 0 and self.won,
            "is_action_valid": valid,
            "task_id": f"corridor-{self.task}",
            "task_type": "walk",
            "admissible_actions": [],
        }

    def close(self) -> None:
        self.closed = True


class Slow(Corridor):
    """Steps take a few milliseconds, longer ones first, so that answers come out of order."""

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        time.sleep(0.002 * (self.task % 3))
        return super().step(action)


class Letters:
    """A `Renderer`: one token a character. A response is well formed if it was not cut off."""

    stop_ids = (STOP,)

    def __init__(self, context: str) -> None:
        self.context = context
        self.valid_columns = torch.ones(VOCABULARY, dtype=torch.bool)
        self.valid_columns[[0, CLOSE]] = False
        self.valid_columns[16:] = False  # so that the stop token is drawn often enough

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % (VOCABULARY - 3) for letter in text]

    def prompt(self, turns: Sequence[Turn], observation: str, info: Info) -> list[int]:
        if self.context == "window" or not turns:
            return self.encode("now " + observation)
        return [CLOSE] * (turns[-1].action[-1] != STOP) + self.encode(observation)

    def parse(self, ids: Sequence[int], stopped: bool, info: Info) -> tuple[str, str, bool]:
        text = "".join(chr(ord("a") + i % 26) for i in ids[: len(ids) - stopped])
        return text, text.upper(), stopped


class Rooms(Corridor):
    """`Corridor` as an environment of one's own, with a prompt. Task `long` begins with more text than fits."""

    def __init__(self, *, tasks: int = 20, long: int = -1) -> None:
        super().__init__(tasks)
        self.long = long

    def reset(self, seed: int, task: int) -> tuple[str, Info]:
        observation, info = super().reset(seed, task)
        return observation + " word" * (3000 if task == self.long else 0), info

    def clone(self) -> Rooms:
        return Rooms(tasks=self.tasks, long=self.long)

    def prompt(self, thinking: bool, history: int) -> PlainPrompt:
        return PlainPrompt(thinking, history, "Say something.")


class Halls(Rooms):
    """`Rooms` that are stepped in threads, with a prompt of few words that takes any response as a command."""

    def __init__(self, *, tasks: int = 20) -> None:
        super().__init__(tasks=tasks)
        self.instant = False

    def clone(self) -> Halls:
        return Halls(tasks=self.tasks)

    def prompt(self, thinking: bool, history: int) -> Bare:
        return Bare()


class Bare:
    """A `Prompt` that shows the observation alone; the command is the response in brackets."""

    def first(self, observation: str, admissible: Sequence[str]) -> str:
        return observation

    def following(self, observation: str, admissible: Sequence[str]) -> str:
        return f"next: {observation}"

    def message(
        self, task_observation: str, history: Sequence[Turn], observation: str, admissible: Sequence[str]
    ) -> str:
        return f"{len(history)}: {observation}"

    def project(self, text: str) -> tuple[str, bool]:
        return f"[{text}]", True
