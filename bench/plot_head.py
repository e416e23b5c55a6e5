"""Make the table, the clauses of the bar and the plots of bench/head.py from its CSV.

python bench/plot_head.py [bench/results/head.csv]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORWARD, BOTH = "forward", "forward+backward"
BEYOND_INPUTS, BEYOND_GRADIENTS = "peak MiB beyond inputs", "peak MiB beyond inputs and gradients"
TO_FLOOR, TO_PEER = "ratio to the floor", "ratio to the fastest chunked peer"
TIMES = ("cpu seconds", "milliseconds")
AXES = {"T": ("tokens", "tokens T"), "V": ("columns", "vocabulary V"), "H": ("student_hidden", "hidden size H")}
SHAPE = ("tokens", "columns", "student_hidden", "teacher_hidden")
MACHINE = ("device", "hardware", "dtype", "threads")

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def groups(rows: list[Row], *names: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Group the rows by the values of some columns, in order of first occurrence."""
    order: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        order.setdefault(tuple(row[n] for n in names), []).append(row)
    yield from order.items()


class Results:
    """The values of one shape and pass by provider and metric; the median by default, or another quantile."""

    def __init__(self, rows: list[Row]):
        self.roles = {r["provider"]: r["role"] for r in rows}
        self.values = {(r["provider"], r["metric"], r["quantile"]): float(r["value"]) for r in rows}
        self.time = next((r["metric"] for r in rows if r["metric"] in TIMES), None)

    def __call__(self, provider: str, metric: str | None, quantile: str = "50") -> float | None:
        return self.values.get((provider, metric, quantile), self.values.get((provider, metric, "")))

    @property
    def chunked_peer(self) -> str | None:
        """Return the fastest chunked peer, or None."""
        timed = [p for p, role in self.roles.items() if role == "chunked peer" and self(p, self.time) is not None]
        return min(timed, key=lambda p: self(p, self.time), default=None)

    def ours(self, op: str) -> list[str]:
        return [p for p in self.roles if p.startswith(op)]


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(results: Results, which: str) -> list[str]:
    memory = BEYOND_GRADIENTS if which == BOTH else BEYOND_INPUTS
    lines = [
        f"| {which} | {results.time or ''} (20%, 80%) | of the floor | of the fastest chunked peer | {memory} |",
        "|---|---|---|---|---|",
    ]
    for provider in results.roles:
        low, median, high = (number(results(provider, results.time, q), 3) for q in ("20", "50", "80"))
        name = f"{provider} (fastest chunked)" if provider == results.chunked_peer else provider
        ratios = " | ".join(number(results(provider, metric)) for metric in (TO_FLOOR, TO_PEER))
        lines.append(f"| {name} | {median} ({low}, {high}) | {ratios} | {number(results(provider, memory), 0)} |")
    return lines


def clauses(results: Results) -> list[str]:
    """Return a line per clause of the bar: whether it holds. Clauses that compare with a chunked peer are left out if
    none ran."""

    def clause(holds: bool, text: str) -> str:
        return f"- {'holds' if holds else 'MISSED'}: {text}"

    lines, peer = [], results.chunked_peer
    for name in results.ours("linear_token_loss fast"):
        to_floor, to_peer, memory = (results(name, metric) for metric in (TO_FLOOR, TO_PEER, BEYOND_GRADIENTS))
        lines.append(clause(to_floor <= 1.2, f"{name} within 1.2 of the floor: {to_floor:.2f}"))
        if peer is None:
            continue
        least, peer_memory = 0.65 * results(peer, TO_FLOOR), results(peer, BEYOND_GRADIENTS)
        if least < 1.2:
            lines.append(
                f"- not asked: {name} at most 0.65 of {peer}: {to_peer:.2f} (0.65 of it is {least:.2f} of the floor)"
            )
        else:
            lines.append(clause(to_peer <= 0.65, f"{name} at most 0.65 of {peer}: {to_peer:.2f}"))
        lines.append(
            clause(memory <= peer_memory, f"{name} no more memory than {peer}: {memory:.0f} of {peer_memory:.0f} MiB")
        )
    for name in [] if peer is None else results.ours("linear_divergence lean") + results.ours("linear_token_loss lean"):
        to_peer, of_memory = results(name, TO_PEER), results(name, BEYOND_GRADIENTS) / results(peer, BEYOND_GRADIENTS)
        products = number(results("products (4+2r)G", TO_PEER))
        text = (
            f"{name} at most 0.9 of the time of {peer} and 0.2 of its memory: "
            f"{to_peer:.2f}, {of_memory:.2f} (its products alone: {products})"
        )
        lines.append(clause(to_peer <= 0.9 and of_memory <= 0.2, text))
    return lines


def report(rows: list[Row]) -> str:
    """Return Markdown: a table per shape and pass, and the clauses of the bar."""
    lines = []
    for (study, *shape, device, hardware, dtype, threads), here in groups(rows, "study", *SHAPE, *MACHINE):
        if study not in ("bar", "shapes"):
            continue
        t, v, hs, ht = shape
        lines += [f"## T {t}, V {v}, H {hs}, teacher's H {ht}, {dtype}", ""]
        for (which,), of_pass in groups(here, "pass"):
            results = Results(of_pass)
            lines += [*table(results, which), ""] + ([*clauses(results), ""] if which == BOTH else [])
        r = here[0]
        where = f"{hardware}, {threads} thread{'s' if threads != '1' else ''}" if device == "cpu" else hardware
        packages = ", ".join(f"{k} {r[k]}" for k in ("python", "torch", "triton", "liger", "trl") if r[k])
        lines += [f"{where}; {packages}; load average {r['load_average']} at the start.", ""]
    return "\n".join(lines)


def style(provider: str, role: str) -> dict:
    """Return a curve's style: ours blue, floors black and dashed, a peer's variants in one colour."""
    colours = {
        "linear_token_loss": "tab:blue",
        "linear_divergence": "tab:cyan",
        "naive": "tab:gray",
        "TRL GKD": "tab:brown",
        "TRL Chunked": "tab:orange",
    }
    colour = next(
        (c for start, c in colours.items() if provider.startswith(start)),
        "tab:red" if "compiled" in provider else "tab:pink",
    )
    if role == "floor":
        return {"color": "black", "linestyle": "--" if "3+r" in provider else ":", "linewidth": 1}
    second = " lean" in provider or "chunk 256" in provider
    return {
        "color": colour,
        "linestyle": "--" if second else "-",
        "marker": "s" if provider.endswith(", torch") else "o",
        "markersize": 3.5,
        "linewidth": 2.2 if role == "ours" else 1.2,
    }


def pyplot() -> Any:
    """Import matplotlib, only when something is drawn: every process that measures memory imports this file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def sweep(rows: list[Row], axis: str, path: Path) -> None:
    """Plot time and memory against one dimension."""
    plt = pyplot()
    column, label = AXES[axis]
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    time = next(r["metric"] for r in rows if r["metric"] in TIMES)
    for panel, metric in zip(panels, (time, BEYOND_GRADIENTS), strict=True):
        for (provider, role), mine in groups([r for r in rows if r["metric"] == metric], "provider", "role"):
            if metric == BEYOND_GRADIENTS and role == "floor":
                continue
            points = {
                q: sorted((int(r[column]), float(r["value"])) for r in mine if r["quantile"] == q)
                for q in ("20", "50", "80", "")
            }
            middle = points["50"] or points[""]
            look = style(provider, role)
            panel.plot(*zip(*middle, strict=True), label=provider, **look)
            if points["20"]:
                xs = [x for x, _ in points["20"]]
                panel.fill_between(
                    xs,
                    [y for _, y in points["20"]],
                    [y for _, y in points["80"]],
                    color=look["color"],
                    alpha=0.12,
                    linewidth=0,
                )
        ticks = sorted({int(r[column]) for r in rows})
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel=metric)
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3, which="both", linewidth=0.5)
    fixed = {k: rows[0][k] for k in SHAPE if k != column and not (axis == "H" and k == "teacher_hidden")}
    names = {"tokens": "T", "columns": "V", "student_hidden": "H", "teacher_hidden": "teacher's H"}
    at = ", ".join(f"{names[k]} {v}" for k, v in fixed.items())
    figure.suptitle(
        f"reverse KL, {rows[0]['pass']}, {at}, {rows[0]['dtype']} ({rows[0]['hardware']}; band: 20% to 80%)",
        fontsize=10,
    )
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def lean_memory(rows: list[Row], path: Path) -> None:
    """Plot the lean schedule's memory against tokens, without inputs and weight gradient, next to the least possible:
    outputs and dX."""
    plt = pyplot()
    rows = [r for r in rows if r["metric"] == BEYOND_INPUTS and r["pass"] == BOTH]
    operators = sorted({r["provider"] for r in rows})
    figure, (panels,) = plt.subplots(
        1, len(operators), figsize=(5.5 * len(operators), 4.4), layout="constrained", sharey=True, squeeze=False
    )
    tokens = sorted({int(r["tokens"]) for r in rows})
    hidden, itemsize = int(rows[0]["student_hidden"]), 4 if rows[0]["dtype"] == "float32" else 2
    needed = 5 * 4 + hidden * itemsize  # bytes per token: five fp32 outputs and the gradient of its hidden state
    for panel, operator in zip(panels, operators, strict=True):
        for columns in sorted({int(r["columns"]) for r in rows}):
            weight = columns * hidden * itemsize / 2**20
            mine = [r for r in rows if r["provider"] == operator and int(r["columns"]) == columns]
            points = sorted((int(r["tokens"]), float(r["value"]) - weight) for r in mine)
            slope = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0]) * 2**20
            panel.plot(*zip(*points, strict=True), marker="o", label=f"V {columns}: {slope:.0f} bytes per token")
        panel.plot(
            tokens,
            [t * needed / 2**20 for t in tokens],
            "k--",
            linewidth=1,
            label=f"outputs and dX: {needed} bytes per token",
        )
        panel.set(title=operator, xlabel="tokens T", xticks=tokens, ylim=(0, None))
        panel.grid(alpha=0.3, linewidth=0.5)
        panel.legend(frameon=False)
    panels[0].set_ylabel("peak MiB beyond inputs and dW")
    figure.suptitle(
        f"reverse KL, forward and backward, H {hidden}, {rows[0]['dtype']} ({rows[0]['hardware']})", fontsize=10
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(path: Path) -> None:
    """Write the tables (.md) and plots (.png) of a CSV beside it."""
    rows = read(path)
    path.with_suffix(".md").write_text("# The divergence head: time and memory\n\n" + report(rows))
    for (study, device), here in groups(rows, "study", "device"):
        of_machine = list(groups(here, *MACHINE))[-1][1]
        name = path.with_name(f"{path.stem}_{study.replace(' ', '_')}{'' if device == 'cpu' else '_' + device}.png")
        if study.startswith("sweep "):
            sweep([r for r in of_machine if r["pass"] == BOTH], study.removeprefix("sweep "), name)
        elif study == "lean memory":
            lean_memory(of_machine, name)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "results" / "head.csv")
