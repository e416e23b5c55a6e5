"""Measure how often the scripted experts succeed, and in how many turns.

An expert plays a random sample of tasks through the loop of `atod_fast.collect`, with plain chat messages, so that
every command has gone through the prompt's own parser.

    python bench/experts.py [--tasks 300] [--shared FOLDER] [--alfworld-data FOLDER]

--alfworld-data is an ALFWORLD_DATA folder. --shared holds WebShop's 1,000-product set and HotpotQA questions with their
passages (default: ../shared/data beside the project). Missing data are left out. Writes bench/results/experts.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import processor, version

from atod_fast import collect

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "experts.md"
PACKAGES = ("numpy", "bm25s", "PyStemmer", "rapidfuzz")
PLAIN = ["student.path=", "rollout.history=2", "rollout.concurrency=1"]


def play(settings: Sequence[str], tasks: int | None, folder: Path) -> tuple[list[dict], float]:
    """Collect from the expert; return the first line of each episode, failed ones too, and seconds."""
    out = folder / "demos.jsonl"
    count = [] if tasks is None else [f"n={tasks}"]
    start = time.perf_counter()
    code = collect.main(["expert", "--preset", "own", *PLAIN, *settings, *count, "--out", str(out), "--all"])
    seconds = time.perf_counter() - start
    assert code == 0, f"exit code {code}"
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    out.unlink()
    return [line for line in lines if line["turn"] == 0], seconds


def row(name: str, played: Sequence[dict], tasks: int, seconds: float) -> str:
    won = [line for line in played if line["success"]]
    scores = [line["score"] for line in played if line["score"] is not None]
    score = f"{sum(scores) / tasks:.3f}" if scores else ""
    turns = f"{sum(line['turns'] for line in won) / max(len(won), 1):.1f}"
    longest = max((line["turns"] for line in won), default=0)
    return f"| {name} | {tasks} | {len(won) / tasks:.1%} | {score} | {turns} | {longest} | {tasks / seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--alfworld-data", type=Path)
    options = parser.parse_args()
    products = next(options.shared.glob("*products_1000.jsonl.xz"), None)
    attributes = next(options.shared.glob("*items_ins_v2_1000.json"), None)
    questions = next(options.shared.glob("*hotpot_questions.jsonl"), None)
    corpus = next(options.shared.glob("*hotpot_corpus.jsonl"), None)
    cases: list[tuple[str, list[str], int | None]] = []
    if options.alfworld_data:
        for split in ("train", "valid_seen"):
            games = f"env.train={{split = '{split}', data = '{options.alfworld_data}'}}"
            if list(options.alfworld_data.glob(f"json_*/{split}")):
                most = options.tasks if split == "train" else None
                cases.append((f"ALFWorld, official {split}", ["env.name=alfworld", "env.max_turns=50", games], most))
    for scene in ("small", "full"):
        games = f"env.train={{generate = {options.tasks}, scene = '{scene}'}}"
        cases.append((f"ALFWorld, generated, {scene} scenes", ["env.name=alfworld", "env.max_turns=50", games], None))
    shop = ["env.name=webshop", "env.max_turns=15"]
    if products and attributes:
        real = f"products = '{products}', attributes = '{attributes}', nouns = 'heuristic'"
        for split in ("train", "test"):
            goals = f"env.train={{{real}, split = '{split}'}}"
            cases.append((f"WebShop, 1,000 products, {split}", [*shop, goals], options.tasks))
    made = "env.train={generate = 300, nouns = 'heuristic'}"
    cases.append(("WebShop, generated", [*shop, made], options.tasks))
    search = ["env.name=searchqa", "env.max_turns=4"]
    if questions and corpus:
        asked = f"env.train={{questions = '{questions}', retriever = '{corpus}'}}"
        cases.append(("Search-QA, HotpotQA with 1,000 passages", [*search, asked], None))
    cases.append(("Search-QA, generated", [*search, f"env.train={{generate = {options.tasks}}}"], None))
    rows = []
    with TemporaryDirectory() as folder:
        for name, settings, tasks in cases:
            played, seconds = play(settings, tasks, Path(folder))
            rows.append(row(name, played, tasks or len(played), seconds))
            print(rows[-1], flush=True)
    head = "| tasks of | played | success | mean score | turns of a success | longest | episodes/s |"
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    text = [
        "# The scripted experts",
        "",
        "`python bench/experts.py`: random tasks, the turn limits of the paper's presets (50, 15, 4). Episodes whose",
        "environment or expert failed count as unsolved. Episodes/s includes loading, on one core.",
        "",
        head,
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"{processor()}; {packages}.",
    ]
    RESULTS.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
