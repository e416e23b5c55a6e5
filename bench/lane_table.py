"""Put the results of `gpu_lane.py` into bench/results/gpu_lane.md, beside what was expected.

    python bench/lane_table.py bench/results/gpu_lane.json     # after a run on a GPU
    python bench/lane_table.py                                 # nothing has run: the expected numbers alone

Only the part of the page between its two marks is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpu_lane import PARTS
from lane import EXPECTED

PAGE = Path(__file__).resolve().parent / "results" / "gpu_lane.md"
BEGIN, END = "<!-- lane: written by bench/lane_table.py -->", "<!-- end of lane -->"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def expected() -> list[str]:
    """Return the page's lines while nothing has run."""
    lines = [
        "**Not run yet at this code.** Expected on one H100 80GB, stated before:",
        "",
        "| what | expected | unit | from |",
        "|---|---|---|---|",
    ]
    return lines + [f"| {name} | {number(e.value)} | {e.unit} | {e.why} |" for name, e in EXPECTED.items()]


def results(record: dict[str, Any]) -> list[str]:
    """Return the page's lines of a run. Raises SystemExit for a dry run, whose numbers mean nothing."""
    about = record["machine"]
    if about["dry"]:
        raise SystemExit("lane_table: this was a dry run; its numbers say nothing about a GPU")
    packages = ", ".join(f"{name} {found}" for name, found in about["packages"].items())
    lines = [
        f"{'; '.join(about['gpus'])}; {about['processor']}, {about['cores']} cores; Python {about['python']}, "
        f"{packages}; commit {about['commit'][:12]}; {about['started']}; {record['seconds']:.0f} s.",
        "",
        "| part | how it ended | s | checks passed |",
        "|---|---|---|---|",
    ]
    missing = [part.name for part in PARTS if part.name not in record["parts"]]
    for name, part in record["parts"].items():
        checks = part.get("checks", [])
        passed = f"{sum(check['passed'] for check in checks)} of {len(checks)}" if checks else ""
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {passed} |")
    lines += [f"| {name} | not asked for | | |" for name in missing]
    told = [text for part in record["parts"].values() for text in (*part.get("failures", []), *part.get("skipped", []))]
    lines += ["", *(f"- {text}" for text in told)] if told else []
    lines += ["", "| what | expected | measured | unit | expected from |", "|---|---|---|---|---|"]
    measures = [line for part in record["parts"].values() for line in part.get("measures", [])]
    for line in measures:
        cells = (line["name"], number(line["expected"]), number(line["value"]), line["unit"], line["why"])
        lines.append(f"| {' | '.join(cells)} |")
    seen = {line["name"] for line in measures}
    lines += [
        f"| {name} | {number(e.value)} | not measured | {e.unit} | {e.why} |"
        for name, e in EXPECTED.items()
        if name not in seen
    ]
    times = [line for part in record["parts"].values() for line in part.get("times", [])]
    for which in dict.fromkeys(line["pass"] for line in times):
        rows = [line for line in times if line["pass"] == which]
        floor = min((row["milliseconds"] for row in rows if row["role"] == "floor"), default=float("nan"))
        lines += ["", f"| {which} | ms | times the floor | MiB |", "|---|---|---|---|"]
        for row in rows:
            ms, mib = row["milliseconds"], row["peak_mib"]
            lines.append(f"| {row['contender']} | {ms:.1f} | {ms / floor:.2f} | {mib:.0f} |")
    return lines


def insert(page: str, lines: list[str]) -> str:
    """Return the page with `lines` between its marks."""
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return "\n".join([before + BEGIN, "", *lines, "", END]) + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="?", help="the JSON of gpu_lane.py; without it, what is expected")
    args = parser.parse_args()
    lines = results(json.loads(args.record.read_text())) if args.record else expected()
    PAGE.write_text(insert(PAGE.read_text(), lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
