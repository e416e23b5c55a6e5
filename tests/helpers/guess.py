"""The environment of docs/environments.md, the agent loop that plays it, and what an adapter makes of hostile text."""

from __future__ import annotations

import re
import shlex

from atod_fast.config import Config
from atod_fast.envs.adapters import adapter
from atod_fast.envs.prompt import prompt_for
from atod_fast.envs.protocol import Environment
from atod_fast.envs.text import GAP
from atod_fast.rollout.agent import Episode, rollout
from atod_fast.rollout.engines.protocol import Completion, Request
from atod_fast.rollout.rendering import ChatRenderer
from helpers.chatml import make_tokenizer
from helpers.paths import ROOT

PAGE = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")
BLOCKS = {language: re.findall(f"```{language}\n(.*?)```", PAGE, re.DOTALL) for language in ("python", "sh", "toml")}
COMMANDS = [shlex.split(line) for block in BLOCKS["sh"] for line in block.replace("\\\n", " ").splitlines()]
TOKENIZER = make_tokenizer()


class Guesser:
    """An engine that plays Guess by bisection, using what the conversation in its prompt says."""

    max_model_len, concurrency = 4096, 4

    def begin(self, sampling) -> None:
        self.queue: list[Request] = []

    def add(self, request: Request) -> None:
        self.queue.append(request)

    def step(self) -> list[Completion]:
        played, self.queue = [self.answer(request) for request in self.queue], []
        return played

    def answer(self, request: Request) -> Completion:
        said = TOKENIZER.decode(request.prompt)
        low, high = 1, int(re.search(r"from 1 to (\d+)", said)[1])
        for guess, answer in re.findall(r"<action> (\d+) </action>.*?(Higher|Lower)", said, re.DOTALL):
            low, high = (int(guess) + 1, high) if answer == "Higher" else (low, int(guess) - 1)
        ids = [*TOKENIZER(f"<action> {(low + high) // 2} </action>")["input_ids"], TOKENIZER.eos_token_id]
        return Completion(request.key, ids, [-0.5] * len(ids), True)

    def release(self, key: int) -> None:
        pass

    def end(self) -> None:
        pass


def play(env: Environment, tasks: int = 12):
    config = Config.model_validate(
        {
            "rollout": {"prompt_tokens": 4000, "response_tokens": 24, "concurrency": 4},
            "env": {"max_turns": 8, "step_timeout": 20.0},
        }
    )
    prompt = prompt_for("one's own", env, thinking=False, history=2)
    renderer = ChatRenderer(TOKENIZER, prompt, context="full", thinking=False, prompt_tokens=4000)
    episodes = [Episode(task, task, 0, seed=task, env_seed=77) for task in range(tasks)]
    return rollout(Guesser(), env, renderer, episodes, config)


def won_by_halving(played) -> None:
    for number, trajectory in enumerate(played):
        assert (trajectory.task, trajectory.failure, trajectory.truncated, trajectory.success) == (
            number,
            None,
            False,
            True,
        )
        assert [turn.reward for turn in trajectory.turns] == [0.0] * (len(trajectory.turns) - 1) + [1.0]
        assert len(trajectory.turns) <= 6 and all(turn.valid for turn in trajectory.turns)
        assert trajectory.turns[0].observation == "I think of a number from 1 to 50. Which?"
        assert {turn.observation for turn in trajectory.turns[1:]} <= {"Higher.", "Lower."}
    assert len({trajectory.turns[-1].command for trajectory in played}) > 4, "the tasks differ"
    assert len({trajectory.task_id for trajectory in played}) == len(played)


def check_shown(observation: str, info: dict, chars: int = 4000) -> None:
    """Check what an adapter makes of `HOSTILE`."""
    text = observation + "".join(map(str, info.values()))
    assert not re.search("[\x1b\u202e]", text + info.get("task_type", ""))
    assert (
        observation.startswith("seen")
        and observation.endswith("z" * (chars // 2))
        and len(observation) == chars + len(GAP)
    )
    *listed, mark = info["admissible_actions"]
    assert mark in GAP and listed[0] == "act" and listed[1].startswith("yy") and GAP in listed[1]
    assert (
        len(listed) <= adapter.MOST_ACTIONS
        and max(map(len, listed)) <= 200 + len(GAP)
        and sum(map(len, listed)) <= chars
    )


HOSTILE_TEXT = "\x1b[31mse\u202een" + "z" * 100_000
HOSTILE_ACTIONS = ["\x1b[31mact", "y" * 300_000, *map(str, range(20_000))]
