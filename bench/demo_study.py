"""Compare ATOD with variants of its turn weights, a fixed mixture, OPD and GRPO on the embedded demo.

    python bench/demo_study.py [--seeds 0 1 2] [--jobs 2]
    python bench/demo_study.py --seeds 0 --steps 2 --games 40 --out /tmp/study      # a trial of some minutes

Every run is one process with one thread and takes the command of the main experiment. The final models, the initial
student and the teacher then play the same 2,000 held-out games with the same seeds: at temperature 1, at 0.5 and
greedily.

Intervals are 95% percentiles of a bootstrap over seeds and games at once. A draw takes games with replacement, the
same ones for all models, so that differences are paired by game; and for each method as many of its seeds, with
replacement. With few seeds that part is coarse: with n seeds a draw shows (n - 1) / n of the variance between seeds.
The teacher and the initial student are one model each.

Writes demo_study.json, .md (whose first table is the README's) and .png. All results come from one commit: uncommitted
changes are refused without --dirty, and so is a work folder made at another commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from machine import ROOT, commit, environment, processor

RESULTS = ROOT / "bench" / "results"
MEASURED = "atod_fast", "kernels", "bench/demo_study.py"
GAMES, DURING = 2000, 400  # held-out games of the table, and of each evaluation during training
TEMPERATURES = {"T = 1": 1.0, "T = 0.5": 0.5, "greedy": 0.0}
DRAWS = 10_000
# Beyond the demo's settings. The learning rates are what a search (bench/results/demo_tuning.md) found best for each.
METHODS: dict[str, list[str]] = {
    "OPD": ["objective.preset=opd", "train.learning_rate=1e-3"],
    "GRPO": ["objective.preset=grpo", "train.learning_rate=5e-4"],
    "fixed": ["objective.preset=fixed"],
    "ATOD uniform": ["objective.preset=paper", "turns.fuse=uniform"],
    "ATOD mean1": ["objective.preset=paper", "turns.budget=mean1"],
    "ATOD": ["objective.preset=paper"],
}
COLOURS = dict(zip(METHODS, ("tab:orange", "tab:green", "tab:red", "tab:purple", "tab:cyan", "tab:blue"), strict=True))
SEEDS_SHOWN = "ATOD", "OPD", "GRPO"
UNTRAINED = {"start": "demo:student", "teacher": "demo:teacher"}
COMMON = ["eval.teacher=false", "checkpoint.every=0"]


def run_name(method: str, seed: int) -> str:
    return f"{method.lower().replace(' ', '-')}-{seed}"


def train(work: Path, method: str, seed: int, more: list[str]) -> float:
    """Train one method to its end unless that is done already; return the seconds. An interrupted run starts anew."""
    run = work / run_name(method, seed)
    done = run.with_suffix(".json")
    if not done.exists():
        shutil.rmtree(run, ignore_errors=True)
        settings = [*METHODS[method], f"train.seed={seed}", *COMMON, *more]
        start = time.time()
        words = [sys.executable, "-m", "atod_fast.train", *settings, "--run-dir", str(run)]
        subprocess.run(words, check=True, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
        done.write_text(json.dumps({"settings": settings, "seconds": round(time.time() - start)}) + "\n")
        print(done.stem, done.read_text(), end="", flush=True)
    return json.loads(done.read_text())["seconds"]


def play(work: Path, name: str, model: str, games: int) -> dict[str, np.ndarray]:
    """Return outcomes (0 or 1) [games] by temperature. One worker plays all three, which starts torch only once."""
    from atod_fast.evaluate import main as evaluate

    # Games of an odd seed are not in training. No setting was chosen on these.
    held_out = [f"env.eval={{generate={games}, seed=3}}", f"eval.tasks={games}"]
    out = {}
    for label, temperature in TEMPERATURES.items():
        path = work / "evaluations" / f"{name}-{temperature:g}.json"
        if not path.exists() or not path.stat().st_size:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                code = evaluate([model, *held_out, f"eval.temperature={temperature}", "--out", str(path)])
            if code:
                raise RuntimeError(f"the evaluation of {name} ended with exit code {code}")
        out[label] = np.array([int(c) for c in json.loads(path.read_text())["outcomes"]])
    print(name, {label: round(float(v.mean()), 4) for label, v in out.items()}, flush=True)
    return out


def bootstrap(outcomes: Mapping[str, np.ndarray], draws: int = DRAWS) -> dict[str, np.ndarray]:
    """Return each model's mean success in each draw: {name: [seeds, games]} to {name: [draws]}.

    A draw takes games with replacement, the same for all models, and for each model as many of its seeds, with
    replacement.
    """
    rng = np.random.default_rng(0)
    rows = np.concatenate(list(outcomes.values())).astype(float)  # [models and seeds, games]
    games = rows.shape[1]
    times = (rng.multinomial(games, np.full(games, 1 / games)) for _ in range(draws))  # how often each game is drawn
    means = np.stack([rows @ drawn for drawn in times]) / games
    out, first = {}, 0
    for name, each in outcomes.items():
        seeds = len(each)
        share = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
        out[name] = (means[:, first : first + seeds] * share).sum(1)
        first += seeds
    return out


def estimate(mean: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {key: round(float(value), 5) for key, value in (("mean", mean), ("low", low), ("high", high))}


def compare(outcomes: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Return each model's success from {name: [seeds, games]}, its difference to the teacher, and ATOD's to each."""
    drawn, means = bootstrap(outcomes), {name: float(each.mean()) for name, each in outcomes.items()}

    def minus(one: str, other: str) -> dict[str, float]:
        return estimate(means[one] - means[other], drawn[one] - drawn[other])

    return {
        "success": {n: estimate(means[n], drawn[n]) | {"seeds": each.mean(1).tolist()} for n, each in outcomes.items()},
        "minus_teacher": {name: minus(name, "teacher") for name in outcomes if name != "teacher"},
        "atod_minus": {name: minus("ATOD", name) for name in outcomes if name != "ATOD"},
    }


def share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def success_cell(found: dict[str, float]) -> str:
    return f"{share(found['mean'])} [{share(found['low'])}, {share(found['high'])}]"


def points_cell(found: dict[str, float]) -> str:
    mean, low, high = (100 * found[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def label(name: str) -> str:
    return {"start": "student before", "ATOD": "**ATOD**"}.get(name, name)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


def readme_table(result: dict) -> str:
    """Return the README's table."""
    comparisons = result["comparisons"]
    leads = {name: points_cell(found) for name, found in comparisons["T = 1"]["atod_minus"].items()}
    rows = []
    for name in (*UNTRAINED, *METHODS):
        settings = f", `{' '.join(METHODS[name])}`" if name in METHODS else ""
        cells = [success_cell(comparisons[t]["success"][name]) for t in TEMPERATURES]
        rows.append([label(name) + settings, *cells, leads.get(name, "")])
    return markdown(["", *TEMPERATURES, "ATOD minus it, T = 1, points"], rows)


def differences(result: dict, which: str) -> str:
    of = {t: result["comparisons"][t][which] for t in TEMPERATURES}
    rows = [[label(name), *(points_cell(of[t][name]) for t in TEMPERATURES)] for name in of["T = 1"]]
    return markdown(["", *TEMPERATURES], rows)


def each_seed(result: dict) -> str:
    of = {t: result["comparisons"][t]["success"] for t in TEMPERATURES}
    rows = []
    for name in METHODS:
        cells = [", ".join(share(value) for value in of[t][name]["seeds"]) for t in TEMPERATURES]
        rows.append([label(name), *cells, ", ".join(map(str, result["seconds"][name]))])
    return markdown(["", *TEMPERATURES, "seconds of training"], rows)


def report(result: dict) -> str:
    """Return the results as Markdown."""
    sizes, machine = result["parameters"], result["machine"]
    dirty = f", with changes in {', '.join(result['changed'])}" if result["changed"] else ""
    seeds = ", ".join(map(str, result["seeds"]))
    if sizes["teacher"] == sizes["student"]:
        size = f"the student's own size, {sizes['student']:,} parameters"
    else:
        size = f"{sizes['teacher']:,} parameters, the student {sizes['student']:,}"
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return f"""\
# ATOD, its variants, OPD and GRPO on the embedded default

`{result["command"]}` at commit {result["commit"]}{dirty}.
{machine["cpu"]}, {machine["cores"]} cores, one thread a run; {versions}.

The teacher has {size}. It was made weak on purpose, by little supervised training. Each run takes
{result["steps"]} steps. The learning rates of ATOD, OPD and GRPO were [chosen for each by itself](demo_tuning.md); the
other rows have ATOD's.

Success on {result["games"]:,} held-out games that no setting was chosen on, the same for all: mean over seeds {seeds},
and 95% interval of a bootstrap over seeds and games at once ({result["draws"]:,} draws); differences are paired by
game. With few seeds their part is coarse: of n seeds a draw shows (n - 1) / n of the variance between seeds, so that
the intervals are somewhat too narrow. Teacher and student before are one model each.

{readme_table(result)}

## Minus the teacher, points

{differences(result, "minus_teacher")}

## ATOD minus the others, points

{differences(result, "atod_minus")}

## Each seed

{each_seed(result)}
"""


def curve(run: Path) -> list[tuple[int, float]]:
    """Return (step, held-out success) of each evaluation of a run."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(p["step"], p["eval/success"]) for p in points if p.get("eval/success") is not None]


def draw(result: dict, path: Path) -> None:
    """Draw each method's mean curve, named at its end, and faint curves for the seeds of the three main methods."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.8), constrained_layout=True)
    teacher = result["comparisons"]["T = 1"]["success"]["teacher"]["mean"]
    axis.axhline(teacher, color="black", linestyle="--", linewidth=1)
    ends = [(teacher, "teacher", "black")]
    for method, color in COLOURS.items():
        curves = result["curves"][method]
        steps = [step for step, _ in curves[0]]
        mean = np.mean([[value for _, value in one] for one in curves], axis=0)
        if method in SEEDS_SHOWN:
            for one in curves:
                axis.plot(*zip(*one, strict=True), color=color, alpha=0.25, linewidth=1)
        axis.plot(steps, mean, color=color, linewidth=2.4)
        ends.append((mean[-1], method, color))
    height = -1.0
    for end, name, color in sorted(ends):
        height = max(end, height + 0.04)  # so that names do not overlap
        axis.annotate(name, (1.01, height), xycoords=("axes fraction", "data"), color=color, va="center")
    title = "{games_during_training:,} games during training; teacher on the {games:,} of the table".format(**result)
    axis.set_title(f"{title}; mean of {len(curves)} seeds", fontsize=10)
    axis.set(xlabel="step", ylabel="held-out success, T = 1", ylim=(0, 1), xlim=(0, steps[-1]))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def claim(work: Path, made: dict) -> None:
    """Record in the work folder what it is made of. Exit if it holds something else, or uncommitted changes."""
    note = work / "study.json"
    if work.exists() and (made["changed"] or not note.is_file() or json.loads(note.read_text()) != made):
        sys.exit(f"demo_study: --work {work} is of another commit, of changes or of other options; give a new folder")
    work.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--steps", type=int, help="of a run; default: the demo's")
    parser.add_argument("--games", type=int, default=GAMES, help="held-out games; the result's have 2000")
    parser.add_argument("--work", type=Path, help="run folders; what is done is kept; default: runs/study-COMMIT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--dirty", action="store_true", help="run although files differ from HEAD")
    arguments = parser.parse_args()
    head, changed = commit(*MEASURED)
    if changed and not arguments.dirty:
        sys.exit(f"demo_study: not as in HEAD: {', '.join(changed)}; commit, or give --dirty")
    trial = arguments.steps is not None or arguments.games != GAMES
    name = f"study-{head[:9]}" + "-trial" * trial + "-dirty" * bool(changed)
    work = (arguments.work or ROOT / "runs" / name).resolve()
    claim(work, {"commit": head, "changed": changed, "steps": arguments.steps, "games": arguments.games})

    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path[:0] = [
        str(ROOT),
        str(ROOT / "kernels"),
    ]  # import this commit's packages, not installed ones; workers inherit it
    seeds, during = arguments.seeds, min(DURING, arguments.games)
    more = [f"eval.tasks={during}"] + ([f"train.steps={arguments.steps}"] if arguments.steps else [])
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {m: [pool.submit(train, work, m, s, more) for s in seeds] for m in METHODS}
        seconds = {method: [run.result() for run in each] for method, each in runs.items()}
    models = {name: [(name, path)] for name, path in UNTRAINED.items()}
    models |= {m: [(run_name(m, s), str(work / run_name(m, s) / "hf")) for s in seeds] for m in METHODS}
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = {n: [pool.submit(play, work, *model, arguments.games) for model in each] for n, each in models.items()}
        outcomes = {name: [job.result() for job in each] for name, each in jobs.items()}

    from transformers import AutoModelForCausalLM

    from atod_fast.models import DEMO_WEIGHTS
    from atod_fast.observe.provenance import versions

    curves = {method: [curve(work / run_name(method, seed)) for seed in seeds] for method in METHODS}
    weights = {name: AutoModelForCausalLM.from_pretrained(DEMO_WEIGHTS / name) for name in ("student", "teacher")}
    by_temperature = {t: {n: np.stack([one[t] for one in each]) for n, each in outcomes.items()} for t in TEMPERATURES}
    result = {
        "command": shlex.join(["python", "bench/demo_study.py", *sys.argv[1:]]),
        "commit": head,
        "changed": changed,
        "machine": {"cpu": processor(), "cores": os.cpu_count()},
        "versions": versions(),
        "parameters": {name: model.num_parameters() for name, model in weights.items()},
        "games": arguments.games,
        "games_during_training": during,
        "steps": curves["ATOD"][0][-1][0],
        "seeds": seeds,
        "draws": DRAWS,
        "settings": {method: [*settings, *COMMON, *more] for method, settings in METHODS.items()},
        "seconds": seconds,
        "comparisons": {t: compare(outcomes) for t, outcomes in by_temperature.items()},
        "curves": curves,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "demo_study.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "demo_study.md").write_text(report(result))
    draw(result, arguments.out / "demo_study.png")
    print(readme_table(result))


if __name__ == "__main__":
    main()
