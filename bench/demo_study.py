"""The embedded default, method against method: ATOD, OPD and GRPO, each tuned for itself, three seeds each.

    python bench/demo_study.py [--seeds 0 1 2] [--jobs 2] [--work runs/study]

Every run is the main job's command in one process with one thread. The final models and the teacher then play the same
2,000 held-out games, with the same seeds, at temperature 1, at 0.5 and greedily. Differences to the teacher are paired
game by game over all seeds (clustered by game); intervals are 95%. Writes bench/results/demo_study.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import numpy as np
from machine import processor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
GAMES = 2000
HELD_OUT = f"env.eval={{generate={GAMES}, seed=3}}"  # an odd seed shares no game with training; no setting was chosen on these
TEMPERATURES = {"T=1": 1.0, "T=0.5": 0.5, "greedy": 0.0}
# Beyond the demo's settings: what a search over learning rates (bench/results/demo_tuning.md) found best for each by itself.
METHODS: dict[str, list[str]] = {
    "ATOD": ["objective.preset=paper"],
    "OPD": ["objective.preset=opd", "train.learning_rate=1e-3"],
    "GRPO": ["objective.preset=grpo", "train.learning_rate=5e-4"],
}


def command(module: str, *arguments: str) -> float:
    """Run to the end; seconds taken."""
    start = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.time() - start


def train(work: Path, method: str, seed: int) -> Path:
    run = work / f"{method.lower()}-{seed}"
    if not (run / "hf" / "config.json").exists():
        seconds = command("atod_fast.train", *METHODS[method], f"train.seed={seed}", "eval.teacher=false", "checkpoint.every=0", "--run-dir", str(run))
        print(f"{run.name}: {seconds:.0f} s", flush=True)
    return run


def play(work: Path, name: str, model: str) -> dict[str, np.ndarray]:
    """Outcomes [GAMES] of 0 and 1 by temperature."""
    out = {}
    for label, temperature in TEMPERATURES.items():
        path = work / "evaluations" / f"{name}-{temperature:g}.json"
        if not path.exists():
            command("atod_fast.evaluate", model, HELD_OUT, f"eval.tasks={GAMES}", f"eval.temperature={temperature}", "--out", str(path))
        out[label] = np.array([int(c) for c in json.loads(path.read_text())["outcomes"]])
    print(name, {label: round(float(v.mean()), 4) for label, v in out.items()}, flush=True)
    return out


def paired(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean difference and its 95% interval over games, each game's outcome averaged over seeds first."""
    difference = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
    return float(difference.mean()), float(difference.mean() - half), float(difference.mean() + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="run folders; what is there already is not done again")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {(m, s): pool.submit(train, arguments.work, m, s) for s in arguments.seeds for m in METHODS}
        runs = {key: future.result() for key, future in runs.items()}
        jobs = {key: pool.submit(play, arguments.work, run.name, str(run / "hf")) for key, run in runs.items()}
        jobs |= {
            ("start", 0): pool.submit(play, arguments.work, "start", "demo:student"),
            ("teacher", 0): pool.submit(play, arguments.work, "teacher", "demo:teacher"),
        }
        outcomes = {key: future.result() for key, future in jobs.items()}
    report(arguments.seeds, runs, outcomes)


def report(seeds: list[int], runs: dict, outcomes: dict) -> None:
    import torch
    import transformers

    table: dict = {"machine": {"cpu": processor(), "cores": os.cpu_count()}}
    table["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    table |= {"games": GAMES, "seeds": seeds, "settings": METHODS, "success": {}, "minus_teacher": {}, "curves": {}}
    lines = ["| model | " + " | ".join(TEMPERATURES) + " |", "|---|" + "---|" * len(TEMPERATURES)]
    for name in ("teacher", "start"):
        table["success"][name] = {t: float(outcomes[name, 0][t].mean()) for t in TEMPERATURES}
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in table["success"][name].values()) + " |")
    for method in METHODS:
        cells = []
        table["success"][method], table["minus_teacher"][method] = {}, {}
        for t in TEMPERATURES:
            each = [outcomes[method, s][t] for s in seeds]
            mean, low, high = paired(each, [outcomes["teacher", 0][t]])
            table["success"][method][t] = [float(e.mean()) for e in each]
            table["minus_teacher"][method][t] = {"mean": mean, "low": low, "high": high}
            cells.append(f"{np.mean(each):.3f} ({', '.join(f'{e.mean():.3f}' for e in each)}); {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for color, method in zip(("C0", "C1", "C2"), METHODS, strict=True):
        curves = []
        for seed in seeds:
            points = [json.loads(line) for line in (runs[method, seed] / "metrics.jsonl").read_text().splitlines()]
            curves.append([(p["step"], p["eval/success"]) for p in points if p.get("eval/success") is not None])
            axis.plot(*zip(*curves[-1], strict=True), color=color, alpha=0.3, linewidth=1)
        table["curves"][method] = curves
        axis.plot([s for s, _ in curves[0]], np.mean([[v for _, v in c] for c in curves], axis=0), color=color, label=f"{method}, mean of {len(seeds)} seeds")
    axis.axhline(table["success"]["teacher"]["T=1"], color="black", linestyle="--", linewidth=1, label="teacher")
    axis.set(xlabel="step", ylabel="held-out success, T = 1", ylim=(0, 1), title="400 games during training; teacher on the 2,000 of the table")
    axis.grid(alpha=0.3)
    axis.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "demo_study.png", dpi=120)
    (RESULTS / "demo_study.json").write_text(json.dumps(table, indent=1) + "\n")
    note = f"Success on {GAMES} held-out games; per method the mean (each seed); difference to the teacher [95% interval, paired by game].\n\n"
    (RESULTS / "demo_study.md").write_text(note + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
