"""Train from Python, follow the run with a callback, and evaluate the model that comes out.

    python examples/train_from_python.py                                     the embedded demo, ten steps
    torchrun --nproc_per_node 2 examples/train_from_python.py train.steps=120 eval.tasks=400

The arguments are settings of the command line (`python -m atod_fast.train --help` lists them).
"""

import csv
import sys
from pathlib import Path

from atod_fast.api import Callback, evaluate, load_config, train

SHORT = ["train.steps=10", "eval.tasks=100", "eval.teacher=false"]


class Table(Callback):
    """Writes a few numbers of each step to a CSV file and remembers the best held-out success."""

    def __init__(self, path: Path, columns: list[str]):
        self.path, self.columns = path, columns
        self.best = (0.0, 0)  # (success, step)

    def on_step(self, metrics):
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            table = csv.writer(file)
            if new:
                table.writerow(["step", *self.columns])
            table.writerow([metrics["step"], *(metrics.get(column) for column in self.columns)])

    def on_evaluation(self, metrics, trajectories):
        if "eval/success" in metrics:  # the student's on env.eval, not the teacher's or that on env.dev
            self.best = max(self.best, (metrics["eval/success"], metrics["step"]))


def main(overrides: list[str], run_dir: Path | None = None, table: Path = Path("table.csv")) -> float:
    """Train, evaluate greedily, and return the greedy success."""
    config = load_config(overrides=[*SHORT, *overrides])
    rows = Table(table, ["train/success", "turns/weight_mean", "loss/total"])
    done = train(config, run_dir=run_dir, callbacks=[rows])
    print(
        f"success {done.before['eval/success']:.1%} before, {done.metrics['eval/success']:.1%} after; "
        f"model {done.model}"
    )

    greedy = config.model_copy(update={"eval": config.eval.model_copy(update={"temperature": 0.0})})
    found = evaluate(done.model, greedy)
    longest = max(found.trajectories, key=lambda trajectory: len(trajectory.turns))
    print(f"greedy: {found.summary['success']:.1%}; the longest episode: {[turn.command for turn in longest.turns]}")
    return found.summary["success"]


if __name__ == "__main__":
    main(sys.argv[1:])
