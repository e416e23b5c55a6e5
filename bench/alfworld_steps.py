"""Steps a second of the ALFWorld engines on one core, on the same games with the same commands.

A step is `AlfWorld.step`: text, sorted admissible commands, goal check. Resets are timed apart; both exclude reading the
game file, which happens once a game. TextWorld is timed where it is installed (pip install alfworld==0.4.2).

    python bench/alfworld_steps.py [--data FOLDER] [--games 20] [--steps 50] [--textworld-games 3]

Games are generated full-sized scenes, or with --data the official valid_seen split. Writes
bench/results/alfworld_steps.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random

from atod_fast.envs import make
from atod_fast.envs.alfworld.env import AlfWorld

RESULTS = Path(__file__).parent / "results" / "alfworld_steps.json"


def scripts(env: AlfWorld, games: int, steps: int) -> dict[int, list[str]]:
    """For each game commands that change something more often than not; a won game ends."""
    plans = {}
    for task in range(games):
        random = Random(task)
        _, info = env.reset(0, task)
        plans[task] = []
        while len(plans[task]) < steps and not info["won"]:
            acting = [c for c in info["admissible_actions"] if c.split()[0] in ("take", "put", "move", "open", "clean", "heat", "cool", "use")]
            plans[task].append(random.choice(acting if acting and random.random() < 0.6 else info["admissible_actions"]))
            info = env.step(plans[task][-1])[4]
    return plans


def play(env: AlfWorld, plans: dict[int, list[str]]) -> dict[str, float]:
    """CPU seconds of this process, spent in resets and in steps."""
    resetting = stepping = 0.0
    for task, commands in plans.items():
        env.reset(0, task)  # reads the game
        start = time.process_time()
        env.reset(0, task)
        resetting += time.process_time() - start
        start = time.process_time()
        for command in commands:
            env.step(command)
        stepping += time.process_time() - start
    steps = sum(map(len, plans.values()))
    return {"games": len(plans), "steps": steps, "steps_per_second": steps / stepping, "milliseconds_per_reset": 1e3 * resetting / len(plans)}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="ALFWORLD_DATA folder: time official valid_seen games")
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--textworld-games", type=int, default=3)
    args = parser.parse_args()

    options = {"split": "valid_seen", "data": args.data} if args.data else {"generate": args.games, "scene": "full", "seed": 0}
    fast = make("alfworld", **options)
    plans = scripts(fast, min(args.games, len(fast)), args.steps)
    result = {
        "games": "official valid_seen" if args.data else "generated, full scenes",
        "fast": play(fast, plans),
        "textworld": None,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None},
        "versions": {"python": platform.python_version(), "textworld": installed("textworld"), "alfworld": installed("alfworld")},
    }
    print(f"fast       {result['fast']['steps_per_second']:10,.0f} steps/s  {result['fast']['milliseconds_per_reset']:8.2f} ms/reset")
    if result["versions"]["textworld"] and result["versions"]["alfworld"]:
        some = {task: plans[task] for task in list(plans)[: args.textworld_games]}
        result["textworld"] = play(make("alfworld", engine="textworld", **options), some)
        result["ratio"] = result["fast"]["steps_per_second"] / result["textworld"]["steps_per_second"]
        print(f"textworld  {result['textworld']['steps_per_second']:10,.0f} steps/s  {result['textworld']['milliseconds_per_reset']:8.2f} ms/reset")
        print(f"ratio      {result['ratio']:10,.0f}")
    else:
        print("TextWorld is not installed: no ratio (pip install alfworld==0.4.2)")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
