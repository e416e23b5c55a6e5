"""Run the three embedded demos as their commands do; report success and duration.

    python bench/demo_worlds.py

It runs `torchrun --nproc_per_node 2 -m atod_fast.train --preset ...` once for each, one after the other, and writes
demo_worlds.json and .md. docs/quickstart.md has the rows of the second and the third. No setting was chosen on the
seed of the held-out tasks. Uncommitted changes are refused without --dirty.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import ROOT, commit, environment, processor, version

RESULTS = ROOT / "bench" / "results"
PRESETS = {"demo": 3, "demo-webshop": 13, "demo-searchqa": 13}  # preset: seed of the held-out tasks
MEASURED = "atod_fast", "kernels", "bench/demo_worlds.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "atod_fast.train"]


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train(preset: str, run: Path, more: list[str]) -> dict:
    start, before = time.time(), cpu_seconds()
    words = [*LAUNCH, "--preset", preset, *more, "--run-dir", str(run)]
    subprocess.run(words, check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    found = {"seconds": round(time.time() - start), "cpu_seconds": round(cpu_seconds() - before)}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/success" in line]
    teacher = {key: lines[0].get(f"eval/teacher_{key}") for key in ("success", "score")}
    return found | {
        "steps": lines[-1]["step"],
        "success": {line["step"]: line["eval/success"] for line in evaluations},
        "score": {line["step"]: line["eval/score"] for line in evaluations if "eval/score" in line},
        "teacher": teacher,
    }


def three(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def readme_table(runs: dict[str, dict]) -> str:
    """Return the table of docs/quickstart.md."""
    lines = ["| preset | steps | minutes | student before | after | teacher |", "|---|---|---|---|---|---|"]
    for preset, run in runs.items():
        before, *_, after = run["success"].values()
        found = three(before), f"**{three(after)}**", three(run["teacher"]["success"])
        lines.append(" | ".join([f"| `{preset}`", str(run["steps"]), f"{run['seconds'] / 60:.1f}", *found]) + " |")
    return "\n".join(lines)


def curves(runs: dict[str, dict]) -> str:
    """Return a table of success by step, with the environment's own score in brackets if it has one."""

    def cell(success: float | None, score: float | None) -> str:
        return "" if success is None else three(success) + ("" if score is None else f" ({three(score)})")

    lines = ["| step | " + " | ".join(f"`{preset}`" for preset in runs) + " |", "|---|" + "---|" * len(runs)]
    for step in sorted({step for run in runs.values() for step in run["success"]}):
        cells = [cell(run["success"].get(step), run["score"].get(step)) for run in runs.values()]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    teachers = (cell(run["teacher"]["success"], run["teacher"]["score"]) for run in runs.values())
    lines.append("| teacher | " + " | ".join(teachers) + " |")
    lines.append("| CPU seconds | " + " | ".join(str(run["cpu_seconds"]) for run in runs.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of a run; default: the preset's")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dirty", action="store_true", help="run although files differ from HEAD")
    arguments = parser.parse_args()
    head, changed = commit(*MEASURED)
    if changed and not arguments.dirty:
        sys.exit(f"demo_worlds: not as in HEAD: {', '.join(changed)}; commit, or give --dirty")
    more = [f"train.steps={arguments.steps}"] if arguments.steps else []
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        runs = {
            preset: train(preset, Path(folder) / preset, [f"env.eval.seed={seed}", *more])
            for preset, seed in PRESETS.items()
        }
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    machine = f"{processor()}, {os.cpu_count()} cores, load {load:.1f} at the start; {versions}"
    at = f"commit {head}" + (f", with changes in {', '.join(changed)}" if changed else "")
    note = f"""\
# The embedded demos

`python bench/demo_worlds.py` at {at}.
{machine}.

One run each of `torchrun --nproc_per_node 2 -m atod_fast.train --preset ...` with the preset's seed. \
Success at T = 1 on
400 held-out tasks that no setting was chosen on \
(`env.eval.seed`: {", ".join(map(str, PRESETS.values()))}); the standard error is at most .025.

{readme_table(runs)}

In brackets the world's own score, WebShop's score or Search-QA's F1:

{curves(runs)}
"""
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"commit": head, "changed": changed, "machine": machine, "runs": runs}
    (arguments.out / "demo_worlds.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "demo_worlds.md").write_text(note)
    print(readme_table(runs))


if __name__ == "__main__":
    main()
