"""Draws a run's curves into one PNG: success, schedule, turn signals, policy."""

from __future__ import annotations

import os
from pathlib import Path


def draw(lines: list[dict], path: Path) -> None:
    """Draw `lines`, the objects of metrics.jsonl, into the PNG file `path`."""
    # Matplotlib reads it on import. A notebook passes its own backend to commands it starts, where it may not exist.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure  # its canvas draws files and needs no display
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2)

    def series(axis, key: str, label: str, **style) -> None:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    success, schedule, signals, policy = axes.flat
    series(success, "train/success", "student, training tasks", alpha=0.35, linewidth=1)
    series(success, "eval/success", "student, held-out tasks", marker="o", markersize=4)
    series(success, "dev/success", "student, tasks to choose by", marker=".", linestyle=":")
    teacher = [line["eval/teacher_success"] for line in lines if line.get("eval/teacher_success") is not None]
    if teacher:
        success.axhline(teacher[0], color="black", linestyle="--", linewidth=1, label="teacher, held-out tasks")
    success.set(title="success", ylim=(0, 1))
    series(schedule, "schedule/kappa", "kappa (imitation)")
    series(schedule, "schedule/rho", "rho (reward)")
    schedule.set(title="schedule")
    series(signals, "turns/disagreement", "disagreement d")
    series(signals, "turns/uncertainty", "uncertainty h")
    series(signals, "turns/weight_mean", "weight w, mean")
    signals.set(title="turns")
    series(policy, "policy/entropy", "entropy (nats)")
    series(policy, "policy/clip_fraction", "clipped share")
    policy.set(title="policy")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
