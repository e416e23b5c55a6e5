"""Measure steps per second of the three environments on one core.

A random agent that knows only the forms of actions plays whole episodes. In ALFWorld and WebShop it draws admissible
commands, in ALFWorld preferring those that change something, and searches for a few words of the task; in Search-QA it
searches three times and answers. Only `reset` and `step` are timed, in CPU time of this process. Every episode is
reset twice and the second reset is timed, which leaves out that a game is read or made once. The first round is a
warm-up. No two rounds use the same words, so that no search is answered from a cache.

    python bench/env_steps.py [--episodes 30] [--rounds 5] [--shared FOLDER] [--alfworld-data FOLDER] [--textworld 2]

--shared holds WebShop's 1,000-product set and HotpotQA questions with their passages (default: ../shared/data beside
the project). --alfworld-data is an ALFWORLD_DATA folder. --textworld N plays N episodes of the first row, with the
same games and commands, in TextWorld's engine if it is installed (pip install alfworld==0.4.2). Missing data are left
out. Writes bench/results/env_steps.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from machine import processor, version

from atod_fast.envs import make
from atod_fast.envs.protocol import Environment, Info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "env_steps.md"
PACKAGES = ("numpy", "bm25s", "PyStemmer", "rapidfuzz", "textworld", "alfworld")
MOST = 30  # steps an episode, at most
ACTING = ("take", "put", "move", "open", "clean", "heat", "cool", "use")

Choose = Callable[[Environment, Info, int, Random], str]  # (environment, its last info, steps taken, random) -> action


def in_alfworld(env: Environment, info: Info, taken: int, random: Random) -> str:
    acting = [command for command in info["admissible_actions"] if command.split()[0] in ACTING]
    return random.choice(acting if acting and random.random() < 0.6 else info["admissible_actions"])


def in_webshop(env: Environment, info: Info, taken: int, random: Random) -> str:
    command = random.choice(info["admissible_actions"])
    return (
        f"search[{some_words(env.goal.instruction, random)}]"
        if command.startswith("search[") or command == "click[search]"
        else command
    )


def in_searchqa(env: Environment, info: Info, taken: int, random: Random) -> str:
    words = some_words(env.question.text, random)
    return f"<search>{words}</search>" if taken < 3 else f"<answer>{words}</answer>"


def some_words(text: str, random: Random) -> str:
    words = text.split()
    return " ".join(random.sample(words, random.randint(min(3, len(words)), min(8, len(words)))))


@dataclass(frozen=True)
class Case:
    title: str
    name: str
    options: dict
    choose: Choose
    episodes: int
    rounds: int


def measured(case: Case) -> str:
    """Return a line of the table."""
    env = make(case.name, **case.options)
    rates, resets, steps = [], [], 0
    for number in range(case.rounds + 1):
        stepping, resetting, taken = play(env, case, number)
        if number:
            rates.append(taken / stepping)
            resets.append(1e3 * resetting / case.episodes)
            steps += taken
    rate = median(rates)
    spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
    cells = [
        case.title,
        f"{len(env):,}",
        f"{steps:,}",
        f"**{rate:,.0f}**",
        spread,
        f"{1e3 / rate:.3f}",
        f"{median(resets):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def play(env: Environment, case: Case, number: int) -> tuple[float, float, int]:
    """Play round `number`; return its CPU seconds in steps, its CPU seconds in resets, and its number of steps."""
    stepping = resetting = 0.0
    steps = 0
    for episode in range(case.episodes):
        task, random = episode * len(env) // case.episodes, Random(f"{number} {episode}")
        env.reset(number, task)
        start = time.process_time()
        _, info = env.reset(number, task)
        resetting += time.process_time() - start
        for taken in range(MOST):
            command = case.choose(env, info, taken, random)
            start = time.process_time()
            _, _, terminated, truncated, info = env.step(command)
            stepping += time.process_time() - start
            steps += 1
            if terminated or truncated:
                break
    return stepping, resetting, steps


def cases(args: argparse.Namespace) -> list[Case]:
    shared, often = args.shared, (args.episodes, args.rounds)
    made = {"generate": args.episodes, "seed": 0}
    found = [Case("ALFWorld, made up, full scenes", "alfworld", made | {"scene": "full"}, in_alfworld, *often)]
    if args.textworld and version("textworld") and version("alfworld"):
        slow = {"generate": args.textworld, "seed": 0, "scene": "full", "engine": "textworld"}
        found.append(
            Case("ALFWorld, made up, full scenes, TextWorld's engine", "alfworld", slow, in_alfworld, args.textworld, 1)
        )
    found.append(Case("ALFWorld, made up, the demo's scenes", "alfworld", made, in_alfworld, *often))
    if args.alfworld_data:
        found.append(
            Case(
                "ALFWorld, official valid_seen",
                "alfworld",
                {"split": "valid_seen", "data": args.alfworld_data},
                in_alfworld,
                *often,
            )
        )
    found.append(
        Case(
            "WebShop, 1,000 made-up products, full pages",
            "webshop",
            {"generate": 1000, "scale": "full", "nouns": "heuristic"},
            in_webshop,
            *often,
        )
    )
    products, attributes = shared / "webshop_products_1000.jsonl.xz", shared / "webshop_items_ins_v2_1000.json"
    if products.exists() and attributes.exists():
        official = {"products": products, "attributes": attributes, "nouns": "heuristic"}
        found.append(Case("WebShop, its 1,000-product set", "webshop", official, in_webshop, *often))
    found.append(Case("Search-QA, made up", "searchqa", {"generate": 1000}, in_searchqa, *often))
    questions, corpus = shared / "searchqa_hotpot_questions.jsonl", shared / "searchqa_hotpot_corpus.jsonl"
    if questions.exists() and corpus.exists():
        found.append(
            Case(
                "Search-QA, HotpotQA, 1,000 passages",
                "searchqa",
                {"questions": questions, "retriever": corpus},
                in_searchqa,
                *often,
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=30, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--alfworld-data")
    parser.add_argument("--textworld", type=int, default=2, metavar="N")
    args = parser.parse_args()

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    versions = ", ".join(f"{package} {found}" for package in PACKAGES if (found := version(package)))
    lines = [
        "# Steps a second of the worlds, on one core",
        "",
        f"`python bench/env_steps.py`: random play, whole episodes of at most {MOST} steps; CPU time; the median, "
        f"least and greatest of {args.rounds} rounds "
        f"of {args.episodes} episodes (with TextWorld's engine one round of {args.textworld}). "
        f"How it is played and timed stands in the script.",
        "",
        f"{processor()}, {os.cpu_count()} cores, load {load} at the start. Python {platform.python_version()}, "
        f"{versions}.",
        "",
        "| world | tasks | steps timed | steps/s | of the rounds | ms a step | ms a reset |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases(args):
        lines.append(measured(case))
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
